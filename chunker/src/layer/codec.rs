//! One frame: compressing its content, and getting it back.
//!
//! Knows nothing of packs and indexes beyond a frame's own entry. Where references come from is the business of `read`;
//! which references to choose, of the delta search.

mod lzma;
mod moves;
mod patch;

pub use patch::Step;

use capsule_proto::FrameHash;
use capsule_proto::index::{Codec, Frame};
use moves::{Moves, Way, bytewise};
use thiserror::Error;
use zstd::zstd_safe::{self, CCtx, CParameter, DCtx};

/// A frame is stored as it is unless compression saves at least 1/128: less is not worth decompressing.
const LEAST_SAVING: usize = 128;
/// What is dearer to decode, as LZMA is, is taken where it saves at least 1/32.
const LEAST_DEAR_SAVING: usize = 32;

/// A frame's bytes in a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packed {
    /// The content as it is.
    Stored,
    /// A zstd frame.
    Zstd(Vec<u8>),
    /// LZMA.
    Lzma(Vec<u8>),
}

impl Packed {
    /// The codec, and the bytes that it makes: of a stored frame none, as they are its content.
    pub(super) fn into_parts(self) -> (Codec, Vec<u8>) {
        match self {
            Self::Stored => (Codec::Stored, Vec::new()),
            Self::Zstd(bytes) => (Codec::Zstd, bytes),
            Self::Lzma(bytes) => (Codec::Lzma, bytes),
        }
    }
}

/// What is wrong with a frame.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum FrameFault {
    /// The pack's bytes are not what the codec makes.
    #[error("it does not decompress: {0}")]
    Zstd(String),
    /// The same, where that is LZMA.
    #[error("it does not decompress as LZMA: {0}")]
    Lzma(String),
    /// A patch whose steps do not make the content.
    #[error("the steps of its patch are wrong: {0}")]
    Steps(&'static str),
    /// The pack's bytes hold more than one compressed frame.
    #[error("its {packed} bytes in the pack hold a compressed frame of only {used}")]
    Trailing {
        /// Length in the pack.
        packed: usize,
        /// Length of the compressed frame.
        used: usize,
    },
    /// Another length than the index says.
    #[error("it decodes to {found} bytes, not {expected}")]
    Length {
        /// By the index.
        expected: usize,
        /// By the pack.
        found: usize,
    },
    /// A difference against fewer bytes than it has.
    #[error("it is a difference of {len} bytes against references of {references}")]
    Difference {
        /// Length of the frame.
        len: usize,
        /// Length of the references together.
        references: usize,
    },
    /// Another content than the index says.
    #[error(
        "its content has hash {found:?}, not {expected:?}: the pack, or what the frame refers to, is not what was published"
    )]
    Hash {
        /// By the index.
        expected: FrameHash,
        /// Of what was decoded.
        found: FrameHash,
    },
}

/// Compresses frames at one level; keeps zstd's tables and its output buffer from frame to frame.
pub struct Compressor {
    context: CCtx<'static>,
    buffer: Vec<u8>,
    level: i32,
    lzma: bool,
}

impl Compressor {
    /// Compresses at a zstd level.
    pub fn new(level: i32) -> Self {
        Self {
            context: CCtx::create(),
            buffer: Vec::new(),
            level,
            lzma: false,
        }
    }

    /// Compresses with LZMA too, and takes what is worth it.
    pub fn with_lzma(self, lzma: bool) -> Self {
        Self { lzma, ..self }
    }

    /// Compresses content on its own.
    pub fn compress(&mut self, content: &[u8]) -> Result<Packed, FrameFault> {
        self.buffer.clear();
        self.buffer
            .reserve(zstd_safe::compress_bound(content.len()));
        let level = CParameter::CompressionLevel(self.level);
        self.context
            .set_parameter(level)
            .and_then(|_| self.context.compress2(&mut self.buffer, content))
            .map_err(fault)?;
        if self.lzma {
            let packed = lzma::encode(content, &[])?;
            let least = self.buffer.len().min(content.len());
            if is_worth_decoding(packed.len(), least) {
                return Ok(Packed::Lzma(packed));
            }
        }
        let enough = self.buffer.len() < content.len() - content.len() / LEAST_SAVING;
        Ok(if enough {
            Packed::Zstd(self.buffer.clone())
        } else {
            Packed::Stored
        })
    }

    /// Compresses content against references: a zstd frame in any case.
    pub fn compress_against(
        &mut self,
        content: &[u8],
        references: &[u8],
    ) -> Result<Vec<u8>, FrameFault> {
        // A context must not outlive its prefix, so each such frame has its own.
        let mut context = CCtx::create();
        let window = (content.len() + references.len())
            .max(1 << 10)
            .next_power_of_two()
            .ilog2();
        let mut packed = Vec::with_capacity(zstd_safe::compress_bound(content.len()));
        context
            .set_parameter(CParameter::CompressionLevel(self.level))
            .and_then(|_| context.set_parameter(CParameter::WindowLog(window)))
            .and_then(|_| context.ref_prefix(references))
            .and_then(|_| context.compress2(&mut packed, content))
            .map_err(fault)?;
        Ok(packed)
    }
}

/// Whether to take what is dearer to decode, as LZMA is, or takes other frames.
pub(super) const fn is_worth_decoding(dearer: usize, cheaper: usize) -> bool {
    dearer < cheaper - cheaper / LEAST_DEAR_SAVING
}

/// Compresses content with LZMA, with references as its dictionary.
pub fn lzma_against(content: &[u8], references: &[u8]) -> Result<Vec<u8>, FrameFault> {
    lzma::encode(content, references)
}

/// Compresses content as a patch of references, whose steps make all of it: a patch of code where that leaves less to be told. None
/// where there are too many steps to pay.
///
/// # Panics
/// Where steps leave the content or the references.
pub fn patch(
    content: &[u8],
    references: &[u8],
    steps: &[Step],
) -> Result<Option<(Codec, Vec<u8>)>, FrameFault> {
    patch::encode(content, references, steps)
}

/// Decodes frames; keeps zstd's tables and its input buffer from frame to frame.
pub struct Decoder {
    context: DCtx<'static>,
    packed: Vec<u8>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self {
            context: DCtx::create(),
            packed: Vec::new(),
        }
    }
}

impl Decoder {
    /// Decodes a frame and checks its hash: `read_packed` fills a buffer with its bytes in the pack, `references` is the
    /// content that it refers to.
    ///
    /// Never makes more than the frame's length (of a patch, and as much again for its steps), whatever the pack says: the
    /// buffer has that size, and nothing is written elsewhere.
    pub fn decode<E: From<FrameFault>>(
        &mut self,
        frame: &Frame,
        read_packed: impl FnOnce(&mut [u8]) -> Result<(), E>,
        references: &[u8],
    ) -> Result<Vec<u8>, E> {
        let content = if frame.codec == Codec::Stored {
            let mut content = vec![0; frame.pack_len as usize];
            read_packed(&mut content)?;
            content
        } else {
            self.packed.resize(frame.pack_len as usize, 0);
            read_packed(&mut self.packed)?;
            self.unpack(frame, references)?
        };
        check(frame, &content)?;
        Ok(content)
    }

    fn unpack(&mut self, frame: &Frame, references: &[u8]) -> Result<Vec<u8>, FrameFault> {
        let len = frame.len as usize;
        match frame.codec {
            // A context must not outlive its prefix, so each such frame has its own.
            Codec::ZstdReferences => {
                let mut context = DCtx::create();
                context.ref_prefix(references).map_err(fault)?;
                decompress(&mut context, &self.packed, len)
            }
            Codec::Difference => {
                if references.len() < len {
                    return Err(FrameFault::Difference {
                        len,
                        references: references.len(),
                    });
                }
                let mut content = decompress(&mut self.context, &self.packed, len)?;
                bytewise(Way::Add, &mut content, references);
                Ok(content)
            }
            Codec::Lzma | Codec::LzmaReferences => lzma::decode(&self.packed, references, len),
            Codec::Patch => patch::decode(&self.packed, references, len, None),
            Codec::CodePatch => patch::decode(&self.packed, references, len, Some(Moves::new())),
            Codec::Stored | Codec::Zstd => decompress(&mut self.context, &self.packed, len),
        }
    }
}

fn check(frame: &Frame, content: &[u8]) -> Result<(), FrameFault> {
    if content.len() != frame.len as usize {
        return Err(FrameFault::Length {
            expected: frame.len as usize,
            found: content.len(),
        });
    }
    match FrameHash::of(content) {
        found if found == frame.hash => Ok(()),
        found => Err(FrameFault::Hash {
            expected: frame.hash,
            found,
        }),
    }
}

fn decompress(context: &mut DCtx<'_>, packed: &[u8], len: usize) -> Result<Vec<u8>, FrameFault> {
    let used = zstd_safe::find_frame_compressed_size(packed).map_err(fault)?;
    if used != packed.len() {
        return Err(FrameFault::Trailing {
            packed: packed.len(),
            used,
        });
    }
    let mut content = Vec::with_capacity(len);
    context.decompress(&mut content, packed).map_err(fault)?;
    Ok(content)
}

fn fault(code: zstd_safe::ErrorCode) -> FrameFault {
    FrameFault::Zstd(zstd_safe::get_error_name(code).to_owned())
}
