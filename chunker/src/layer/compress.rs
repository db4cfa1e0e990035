//! Compressing frames: on their own, against old content and earlier frames, or as differences to them, whichever is smallest.

use capsule_proto::index::{Codec, Reference, ReferenceTo};

use super::codec::{self, Compressor, FrameFault, Packed, is_worth_decoding};
use super::earlier::Referred;
use super::encode::{Against, EncodeError, EncodeOptions};
use crate::delta::{Limits, Window, align, cover_old, steps};

/// What a reference costs in the index, about: source, offset and length, compressed.
const REFERENCE_COST: usize = 5;
/// A frame that takes less is not tried as a difference.
const LEAST_DIFFERENCE: usize = 512;

/// A frame as it comes into the pack.
pub(super) struct Encoding {
    pub codec: Codec,
    /// The bytes; of a stored frame none, as they are its content.
    pub bytes: Vec<u8>,
    pub references: Vec<Reference>,
    /// How deep references to frames lead; 0 without any.
    pub depth: u8,
}

/// One worker's compressors.
pub(super) struct FrameCompressor<'a> {
    against: Option<&'a Against<'a>>,
    limits: Limits,
    alone: Compressor,
    referring: Compressor,
    /// Whether frames are tried as differences.
    differences: bool,
    /// Whether they are compressed with LZMA and as patches too.
    lzma: bool,
    /// The references' content.
    references: Vec<u8>,
}

impl<'a> FrameCompressor<'a> {
    pub fn new(against: Option<&'a Against<'a>>, options: &EncodeOptions) -> Self {
        let effort = options.effort;
        Self {
            against,
            limits: effort.references(),
            alone: Compressor::new(effort.level()).with_lzma(effort.lzma()),
            referring: Compressor::new(effort.level_with_references()),
            differences: effort.differences(),
            lzma: effort.lzma(),
            references: Vec::new(),
        }
    }

    /// Compresses a frame against what was found for it; where nothing was looked for, against old content, if that resembles it.
    pub fn compress(
        &mut self,
        frame: u32,
        content: &[u8],
        alike: bool,
        referred: Option<Referred>,
    ) -> Result<Encoding, EncodeError> {
        let referred = referred.unwrap_or_else(|| self.old_content(content, alike));
        let failed = |why| EncodeError::Compress { frame, why };
        if referred.windows.is_empty() && referred.earlier.is_empty() {
            return self.plain(content).map_err(failed);
        }
        self.read(&referred)?;
        let mut best = self.refer(content, &referred).map_err(failed)?;
        if let Some(difference) = self.difference(frame, content, best.bytes.len())?
            && cost(&difference) < cost(&best)
        {
            best = difference;
        }
        // Where old content brings much, content alone would not be smaller.
        if !referred.windows.is_empty() && best.bytes.len() < content.len() / 8 {
            return Ok(best);
        }
        let plain = self.plain(content).map_err(failed)?;
        let plain_len = match plain.codec {
            Codec::Stored => content.len(),
            _ => plain.bytes.len(),
        };
        // What refers to earlier frames alone could do without references: they must be worth reading those.
        let is_worth = if referred.windows.is_empty() {
            is_worth_decoding(cost(&best), plain_len)
        } else {
            cost(&best) < plain_len
        };
        Ok(if is_worth { best } else { plain })
    }

    /// What of old content to refer to.
    fn old_content(&self, content: &[u8], alike: bool) -> Referred {
        let windows = match self.against {
            Some(against) if alike => {
                cover_old(against.similar, against.sources, content, &self.limits)
            }
            _ => Vec::new(),
        };
        Referred {
            windows,
            earlier: Vec::new(),
        }
    }

    fn plain(&mut self, content: &[u8]) -> Result<Encoding, FrameFault> {
        let (codec, bytes) = self.alone.compress(content)?.into_parts();
        Ok(Encoding {
            codec,
            bytes,
            references: Vec::new(),
            depth: 0,
        })
    }

    /// The frame with the references that were read: by zstd, by LZMA, or as a patch.
    fn refer(&mut self, content: &[u8], referred: &Referred) -> Result<Encoding, FrameFault> {
        let references = &self.references;
        let zstd = self.referring.compress_against(content, references)?;
        let zstd = referred.encoding(Codec::ZstdReferences, zstd);
        if !self.lzma {
            return Ok(zstd);
        }
        let with_dictionary = codec::lzma_against(content, references)?;
        let steps = steps(references, content);
        let smaller = match codec::patch(content, references, &steps)? {
            Some((codec, patch)) if patch.len() < with_dictionary.len() => {
                referred.encoding(codec, patch)
            }
            _ => referred.encoding(Codec::LzmaReferences, with_dictionary),
        };
        let is_worth = is_worth_decoding(smaller.bytes.len(), zstd.bytes.len());
        Ok(if is_worth { smaller } else { zstd })
    }

    /// The frame as a bytewise difference, where old content lies under it, and there is something to be gained.
    fn difference(
        &mut self,
        frame: u32,
        content: &[u8],
        len: usize,
    ) -> Result<Option<Encoding>, EncodeError> {
        let against = self.against.filter(|_| self.differences);
        let Some(Against {
            similar, sources, ..
        }) = against.filter(|_| len >= LEAST_DIFFERENCE)
        else {
            return Ok(None);
        };
        let Some(windows) = align(similar, sources, content)? else {
            return Ok(None);
        };
        let referred = Referred {
            windows,
            earlier: Vec::new(),
        };
        self.read(&referred)?;
        self.references
            .iter_mut()
            .zip(content)
            .for_each(|(old, new)| *old = new.wrapping_sub(*old));
        let packed = self.referring.compress(&self.references);
        Ok(
            match packed.map_err(|why| EncodeError::Compress { frame, why })? {
                Packed::Zstd(packed) => Some(referred.encoding(Codec::Difference, packed)),
                Packed::Stored | Packed::Lzma(_) => None,
            },
        )
    }

    /// Reads what is referred to.
    fn read(&mut self, referred: &Referred) -> Result<(), EncodeError> {
        let len = |window: &Window| (window.range.end - window.range.start) as usize;
        self.references
            .resize(referred.windows.iter().map(len).sum(), 0);
        let mut rest = self.references.as_mut_slice();
        if let Some(against) = self.against {
            for window in &referred.windows {
                let (now, later) = rest.split_at_mut(len(window));
                against.sources[window.of as usize].read(window.range.start, now)?;
                rest = later;
            }
        }
        for stretch in &referred.earlier {
            self.references.extend_from_slice(stretch.bytes());
        }
        Ok(())
    }
}

impl Referred {
    fn encoding(&self, codec: Codec, bytes: Vec<u8>) -> Encoding {
        let windows = self.windows.iter().map(|window| Reference {
            to: ReferenceTo::Source(window.of as u16),
            offset: window.range.start,
            len: (window.range.end - window.range.start) as u32,
        });
        let earlier = self.earlier.iter().map(|stretch| Reference {
            to: ReferenceTo::Frame(stretch.frame),
            offset: stretch.range.start as u64,
            len: stretch.range.len() as u32,
        });
        Encoding {
            codec,
            bytes,
            references: windows.chain(earlier).collect(),
            depth: u8::from(!self.earlier.is_empty()),
        }
    }
}

/// Bytes in the pack, and about in the index.
fn cost(encoding: &Encoding) -> usize {
    encoding.bytes.len() + REFERENCE_COST * encoding.references.len()
}
