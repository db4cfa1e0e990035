//! Which pieces of a stretch of new content are unchanged in their place, or exact copies of old content from another.
//!
//! A copy costs an entry in the index, some bytes whatever its length, and no decoding; a match within a frame costs about as
//! much when it is short. So only copies from some length on are taken: a page of disks and memory, where copies keep to pages, and
//! more where they may lie at any byte.

use std::ops::Range;

use super::old::{OldError, OldReader, OldSource};
use super::outline::Outline;
use super::seeds::Seed;
use super::similar::{Place, Similar};
use crate::layer::{Cuts, PAGE_LEN};

/// Shortest copy at any byte.
const MIN_COPY: usize = 8 << 10;
const PAGE: u64 = PAGE_LEN as u64;

/// What a piece of new content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// The parent's, at the same offset.
    Same,
    /// Old content from another place.
    Copy {
        /// Position among the sources.
        source: u16,
        /// First byte there.
        offset: u64,
    },
    /// New; whether old content resembles it.
    New {
        /// Whether a frame of it is worth references.
        alike: bool,
    },
}

/// A piece of a stretch of new content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where in the stretch.
    pub range: Range<usize>,
    /// What it is.
    pub found: Found,
}

/// Finds them. One a thread.
pub(crate) struct Matcher<'a> {
    outline: &'a Outline,
    similar: &'a Similar,
    old: OldReader<'a>,
    /// Whether copies keep to pages.
    paged: bool,
    /// Whether the first source is the parent, in the space of the new content, and small changes lie in their old places.
    in_place: bool,
    seeds: Vec<Seed>,
}

impl<'a> Matcher<'a> {
    pub fn new(
        outline: &'a Outline,
        similar: &'a Similar,
        sources: &'a [OldSource],
        cuts: Cuts,
        in_place: bool,
    ) -> Self {
        Self {
            outline,
            similar,
            old: OldReader::new(sources),
            paged: cuts == Cuts::Pages,
            in_place: in_place && !sources.is_empty(),
            seeds: Vec::new(),
        }
    }

    /// Cuts a stretch, which begins at byte `at` of what is to be read, into pieces.
    pub fn pieces(&mut self, at: u64, data: &[u8]) -> Result<Vec<Piece>, OldError> {
        let mut pieces = Vec::new();
        let mut start = 0;
        for place in self.outline.places(at..at + data.len() as u64) {
            let end = start + (place.end - place.start) as usize;
            self.within(start..end, place.start, data, &mut pieces)?;
            start = end;
        }
        Ok(pieces)
    }

    /// The pieces of what lies in one place of the new content.
    fn within(
        &mut self,
        range: Range<usize>,
        place: u64,
        data: &[u8],
        pieces: &mut Vec<Piece>,
    ) -> Result<(), OldError> {
        for piece in self.same_pages(range.clone(), place, data)? {
            if piece.found == Found::Same {
                pieces.push(piece);
            } else {
                let place = place + (piece.range.start - range.start) as u64;
                self.copies(piece.range, place, data, pieces)?;
            }
        }
        Ok(())
    }

    /// Which pages are the parent's at the same offset.
    fn same_pages(
        &mut self,
        range: Range<usize>,
        place: u64,
        data: &[u8],
    ) -> Result<Vec<Piece>, OldError> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let target = place + (at - range.start) as u64;
            let end = range.end.min(at + (PAGE - target % PAGE) as usize);
            let page = &data[at..end];
            let same = self.in_place && self.old.common_prefix(0, target, page)? == page.len();
            let found = if same {
                Found::Same
            } else {
                Found::New { alike: false }
            };
            match pieces.last_mut() {
                Some(last) if last.found == found => last.range.end = end,
                _ => pieces.push(Piece {
                    range: at..end,
                    found,
                }),
            }
            at = end;
        }
        Ok(pieces)
    }

    /// Copies within a range; what is between them is new.
    fn copies(
        &mut self,
        range: Range<usize>,
        place: u64,
        data: &[u8],
        pieces: &mut Vec<Piece>,
    ) -> Result<(), OldError> {
        let mut seeds = std::mem::take(&mut self.seeds);
        seeds.clear();
        self.similar
            .seeds(&data[range.clone()], range.start as u64, |seed| {
                seeds.push(seed)
            });
        // Seeds since the last copy, and those of them that old content has too.
        let (mut done, mut all, mut known) = (range.start, 0, 0);
        let similar = self.similar;
        for seed in &seeds {
            let at = seed.at as usize;
            if at < done {
                continue;
            }
            all += 1;
            let mut best: Option<(Range<usize>, Place)> = None;
            let mut is_known = false;
            for old in similar.places(seed.hash) {
                is_known = true;
                let target = place + (at - range.start) as u64;
                let found = self.copy_at(at, done..range.end, target, old, data)?;
                if let Some(found) = found
                    && best
                        .as_ref()
                        .is_none_or(|(best, _)| best.len() < found.0.len())
                {
                    best = Some(found);
                }
            }
            known += usize::from(is_known);
            if let Some((copy, old)) = best {
                push_new(pieces, done..copy.start, all, known);
                (all, known) = (0, 0);
                done = copy.end;
                let found = Found::Copy {
                    source: old.source,
                    offset: old.at,
                };
                pieces.push(Piece { range: copy, found });
            }
        }
        push_new(pieces, done..range.end, all, known);
        self.seeds = seeds;
        Ok(())
    }

    /// The copy around a byte of the stretch that has the same window as a place of old content; within the limits.
    fn copy_at(
        &mut self,
        at: usize,
        limits: Range<usize>,
        target: u64,
        old: Place,
        data: &[u8],
    ) -> Result<Option<(Range<usize>, Place)>, OldError> {
        if self.paged {
            return self.pages_at(at, limits, target, old, data);
        }
        let after = self
            .old
            .common_prefix(old.source, old.at, &data[at..limits.end])?;
        let before = self
            .old
            .common_suffix(old.source, old.at, &data[limits.start..at])?;
        let range = at - before..at + after;
        let old = Place {
            at: old.at - before as u64,
            ..old
        };
        Ok((range.len() >= MIN_COPY).then_some((range, old)))
    }

    /// The same in whole pages of both.
    fn pages_at(
        &mut self,
        at: usize,
        limits: Range<usize>,
        target: u64,
        old: Place,
        data: &[u8],
    ) -> Result<Option<(Range<usize>, Place)>, OldError> {
        let into = target % PAGE;
        if old.at % PAGE != into || ((at - limits.start) as u64) < into {
            return Ok(None);
        }
        let start = at - into as usize;
        let from = old.at - into;
        let after = self
            .old
            .common_prefix(old.source, from, &data[start..limits.end])?;
        let after = after - after % PAGE_LEN;
        if after == 0 {
            return Ok(None);
        }
        let before = self
            .old
            .common_suffix(old.source, from, &data[limits.start..start])?;
        let before = before - before % PAGE_LEN;
        let old = Place {
            at: from - before as u64,
            ..old
        };
        Ok(Some((start - before..start + after, old)))
    }
}

/// Whether old content resembles new content that has so many seeds, and shares so many with it: one in sixteen, where there
/// are enough to tell.
fn push_new(pieces: &mut Vec<Piece>, range: Range<usize>, all: usize, known: usize) {
    if !range.is_empty() {
        let found = Found::New {
            alike: known * 16 >= all && known > 0,
        };
        pieces.push(Piece { range, found });
    }
}
