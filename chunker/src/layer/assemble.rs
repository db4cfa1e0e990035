//! Putting spans together to frames, and finding repeats.
//!
//! Sequential and in the order of the content: ids of frames, runs and what repeats what follow from the content alone.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use capsule_proto::FrameHash;
use capsule_proto::index::{BuildError, IndexBuilder, MAX_SPANS, Run, RunFrom};

use super::slab::{Piece, Slab};
use super::work::{FrameBytes, HashedPiece};
use crate::delta::{Known, Outline};

/// Shortest span that is looked up among earlier ones: a shorter repeat would make readers decode a whole frame for little.
const REPEAT_LEN: usize = 16 << 10;
/// Most spans remembered: 2^21, about 100 MiB; 128 GiB of content. Later repeats of later spans are not found.
const MAX_REMEMBERED: usize = 1 << 21;

/// Spans that are shorter are listed together with their neighbours, up to [`JOINED_SPAN_LEN`]: an entry takes 18 bytes.
const SHORT_SPAN_LEN: u32 = 8 << 10;
const JOINED_SPAN_LEN: u32 = 32 << 10;
/// Longest frame of what old content resembles. A longer one would need more references than compress well at a time.
const ALIKE_FRAME_LEN: usize = 256 << 10;
/// A frame ends early where what old content resembles begins or ends, unless it is shorter.
const LEAST_FRAME_LEN: usize = 32 << 10;

/// A frame that is ready for compression.
pub(super) struct ClosedFrame {
    pub id: u32,
    pub bytes: FrameBytes,
    /// Lengths and, where they are known, hashes.
    pub spans: Vec<(u32, Option<FrameHash>)>,
    pub alike: bool,
}

/// Makes frames and runs of spans.
pub(super) struct Assembler<'a> {
    frame_max: usize,
    outline: &'a Outline,
    /// Where spans lie that were seen: frame and first byte in it.
    seen: HashMap<FrameHash, (u32, u32)>,
    open: Option<OpenFrame>,
    next_id: u32,
    /// First byte of the content behind what was assembled, and the segment of the outline that it lies in.
    position: u64,
    segment: usize,
    /// Frames to be compressed, in order.
    pub closed: VecDeque<ClosedFrame>,
    pub zero: u64,
    pub repeated: u64,
    pub inherited: u64,
    pub copied: u64,
}

struct OpenFrame {
    bytes: FrameBytes,
    len: usize,
    spans: Vec<(u32, Option<FrameHash>)>,
    alike: bool,
}

impl<'a> Assembler<'a> {
    pub fn new(frame_max: usize, outline: &'a Outline) -> Self {
        Self {
            frame_max,
            outline,
            seen: HashMap::new(),
            open: None,
            next_id: 0,
            position: 0,
            segment: 0,
            closed: VecDeque::new(),
            zero: 0,
            repeated: 0,
            inherited: 0,
            copied: 0,
        }
    }

    /// Takes the next slab with what its pieces are; adds the runs to the index.
    pub fn push(
        &mut self,
        slab: &Arc<Slab>,
        pieces: &[HashedPiece],
        index: &mut IndexBuilder,
    ) -> Result<(), BuildError> {
        for (piece, hash) in pieces {
            let from = match *piece {
                Piece::Zero { len } => {
                    self.zero += len;
                    Some(RunFrom::Zero)
                }
                Piece::Same { len } => {
                    self.inherited += len;
                    None
                }
                Piece::Copy {
                    len,
                    source,
                    offset,
                } => {
                    self.copied += len;
                    Some(RunFrom::Copy { source, offset })
                }
                Piece::Span { .. } => {
                    let hash = hash.expect("a span has a hash");
                    Some(self.place(slab, piece, hash))
                }
            };
            self.runs(piece.len(), from, index)?;
        }
        // A frame that goes on in the next slab must not hold this one: its buffer is needed to read on.
        if let Some(open) = &mut self.open {
            open.own(self.frame_max);
        }
        Ok(())
    }

    /// Closes the last frame, and adds what is known of the rest of the content.
    pub fn finish(&mut self, index: &mut IndexBuilder) -> Result<(), BuildError> {
        self.close();
        self.known(index)
    }

    /// Adds a piece's runs where the outline has room for it, and what is known before them.
    fn runs(
        &mut self,
        mut len: u64,
        mut from: Option<RunFrom>,
        index: &mut IndexBuilder,
    ) -> Result<(), BuildError> {
        while len > 0 {
            self.known(index)?;
            let segment = &self.outline.segments()[self.segment];
            let now = len.min(segment.end() - self.position);
            push_run(index, self.position, now, from)?;
            from = from.map(|from| skip(from, now));
            self.position += now;
            len -= now;
        }
        Ok(())
    }

    /// Adds the runs of what is known from the position on.
    fn known(&mut self, index: &mut IndexBuilder) -> Result<(), BuildError> {
        while let Some(segment) = self.outline.segments().get(self.segment) {
            let (len, from) = match segment.known {
                None if self.position < segment.end() => return Ok(()),
                None => (0, None),
                Some(Known::Inherited) => {
                    self.inherited += segment.len;
                    (segment.len, None)
                }
                Some(Known::Copy { source, offset }) => {
                    self.copied += segment.len;
                    (segment.len, Some(RunFrom::Copy { source, offset }))
                }
            };
            push_run(index, self.position, len, from)?;
            self.position += len;
            self.segment += 1;
        }
        Ok(())
    }

    /// Says which bytes of which frame make a span.
    fn place(&mut self, slab: &Arc<Slab>, piece: &Piece, hash: FrameHash) -> RunFrom {
        let Piece::Span {
            at,
            len,
            strong,
            alike,
        } = *piece
        else {
            unreachable!("only spans are placed")
        };
        if let Some(&(id, offset)) = self.seen.get(&hash) {
            self.repeated += len as u64;
            return RunFrom::Frame { id, offset };
        }
        let frame_max = if alike {
            self.frame_max.min(ALIKE_FRAME_LEN)
        } else {
            self.frame_max
        };
        if self.open.as_ref().is_some_and(|open| {
            open.len + len > frame_max
                || open.spans.len() == MAX_SPANS
                || (open.alike != alike && open.len >= LEAST_FRAME_LEN)
        }) {
            self.close();
        }
        let id = self.next_id;
        let open = self.open.get_or_insert_with(|| OpenFrame::new(slab, at));
        open.alike |= alike;
        let offset = open.len as u32;
        open.append(slab, at, len, hash, self.frame_max);
        let full = open.len >= frame_max || (strong && open.len >= frame_max / 2);
        if len >= REPEAT_LEN && self.seen.len() < MAX_REMEMBERED {
            self.seen.insert(hash, (id, offset));
        }
        if full {
            self.close();
        }
        RunFrom::Frame { id, offset }
    }

    fn close(&mut self) {
        if let Some(open) = self.open.take() {
            self.closed.push_back(ClosedFrame {
                id: self.next_id,
                bytes: open.bytes,
                spans: open.spans,
                alike: open.alike,
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
            alike: false,
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
        let len = len as u32;
        match self.spans.last_mut() {
            Some((last, known))
                if (*last < SHORT_SPAN_LEN || len < SHORT_SPAN_LEN)
                    && *last + len <= JOINED_SPAN_LEN =>
            {
                *last += len;
                *known = None;
            }
            _ => self.spans.push((len, Some(hash))),
        }
    }

    fn own(&mut self, frame_max: usize) {
        if let FrameBytes::InSlab { .. } = self.bytes {
            let mut bytes = Vec::with_capacity(frame_max);
            bytes.extend_from_slice(self.bytes.as_slice());
            self.bytes = FrameBytes::Owned(bytes);
        }
    }
}

/// Adds a run, unless the bytes are inherited.
fn push_run(
    index: &mut IndexBuilder,
    start: u64,
    len: u64,
    from: Option<RunFrom>,
) -> Result<(), BuildError> {
    match from {
        Some(from) if len > 0 => index.push_run(Run { start, len, from }),
        _ => Ok(()),
    }
}

/// Where a run's bytes are, but for its first ones.
const fn skip(from: RunFrom, len: u64) -> RunFrom {
    match from {
        RunFrom::Zero => RunFrom::Zero,
        RunFrom::Copy { source, offset } => RunFrom::Copy {
            source,
            offset: offset + len,
        },
        // A frame is at most 16 MiB long.
        RunFrom::Frame { id, offset } => RunFrom::Frame {
            id,
            offset: offset + len as u32,
        },
    }
}
