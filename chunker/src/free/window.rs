//! Reading within a part of a disk, and little-endian numbers of what was read.

use std::ops::Range;

use crate::content::{Content, ReadError};

/// What is wrong with a file system, before it is said with which.
#[derive(Debug)]
pub(super) enum Fault {
    Read(ReadError),
    Dirty(&'static str),
    Damaged(String),
    Unsupported(String),
    Cancelled,
}

impl Fault {
    pub fn damaged(why: impl Into<String>) -> Self {
        Self::Damaged(why.into())
    }
}

impl From<ReadError> for Fault {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

/// A part of a disk: a partition, or all of it.
pub(super) struct Window<'a> {
    disk: &'a dyn Content,
    range: Range<u64>,
}

impl<'a> Window<'a> {
    /// Takes the range as far as the disk goes.
    pub fn new(disk: &'a dyn Content, range: Range<u64>) -> Self {
        let end = range.end.min(disk.len());
        Self {
            disk,
            range: range.start.min(end)..end,
        }
    }

    pub fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Its first byte on the disk.
    pub fn start(&self) -> u64 {
        self.range.start
    }

    /// Fills a buffer from an offset; whether the window has that many bytes there.
    pub fn read_if_there(&self, offset: u64, buf: &mut [u8]) -> Result<bool, ReadError> {
        match offset.checked_add(buf.len() as u64) {
            Some(end) if end <= self.len() => {
                self.disk.read_at(self.range.start + offset, buf)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Fills a buffer from an offset that the file system itself named.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Fault> {
        match self.read_if_there(offset, buf)? {
            true => Ok(()),
            false => Err(Fault::Damaged(format!(
                "it refers to byte {offset}, where it has none"
            ))),
        }
    }
}

/// The number at a place in bytes that are known to be long enough.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
