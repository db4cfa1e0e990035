//! A component as a layer of its own bytes: its pack is the component itself, in frames that are stored as they are.
//!
//! So what came as a blob of its own is read like anything else, and later versions can be put upon it.

use capsule_proto::index::{
    Codec, Frame, IndexBuilder, IndexHeader, MAX_FRAME_LEN, Run, RunFrom, Space,
};
use capsule_proto::{FrameHash, RootHash};

use super::encode::{EncodeError, EncodeOptions};
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
