//! Content that can be read, and sources that can be published.
//!
//! The two traits between those who have bytes (images, directory trees, decoded layers) and those who
//! work on bytes (the layer encoder, exports, the store). How each kind is read lives with that kind, in
//! `image`, `tree` and `layer`; hashing lives in `bao`.

use std::io;
use std::ops::Range;
use std::path::PathBuf;

use positioned_io::ReadAt;
use thiserror::Error;

use crate::layer::read::LayerContent;

/// Why content could not be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// A range that is not within the content.
    #[error("bytes {}..{} lie outside content of {size} bytes", .range.start, .range.end)]
    OutOfRange {
        /// What was asked for.
        range: Range<u64>,
        /// How long the content is.
        size: u64,
    },
    /// The operating system could not read, open or examine a file.
    #[error("reading {} at byte {offset}: {source}", .path.display())]
    Io {
        /// The file or device.
        path: PathBuf,
        /// Offset in that file.
        offset: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// A source is no longer what it was when it was opened.
    #[error("{} changed while it was read ({why}): nothing was published; stop what writes to it, or publish a snapshot", .path.display())]
    Changed {
        /// The file, device or directory.
        path: PathBuf,
        /// What differs: size, time of modification, type.
        why: String,
    },
    /// A file whose own format (an image's tables, say) is damaged or not supported.
    #[error("{} at byte {offset}: {why}", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Offset in the file, or in the virtual disk where the fault has none of its own.
        offset: u64,
        /// What is wrong, and the way out.
        why: String,
    },
    /// Content that is decoded from layers could not be decoded; the cause names the frame.
    #[error("decoding byte {offset} of the content: {source}")]
    Decode {
        /// Offset in the content.
        offset: u64,
        /// What failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl ReadError {
    /// An error of the operating system about a file.
    pub fn io(path: impl Into<PathBuf>, offset: u64, source: io::Error) -> Self {
        Self::Io {
            path: path.into(),
            offset,
            source,
        }
    }
}

/// Bytes of known length that can be read at any place, from many threads.
pub trait Content: Send + Sync {
    /// Length in bytes; does not change.
    fn len(&self) -> u64;

    /// Whether there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a range is known to be zeros without reading it. What does not know says no.
    fn is_zero(&self, _range: Range<u64>) -> bool {
        false
    }

    /// Fills the buffer from an offset: all of it, or an error. Reading nothing within the content succeeds.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError>;

    /// Itself, if it is read through a layer: a layer upon it then reads both as one, so that what one read costs is bounded
    /// however many layers it leads through.
    fn as_layer(&self) -> Option<&LayerContent> {
        None
    }
}

/// A range of a source that is wholly stored, or known to be zero without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The bytes; never empty.
    pub range: Range<u64>,
    /// Whether they are known to be zero: holes, unallocated clusters.
    pub zero: bool,
}

/// Walks a source's extents; lazily, so that memory stays bounded whatever the number of extents.
pub type Extents<'a> = Box<dyn Iterator<Item = Result<Extent, ReadError>> + Send + 'a>;

/// Lengths of the parts of a source, in order.
pub type Parts<'a> = Box<dyn Iterator<Item = u64> + Send + 'a>;

/// Content that can be published: says where it is zero, and whether it stayed the same.
pub trait Source: Content {
    /// The extents from 0 to the end, in order, without gaps or overlaps; neighbours may be of one kind.
    ///
    /// The encoder reads data extents once, in order, in pieces of about a megabyte; zero extents never.
    fn extents(&self) -> Extents<'_>;

    /// For the contents of a tree: the length of each regular file in listing order, empty ones included;
    /// they add up to [`Content::len`]. `None` for a stream.
    ///
    /// Each part is hashed on its own, and its start is a good place to cut frames.
    fn parts(&self) -> Option<Parts<'_>> {
        None
    }

    /// Fails with [`ReadError::Changed`] if the source may have changed since it was opened.
    ///
    /// Called after the last read. Reads that find a file shorter than it was fail by themselves.
    fn check_unchanged(&self) -> Result<(), ReadError>;
}

/// Checks a range against the length of content.
pub fn check_range(size: u64, offset: u64, len: usize) -> Result<(), ReadError> {
    match offset.checked_add(len as u64) {
        Some(end) if end <= size => Ok(()),
        end => Err(ReadError::OutOfRange {
            range: offset..end.unwrap_or(u64::MAX),
            size,
        }),
    }
}

/// Content in memory: listings, manifests, tests.
#[derive(Clone, Debug, Default)]
pub struct BytesSource<B = Vec<u8>>(pub B);

impl<B: AsRef<[u8]> + Send + Sync> Content for BytesSource<B> {
    fn len(&self) -> u64 {
        self.0.as_ref().len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        check_range(self.len(), offset, buf.len())?;
        let start = offset as usize;
        buf.copy_from_slice(&self.0.as_ref()[start..start + buf.len()]);
        Ok(())
    }
}

impl<B: AsRef<[u8]> + Send + Sync> Source for BytesSource<B> {
    fn extents(&self) -> Extents<'_> {
        let all = Extent {
            range: 0..self.len(),
            zero: false,
        };
        Box::new((!self.is_empty()).then_some(Ok(all)).into_iter())
    }

    fn check_unchanged(&self) -> Result<(), ReadError> {
        Ok(())
    }
}

/// Content as [`ReadAt`], for the functions of `bao` and the store. Reads stop short only at the end.
#[derive(Clone, Copy, Debug)]
pub struct AsReadAt<C>(pub C);

impl<C: std::ops::Deref<Target: Content>> ReadAt for AsReadAt<C> {
    fn read_at(&self, pos: u64, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.0.len().saturating_sub(pos).min(buf.len() as u64) as usize;
        self.0
            .read_at(pos, &mut buf[..len])
            .map_err(io::Error::other)?;
        Ok(len)
    }
}

/// Hears how far long work has come, and can stop it.
///
/// Called from the threads that do the work, about once a megabyte: implementations only count.
pub trait Progress: Send + Sync {
    /// So many more bytes of content were gone through, zeros included.
    fn read(&self, _bytes: u64) {}

    /// So many more bytes of result were written: of the pack when publishing, of the target when restoring.
    fn written(&self, _bytes: u64) {}

    /// Whether the work should stop; it then fails with an error named `Cancelled`.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Nobody listens.
impl Progress for () {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_exactly_or_not_at_all() {
        let source = BytesSource(b"capsule".to_vec());
        let mut buf = [0; 3];
        source.read_at(4, &mut buf).unwrap();
        assert_eq!(&buf, b"ule");
        source.read_at(7, &mut []).unwrap();
        for offset in [5, 8, u64::MAX] {
            assert!(matches!(
                source.read_at(offset, &mut buf),
                Err(ReadError::OutOfRange { size: 7, .. })
            ));
        }
        let mut long = [0; 9];
        assert_eq!(
            ReadAt::read_at(&AsReadAt(&source), 5, &mut long).unwrap(),
            2
        );
        assert_eq!(&long[..2], b"le");
    }

    #[test]
    fn extents_cover_the_content() {
        let extents = |bytes: &[u8]| {
            BytesSource(bytes.to_vec())
                .extents()
                .map(Result::unwrap)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            extents(b"ab"),
            [Extent {
                range: 0..2,
                zero: false
            }]
        );
        assert_eq!(extents(b""), []);
    }
}
