//! What an update adds to the stages of encoding: pieces that old content has, and frames compressed against it.

use std::ops::Range;

use capsule_proto::index::{Codec, Reference, ReferenceTo};

use super::codec::{self, Compressor, Packed};
use super::encode::{Against, EncodeError, EncodeOptions};
use super::slab::{Piece, Slab};
use super::work::Encoding;
use crate::delta::{Found, Limits, Matcher, Window, align, cover, steps};

/// What a reference costs in the index, about: source, offset and length, compressed.
const REFERENCE_COST: usize = 5;
/// A frame that takes less is not tried as a difference.
const LEAST_DIFFERENCE: usize = 512;

/// One worker's part in an update.
pub(super) struct Updater<'a> {
    against: &'a Against<'a>,
    matcher: Matcher<'a>,
    limits: Limits,
    compressor: Compressor,
    /// Whether frames are tried as differences.
    differences: bool,
    /// Whether they are compressed with LZMA and as patches too.
    lzma: bool,
    /// The references' content.
    references: Vec<u8>,
}

impl<'a> Updater<'a> {
    pub fn new(against: &'a Against<'a>, options: &EncodeOptions) -> Self {
        Self {
            against,
            matcher: Matcher::new(
                against.outline,
                against.similar,
                against.sources,
                options.cuts,
                against.in_place,
            ),
            limits: options.effort.references(),
            compressor: Compressor::new(options.effort.level_with_references()),
            differences: options.effort.differences(),
            lzma: options.effort.lzma(),
            references: Vec::new(),
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

    /// Compresses a frame against old content, or as it is, whichever is smaller.
    pub fn compress(
        &mut self,
        frame: u32,
        content: &[u8],
        plain: impl FnOnce() -> Result<Encoding, EncodeError>,
    ) -> Result<Encoding, EncodeError> {
        let Against {
            similar, sources, ..
        } = self.against;
        let windows = cover(similar, sources, content, &self.limits);
        if windows.is_empty() {
            return plain();
        }
        self.read(&windows)?;
        let packed = self
            .compressor
            .compress_against(content, &self.references)
            .map_err(|why| EncodeError::Compress { frame, why })?;
        let mut best = referring(Codec::ZstdReferences, packed, &windows);
        if self.lzma {
            let smaller = self.lzma(frame, content, &windows)?;
            if codec::is_worth_lzma(smaller.bytes.len(), best.bytes.len()) {
                best = smaller;
            }
        }
        if let Some(difference) = self.difference(frame, content, best.bytes.len())?
            && cost(&difference) < cost(&best)
        {
            best = difference;
        }
        // Where references bring much, content alone would not be smaller.
        if best.bytes.len() < content.len() / 8 {
            return Ok(best);
        }
        let plain = plain()?;
        let plain_len = match plain.codec {
            Codec::Stored => content.len(),
            _ => plain.bytes.len(),
        };
        Ok(if cost(&best) < plain_len { best } else { plain })
    }

    /// The frame by LZMA, with the references that were read as dictionary, or as a patch of them.
    fn lzma(
        &self,
        frame: u32,
        content: &[u8],
        windows: &[Window],
    ) -> Result<Encoding, EncodeError> {
        let failed = |why| EncodeError::Compress { frame, why };
        let references = &self.references;
        let with_dictionary = codec::lzma_against(content, references).map_err(failed)?;
        let steps = steps(references, content);
        let patch = codec::patch(content, references, &steps).map_err(failed)?;
        Ok(match patch {
            Some(patch) if patch.len() < with_dictionary.len() => {
                referring(Codec::Patch, patch, windows)
            }
            _ => referring(Codec::LzmaReferences, with_dictionary, windows),
        })
    }

    /// The frame as a bytewise difference, where old content lies under it, and there is something to be gained.
    fn difference(
        &mut self,
        frame: u32,
        content: &[u8],
        len: usize,
    ) -> Result<Option<Encoding>, EncodeError> {
        if !self.differences || len < LEAST_DIFFERENCE {
            return Ok(None);
        }
        let Against {
            similar, sources, ..
        } = self.against;
        let Some(windows) = align(similar, sources, content)? else {
            return Ok(None);
        };
        self.read(&windows)?;
        self.references
            .iter_mut()
            .zip(content)
            .for_each(|(old, new)| *old = new.wrapping_sub(*old));
        let packed = self
            .compressor
            .compress(&self.references)
            .map_err(|why| EncodeError::Compress { frame, why })?;
        Ok(match packed {
            Packed::Zstd(packed) => Some(referring(Codec::Difference, packed, &windows)),
            Packed::Stored | Packed::Lzma(_) => None,
        })
    }

    fn read(&mut self, windows: &[Window]) -> Result<(), EncodeError> {
        let len = |window: &Window| (window.range.end - window.range.start) as usize;
        self.references.resize(windows.iter().map(len).sum(), 0);
        let mut rest = self.references.as_mut_slice();
        for window in windows {
            let (now, later) = rest.split_at_mut(len(window));
            self.against.sources[usize::from(window.source)].read(window.range.start, now)?;
            rest = later;
        }
        Ok(())
    }
}

fn referring(codec: Codec, bytes: Vec<u8>, windows: &[Window]) -> Encoding {
    let references = windows
        .iter()
        .map(|window| Reference {
            to: ReferenceTo::Source(window.source),
            offset: window.range.start,
            len: (window.range.end - window.range.start) as u32,
        })
        .collect();
    Encoding {
        codec,
        bytes,
        references,
    }
}

/// Bytes in the pack, and about in the index.
fn cost(encoding: &Encoding) -> usize {
    encoding.bytes.len() + REFERENCE_COST * encoding.references.len()
}
