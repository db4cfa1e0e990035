//! The first stage of encoding: reading a source in slabs, and cutting each into spans and zero runs.
//!
//! A slab covers a stretch of the content without gaps. It holds only the bytes of data extents, so that a hole costs
//! neither memory nor time; and it ends between spans, so that every span lies in one piece in one slab.
//! Hashing and compressing slabs is the business of `work`.

use std::iter::{self, Peekable};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use super::cut::{self, Cutter, ZERO_RUN_LEN};
use super::encode::EncodeError;
use crate::content::{Extents, Parts, Progress, Source};

/// Bytes of data in a slab: many times the longest span, so that little is carried over; small beside the memory allowed.
pub(crate) const SLAB_LEN: usize = 8 << 20;
/// Bytes read at once: how often a source is asked, and how soon a cancelled reading ends.
const READ_LEN: u64 = 1 << 20;
/// Most regions in a slab, however scattered the extents are.
const MAX_REGIONS: usize = 1 << 14;
/// Parts of at least this length begin and end spans of their own; smaller ones are taken together up to it. A span
/// costs 18 bytes of index: 0.2 % of this length.
const SMALL_PART_LEN: u64 = 8 << 10;

/// A stretch of content, read and cut.
pub(crate) struct Slab {
    /// The bytes of the data regions, one after another.
    bytes: Vec<u8>,
    /// What of the content the slab covers.
    pub range: Range<u64>,
    /// What it consists of as read: data and holes, in order.
    pub regions: Vec<Region>,
    /// What it consists of as cut: spans and zeros, in order.
    pub pieces: Vec<Piece>,
    /// The parts of the source (a tree's files) that touch the range; an empty part belongs where it lies.
    pub parts: Vec<Part>,
    /// Where the bytes go to be used again.
    home: SyncSender<Vec<u8>>,
}

/// A run of data or of known zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    /// First byte in the content.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where in the slab the bytes lie; none for zeros.
    pub at: Option<usize>,
}

/// What a piece of the content is. The reader knows spans and zeros; of an update, `update` tells the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Zeros: holes, and long runs of zeros in data.
    Zero { len: u64 },
    /// The parent's, at the same offset.
    Same { len: u64 },
    /// A source's, at another.
    Copy { len: u64, source: u16, offset: u64 },
    /// Data at a place in the slab.
    Span {
        at: usize,
        len: usize,
        /// Whether a frame that is long enough should end behind it.
        strong: bool,
        /// Whether old content resembles it.
        alike: bool,
    },
}

impl Piece {
    /// Length in bytes.
    pub const fn len(&self) -> u64 {
        match *self {
            Self::Zero { len } | Self::Same { len } | Self::Copy { len, .. } => len,
            Self::Span { len, .. } => len as u64,
        }
    }
}

/// A part of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Position among the parts.
    pub index: usize,
    /// Where in the content it lies.
    pub range: Range<u64>,
}

impl Slab {
    /// Bytes that lie at a place in the slab.
    pub fn bytes(&self, at: usize, len: usize) -> &[u8] {
        &self.bytes[at..at + len]
    }

    /// The content of a range where the slab has it in one piece.
    pub fn whole(&self, range: &Range<u64>) -> Option<&[u8]> {
        let i = self
            .regions
            .partition_point(|region| region.start + region.len <= range.start);
        let region = self.regions.get(i)?;
        let fits = region.start <= range.start && range.end <= region.start + region.len;
        let at = region.at.filter(|_| fits)? + (range.start - region.start) as usize;
        Some(self.bytes(at, (range.end - range.start) as usize))
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // There is room for every buffer; it fails when nobody needs them any more.
        let _ = self.home.try_send(std::mem::take(&mut self.bytes));
    }
}

/// Reads a source slab by slab.
pub(crate) struct SlabReader<'a> {
    source: &'a dyn Source,
    progress: &'a dyn Progress,
    stop: &'a AtomicBool,
    cutter: Cutter,
    /// A part of this length begins a frame, where there is a choice.
    long_part: u64,
    extents: Extents<'a>,
    /// What is left of the extent that is being read.
    extent: Option<(Range<u64>, bool)>,
    parts: Option<Peekable<Parts<'a>>>,
    /// Parts that begin before the point of reading and do not end before the next slab.
    open_parts: Vec<Part>,
    next_part: Part,
    /// First byte that was not read.
    position: u64,
    /// Whether the last slab reached the end.
    ended: bool,
    /// Bytes read that belong to the next slab.
    carry: Vec<u8>,
    /// Time spent in reading the source, and in cutting.
    pub times: (Duration, Duration),
}

impl<'a> SlabReader<'a> {
    pub fn new(
        source: &'a dyn Source,
        cutter: Cutter,
        frame_max: usize,
        progress: &'a dyn Progress,
        stop: &'a AtomicBool,
    ) -> Self {
        Self {
            source,
            progress,
            stop,
            cutter,
            long_part: frame_max as u64 / 4,
            extents: source.extents(),
            extent: None,
            parts: source.parts().map(Iterator::peekable),
            open_parts: Vec::new(),
            next_part: Part {
                index: 0,
                range: 0..0,
            },
            position: 0,
            ended: false,
            carry: Vec::new(),
            times: Default::default(),
        }
    }

    /// Reads the next slab into a buffer of [`SLAB_LEN`] bytes; none at the end of the source.
    pub fn next(
        &mut self,
        mut bytes: Vec<u8>,
        home: &SyncSender<Vec<u8>>,
    ) -> Result<Option<Slab>, EncodeError> {
        let started = Instant::now();
        let start = self.position - self.carry.len() as u64;
        let (mut regions, ended) = self.fill(&mut bytes)?;
        self.times.0 += started.elapsed();
        if regions.is_empty() && (self.ended || self.parts.is_none()) {
            self.check_parts()?;
            return Ok(None);
        }
        self.ended = ended;
        let started = Instant::now();
        self.open_parts_to(self.position);
        let (pieces, end) = self.cut(&bytes, &regions, ended);
        self.carry_over(&bytes, &mut regions, end);
        let parts = self.parts_before(end, ended);
        self.times.1 += started.elapsed();
        Ok(Some(Slab {
            bytes,
            range: start..end,
            regions,
            pieces,
            parts,
            home: home.clone(),
        }))
    }

    /// Fills the buffer; says what lies in it, and whether that is the last of the source.
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(Vec<Region>, bool), EncodeError> {
        let mut filled = self.carry.len();
        bytes[..filled].copy_from_slice(&self.carry);
        let mut regions = Vec::new();
        if filled > 0 {
            regions.push(Region {
                start: self.position - filled as u64,
                len: filled as u64,
                at: Some(0),
            });
            self.carry.clear();
        }
        while filled < bytes.len() && regions.len() < MAX_REGIONS {
            if self.progress.cancelled() || self.stop.load(Ordering::Relaxed) {
                return Err(EncodeError::Cancelled);
            }
            let Some((range, zero)) = self.next_extent()? else {
                return Ok((regions, true));
            };
            let room = if zero {
                u64::MAX
            } else {
                READ_LEN.min((bytes.len() - filled) as u64)
            };
            let len = room.min(range.end - range.start);
            let at = (!zero).then_some(filled);
            if !zero {
                self.source
                    .read_at(range.start, &mut bytes[filled..filled + len as usize])?;
                filled += len as usize;
            }
            match regions.last_mut() {
                Some(last) if last.at.is_some() == at.is_some() => last.len += len,
                _ => regions.push(Region {
                    start: range.start,
                    len,
                    at,
                }),
            }
            self.progress.read(len);
            self.position = range.start + len;
            self.extent = (self.position < range.end).then_some((self.position..range.end, zero));
        }
        Ok((regions, self.position == self.source.len()))
    }

    fn next_extent(&mut self) -> Result<Option<(Range<u64>, bool)>, EncodeError> {
        if let Some(extent) = self.extent.take() {
            return Ok(Some(extent));
        }
        let next = self
            .extents
            .next()
            .transpose()?
            .map(|extent| (extent.range, extent.zero));
        let fits = match &next {
            Some((range, _)) => {
                range.start == self.position
                    && range.start < range.end
                    && range.end <= self.source.len()
            }
            None => self.position == self.source.len(),
        };
        if fits {
            Ok(next)
        } else {
            Err(EncodeError::Extents {
                offset: self.position,
            })
        }
    }

    /// Takes the parts that begin at or before a byte, so that each cut there knows what lies on both sides.
    fn open_parts_to(&mut self, position: u64) {
        let Some(parts) = &mut self.parts else { return };
        while self.next_part.range.start <= position
            && let Some(len) = parts.next()
        {
            let start = self.next_part.range.start;
            self.open_parts.push(Part {
                index: self.next_part.index,
                range: start..start + len,
            });
            self.next_part = Part {
                index: self.next_part.index + 1,
                range: start + len..start + len,
            };
        }
    }

    fn check_parts(&mut self) -> Result<(), EncodeError> {
        let Some(parts) = &mut self.parts else {
            return Ok(());
        };
        if parts.peek().is_none() && self.next_part.range.start == self.source.len() {
            return Ok(());
        }
        Err(EncodeError::Parts {
            len: self.source.len(),
        })
    }

    /// Cuts what was read; the end says how far, as the last span may go on in the next slab.
    fn cut(&self, bytes: &[u8], regions: &[Region], ended: bool) -> (Vec<Piece>, u64) {
        let mut pieces = Vec::new();
        let mut ends = self.part_ends().peekable();
        let mut end = 0;
        for (i, region) in regions.iter().enumerate() {
            end = region.start + region.len;
            let Some(at) = region.at else {
                pieces.push(Piece::Zero { len: region.len });
                continue;
            };
            let data = &bytes[at..at + region.len as usize];
            let goes_on = i + 1 == regions.len() && !ended;
            let mut done = 0;
            for zeros in cut::zero_runs(data, region.start)
                .into_iter()
                .chain(iter::once(data.len()..data.len()))
            {
                // The last span may go on beyond what was read, and so may zeros at the end of it.
                let open = goes_on && zeros.is_empty();
                while done < zeros.start {
                    let left = &data[done..zeros.start];
                    if open && left.len() < self.cutter.max() + ZERO_RUN_LEN {
                        return (pieces, region.start + done as u64);
                    }
                    let (len, strong) = self.next_cut(left, region.start + done as u64, &mut ends);
                    pieces.push(Piece::Span {
                        at: at + done,
                        len,
                        strong,
                        alike: false,
                    });
                    done += len;
                }
                if !zeros.is_empty() {
                    pieces.push(Piece::Zero {
                        len: zeros.len() as u64,
                    });
                    done = zeros.end;
                }
            }
        }
        (pieces, end)
    }

    /// Where open parts end, and how long they and those after them are.
    fn part_ends(&self) -> impl Iterator<Item = (u64, u64, u64)> {
        let len = |part: &Part| part.range.end - part.range.start;
        let next = self.open_parts.iter().skip(1).map(len).chain([0]);
        self.open_parts
            .iter()
            .zip(next)
            .filter(|(part, _)| !part.range.is_empty())
            .map(move |(part, next)| (part.range.end, len(part), next))
    }

    fn next_cut(
        &self,
        data: &[u8],
        at: u64,
        ends: &mut Peekable<impl Iterator<Item = (u64, u64, u64)>>,
    ) -> (usize, bool) {
        while ends.next_if(|(end, ..)| *end <= at).is_some() {}
        while let Some(&(end, len, next)) = ends.peek() {
            if end > at + self.cutter.max().min(data.len()) as u64 {
                break;
            }
            if len >= SMALL_PART_LEN || next >= SMALL_PART_LEN || end - at >= SMALL_PART_LEN {
                let cut = self.cutter.cut(&data[..(end - at) as usize], at);
                return (
                    cut.len,
                    if at + cut.len as u64 == end {
                        next >= self.long_part
                    } else {
                        cut.strong
                    },
                );
            }
            ends.next();
        }
        let cut = self.cutter.cut(data, at);
        (cut.len, cut.strong)
    }

    /// Leaves to the next slab what lies beyond the end of this one.
    fn carry_over(&mut self, bytes: &[u8], regions: &mut Vec<Region>, end: u64) {
        let Some(last) = regions.last_mut() else {
            return;
        };
        let kept = end - last.start;
        if let Some(at) = last.at {
            self.carry
                .extend_from_slice(&bytes[at + kept as usize..at + last.len as usize]);
        }
        last.len = kept;
        if kept == 0 {
            regions.pop();
        }
    }

    /// The parts that touch what comes before the end; those that go on are kept for the next slab too.
    fn parts_before(&mut self, end: u64, ended: bool) -> Vec<Part> {
        let last = ended && end == self.source.len();
        let touching = |part: &&Part| part.range.start < end || last;
        let parts = self
            .open_parts
            .iter()
            .take_while(touching)
            .cloned()
            .collect();
        self.open_parts
            .retain(|part| part.range.end > end || (!last && part.range.start >= end));
        parts
    }
}
