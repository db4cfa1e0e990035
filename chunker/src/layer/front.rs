//! What is read first of a layer lies at the front of its pack, in frames of its own.
//!
//! A frame holds what lies side by side in the content, while a machine that resumes reads a page here and a page there: over a thin link it would
//! fetch whole frames, and the chunk groups around them, for single pages. So these pages are put into further frames, one after the other; then come
//! frames that are read nearly whole, or are not longer than their pages alone would be, as those against old content; then what is left of the frames
//! from which pages were taken, as what is read next mostly lies there; then all others.

mod pieces;
#[cfg(test)]
mod tests;

use std::ops::Range;

use capsule_proto::index::{BuildError, Codec, Frame, Index, IndexBuilder, ReferenceTo, RunFrom};
use capsule_proto::ranges::groups_touching;
use capsule_proto::{FrameHash, GROUP_LEN, GroupRanges};
use rayon::prelude::*;

use self::pieces::{Moves, Piece, divided, in_content, read_of, referred, with_references};
use super::codec::Compressor;
use super::encode::{EncodeError, Hashed};
use super::reread::proved;
use crate::content::{Content, Progress};

/// Most that is taken out of frames, and most that is left of these: what both take in the pack is held.
const MAX_TAKEN: u64 = 64 << 20;
/// Longest frame of which what is left is compressed anew; a longer one stays as it is beside what was taken from it.
const MAX_APART: u32 = 1 << 20;
/// Pages alone take about this part of their length. A frame that takes less for what is read of it stays whole,
const ALONE: u64 = 4;
/// as does one of which all but this part is read.
const NEARLY: u64 = 8;
/// So many parts are made of each run and each piece; where more would be, as a frame that is taken apart is in the content many times, nothing is done.
const MAX_PARTS: usize = 4;
/// zstd's level for what is read first, which many fetch over thin links, and for what is left.
const LEVEL: i32 = 15;
const LEVEL_OF_REST: i32 = 6;

/// A new order of a layer's frames, and which are added.
#[derive(Debug, PartialEq, Eq)]
pub struct Front {
    /// What each new frame takes.
    new: Vec<Vec<Piece>>,
    /// How many of the new frames are read first.
    pages: usize,
    /// Frames that stay, by the ids that they had, in the new order.
    kept: Vec<u32>,
    /// How many of these are read first.
    first: usize,
    moves: Moves,
    /// Bytes of the chunk groups that what is read first touches as it is.
    scattered: u64,
}

/// A new frame.
#[derive(Debug)]
pub struct NewFrame {
    frame: Frame,
    /// Its bytes in the pack.
    pub bytes: Vec<u8>,
}

/// What comes next in the pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// A new frame, by its number.
    New(usize),
    /// A frame that stays, by the id that it had.
    Kept(u32),
}

impl Front {
    /// What is to be done so that these ranges of the content are in front, in frames of at most `frame_len` bytes; nothing where they are.
    pub fn of(index: &Index, reads: &[Range<u64>], frame_len: u32) -> Option<Self> {
        let read = read_of(index, reads);
        let whole = whole(index, &read);
        let is_divided = |id: u32| !read[id as usize].is_empty() && !whole[id as usize];
        let referred = referred(index);
        let (mut pages, mut rest) = (Frames::new(frame_len), Vec::new());
        let mut left_len = 0;
        for of_frame in in_content(index, is_divided) {
            let Some(id) = of_frame.first().map(|piece| piece.frame as usize) else {
                continue;
            };
            let (taken, left) = divided(&of_frame, &read[id]);
            taken.into_iter().for_each(|piece| pages.push(piece));
            let frame = &index.frames[id];
            let is_alone = frame.references.is_empty() && !referred[id];
            let is_apart =
                is_alone && frame.len <= MAX_APART && left_len + u64::from(frame.len) <= MAX_TAKEN;
            if is_apart && !left.is_empty() {
                left_len += u64::from(frame.len);
                rest.push(left);
            }
        }
        let mut new = pages.frames;
        let count = new.len();
        new.extend(rest);
        let moves = Moves::of(index.frames.len(), &new);
        let pieces: usize = new.iter().map(Vec::len).sum();
        if moves.parts(&index.runs) > MAX_PARTS * (index.runs.len() + pieces) {
            return None;
        }
        let used = used(index, &whole, &moves);
        let ids = (0..index.frames.len() as u32).filter(|id| used[*id as usize]);
        let (mut kept, others): (Vec<u32>, Vec<u32>) = ids.partition(|id| whole[*id as usize]);
        let first = kept.len();
        kept.extend(others);
        if new.is_empty() && kept.is_sorted() {
            return None;
        }
        Some(Self {
            new,
            pages: count,
            kept,
            first,
            moves,
            scattered: scattered(index, &read, &whole),
        })
    }

    /// Bytes of the chunk groups that what is read first touches as it is.
    pub const fn scattered(&self) -> u64 {
        self.scattered
    }

    /// Makes the new frames of what the layer makes, which must have the hashes that it has; on all cores, or on one.
    pub fn make(
        &self,
        content: &dyn Content,
        hashed: &Hashed<'_>,
        on_all_cores: bool,
        progress: &dyn Progress,
    ) -> Result<Vec<NewFrame>, EncodeError> {
        let one = |number| match progress.cancelled() {
            true => Err(EncodeError::Cancelled),
            false => self.make_one(content, hashed, number),
        };
        let numbers = 0..self.new.len();
        match on_all_cores {
            true => numbers.into_par_iter().map(one).collect(),
            false => numbers.map(one).collect(),
        }
    }

    fn make_one(
        &self,
        content: &dyn Content,
        hashed: &Hashed<'_>,
        number: usize,
    ) -> Result<NewFrame, EncodeError> {
        let mut bytes = Vec::new();
        for piece in &self.new[number] {
            proved(content, hashed, piece.content(), &mut bytes)?;
        }
        let len = bytes.len() as u32;
        let level = match number < self.pages {
            true => LEVEL,
            false => LEVEL_OF_REST,
        };
        let hash = FrameHash::of(&bytes);
        let packed = Compressor::new(level).compress(&bytes);
        let packed = packed.map_err(|why| EncodeError::Compress {
            frame: number as u32,
            why,
        })?;
        let (codec, bytes) = match packed.into_parts() {
            (Codec::Stored, _) => (Codec::Stored, bytes),
            packed => packed,
        };
        let frame = Frame {
            pack_offset: 0,
            pack_len: bytes.len() as u32,
            len,
            codec,
            hash,
            depth: 0,
            references: Vec::new(),
            spans: Vec::new(),
        };
        Ok(NewFrame { frame, bytes })
    }

    /// Bytes of the chunk groups that what is read first touches when it is in front.
    pub fn together(&self, index: &Index, new: &[NewFrame]) -> u64 {
        let pages = new[..self.pages].iter().map(|new| new.bytes.len() as u64);
        let whole = self.kept[..self.first].iter();
        let whole = whole.map(|id| u64::from(index.frames[*id as usize].pack_len));
        pages.chain(whole).sum::<u64>().next_multiple_of(GROUP_LEN)
    }

    /// Length of the pack as it becomes.
    pub fn pack_len(&self, index: &Index, new: &[NewFrame]) -> u64 {
        let lens = self.order().map(|next| match next {
            Next::New(number) => new[number].bytes.len() as u64,
            Next::Kept(id) => index.frames[id as usize].pack_len.into(),
        });
        lens.sum()
    }

    /// The pack as it becomes, frame by frame.
    pub fn order(&self) -> impl Iterator<Item = Next> + '_ {
        let new = |numbers: Range<usize>| numbers.map(Next::New);
        let (first, others) = self.kept.split_at(self.first);
        new(0..self.pages)
            .chain(first.iter().copied().map(Next::Kept))
            .chain(new(self.pages..self.new.len()))
            .chain(others.iter().copied().map(Next::Kept))
    }

    /// The index as it becomes.
    pub fn index(&self, index: &Index, new: &[NewFrame]) -> Result<Vec<u8>, BuildError> {
        let (mut new_ids, mut ids) = (vec![0; new.len()], vec![0; index.frames.len()]);
        for (id, next) in (0..).zip(self.order()) {
            match next {
                Next::New(number) => new_ids[number] = id,
                Next::Kept(was) => ids[was as usize] = id,
            }
        }
        let mut builder = IndexBuilder::new();
        for next in self.order() {
            let frame = match next {
                Next::New(number) => &new[number].frame,
                Next::Kept(was) => &index.frames[was as usize],
            };
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
        for run in &index.runs {
            for (mut part, to) in self.moves.applied(run) {
                if let RunFrom::Frame { id, .. } = &mut part.from {
                    *id = to.map_or(ids[*id as usize], |number| new_ids[number]);
                }
                builder.push_run(part)?;
            }
        }
        Ok(builder.finish(index.directory.header()))
    }
}

/// New frames, filled one after the other.
struct Frames {
    frames: Vec<Vec<Piece>>,
    /// What the last has room for.
    room: u32,
    /// Length of each.
    len: u32,
}

impl Frames {
    /// None yet; each is to have at most so many bytes.
    fn new(len: u32) -> Self {
        Self {
            frames: Vec::new(),
            room: 0,
            len: len.max(1),
        }
    }

    /// Puts a piece into the last, and what it has no room for into further ones.
    fn push(&mut self, mut piece: Piece) {
        while piece.len() > 0 {
            if self.room == 0 {
                self.frames.push(Vec::new());
                self.room = self.len;
            }
            let (now, later) = piece.split(piece.len().min(self.room));
            self.room -= now.len();
            self.frames.last_mut().expect("there is one").push(now);
            piece = later;
        }
    }
}

/// Which frames move to the front as they are, for what is read of each; and those to which they refer.
fn whole(index: &Index, read: &[Vec<Range<u32>>]) -> Vec<bool> {
    let mut whole = vec![false; index.frames.len()];
    let mut taken = 0;
    for (id, frame) in index.frames.iter().enumerate() {
        let read = read[id]
            .iter()
            .map(|range| u64::from(range.end - range.start));
        let read: u64 = read.sum();
        if read > 0 {
            let (len, packed) = (u64::from(frame.len), u64::from(frame.pack_len));
            // Against old content, pages alone may be longer; and what would be left of it, much longer.
            let alone = if frame.references.is_empty() {
                ALONE
            } else {
                1
            };
            let is_short = packed * alone <= read;
            let is_read = (len - read.min(len)) * NEARLY <= len;
            whole[id] = is_short || is_read || taken + read > MAX_TAKEN;
            taken += if whole[id] { 0 } else { read };
        }
    }
    with_references(index, &mut whole);
    whole
}

/// Which frames stay: the content has nothing of the others, but for what is in new ones.
fn used(index: &Index, whole: &[bool], moves: &Moves) -> Vec<bool> {
    let mut used = whole.to_vec();
    for run in &index.runs {
        for (part, to) in moves.applied(run) {
            if let (RunFrom::Frame { id, .. }, None) = (part.from, to) {
                used[id as usize] = true;
            }
        }
    }
    with_references(index, &mut used);
    used
}

/// Bytes of the chunk groups of frames of which anything is read, or that come with these.
fn scattered(index: &Index, read: &[Vec<Range<u32>>], whole: &[bool]) -> u64 {
    let touched = read.iter().zip(whole);
    let mut touched: Vec<bool> = touched
        .map(|(read, whole)| *whole || !read.is_empty())
        .collect();
    with_references(index, &mut touched);
    let mut groups = GroupRanges::new();
    for (frame, is_touched) in index.frames.iter().zip(touched) {
        if is_touched {
            groups.insert(groups_touching(&place(frame)));
        }
    }
    groups.count() * GROUP_LEN
}

fn place(frame: &Frame) -> Range<u64> {
    frame.pack_offset..frame.pack_offset + u64::from(frame.pack_len)
}
