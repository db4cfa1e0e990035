//! Bytes as they lie: regular files with their holes, and devices.
//!
//! Devices do not say where they are zero; the encoder finds out by reading. Formats are not looked at here.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::ImageError;
use crate::content::{Content, Extent, Extents, ReadError, Source, check_range};
use crate::osfile::{self, Fingerprint};

/// A file or device, open for reading.
pub(super) struct RawSource {
    path: PathBuf,
    file: File,
    len: u64,
    /// What changes when a file is written to; devices have no such thing.
    stamp: Option<Fingerprint>,
}

impl RawSource {
    /// Takes an open regular file.
    pub fn file(path: &Path, file: File) -> Result<Self, ReadError> {
        let stat = rustix::fs::fstat(&file).map_err(|e| ReadError::io(path, 0, e.into()))?;
        let stamp = Fingerprint::of(&stat);
        Ok(Self {
            path: path.into(),
            file,
            len: stamp.size(),
            stamp: Some(stamp),
        })
    }

    /// Takes an open device.
    pub fn device(path: &Path, file: File) -> Result<Self, ReadError> {
        let len = device_len(path, &file)?;
        Ok(Self {
            path: path.into(),
            file,
            len,
            stamp: None,
        })
    }

    /// Opens a device, alone if possible: while it is held so, nobody can mount it. Also says whether somebody has it already.
    pub fn open_device(path: &Path) -> Result<(File, bool), ImageError> {
        use rustix::fs::{Mode, OFlags};
        let open = |flags| {
            rustix::fs::open(
                path,
                OFlags::RDONLY | OFlags::CLOEXEC | flags,
                Mode::empty(),
            )
        };
        let opened = match open(OFlags::EXCL) {
            Err(rustix::io::Errno::BUSY) => open(OFlags::empty()).map(|fd| (fd, true)),
            result => result.map(|fd| (fd, false)),
        };
        let (fd, in_use) = opened.map_err(|e| ImageError::open(path, e.into()))?;
        Ok((File::from(fd), in_use))
    }
}

/// A device is as long as one can seek.
fn device_len(path: &Path, file: &File) -> Result<u64, ReadError> {
    rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))
        .map_err(|e| ReadError::io(path, 0, e.into()))
}

impl Content for RawSource {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        check_range(self.len, offset, buf.len())?;
        osfile::read_exact(&self.path, &self.file, offset, buf)
    }
}

impl Source for RawSource {
    fn extents(&self) -> Extents<'_> {
        let mut at = 0;
        Box::new(std::iter::from_fn(move || {
            if at == self.len {
                return None;
            }
            let extent = match self.stamp {
                Some(_) => osfile::extent_at(&self.file, at, self.len)
                    .map_err(|e| ReadError::io(&self.path, at, e)),
                None => Ok(Extent {
                    range: at..self.len,
                    zero: false,
                }),
            };
            at = extent.as_ref().map_or(self.len, |extent| extent.range.end);
            Some(extent)
        }))
    }

    fn check_unchanged(&self) -> Result<(), ReadError> {
        match &self.stamp {
            Some(stamp) => stamp.check(&self.path, &self.file),
            None if device_len(&self.path, &self.file)? == self.len => Ok(()),
            None => Err(ReadError::Changed {
                path: self.path.clone(),
                why: "its size changed".to_owned(),
            }),
        }
    }
}
