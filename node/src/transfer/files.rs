//! Comparing the contents of a tree with its listing.

use std::io;

use capsule_chunker::layer::restore::Sink;
use capsule_proto::RootHash;
use capsule_proto::listing::Listing;
use capsule_proto::manifest::Component;

use super::check::wrong;
use crate::control::Failure;

/// From this length on, hashing a file's piece in parallel pays.
const PARALLEL_HASH_LEN: usize = 128 << 10;
static ZEROS: [u8; 1 << 18] = [0; 1 << 18];

/// Hashes a tree's contents file by file, and compares with the listing.
pub(super) struct Files<'a> {
    component: &'a Component,
    listing: &'a Listing,
    files: Box<dyn Iterator<Item = (usize, u64, RootHash)> + 'a>,
    current: Option<(usize, u64, RootHash)>,
    hasher: blake3::Hasher,
}

impl<'a> Files<'a> {
    pub(super) fn new(listing: &'a Listing, component: &'a Component) -> Self {
        let mut files: Box<dyn Iterator<Item = _> + 'a> = Box::new(listing.files());
        let current = files.next();
        Self {
            component,
            listing,
            files,
            current,
            hasher: blake3::Hasher::new(),
        }
    }

    /// Closes the files that end here; empty ones among them.
    fn close(&mut self) -> Result<(), Failure> {
        while let Some((entry, 0, root)) = self.current {
            let found = std::mem::replace(&mut self.hasher, blake3::Hasher::new()).finalize();
            if found.as_bytes() != root.as_bytes() {
                let path = &self.listing.entries()[entry].path;
                return Err(wrong(
                    self.component,
                    &format!("file {path} has another hash than in the listing"),
                ));
            }
            self.current = self.files.next();
        }
        Ok(())
    }

    /// Gives each file its part of a piece of `len` bytes.
    fn take(
        &mut self,
        len: u64,
        mut part_of: impl FnMut(&mut blake3::Hasher, std::ops::Range<u64>),
    ) -> Result<(), Failure> {
        let mut at = 0;
        while at < len {
            self.close()?;
            let Some((_, left, _)) = &mut self.current else {
                return Err(wrong(
                    self.component,
                    "its contents are longer than its files",
                ));
            };
            let part = (*left).min(len - at);
            part_of(&mut self.hasher, at..at + part);
            *left -= part;
            at += part;
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<(), Failure> {
        self.close()?;
        if self.current.is_some() {
            return Err(wrong(
                self.component,
                "its contents are shorter than its files",
            ));
        }
        Ok(())
    }
}

impl Sink for Files<'_> {
    fn data(&mut self, _: u64, bytes: &[u8]) -> io::Result<()> {
        let hash = |hasher: &mut blake3::Hasher, part: std::ops::Range<u64>| {
            let part = &bytes[part.start as usize..part.end as usize];
            if part.len() < PARALLEL_HASH_LEN {
                hasher.update(part)
            } else {
                hasher.update_rayon(part)
            };
        };
        self.take(bytes.len() as u64, hash)
            .map_err(io::Error::other)
    }

    fn zeros(&mut self, _: u64, len: u64) -> io::Result<()> {
        let hash = |hasher: &mut blake3::Hasher, part: std::ops::Range<u64>| {
            let mut left = part.end - part.start;
            while left > 0 {
                let piece = left.min(ZEROS.len() as u64);
                hasher.update_rayon(&ZEROS[..piece as usize]);
                left -= piece;
            }
        };
        self.take(len, hash).map_err(io::Error::other)
    }
}
