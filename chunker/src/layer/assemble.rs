//! Putting spans together to frames, and finding repeats.
//!
//! Sequential and in the order of the content: ids of frames, runs and what repeats what follow from the content alone.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use capsule_proto::FrameHash;
use capsule_proto::index::{BuildError, IndexBuilder, MAX_SPANS, Run, RunFrom, Span};

use super::slab::{Piece, Slab};
use super::work::FrameBytes;

/// Shortest span that is looked up among earlier ones: a shorter repeat would make readers decode a whole frame for little.
const REPEAT_LEN: usize = 16 << 10;
/// Most spans remembered: 2^21, about 100 MiB; 128 GiB of content. Later repeats of later spans are not found.
const MAX_REMEMBERED: usize = 1 << 21;

/// A frame that is ready for compression.
pub(super) struct ClosedFrame {
    pub id: u32,
    pub bytes: FrameBytes,
    pub spans: Vec<Span>,
}

/// Makes frames and runs of spans.
pub(super) struct Assembler {
    frame_max: usize,
    /// Where spans lie that were seen: frame and first byte in it.
    seen: HashMap<FrameHash, (u32, u32)>,
    open: Option<OpenFrame>,
    next_id: u32,
    /// First byte of the content behind what was assembled.
    position: u64,
    /// Frames to be compressed, in order.
    pub closed: VecDeque<ClosedFrame>,
    pub zero: u64,
    pub repeated: u64,
}

struct OpenFrame {
    bytes: FrameBytes,
    len: usize,
    spans: Vec<Span>,
}

impl Assembler {
    pub fn new(frame_max: usize) -> Self {
        Self {
            frame_max,
            seen: HashMap::new(),
            open: None,
            next_id: 0,
            position: 0,
            closed: VecDeque::new(),
            zero: 0,
            repeated: 0,
        }
    }

    /// Takes the next slab with the hashes of its spans; adds the runs to the index.
    pub fn push(
        &mut self,
        slab: &Arc<Slab>,
        hashes: &[FrameHash],
        index: &mut IndexBuilder,
    ) -> Result<(), BuildError> {
        let mut hashes = hashes.iter();
        for piece in &slab.pieces {
            let (len, from) = match *piece {
                Piece::Zero { len } => {
                    self.zero += len;
                    (len, RunFrom::Zero)
                }
                Piece::Span { at, len, strong } => {
                    let hash = *hashes.next().expect("one hash a span");
                    (len as u64, self.place(slab, at, len, strong, hash)?)
                }
            };
            index.push_run(Run {
                start: self.position,
                len,
                from,
            })?;
            self.position += len;
        }
        // A frame that goes on in the next slab must not hold this one: its buffer is needed to read on.
        if let Some(open) = &mut self.open {
            open.own(self.frame_max);
        }
        Ok(())
    }

    /// Closes the last frame.
    pub fn finish(&mut self) {
        self.close();
    }

    /// Says which bytes of which frame make a span.
    fn place(
        &mut self,
        slab: &Arc<Slab>,
        at: usize,
        len: usize,
        strong: bool,
        hash: FrameHash,
    ) -> Result<RunFrom, BuildError> {
        if let Some(&(id, offset)) = self.seen.get(&hash) {
            self.repeated += len as u64;
            return Ok(RunFrom::Frame { id, offset });
        }
        if self
            .open
            .as_ref()
            .is_some_and(|open| open.len + len > self.frame_max || open.spans.len() == MAX_SPANS)
        {
            self.close();
        }
        let id = self.next_id;
        let open = self.open.get_or_insert_with(|| OpenFrame::new(slab, at));
        let offset = open.len as u32;
        open.append(slab, at, len, hash, self.frame_max);
        let full = open.len == self.frame_max || (strong && open.len >= self.frame_max / 2);
        if len >= REPEAT_LEN && self.seen.len() < MAX_REMEMBERED {
            self.seen.insert(hash, (id, offset));
        }
        if full {
            self.close();
        }
        Ok(RunFrom::Frame { id, offset })
    }

    fn close(&mut self) {
        if let Some(OpenFrame { bytes, spans, .. }) = self.open.take() {
            self.closed.push_back(ClosedFrame {
                id: self.next_id,
                bytes,
                spans,
            });
            // Wraps only where the index refuses the frame.
            self.next_id = self.next_id.wrapping_add(1);
        }
    }
}

impl OpenFrame {
    fn new(slab: &Arc<Slab>, at: usize) -> Self {
        Self {
            bytes: FrameBytes::InSlab {
                slab: slab.clone(),
                range: at..at,
            },
            len: 0,
            spans: Vec::new(),
        }
    }

    fn append(
        &mut self,
        slab: &Arc<Slab>,
        at: usize,
        len: usize,
        hash: FrameHash,
        frame_max: usize,
    ) {
        let adjoins = matches!(&self.bytes, FrameBytes::InSlab { range, .. } if range.end == at);
        if !adjoins {
            self.own(frame_max);
        }
        match &mut self.bytes {
            FrameBytes::InSlab { range, .. } => range.end += len,
            FrameBytes::Owned(bytes) => bytes.extend_from_slice(slab.bytes(at, len)),
        }
        self.len += len;
        self.spans.push(Span {
            len: len as u32,
            hash,
        });
    }

    fn own(&mut self, frame_max: usize) {
        if let FrameBytes::InSlab { .. } = self.bytes {
            let mut bytes = Vec::with_capacity(frame_max);
            bytes.extend_from_slice(self.bytes.as_slice());
            self.bytes = FrameBytes::Owned(bytes);
        }
    }
}
