//! What is read first of a layer lies at the front of its pack, in frames of its own.
//!
//! A frame holds what lies side by side in the content, while a machine that resumes reads a page here and a page there: over a thin link it would
//! fetch whole frames, and the chunk groups around them, for single pages. So these pages are put into further frames, one after the other. Frames that
//! are not longer than their pages alone would be, as those against old content, only move to the front. All else stays as it is.

use std::ops::Range;

use capsule_proto::index::{
    BuildError, Codec, Frame, Index, IndexBuilder, ReferenceTo, Run, RunFrom,
};
use capsule_proto::ranges::groups_touching;
use capsule_proto::{FrameHash, GROUP_LEN, GroupRanges};

use super::codec::{Compressor, Packed};
use super::encode::EncodeError;
use crate::content::Content;

/// Length of the frames into which pages are put: long, as all of them are fetched, but each is decoded for one page.
const FRAME_LEN: u64 = 128 << 10;
/// Most that is put into frames of its own: what they take in the pack is held.
const MAX_GATHERED: u64 = 64 << 20;
/// Pages alone take about this part of their length. A frame that takes less for what is read of it stays.
const ALONE: u64 = 4;
/// They are few, and many fetch them over thin links.
const LEVEL: i32 = 15;

/// A new order of a layer's frames, and which are added.
#[derive(Debug, PartialEq, Eq)]
pub struct Front {
    /// What of the content is put into each new frame; in the content's order.
    gathered: Vec<Vec<Range<u64>>>,
    /// Frames that stay, by the ids that they had, in the new order.
    kept: Vec<u32>,
    /// How many of these are read first.
    first: usize,
    /// Bytes of the chunk groups that what is read first touches as it is.
    scattered: u64,
}

/// A new frame.
#[derive(Debug)]
pub struct Gathered {
    frame: Frame,
    /// Its bytes in the pack.
    pub bytes: Vec<u8>,
}

impl Front {
    /// What is to be done so that these ranges of the content are in front; nothing where they are.
    pub fn of(index: &Index, reads: &[Range<u64>]) -> Option<Self> {
        let reads = Reads::new(reads);
        let mut read_of = vec![0; index.frames.len()];
        for (id, part) in reads.of_frames(index) {
            read_of[id as usize] += part.end - part.start;
        }
        let first = first(index, &read_of);
        let mut gathered = Vec::new();
        let mut len = 0;
        for (id, part) in reads.of_frames(index) {
            if !first[id as usize] {
                put(&mut gathered, &mut len, part);
            }
        }
        let used = used(index, &first, &gathered);
        let ids = (0..index.frames.len() as u32).filter(|id| used[*id as usize]);
        let (mut kept, rest): (Vec<u32>, Vec<u32>) = ids.partition(|id| first[*id as usize]);
        let count = kept.len();
        kept.extend(rest);
        if gathered.is_empty() && kept.is_sorted() {
            return None;
        }
        Some(Self {
            gathered,
            kept,
            first: count,
            scattered: scattered(index, &read_of, &first),
        })
    }

    /// How many frames are new.
    pub const fn frames(&self) -> usize {
        self.gathered.len()
    }

    /// Makes one of them of what the layer makes.
    pub fn gather(&self, content: &dyn Content, number: usize) -> Result<Gathered, EncodeError> {
        let parts = &self.gathered[number];
        let len: u64 = parts.iter().map(|part| part.end - part.start).sum();
        let mut bytes = vec![0; len as usize];
        let mut rest = bytes.as_mut_slice();
        for part in parts {
            let (now, later) = rest.split_at_mut((part.end - part.start) as usize);
            content.read_at(part.start, now)?;
            rest = later;
        }
        let hash = FrameHash::of(&bytes);
        let packed = Compressor::new(LEVEL).compress(&bytes);
        let packed = packed.map_err(|why| EncodeError::Compress {
            frame: number as u32,
            why,
        })?;
        let (codec, bytes) = match packed {
            Packed::Stored => (Codec::Stored, bytes),
            Packed::Zstd(packed) => (Codec::Zstd, packed),
            Packed::Lzma(packed) => (Codec::Lzma, packed),
        };
        let frame = Frame {
            pack_offset: 0,
            pack_len: bytes.len() as u32,
            len: len as u32,
            codec,
            hash,
            depth: 0,
            references: Vec::new(),
            spans: Vec::new(),
        };
        Ok(Gathered { frame, bytes })
    }

    /// Bytes of the chunk groups that what is read first touches: as it lay, and in front.
    pub fn fetched(&self, index: &Index, gathered: &[Gathered]) -> (u64, u64) {
        let moved = self.kept[..self.first].iter();
        let moved = moved.map(|id| u64::from(index.frames[*id as usize].pack_len));
        let together = moved.sum::<u64>() + len_of(gathered);
        (self.scattered, together.next_multiple_of(GROUP_LEN))
    }

    /// Length of the pack.
    pub fn pack_len(&self, index: &Index, gathered: &[Gathered]) -> u64 {
        let kept = self.places(index).map(|place| place.end - place.start);
        kept.sum::<u64>() + len_of(gathered)
    }

    /// Where the frames that stay lie in the pack as it was, in the new order: behind the new ones.
    pub fn places<'a>(&'a self, index: &'a Index) -> impl Iterator<Item = Range<u64>> + 'a {
        let frames = self.kept.iter().map(|id| &index.frames[*id as usize]);
        frames.map(place)
    }

    /// The new index.
    pub fn index(&self, index: &Index, gathered: &[Gathered]) -> Result<Vec<u8>, BuildError> {
        let mut builder = IndexBuilder::new();
        for new in gathered {
            builder.push_frame(Frame {
                pack_offset: builder.pack_len(),
                ..new.frame.clone()
            })?;
        }
        let mut ids = vec![0; index.frames.len()];
        for (id, was) in (gathered.len() as u32..).zip(&self.kept) {
            ids[*was as usize] = id;
        }
        for was in &self.kept {
            let frame = &index.frames[*was as usize];
            let mut references = frame.references.clone();
            for reference in &mut references {
                if let ReferenceTo::Frame(id) = &mut reference.to {
                    *id = ids[*id as usize];
                }
            }
            builder.push_frame(Frame {
                pack_offset: builder.pack_len(),
                references,
                ..frame.clone()
            })?;
        }
        for (run, new) in split(index, &self.gathered) {
            let from = match (new, run.from) {
                (Some((id, offset)), _) => RunFrom::Frame { id, offset },
                (None, RunFrom::Frame { id, offset }) => RunFrom::Frame {
                    id: ids[id as usize],
                    offset,
                },
                (None, from) => from,
            };
            builder.push_run(Run { from, ..run })?;
        }
        Ok(builder.finish(index.directory.header()))
    }
}

/// Ranges in order, none of which touches another.
struct Reads(Vec<Range<u64>>);

impl Reads {
    fn new(reads: &[Range<u64>]) -> Self {
        let mut reads: Vec<_> = reads.iter().filter(|read| !read.is_empty()).collect();
        reads.sort_unstable_by_key(|read| read.start);
        let mut joined: Vec<Range<u64>> = Vec::new();
        for read in reads {
            match joined.last_mut() {
                Some(last) if read.start <= last.end => last.end = last.end.max(read.end),
                _ => joined.push(read.clone()),
            }
        }
        Self(joined)
    }

    /// What of the content is read and comes of a frame, with the frame's id; in the content's order.
    fn of_frames<'a>(&'a self, index: &'a Index) -> impl Iterator<Item = (u32, Range<u64>)> + 'a {
        let mut next = 0;
        let parts = index.runs.iter().flat_map(move |run| {
            while self.0.get(next).is_some_and(|read| read.end <= run.start) {
                next += 1;
            }
            let reads = self.0[next..].iter();
            let reads = reads.take_while(|read| read.start < run.end());
            reads.map(move |read| (run, read.start.max(run.start)..read.end.min(run.end())))
        });
        parts.filter_map(|(run, part)| match run.from {
            RunFrom::Frame { id, .. } => Some((id, part)),
            _ => None,
        })
    }
}

/// Which frames move to the front as they are: those not worth taking apart, and those to which they refer. Of each so much is read.
fn first(index: &Index, read_of: &[u64]) -> Vec<bool> {
    let mut first = vec![false; index.frames.len()];
    let mut gathered = 0;
    for (id, frame) in index.frames.iter().enumerate() {
        let read = read_of[id];
        if read > 0 {
            first[id] = u64::from(frame.pack_len) * ALONE <= read || gathered + read > MAX_GATHERED;
            gathered += if first[id] { 0 } else { read };
        }
    }
    with_references(index, &mut first);
    first
}

/// Which frames stay: the rest is in the new ones.
fn used(index: &Index, first: &[bool], gathered: &[Vec<Range<u64>>]) -> Vec<bool> {
    let mut used = first.to_vec();
    for (run, new) in split(index, gathered) {
        if let (None, RunFrom::Frame { id, .. }) = (new, run.from) {
            used[id as usize] = true;
        }
    }
    with_references(index, &mut used);
    used
}

/// Frames refer to earlier ones, which come with them.
fn with_references(index: &Index, set: &mut [bool]) {
    for (id, frame) in index.frames.iter().enumerate().rev() {
        if !set[id] {
            continue;
        }
        for reference in &frame.references {
            if let ReferenceTo::Frame(earlier) = reference.to {
                set[earlier as usize] = true;
            }
        }
    }
}

/// Puts a part of the content into the last frame, and what it has no room for into further ones. `len` is that of the last.
fn put(gathered: &mut Vec<Vec<Range<u64>>>, len: &mut u64, part: Range<u64>) {
    let mut at = part.start;
    while at < part.end {
        if gathered.is_empty() || *len == FRAME_LEN {
            gathered.push(Vec::new());
            *len = 0;
        }
        let end = part.end.min(at + FRAME_LEN - *len);
        if let Some(last) = gathered.last_mut() {
            last.push(at..end);
        }
        *len += end - at;
        at = end;
    }
}

/// The runs, cut where new frames have their parts; with each such part its frame, and where it lies in that.
fn split<'a>(
    index: &'a Index,
    gathered: &'a [Vec<Range<u64>>],
) -> impl Iterator<Item = (Run, Option<(u32, u32)>)> + 'a {
    let new = (0..).zip(gathered).flat_map(|(id, parts)| {
        let mut at = 0;
        parts.iter().map(move |part| {
            let offset = at;
            at += (part.end - part.start) as u32;
            (part.clone(), (id, offset))
        })
    });
    let mut new = new.peekable();
    index.runs.iter().flat_map(move |run| {
        let mut pieces = Vec::new();
        let mut at = run.start;
        while let Some((part, place)) = new.next_if(|(part, _)| part.start < run.end()) {
            pieces.extend(piece(run, at..part.start).map(|run| (run, None)));
            pieces.extend(piece(run, part.clone()).map(|run| (run, Some(place))));
            at = part.end;
        }
        pieces.extend(piece(run, at..run.end()).map(|run| (run, None)));
        pieces
    })
}

/// A part of a run; none where it is empty.
fn piece(run: &Run, part: Range<u64>) -> Option<Run> {
    let skipped = part.start - run.start;
    let from = match run.from {
        RunFrom::Zero => RunFrom::Zero,
        RunFrom::Copy { source, offset } => RunFrom::Copy {
            source,
            offset: offset + skipped,
        },
        RunFrom::Frame { id, offset } => RunFrom::Frame {
            id,
            offset: offset + skipped as u32,
        },
    };
    (!part.is_empty()).then(|| Run {
        start: part.start,
        len: part.end - part.start,
        from,
    })
}

/// Bytes of the chunk groups that frames touch of which anything is read, or that are in front as others refer to them.
fn scattered(index: &Index, read_of: &[u64], first: &[bool]) -> u64 {
    let mut groups = GroupRanges::new();
    let mut needed: Vec<bool> = read_of.iter().map(|read| *read > 0).collect();
    needed
        .iter_mut()
        .zip(first)
        .for_each(|(needed, first)| *needed |= first);
    with_references(index, &mut needed);
    for (frame, needed) in index.frames.iter().zip(needed) {
        if needed {
            groups.insert(groups_touching(&place(frame)));
        }
    }
    groups.count() * GROUP_LEN
}

fn place(frame: &Frame) -> Range<u64> {
    frame.pack_offset..frame.pack_offset + u64::from(frame.pack_len)
}

fn len_of(gathered: &[Gathered]) -> u64 {
    gathered.iter().map(|new| new.bytes.len() as u64).sum()
}

#[cfg(test)]
mod tests {
    use capsule_proto::RootHash;
    use capsule_proto::index::{IndexHeader, Reference, Space};

    use super::*;
    use crate::content::BytesSource;

    /// Frames of so many bytes each, stored in these lengths, the content in their order; `references` are pairs of frames.
    fn index(len: u32, stored: &[u32], references: &[(u32, u32)]) -> Index {
        let mut builder = IndexBuilder::new();
        for (id, pack_len) in (0..).zip(stored) {
            let to = references.iter().filter(|(from, _)| *from == id);
            let references: Vec<_> = to
                .map(|(_, to)| Reference {
                    to: ReferenceTo::Frame(*to),
                    offset: 0,
                    len,
                })
                .collect();
            let frame = Frame {
                pack_offset: builder.pack_len(),
                pack_len: *pack_len,
                len,
                codec: match references.is_empty() {
                    true => Codec::Zstd,
                    false => Codec::ZstdReferences,
                },
                hash: FrameHash::of(&[id as u8]),
                depth: u8::from(!references.is_empty()),
                references,
                spans: Vec::new(),
            };
            builder.push_frame(frame).unwrap();
            let (start, len) = (u64::from(len) * u64::from(id), len.into());
            let from = RunFrom::Frame { id, offset: 0 };
            builder.push_run(Run { start, len, from }).unwrap();
        }
        let header = IndexHeader {
            space: Space::Stream,
            parent: None,
            target: RootHash::of(b"target"),
            target_size: u64::from(len) * stored.len() as u64,
            sources: Vec::new(),
        };
        Index::decode(&builder.finish(&header)).unwrap()
    }

    fn gather(front: &Front, content: &[u8]) -> Vec<Gathered> {
        let source = BytesSource(content);
        let frames = 0..front.frames();
        frames.map(|n| front.gather(&source, n).unwrap()).collect()
    }

    #[test]
    fn pages_are_put_together_and_short_frames_move_with_what_they_refer_to() {
        let before = index(10, &[8, 8, 8, 8, 1], &[(4, 1)]);
        // In frame 1, which comes in any case; all of 3; all of 4, which is short.
        let reads = [40..50, 26..27, 25..26, 12..13, 30..40, 7..7];
        let front = Front::of(&before, &reads).unwrap();
        assert_eq!(front.gathered, [[25..27, 30..40]]);
        let places: Vec<_> = front.places(&before).collect();
        assert_eq!(places, [8..16, 32..33, 0..8, 16..24], "without frame 3");
        let content: Vec<u8> = (0..50).collect();
        let gathered = gather(&front, &content);
        assert_eq!(
            gathered[0].bytes,
            content[25..27]
                .iter()
                .chain(&content[30..40])
                .copied()
                .collect::<Vec<_>>()
        );
        assert_eq!(front.pack_len(&before, &gathered), 12 + 25);
        let after = Index::decode(&front.index(&before, &gathered).unwrap()).unwrap();
        let lie = |run: &Run| match run.from {
            RunFrom::Frame { id, offset } => (run.start, id, offset),
            other => panic!("{other:?}"),
        };
        let runs: Vec<_> = after.runs.iter().map(lie).collect();
        let expected = [
            (0, 3, 0),
            (10, 1, 0),
            (20, 4, 0),
            (25, 0, 0),
            (27, 4, 7),
            (30, 0, 2),
            (40, 2, 0),
        ];
        assert_eq!(runs, expected);
        assert_eq!(after.frames[2].references[0].to, ReferenceTo::Frame(1));
        assert_eq!(after.frames[0].hash, gathered[0].frame.hash);
        assert_eq!(after.frames[2].hash, before.frames[4].hash);
        assert_eq!(after.directory.header(), before.directory.header());
    }

    #[test]
    fn what_is_long_fills_frames_that_are_bounded() {
        let len = FRAME_LEN as u32;
        let before = index(len, &[len, len, len], &[]);
        let (half, end) = (FRAME_LEN / 2, 3 * FRAME_LEN);
        let front = Front::of(&before, &[half..end]).unwrap();
        let expected: [&[Range<u64>]; 3] = [
            &[half..FRAME_LEN, FRAME_LEN..FRAME_LEN + half],
            &[
                FRAME_LEN + half..2 * FRAME_LEN,
                2 * FRAME_LEN..2 * FRAME_LEN + half,
            ],
            &[2 * FRAME_LEN + half..end],
        ];
        assert_eq!(front.gathered, expected);
        assert_eq!(front.kept, [0]);
        let gathered = gather(&front, &vec![7; end as usize]);
        let after = Index::decode(&front.index(&before, &gathered).unwrap()).unwrap();
        assert_eq!(after.frames.len(), 4);
        assert!(after.frames[0].pack_len < 100);
    }

    #[test]
    fn what_is_fetched_of_it_is_counted_in_chunk_groups() {
        const LEN: u32 = 5000;
        let before = index(LEN, &[LEN; 100], &[]);
        let content: Vec<u8> = (0..100 * LEN)
            .map(|at| (at.wrapping_mul(at) >> 7) as u8)
            .collect();
        let at = |frame: u64| u64::from(LEN) * frame..u64::from(LEN) * frame + 1;
        // Bytes 50,000 to 55,000 lie in group 3; 100,000 to 105,000 in 6; 115,000 to 120,000 in 7.
        let front = Front::of(&before, &[at(10), at(20), at(23)]).unwrap();
        let gathered = gather(&front, &content);
        assert_eq!(
            front.fetched(&before, &gathered),
            (3 * GROUP_LEN, GROUP_LEN)
        );
        assert_eq!(front.pack_len(&before, &gathered), 100 * u64::from(LEN) + 3);
    }

    #[test]
    fn what_is_in_front_stays() {
        let before = index(10, &[1, 1, 9, 9], &[]);
        let of = |reads: &[Range<u64>]| Front::of(&before, reads);
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[0..5, 10..20]), None, "the first two are short");
        assert_eq!(of(&[40..50]), None, "beyond the end");
        assert!(of(&[10..20]).is_some());
        assert!(of(&[20..21]).is_some());
        // Ranges that lie within each other.
        assert_eq!(of(&[0..20, 5..6, 13..14]), None);
    }
}
