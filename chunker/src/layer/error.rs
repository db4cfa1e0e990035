//! Why a range could not be read through a layer.

use capsule_proto::RootHash;
use thiserror::Error;

use super::budget::Spent;
use super::codec::FrameFault;
use super::pages::IndexFault;
use crate::content::ReadError;

/// Why a range could not be read through a layer.
#[derive(Debug, Error)]
pub enum LayerError {
    /// The index is damaged, not there, or contradicts itself.
    #[error("the layer's index: {0}")]
    Index(#[from] IndexFault),
    /// The reader gave other sources than the index names.
    #[error("the layer reads {expected} sources, but {found} were given")]
    Sources {
        /// By the index.
        expected: usize,
        /// By the caller.
        found: usize,
    },
    /// A source has another size than the index says.
    #[error(
        "source {source_id} of the layer has {found} bytes, not {expected}: it is not the content that the layer was made for"
    )]
    SourceSize {
        /// Position among the sources.
        source_id: usize,
        /// By the index.
        expected: u64,
        /// By the caller.
        found: u64,
    },
    /// A source could not be read.
    #[error("source {source_id} of the layer: {source}")]
    Source {
        /// Position among the sources.
        source_id: usize,
        /// What failed there.
        source: Box<ReadError>,
    },
    /// The pack could not be read.
    #[error("reading frame {frame}, {len} bytes at {at} of the pack: {source}")]
    Pack {
        /// The frame's id.
        frame: u32,
        /// First byte in the pack.
        at: u64,
        /// How many bytes.
        len: u32,
        /// What the storage said.
        source: std::io::Error,
    },
    /// A frame could not be decoded.
    #[error("frame {frame}, at byte {at} of the pack: {fault}")]
    Frame {
        /// The frame's id.
        frame: u32,
        /// First byte in the pack.
        at: u64,
        /// What is wrong with it.
        fault: FrameFault,
    },
    /// A run reads beyond the end of its frame.
    #[error(
        "the layer's index: bytes at {start} of the component lie beyond the end of frame {frame}"
    )]
    BeyondFrame {
        /// First byte in the component.
        start: u64,
        /// The frame's id.
        frame: u32,
    },
    /// A frame refers to what it must not.
    #[error("the layer's index: frame {frame} refers to frame {to}, {why}")]
    Reference {
        /// The frame's id.
        frame: u32,
        /// What it refers to.
        to: u32,
        /// Which rule it breaks.
        why: &'static str,
    },
    /// A frame was to be made of local data, which is no longer what it was.
    #[error("local data no longer has frame {frame}{}", .source.as_ref().map(|error| format!(": {error}")).unwrap_or_default())]
    Drifted {
        /// The frame's id.
        frame: u32,
        /// Why it could not be read, where that is why.
        source: Option<Box<ReadError>>,
    },
    /// The read costs too much, which is the layer's fault, or was told to stop.
    #[error(transparent)]
    Spent(#[from] Spent),
    /// What failed belongs to a layer further down.
    #[error("the layer that makes {target}: {source}")]
    Below {
        /// What that layer makes.
        target: RootHash,
        /// What failed there.
        source: Box<LayerError>,
    },
}
