//! A source without its free space.

use std::ops::Range;

use super::ranges::{first_after, joined};
use crate::content::{Content, Extent, Extents, Parts, ReadError, Source, check_range};

/// A source of which some ranges are zeros, whatever is stored there.
///
/// Those ranges are never read, and are reported as zero extents; all else is as it was.
pub struct Trimmed<'a> {
    source: &'a dyn Source,
    /// In order and apart.
    zeros: Vec<Range<u64>>,
}

impl<'a> Trimmed<'a> {
    /// Takes away ranges of bytes, in any order; what lies beyond the source is of no account.
    pub fn new(source: &'a dyn Source, zeros: Vec<Range<u64>>) -> Self {
        let len = source.len();
        let cut = zeros
            .into_iter()
            .map(|range| range.start..range.end.min(len))
            .filter(|range| !range.is_empty());
        Self {
            source,
            zeros: joined(cut.collect()),
        }
    }

    /// What is taken away, in order and apart.
    pub fn zeros(&self) -> &[Range<u64>] {
        &self.zeros
    }

    /// The pieces of a range, in order, and whether each is taken away.
    fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, bool)> + '_ {
        let mut at = range.start;
        let mut next = first_after(&self.zeros, at);
        std::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let from = at;
            let zero = match self.zeros.get(next) {
                Some(zeros) if zeros.start <= at => {
                    at = zeros.end.min(range.end);
                    next += 1;
                    true
                }
                zeros => {
                    at = zeros.map_or(range.end, |zeros| zeros.start.min(range.end));
                    false
                }
            };
            Some((from..at, zero))
        })
    }
}

impl Content for Trimmed<'_> {
    fn len(&self) -> u64 {
        self.source.len()
    }

    fn is_zero(&self, range: Range<u64>) -> bool {
        self.pieces(range)
            .all(|(piece, zero)| zero || self.source.is_zero(piece))
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        check_range(self.len(), offset, buf.len())?;
        for (piece, zero) in self.pieces(offset..offset + buf.len() as u64) {
            let part = &mut buf[(piece.start - offset) as usize..(piece.end - offset) as usize];
            if zero {
                part.fill(0);
            } else {
                self.source.read_at(piece.start, part)?;
            }
        }
        Ok(())
    }
}

impl Source for Trimmed<'_> {
    fn extents(&self) -> Extents<'_> {
        Box::new(TrimmedExtents {
            inner: self.source.extents(),
            current: None,
            zeros: &self.zeros,
            at: 0,
            len: self.len(),
        })
    }

    fn parts(&self) -> Option<Parts<'_>> {
        self.source.parts()
    }

    fn check_unchanged(&self) -> Result<(), ReadError> {
        self.source.check_unchanged()
    }
}

/// The source's extents, where nothing is taken away; between them, what is.
struct TrimmedExtents<'a> {
    inner: Extents<'a>,
    /// The source's extent that was looked at last.
    current: Option<Extent>,
    /// Those not passed yet.
    zeros: &'a [Range<u64>],
    at: u64,
    len: u64,
}

impl TrimmedExtents<'_> {
    /// The source's extent at this place.
    fn here(&mut self) -> Option<Result<Extent, ReadError>> {
        loop {
            match &self.current {
                Some(extent) if extent.range.end > self.at => return Some(Ok(extent.clone())),
                _ => match self.inner.next()? {
                    Ok(extent) => self.current = Some(extent),
                    Err(error) => return Some(Err(error)),
                },
            }
        }
    }
}

impl Iterator for TrimmedExtents<'_> {
    type Item = Result<Extent, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.len {
            return None;
        }
        let start = self.at;
        if let [first, rest @ ..] = self.zeros
            && first.start <= start
        {
            self.at = first.end;
            self.zeros = rest;
            return Some(Ok(Extent {
                range: start..first.end,
                zero: true,
            }));
        }
        match self.here() {
            Some(Ok(extent)) => {
                let limit = self.zeros.first().map_or(self.len, |zeros| zeros.start);
                self.at = extent.range.end.min(limit);
                Some(Ok(Extent {
                    range: start..self.at,
                    zero: extent.zero,
                }))
            }
            other => {
                self.at = self.len;
                other
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes, of which some stretches are said to be zero.
    struct Patchy {
        bytes: Vec<u8>,
        extents: Vec<Extent>,
    }

    impl Content for Patchy {
        fn len(&self) -> u64 {
            self.bytes.len() as u64
        }

        fn is_zero(&self, range: Range<u64>) -> bool {
            self.bytes[range.start as usize..range.end as usize]
                .iter()
                .all(|byte| *byte == 0)
        }

        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
            check_range(self.len(), offset, buf.len())?;
            buf.copy_from_slice(&self.bytes[offset as usize..][..buf.len()]);
            Ok(())
        }
    }

    impl Source for Patchy {
        fn extents(&self) -> Extents<'_> {
            Box::new(self.extents.iter().cloned().map(Ok))
        }

        fn check_unchanged(&self) -> Result<(), ReadError> {
            Ok(())
        }
    }

    fn patchy(lengths: &[(u64, bool)]) -> Patchy {
        let (mut bytes, mut extents) = (Vec::new(), Vec::new());
        for (number, &(length, zero)) in (1_u8..).zip(lengths) {
            let start = bytes.len() as u64;
            bytes.resize(bytes.len() + length as usize, if zero { 0 } else { number });
            extents.push(Extent {
                range: start..start + length,
                zero,
            });
        }
        Patchy { bytes, extents }
    }

    proptest! {
        #[test]
        fn what_is_taken_away_is_zero_and_all_else_as_it_was(
            lengths in prop::collection::vec((1_u64..50, any::<bool>()), 0..20),
            cuts in prop::collection::vec((0_u64..600, 0_u64..80), 0..12),
            reads in prop::collection::vec((0_u64..600, 0_u64..200), 8),
        ) {
            let source = patchy(&lengths);
            let mut expected = source.bytes.clone();
            let zeros: Vec<_> = cuts.iter().map(|&(start, len)| start..start + len).collect();
            for range in &zeros {
                let end = (range.end as usize).min(expected.len());
                let start = (range.start as usize).min(end);
                expected[start..end].fill(0);
            }
            let trimmed = Trimmed::new(&source, zeros.clone());
            let mut at = 0;
            for extent in trimmed.extents() {
                let extent = extent.unwrap();
                prop_assert_eq!(extent.range.start, at);
                prop_assert!(!extent.range.is_empty());
                at = extent.range.end;
                let bytes = &expected[extent.range.start as usize..at as usize];
                prop_assert_eq!(extent.zero, bytes.iter().all(|byte| *byte == 0));
            }
            prop_assert_eq!(at, source.len());
            for (start, len) in reads {
                let mut buf = vec![9; len as usize];
                let read = trimmed.read_at(start, &mut buf);
                let Some(wanted) = expected.get(start as usize..(start + len) as usize) else {
                    prop_assert!(read.is_err());
                    continue;
                };
                read.unwrap();
                prop_assert_eq!(&buf, wanted);
                prop_assert_eq!(
                    trimmed.is_zero(start..start + len),
                    wanted.iter().all(|byte| *byte == 0)
                );
            }
        }
    }
}
