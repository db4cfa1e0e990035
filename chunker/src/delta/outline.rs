//! What of the new content is known before it is read, and where the rest lies.
//!
//! The rest, put together, is a source of its own ([`UnknownSource`]), which the encoder reads and cuts as it does any other; the
//! outline says where each stretch of it belongs.

use std::ops::Range;

use capsule_proto::GroupRanges;
use capsule_proto::ranges::group_bytes;

use crate::content::{Content, Extent, Extents, Parts, ReadError, Source, check_range};

/// What a stretch of the new content is, where that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// The parent's, at the same offset.
    Inherited,
    /// A source's, at another.
    Copy {
        /// Position among the sources.
        source: u16,
        /// First byte there.
        offset: u64,
    },
}

/// The new content as stretches that are known, or not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outline {
    segments: Vec<Segment>,
    len: u64,
    unknown: u64,
}

/// A stretch of the new content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// First byte.
    pub start: u64,
    /// Length in bytes, at least 1.
    pub len: u64,
    /// What it is; none: to be read.
    pub known: Option<Known>,
    /// How much before it is to be read.
    unknown_before: u64,
}

impl Outline {
    /// Of content of which nothing is known.
    pub fn unknown(len: u64) -> Self {
        let mut outline = Self::default();
        outline.push(len, None);
        outline
    }

    /// Of content of `size` bytes, which in all groups but the changed ones is its parent's.
    pub fn of_groups(size: u64, changed: &GroupRanges) -> Self {
        let mut outline = Self::default();
        for run in changed.runs() {
            let bytes = group_bytes(run, size);
            outline.push(bytes.start - outline.len, Some(Known::Inherited));
            outline.push(bytes.end - bytes.start, None);
        }
        outline.push(size - outline.len, Some(Known::Inherited));
        outline
    }

    /// Adds the next stretch; one that goes on where the last ended is joined to it.
    pub fn push(&mut self, len: u64, known: Option<Known>) {
        if len == 0 {
            return;
        }
        let joined = self
            .segments
            .last_mut()
            .filter(|last| match (last.known, known) {
                (
                    Some(Known::Copy { source, offset }),
                    Some(Known::Copy {
                        source: s,
                        offset: o,
                    }),
                ) => source == s && offset + last.len == o,
                (before, now) => before == now,
            });
        match joined {
            Some(last) => last.len += len,
            None => self.segments.push(Segment {
                start: self.len,
                len,
                known,
                unknown_before: self.unknown,
            }),
        }
        self.len += len;
        if known.is_none() {
            self.unknown += len;
        }
    }

    /// Length of the content.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether the content is empty.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How much of it is to be read.
    pub const fn unknown_len(&self) -> u64 {
        self.unknown
    }

    /// The stretches, in order.
    pub(crate) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// How many bytes lie between a range and the nearest stretch that is to be read.
    pub(crate) fn distance(&self, range: &Range<u64>) -> u64 {
        let after = self
            .segments
            .partition_point(|segment| segment.end() <= range.start);
        let is_unknown = |segment: &&Segment| segment.known.is_none();
        let next = self.segments[after..].iter().find(is_unknown);
        let last = self.segments[..after].iter().rev().find(is_unknown);
        let to_next = next.map(|segment| segment.start.saturating_sub(range.end));
        let to_last = last.map(|segment| range.start - segment.end());
        let nearest = [to_next, to_last].into_iter().flatten().min();
        nearest.unwrap_or(u64::MAX)
    }

    /// Where a range of what is to be read lies in the content, in order.
    pub(crate) fn places(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let first = self
            .segments
            .partition_point(|segment| segment.unknown_end() <= range.start);
        self.segments[first..]
            .iter()
            .filter(|segment| segment.known.is_none())
            .take_while(move |segment| segment.unknown_before < range.end)
            .map(move |segment| {
                let from = range.start.max(segment.unknown_before) - segment.unknown_before;
                let to = range.end.min(segment.unknown_end()) - segment.unknown_before;
                segment.start + from..segment.start + to
            })
            .filter(|place| !place.is_empty())
    }
}

impl Segment {
    /// How much is to be read up to its end.
    const fn unknown_end(&self) -> u64 {
        match self.known {
            None => self.unknown_before + self.len,
            Some(_) => self.unknown_before,
        }
    }

    /// First byte after it.
    pub const fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// What is to be read of a source, put together.
pub(crate) struct UnknownSource<'a> {
    source: &'a dyn Source,
    outline: &'a Outline,
}

impl<'a> UnknownSource<'a> {
    pub fn new(source: &'a dyn Source, outline: &'a Outline) -> Self {
        Self { source, outline }
    }

    fn unknown(&self) -> impl Iterator<Item = Range<u64>> + Send + 'a {
        let segments = self.outline.segments.iter();
        segments
            .filter(|segment| segment.known.is_none())
            .map(|segment| segment.start..segment.end())
    }
}

impl Content for UnknownSource<'_> {
    fn len(&self) -> u64 {
        self.outline.unknown_len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        check_range(self.len(), offset, buf.len())?;
        let mut rest = buf;
        for place in self.outline.places(offset..offset + rest.len() as u64) {
            let (now, later) = rest.split_at_mut((place.end - place.start) as usize);
            self.source.read_at(place.start, now)?;
            rest = later;
        }
        Ok(())
    }
}

impl Source for UnknownSource<'_> {
    fn extents(&self) -> Extents<'_> {
        Box::new(Within {
            extents: self.source.extents(),
            extent: None,
            unknown: self.unknown(),
            wanted: 0..0,
            len: 0,
        })
    }

    /// Parts are known or unknown as a whole: who outlines a tree sees to that.
    fn parts(&self) -> Option<Parts<'_>> {
        let mut start = 0;
        let mut segments = self.outline.segments.iter().peekable();
        let parts = self.source.parts()?.filter(move |len| {
            while segments.next_if(|segment| segment.end() <= start).is_some() {}
            let unknown = segments
                .peek()
                .is_none_or(|segment| segment.known.is_none());
            start += len;
            // What is empty has no stretch, and is hashed in any case.
            unknown || *len == 0
        });
        Some(Box::new(parts))
    }

    fn check_unchanged(&self) -> Result<(), ReadError> {
        self.source.check_unchanged()
    }
}

/// A source's extents within what is to be read.
struct Within<'a, U> {
    extents: Extents<'a>,
    extent: Option<Extent>,
    unknown: U,
    /// What is left of the stretch that is gone through.
    wanted: Range<u64>,
    /// How much was gone through.
    len: u64,
}

impl<U: Iterator<Item = Range<u64>>> Iterator for Within<'_, U> {
    type Item = Result<Extent, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.wanted.is_empty() {
            self.wanted = self.unknown.next()?;
        }
        loop {
            let extent = match self.extent.take() {
                Some(extent) => extent,
                None => match self.extents.next()? {
                    Ok(extent) => extent,
                    Err(error) => return Some(Err(error)),
                },
            };
            if extent.range.end <= self.wanted.start {
                continue;
            }
            let end = extent.range.end.min(self.wanted.end);
            let len = end - self.wanted.start;
            let range = self.len..self.len + len;
            let zero = extent.zero;
            self.extent = (extent.range.end > end).then_some(extent);
            self.wanted.start = end;
            self.len += len;
            return Some(Ok(Extent { range, zero }));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::content::BytesSource;

    /// Bytes with holes, in parts.
    struct Holed(BytesSource, Vec<u64>);

    impl Content for Holed {
        fn len(&self) -> u64 {
            self.0.len()
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
            self.0.read_at(offset, buf)
        }
    }

    impl Source for Holed {
        fn extents(&self) -> Extents<'_> {
            let bytes = (0..self.len()).map(|at| {
                Ok(Extent {
                    range: at..at + 1,
                    zero: self.0.0[at as usize] == 0,
                })
            });
            Box::new(bytes)
        }
        fn parts(&self) -> Option<Parts<'_>> {
            Some(Box::new(self.1.iter().copied()))
        }
        fn check_unchanged(&self) -> Result<(), ReadError> {
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn what_is_unknown_reads_as_a_source(parts in prop::collection::vec((0u64..5, any::<bool>()), 0..12)) {
            let mut outline = Outline::default();
            let (mut bytes, mut unknown, mut places) = (Vec::new(), Vec::new(), Vec::new());
            for (i, (len, known)) in parts.iter().enumerate() {
                for at in 0..*len {
                    let byte = if at % 3 == 0 { 0 } else { i as u8 + 1 };
                    bytes.push(byte);
                    if !known {
                        unknown.push(byte);
                        places.push(bytes.len() as u64 - 1);
                    }
                }
                outline.push(*len, known.then_some(Known::Inherited));
            }
            let lens = parts.iter().map(|(len, _)| *len).collect();
            let holed = Holed(BytesSource(bytes), lens);
            let source = UnknownSource::new(&holed, &outline);
            prop_assert_eq!(source.len(), unknown.len() as u64);
            let mut read = vec![0; unknown.len()];
            source.read_at(0, &mut read).unwrap();
            prop_assert_eq!(&read, &unknown);
            let extents: Vec<_> = source.extents().map(Result::unwrap).collect();
            let mut at = 0;
            for extent in &extents {
                prop_assert_eq!(extent.range.start, at);
                at = extent.range.end;
                for byte in extent.range.clone() {
                    prop_assert_eq!(extent.zero, unknown[byte as usize] == 0);
                }
            }
            prop_assert_eq!(at, unknown.len() as u64);
            let kept: Vec<u64> = parts.iter().filter(|(len, known)| !known || *len == 0).map(|(len, _)| *len).collect();
            prop_assert_eq!(source.parts().unwrap().collect::<Vec<_>>(), kept);
            for start in 0..unknown.len() as u64 {
                for end in start..unknown.len() as u64 {
                    let found: Vec<u64> = outline.places(start..end).flatten().collect();
                    prop_assert_eq!(&found[..], &places[start as usize..end as usize]);
                }
            }
        }

        #[test]
        fn the_nearest_unknown_stretch_is_found(parts in prop::collection::vec((1u64..9, any::<bool>()), 0..9), start in 0u64..40, len in 1u64..9) {
            let mut outline = Outline::default();
            for (len, known) in &parts {
                outline.push(*len, known.then_some(Known::Inherited));
            }
            let (mut at, mut nearest) = (0, u64::MAX);
            for (len_here, known) in &parts {
                for byte in at..at + len_here {
                    if !known {
                        let apart = if byte < start { start - byte - 1 } else { byte.saturating_sub(start + len) };
                        let within = (start..start + len).contains(&byte);
                        nearest = nearest.min(if within { 0 } else { apart });
                    }
                }
                at += len_here;
            }
            prop_assert_eq!(outline.distance(&(start..start + len)), nearest);
        }

        #[test]
        fn groups_outline_the_content(size in 0u64..200_000, first in 0u64..12, len in 1u64..12) {
            let count = capsule_proto::ranges::group_count(size);
            let run = first.min(count - 1)..(first + len).min(count);
            let outline = Outline::of_groups(size, &GroupRanges::from(run.clone()));
            prop_assert_eq!(outline.len(), size);
            let bytes = group_bytes(&run, size);
            prop_assert_eq!(outline.unknown_len(), bytes.end - bytes.start);
            prop_assert!(outline.segments().len() <= 3);
        }
    }
}
