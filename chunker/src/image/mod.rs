//! Disk images, devices and single files as sources to publish.
//!
//! A path is opened as what it holds: a raw or sparse file, a device (`raw`), a qcow2 image with its backing chain (`chain`,
//! `complete`, `qcow2`; what it tells of change: `record`, `bitmap`), any other image format through QEMU's tools (`qemu`, `nbd`). Nothing here writes to an image. Cutting content into
//! frames belongs to `layer`, directories to `tree`.
//!
//! # Disk or file
//! The kind is part of the manifest and so of the capsule's id; therefore it follows from content, never from a name. A disk is:
//! a device; an image in a container format, published as its virtual disk; a raw file of whole 512-byte sectors that begins
//! with a partition table, a boot sector or a known file system (`detect`). All else is a file. [`ReadAs`] overrides it. Devices
//! are always read as they are, whatever format lies on them.

mod bitmap;
mod chain;
mod complete;
mod detect;
mod nbd;
mod qcow2;
mod qemu;
mod raw;
mod record;
mod tables;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use self::chain::Chain;
pub use self::detect::Format;
use self::detect::Probe;
use self::qcow2::Qcow2Source;
use self::qemu::QemuSource;
use self::raw::RawSource;
pub use self::record::{ImageRecord, Stamp};
use crate::content::{ReadError, Source};

/// How a path is to be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadAs {
    /// As its content tells.
    #[default]
    Auto,
    /// As a disk: images in a container format as their virtual disk, all else as raw.
    Disk,
    /// As a file: the bytes as they lie.
    File,
}

/// How to open an image.
#[derive(Clone, Copy, Debug, Default)]
pub struct ImageOptions {
    /// Whether the bytes or the virtual disk are wanted.
    pub read_as: ReadAs,
}

/// What a source is to a capsule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// A disk: of a machine, or to be written to one.
    Disk,
    /// Any other file.
    File,
}

/// A source, and what is known of it.
pub struct OpenedImage {
    /// The content.
    pub source: Box<dyn Source>,
    /// Disk or file.
    pub kind: ImageKind,
    /// How the content is stored; [`Format::Raw`] where a file's bytes are taken as they lie.
    pub format: Format,
    /// The device is mounted or held by another program, and may change unnoticed while it is read.
    pub in_use: bool,
    /// What its files tell of change, where they are of a kind that does.
    pub record: Option<ImageRecord>,
}

/// Why an image could not be opened.
#[derive(Debug, Error)]
pub enum ImageError {
    /// A file of the image could not be read, or its headers not understood.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Nothing there, or no right to read it.
    #[error("cannot open {}: {source}", .path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Neither a file nor a device.
    #[error("{} is {what}: publish a file, a device, or a directory", .path.display())]
    NotAnImage {
        /// The path.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// QEMU's tools are needed and not there.
    #[error("reading {} ({format}) takes qemu-img and qemu-nbd: install the Debian package qemu-utils, or publish the bytes as they are with --as file", .path.display())]
    NeedsQemu {
        /// The image.
        path: PathBuf,
        /// Its format.
        format: Format,
    },
    /// QEMU's tools could not read the image.
    #[error("{tool} cannot read {}: {why}", .path.display())]
    Qemu {
        /// The image.
        path: PathBuf,
        /// Which tool.
        tool: &'static str,
        /// What it said.
        why: String,
    },
}

impl ImageError {
    fn open(path: &Path, source: io::Error) -> Self {
        Self::Open {
            path: path.into(),
            source,
        }
    }
}

/// Opens a file, device or disk image for publishing.
///
/// Files that an image refers to (backing files, external data, extents) are opened wherever they lie on this machine, but nowhere else.
pub fn open(path: &Path, options: &ImageOptions) -> Result<OpenedImage, ImageError> {
    let metadata = std::fs::metadata(path).map_err(|e| ImageError::open(path, e))?;
    let not_an_image = |what| {
        Err(ImageError::NotAnImage {
            path: path.into(),
            what,
        })
    };
    match metadata.file_type() {
        kind if kind.is_file() => open_file(path, options),
        kind if kind.is_block_device() => open_device(path, options),
        kind if kind.is_dir() => not_an_image("a directory"),
        kind if kind.is_char_device() => not_an_image("a character device"),
        kind if kind.is_fifo() => not_an_image("a named pipe"),
        _ => not_an_image("a socket"),
    }
}

fn open_device(path: &Path, options: &ImageOptions) -> Result<OpenedImage, ImageError> {
    let (file, in_use) = RawSource::open_device(path)?;
    let kind = if options.read_as == ReadAs::File {
        ImageKind::File
    } else {
        ImageKind::Disk
    };
    Ok(OpenedImage {
        source: Box::new(RawSource::device(path, file)?),
        kind,
        format: Format::Device,
        in_use,
        record: None,
    })
}

fn open_file(path: &Path, options: &ImageOptions) -> Result<OpenedImage, ImageError> {
    let file = File::open(path).map_err(|e| ImageError::open(path, e))?;
    let raw = |file, kind| {
        Ok(OpenedImage {
            record: Some(ImageRecord::new(&Chain::raw(path, &file)?)),
            source: Box::new(RawSource::file(path, file)?),
            kind,
            format: Format::Raw,
            in_use: false,
        })
    };
    if options.read_as == ReadAs::File {
        return raw(file, ImageKind::File);
    }
    let len = file
        .metadata()
        .map_err(|e| ImageError::open(path, e))?
        .len();
    let probe = Probe::read(&file, len).map_err(|e| ReadError::io(path, 0, e))?;
    let format = probe.format();
    let (source, record): (Box<dyn Source>, _) = match format {
        Format::Raw | Format::Device => {
            let disk = options.read_as == ReadAs::Disk || probe.looks_like_disk();
            let kind = if disk {
                ImageKind::Disk
            } else {
                ImageKind::File
            };
            return raw(file, kind);
        }
        Format::Qcow2 => {
            let chain = chain::open(path, file)?;
            let record = ImageRecord::new(&chain);
            if chain.needs_qemu {
                let source = QemuSource::open(path, format)?;
                // From now on the source watches the files.
                record.check_unchanged()?;
                (Box::new(source), Some(record))
            } else {
                (Box::new(Qcow2Source::new(chain.links)?), Some(record))
            }
        }
        _ => (Box::new(QemuSource::open(path, format)?), None),
    };
    Ok(OpenedImage {
        source,
        kind: ImageKind::Disk,
        format,
        in_use: false,
        record,
    })
}
