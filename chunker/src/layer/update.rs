//! What an update adds to the stages of encoding: pieces that old content has.

use std::ops::Range;

use super::encode::{Against, EncodeError, EncodeOptions};
use super::slab::{Piece, Slab};
use crate::delta::{Found, Matcher};

/// One worker's part in an update.
pub(super) struct Updater<'a> {
    matcher: Matcher<'a>,
}

impl<'a> Updater<'a> {
    pub fn new(against: &'a Against<'a>, options: &EncodeOptions) -> Self {
        Self {
            matcher: Matcher::new(
                against.outline,
                against.similar,
                against.sources,
                options.cuts,
                against.in_place,
            ),
        }
    }

    /// The pieces of a slab, by what old content has of them.
    pub fn pieces(&mut self, slab: &Slab) -> Result<Vec<Piece>, EncodeError> {
        let mut pieces = Vec::with_capacity(slab.pieces.len());
        let mut spans = Vec::new();
        let mut start = slab.range.start;
        let mut next = start;
        for piece in &slab.pieces {
            if let Piece::Span {
                at, len, strong, ..
            } = *piece
            {
                // Data regions lie apart in the slab only where zeros lie between.
                spans.push((at..at + len, strong));
            } else {
                self.stretch(slab, start, &mut spans, &mut pieces)?;
                pieces.push(*piece);
            }
            next += piece.len();
            if spans.is_empty() {
                start = next;
            }
        }
        self.stretch(slab, start, &mut spans, &mut pieces)?;
        Ok(pieces)
    }

    /// The pieces of spans that adjoin each other; what is new in them is cut where they are.
    fn stretch(
        &mut self,
        slab: &Slab,
        start: u64,
        spans: &mut Vec<(Range<usize>, bool)>,
        pieces: &mut Vec<Piece>,
    ) -> Result<(), EncodeError> {
        let (Some((first, _)), Some((last, _))) = (spans.first(), spans.last()) else {
            return Ok(());
        };
        let (at, len) = (first.start, last.end - first.start);
        let mut cuts = spans.iter().peekable();
        for piece in self.matcher.pieces(start, slab.bytes(at, len))? {
            let range = at + piece.range.start..at + piece.range.end;
            let len = range.len() as u64;
            match piece.found {
                Found::Same => pieces.push(Piece::Same { len }),
                Found::Copy { source, offset } => pieces.push(Piece::Copy {
                    len,
                    source,
                    offset,
                }),
                Found::New { alike } => {
                    let mut from = range.start;
                    while from < range.end {
                        while cuts.next_if(|(span, _)| span.end <= from).is_some() {}
                        let (end, strong) = cuts
                            .peek()
                            .map_or((range.end, false), |(span, strong)| (span.end, *strong));
                        let (end, strong) = if end <= range.end {
                            (end, strong)
                        } else {
                            (range.end, false)
                        };
                        pieces.push(Piece::Span {
                            at: from,
                            len: end - from,
                            strong,
                            alike,
                        });
                        from = end;
                    }
                }
            }
        }
        spans.clear();
        Ok(())
    }
}
