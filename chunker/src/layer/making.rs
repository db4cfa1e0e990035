//! What a job of restoring makes: pieces of content, all of them planned and paid for as one read.

use std::ops::Range;
use std::sync::Arc;

use capsule_proto::index::RunFrom;

use super::budget::{Budget, Spent};
use super::error::LayerError;
use super::follow::{FramePlace, Piece, Place, follow};
use super::pages::{Part, PartFrom};
use super::plan::Plan;
use super::read::LayerContent;
use super::restore::RestoreError;

/// Zeros in what comes from sources are handed on as such from this length on.
pub(super) const LEAST_ZEROS: u64 = 16 << 10;
/// Part of a component that is zeros.
pub(super) const ZERO: PartFrom = PartFrom::Mentioned(RunFrom::Zero);

/// A piece of restored content.
pub(super) struct Made {
    pub offset: u64,
    pub bytes: Bytes,
}

pub(super) enum Bytes {
    Zeros(u64),
    /// All that a buffer holds.
    Own(Vec<u8>),
    /// Bytes of a decoded frame, not copied.
    Frame(Arc<Vec<u8>>, Range<usize>),
}

impl Bytes {
    pub fn len(&self) -> u64 {
        match self {
            Self::Zeros(len) => *len,
            Self::Own(bytes) => bytes.len() as u64,
            Self::Frame(_, range) => range.len() as u64,
        }
    }
}

/// Decodes a job's parts, as one read.
pub(super) fn make(
    content: &LayerContent,
    parts: &[Part],
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Vec<Made>, RestoreError> {
    let decoded = parts.iter().filter(|part| part.from != ZERO);
    let mut budget = Budget::until(decoded.map(Part::len).sum(), cancelled);
    let mut making = Making {
        content,
        made: Vec::with_capacity(parts.len()),
        plan: Plan::new(content),
        wanted: Vec::new(),
    };
    let noted = parts
        .iter()
        .try_for_each(|part| making.note(part, &mut budget));
    noted
        .and_then(|()| making.run(&mut budget))
        .map_err(|error| match (error, parts) {
            (LayerError::Spent(Spent::Cancelled), _) | (_, []) => RestoreError::Cancelled,
            (source, [first, .., last] | [first @ last]) => RestoreError::Layer {
                range: first.range.start..last.range.end,
                source,
            },
        })
}

/// A job's pieces, of which some wait for frames.
struct Making<'a> {
    content: &'a LayerContent,
    made: Vec<Made>,
    plan: Plan<'a>,
    wanted: Vec<Wanted>,
}

/// What a piece wants of a frame.
struct Wanted {
    /// Which piece.
    made: usize,
    /// Where in it.
    at: usize,
    len: usize,
    /// Where in the frame.
    offset: usize,
}

impl<'a> Making<'a> {
    fn note(&mut self, part: &Part, budget: &mut Budget<'_>) -> Result<(), LayerError> {
        let Range { start, end } = part.range;
        match part.from {
            PartFrom::Mentioned(RunFrom::Zero) => self.push(start, Bytes::Zeros(part.len())),
            PartFrom::Mentioned(RunFrom::Frame { id, offset }) => {
                self.push(start, Bytes::Own(Vec::new()));
                let place = FramePlace {
                    layer: self.content,
                    id,
                    offset,
                    start,
                };
                self.want(place, 0, part.len(), budget)?;
            }
            PartFrom::Mentioned(RunFrom::Copy { .. }) | PartFrom::Inherited => {
                return self.note_of_source(start..end, budget);
            }
        }
        Ok(())
    }

    /// What comes from sources, where what these know to be zeros, and is long enough, is a piece of its own.
    fn note_of_source(
        &mut self,
        range: Range<u64>,
        budget: &mut Budget<'_>,
    ) -> Result<(), LayerError> {
        let mut at = range.start;
        // Whether the last piece is one that can be added to.
        let mut open = false;
        while at < range.end {
            let Piece { len, place } = follow(self.content, at..range.end, budget)?;
            if matches!(place, Place::Zeros) && len >= LEAST_ZEROS {
                self.push(at, Bytes::Zeros(len));
                open = false;
            } else {
                if !open {
                    self.push(at, Bytes::Own(Vec::new()));
                    open = true;
                }
                self.add(place, len, budget)?;
            }
            at += len;
        }
        Ok(())
    }

    /// Adds bytes to the last piece.
    fn add(
        &mut self,
        place: Place<'a>,
        len: u64,
        budget: &mut Budget<'_>,
    ) -> Result<(), LayerError> {
        let Some(Made {
            bytes: Bytes::Own(bytes),
            ..
        }) = self.made.last_mut()
        else {
            unreachable!("it was just pushed");
        };
        let at = bytes.len();
        bytes.resize(at + len as usize, 0);
        match place {
            Place::Frame(place) => self.want(place, at, len, budget),
            other => other.read(&mut bytes[at..]),
        }
    }

    fn push(&mut self, offset: u64, bytes: Bytes) {
        self.made.push(Made { offset, bytes });
    }

    /// The last piece wants part of a frame.
    fn want(
        &mut self,
        place: FramePlace<'a>,
        at: usize,
        len: u64,
        budget: &mut Budget<'_>,
    ) -> Result<(), LayerError> {
        self.plan.want(self.wanted.len(), place, len, budget)?;
        self.wanted.push(Wanted {
            made: self.made.len() - 1,
            at,
            len: len as usize,
            offset: place.offset as usize,
        });
        Ok(())
    }

    fn run(self, budget: &mut Budget<'_>) -> Result<Vec<Made>, LayerError> {
        let (mut made, wanted) = (self.made, self.wanted);
        self.plan.run(budget, |position, frame| {
            let wanted = &wanted[position];
            let range = wanted.offset..wanted.offset + wanted.len;
            let bytes = &mut made[wanted.made].bytes;
            match bytes {
                Bytes::Own(own) if !own.is_empty() => {
                    own[wanted.at..wanted.at + wanted.len].copy_from_slice(&frame[range]);
                }
                // A small piece must not keep a large frame in memory.
                _ if range.len() < frame.len() / 4 => *bytes = Bytes::Own(frame[range].to_vec()),
                _ => *bytes = Bytes::Frame(frame.clone(), range),
            }
        })?;
        Ok(made)
    }
}
