//! A component as a layer of its own bytes: its pack is the component itself, in frames that are stored as they are.
//!
//! So what came as a blob of its own is read like anything else, and later versions can be put upon it.

use capsule_proto::index::{
    Codec, Frame, IndexBuilder, IndexHeader, MAX_FRAME_LEN, Run, RunFrom, Space,
};
use capsule_proto::{FrameHash, RootHash};

use super::budget::Budget;
use super::encode::{EncodeError, EncodeOptions};
use super::error::LayerError;
use super::pages::PartFrom;
use super::read::LayerContent;
use crate::content::{Content, Progress};

/// Most frames, but of content beyond 16 TiB: 40 MiB of index.
const MAX_FRAMES: u64 = 1 << 20;

/// The index of a stream whose pack it is itself. Reads all of it; none if its hash is another.
pub fn stored_index(
    content: &dyn Content,
    root: RootHash,
    progress: &dyn Progress,
) -> Result<Option<Vec<u8>>, EncodeError> {
    let size = content.len();
    let least = u64::from(EncodeOptions::PAGED_FRAME_MAX);
    let frame_len = (size / MAX_FRAMES)
        .next_power_of_two()
        .clamp(least, MAX_FRAME_LEN);
    let mut builder = IndexBuilder::new();
    let mut bytes = Vec::new();
    let mut hasher = blake3::Hasher::new();
    for start in (0..size).step_by(frame_len as usize) {
        if progress.cancelled() {
            return Err(EncodeError::Cancelled);
        }
        let len = frame_len.min(size - start);
        bytes.resize(len as usize, 0);
        content.read_at(start, &mut bytes)?;
        hasher.update_rayon(&bytes);
        let id = builder.push_frame(Frame {
            pack_offset: start,
            pack_len: len as u32,
            len: len as u32,
            codec: Codec::Stored,
            hash: FrameHash::of(&bytes),
            depth: 0,
            references: Vec::new(),
            spans: Vec::new(),
        })?;
        let from = RunFrom::Frame { id, offset: 0 };
        builder.push_run(Run { start, len, from })?;
        progress.read(len);
    }
    let index = || {
        builder.finish(&IndexHeader {
            space: Space::Stream,
            parent: None,
            target: root,
            target_size: size,
            sources: Vec::new(),
        })
    };
    Ok((hasher.finalize().as_bytes() == root.as_bytes()).then(index))
}

impl LayerContent {
    /// Whether reading through this layer gives its pack as it lies, by the index alone. Whoever has verified the pack then knows the
    /// content; whether the frames' hashes are right is another question.
    pub fn is_its_pack(&self) -> Result<bool, LayerError> {
        let size = self.header().target_size;
        let mut parts = self.parts(0..size);
        // Each part may pay as a read of its own: the index's length bounds them all.
        while let Some(part) = parts.next(&mut Budget::new(0))? {
            let PartFrom::Mentioned(RunFrom::Frame { id, offset }) = part.from else {
                return Ok(false);
            };
            let frame = self.pages().frame(id, &mut Budget::new(0))?;
            let (at, end) = (u64::from(offset), u64::from(offset) + part.len());
            let lies_there = frame.codec == Codec::Stored
                && end <= frame.len.into()
                && frame.pack_offset.checked_add(at) == Some(part.range.start);
            if !lies_there {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
