//! The virtual disk of a qcow2 image, with its backing chain.
//!
//! The clusters' tables and compressed data are read by the `imago` crate, over files that `chain` has opened. What it does not read
//! (zstd, extended L2 entries) goes through `qemu`.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping};

use super::chain::Link;
use super::detect::Format;
use crate::content::{Content, Extent, Extents, ReadError, Source, check_range};

/// Neighbouring clusters of one kind are reported as one extent up to this length.
const MAX_EXTENT: u64 = 64 << 20;

/// A virtual disk.
pub(super) struct Qcow2Source {
    access: FormatAccess<Storage>,
    links: Arc<[Arc<Link>]>,
    len: u64,
}

impl Qcow2Source {
    /// Puts the disk of the first image together, from the end of the chain up.
    pub fn new(links: Arc<[Arc<Link>]>) -> Result<Self, ReadError> {
        let mut backing = None;
        for link in links.iter().rev() {
            let layer = layer(link, backing.take()).map_err(|e| ReadError::Format {
                path: link.path.clone(),
                offset: 0,
                why: format!("{e}; qemu-img check tells more"),
            })?;
            backing = Some(layer);
        }
        let access = backing.expect("a chain has at least the image itself");
        let len = access.size();
        Ok(Self { access, links, len })
    }

    fn path(&self) -> PathBuf {
        self.links[0].path.clone()
    }

    fn failed(&self, offset: u64, error: io::Error) -> ReadError {
        let why =
            format!("reading this part of its disk failed: {error}; qemu-img check tells more");
        ReadError::Format {
            path: self.path(),
            offset,
            why,
        }
    }

    fn extent(&self, start: u64) -> Result<Extent, ReadError> {
        let mut extent: Option<Extent> = None;
        let mut at = start;
        while at < self.len && at - start < MAX_EXTENT {
            let (mapping, len) = self
                .access
                .get_mapping(at, self.len - at)
                .map_err(|e| self.failed(at, e))?;
            if len == 0 {
                return Err(self.failed(at, io::Error::other("the mapping is empty")));
            }
            let zero = matches!(mapping, Mapping::Zero { .. });
            match &mut extent {
                Some(extent) if extent.zero == zero => extent.range.end += len,
                Some(_) => break,
                None => {
                    extent = Some(Extent {
                        range: at..at + len,
                        zero,
                    })
                }
            }
            at += len;
        }
        Ok(extent.expect("asked for before the end"))
    }
}

/// One image of the chain, over the disk behind it.
fn layer(link: &Link, backing: Option<FormatAccess<Storage>>) -> io::Result<FormatAccess<Storage>> {
    let storage = Storage::try_from(link.file.try_clone()?)?;
    // Everything is at hand: nothing more may be opened.
    let gate = DenyImplicitOpenGate::default();
    if link.format != Format::Qcow2 {
        return Ok(FormatAccess::new(
            Raw::<Storage>::builder(storage).write(false).open(gate)?,
        ));
    }
    let data = match &link.data {
        Some(data) => Some(Storage::try_from(data.file.try_clone()?)?),
        None => None,
    };
    let builder = Qcow2::<Storage>::builder(storage)
        .write(false)
        .backing(backing)
        .data_file(data);
    Ok(FormatAccess::new(builder.open(gate)?))
}

impl Content for Qcow2Source {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        check_range(self.len, offset, buf.len())?;
        self.access
            .read(buf, offset)
            .map_err(|e| self.failed(offset, e))
    }
}

impl Source for Qcow2Source {
    fn extents(&self) -> Extents<'_> {
        let mut at = 0;
        Box::new(std::iter::from_fn(move || {
            if at == self.len {
                return None;
            }
            let extent = self.extent(at);
            at = extent.as_ref().map_or(self.len, |extent| extent.range.end);
            Some(extent)
        }))
    }

    fn check_unchanged(&self) -> Result<(), ReadError> {
        self.links
            .iter()
            .try_for_each(|link| link.check_unchanged())
    }
}
