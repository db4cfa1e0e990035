//! Disk images and single files as sources to publish.
//!
//! Opens a path as what it holds: a raw or sparse file and a device (`raw`), a qcow2 image with its backing chain
//! (`qcow2`), any other image format through QEMU's tools (`qemu`). What a format is, and whether content counts as
//! a disk, is decided in `detect`, by content alone. Cutting content into frames belongs to `layer`; directories to
//! `tree`. Nothing here writes to an image.

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::content::{ReadError, Source};

/// How a path is to be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadAs {
    /// Disk images and devices as disks, everything else as a file; decided by content, never by name.
    #[default]
    Auto,
    /// As a disk, whatever it holds: images of a known format as their virtual disk.
    Disk,
    /// As a file: the bytes as they lie.
    File,
}

/// How to open an image.
#[derive(Clone, Debug, Default)]
pub struct ImageOptions {
    /// Whether the bytes or the virtual disk are wanted.
    pub read_as: ReadAs,
}

/// What a source is to a capsule; part of the manifest, and so of the capsule's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// A disk: of a machine, or to be written to one.
    Disk,
    /// Any other file.
    File,
}

/// Container formats of disks, told apart by their magic numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The disk's bytes as they are: a file, sparse or not.
    Raw,
    /// A device of kind "block".
    Device,
    /// QEMU's qcow2, versions 2 and 3.
    Qcow2,
    /// QEMU's first qcow.
    Qcow,
    /// VMware.
    Vmdk,
    /// VirtualBox.
    Vdi,
    /// Hyper-V's VHDX.
    Vhdx,
    /// Virtual PC's VHD.
    Vpc,
    /// QEMU's QED.
    Qed,
    /// Parallels.
    Parallels,
}

/// A source and what is known of it.
pub struct OpenedImage {
    /// The content.
    pub source: Box<dyn Source>,
    /// Disk or file.
    pub kind: ImageKind,
    /// What it is stored as; [`Format::Raw`] where the bytes are taken as they lie.
    pub format: Format,
    /// The device is mounted, or held by another program, and may change while it is read.
    pub in_use: bool,
}

/// Why an image could not be opened.
#[derive(Debug, Error)]
pub enum ImageError {
    /// Reading or parsing failed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Neither a file nor a device.
    #[error("{} is {what}: publish a file, a device, or a directory", .path.display())]
    NotAnImage {
        /// The path.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
}

/// Opens a file, device or disk image for publishing.
pub fn open(_path: &Path, _options: &ImageOptions) -> Result<OpenedImage, ImageError> {
    todo!()
}
