//! Whole blobs made on this machine: written to a temporary file as they grow, then given their name.
//!
//! Order: the temporary files are synced, renamed into place, the directory is synced, the row is
//! committed. A crash before the commit leaves files without a row, which the next open removes.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use capsule_chunker::bao::{outboard_len, tree_of};
use capsule_proto::RootHash;
use positioned_io::{ReadAt, WriteAt};

use super::blob::{Blob, Part, dir_of, is_small, lock, path_of};
use super::disk::{DiskFile, OpenMode, read_exact};
use super::error::{IoFault, WriteError};
use super::rows::BlobKind;
use super::{Inner, Store};

/// Directory of what is not a blob yet; emptied at open.
pub(super) const TMP_DIR: &str = "tmp";
/// Small writes are gathered up to this; larger ones go through as they are.
const BUFFER_LEN: usize = 256 << 10;

/// A file of unnamed content in the store's directory, removed when dropped: scratch space for an
/// outboard while it grows (`TreeHasher::with_storage`).
#[derive(Debug)]
pub struct Scratch {
    inner: Arc<Inner>,
    file: Arc<dyn DiskFile>,
    /// `None` once it has been given another name.
    path: Option<PathBuf>,
}

/// A blob that is being written; dropped without [`commit`](Import::commit), it leaves nothing behind.
#[derive(Debug)]
pub struct Import {
    scratch: Scratch,
    buffer: Vec<u8>,
    /// Bytes in the file, the buffer not counted.
    written: u64,
    /// Bytes taken from the quota.
    charged: u64,
}

/// Where an outboard is.
#[derive(Debug)]
pub enum Outboard<'a> {
    /// In memory.
    Bytes(&'a [u8]),
    /// In a file of the store, which becomes the blob's.
    Scratch(Scratch),
}

impl Store {
    /// Begins a blob whose root is not known yet.
    pub fn begin_import(&self) -> Result<Import, WriteError> {
        let scratch = self.scratch()?;
        Ok(Import {
            scratch,
            buffer: Vec::new(),
            written: 0,
            charged: 0,
        })
    }

    /// Makes an empty scratch file.
    pub fn scratch(&self) -> Result<Scratch, WriteError> {
        self.inner.scratch().map_err(WriteError::io)
    }

    /// Stores bytes at hand (a manifest, a listing, an index), durably, and names them.
    pub fn put_small(&self, bytes: &[u8], kind: BlobKind) -> Result<RootHash, WriteError> {
        if is_small(bytes.len() as u64) {
            let root = RootHash::of(bytes);
            self.inner.put_small(&root, bytes.to_vec(), kind)?;
            return Ok(root);
        }
        let (tree, outboard) = tree_of(bytes);
        let mut import = self.begin_import()?;
        import.write_all(bytes).map_err(|e| import.fault(e))?;
        import.commit(&tree.root, tree.size, &outboard[..], kind)?;
        Ok(tree.root)
    }
}

impl Import {
    /// Names the blob and makes it durable.
    ///
    /// `root`, `size` and `outboard` are what a `TreeHasher` gave for the bytes written here: the store
    /// does not hash them again. A blob that is complete already stays as it is; a partial one is replaced.
    /// The blob is collected by the next `gc` unless it is live or guarded: take a
    /// [`guard`](Store::guard) of the root first.
    pub fn commit<'a>(
        mut self,
        root: &RootHash,
        size: u64,
        outboard: impl Into<Outboard<'a>>,
        kind: BlobKind,
    ) -> Result<(), WriteError> {
        let known = self.written + self.buffer.len() as u64;
        if known != size {
            return Err(WriteError::Size {
                root: *root,
                claimed: size,
                known,
            });
        }
        let inner = Arc::clone(&self.scratch.inner);
        if is_small(size) {
            let bytes = self.take_all()?;
            drop(self);
            return inner.put_small(root, bytes, kind);
        }
        self.write_out().map_err(|e| self.fault(e))?;
        let mut outboard = inner.outboard_file(root, size, outboard.into())?;
        inner.place(self, &mut outboard, root, kind)
    }

    /// Reads what was written.
    pub fn read_exact_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), WriteError> {
        self.write_out().map_err(|e| self.fault(e))?;
        read_exact(&*self.scratch.file, offset, into).map_err(|e| self.scratch.fault("read", e))
    }

    /// All bytes of a blob that turned out small.
    fn take_all(&mut self) -> Result<Vec<u8>, WriteError> {
        let mut bytes = vec![0; self.written as usize];
        read_exact(&*self.scratch.file, 0, &mut bytes)
            .map_err(|e| self.scratch.fault("read", e))?;
        bytes.append(&mut self.buffer);
        Ok(bytes)
    }

    fn write_out(&mut self) -> io::Result<()> {
        if !self.buffer.is_empty() {
            let buffer = std::mem::take(&mut self.buffer);
            self.append(&buffer)?;
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let len = bytes.len() as u64;
        self.scratch
            .inner
            .space
            .reserve(len)
            .map_err(|full| io::Error::new(io::ErrorKind::StorageFull, full))?;
        self.charged += len;
        self.scratch.file.write_at(self.written, &[bytes])?;
        self.written += len;
        Ok(())
    }

    /// The typed form of an error that [`Write`] gave.
    pub fn fault(&self, error: io::Error) -> WriteError {
        match error
            .get_ref()
            .and_then(|e| e.downcast_ref::<super::Full>())
        {
            Some(full) => WriteError::Full(full.clone()),
            None => self.scratch.fault("write", error),
        }
    }
}

impl Write for Import {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() + bytes.len() > BUFFER_LEN {
            self.write_out()?;
        }
        if bytes.len() >= BUFFER_LEN {
            self.append(bytes)?;
        } else {
            self.buffer.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.write_out()
    }
}

impl Drop for Import {
    fn drop(&mut self) {
        self.scratch.inner.space.release(self.charged);
    }
}

impl Inner {
    pub(super) fn scratch(self: &Arc<Self>) -> Result<Scratch, IoFault> {
        let number = self.next_tmp.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(TMP_DIR).join(number.to_string());
        match self.disk.open(&path, OpenMode::Truncate) {
            Ok(file) => Ok(Scratch {
                inner: Arc::clone(self),
                file,
                path: Some(path),
            }),
            Err(e) => Err(IoFault::new("create", path, e)),
        }
    }

    fn put_small(&self, root: &RootHash, bytes: Vec<u8>, kind: BlobKind) -> Result<(), WriteError> {
        let blob = self.entry(root, bytes.len() as u64, kind)?;
        let stored = self
            .keep_small(&blob, bytes)
            .and_then(|()| self.flush(&blob));
        stored.inspect_err(|_| self.forget_if_empty(&blob))
    }

    /// The outboard as a scratch file of the right length.
    pub(super) fn outboard_file(
        self: &Arc<Self>,
        root: &RootHash,
        size: u64,
        outboard: Outboard<'_>,
    ) -> Result<Scratch, WriteError> {
        let scratch = match outboard {
            Outboard::Scratch(scratch) => scratch,
            Outboard::Bytes(bytes) => {
                let scratch = self.scratch().map_err(WriteError::io)?;
                scratch
                    .file
                    .write_at(0, &[bytes])
                    .map_err(|e| scratch.fault("write", e))?;
                scratch
            }
        };
        let (claimed, known) = (
            outboard_len(size),
            scratch.file.len().map_err(|e| scratch.fault("read", e))?,
        );
        if claimed != known {
            return Err(WriteError::Size {
                root: *root,
                claimed,
                known,
            });
        }
        Ok(scratch)
    }

    fn place(
        &self,
        mut import: Import,
        outboard: &mut Scratch,
        root: &RootHash,
        kind: BlobKind,
    ) -> Result<(), WriteError> {
        import.scratch.sync()?;
        outboard.sync()?;
        loop {
            let blob = self.entry(root, import.written, kind)?;
            let turn = blob.turn();
            if blob.state().gone {
                continue;
            }
            if blob.completes(&blob.state().durable) {
                return Ok(());
            }
            let result = self.place_in_turn(&blob, &mut import, outboard);
            drop(turn);
            return result.inspect_err(|_| self.forget_if_empty(&blob));
        }
    }

    fn place_in_turn(
        &self,
        blob: &Blob,
        import: &mut Import,
        outboard: &mut Scratch,
    ) -> Result<(), WriteError> {
        // Writers to a partial blob of this root must not write on to the files that are replaced.
        let _alone = blob.gate_exclusive();
        let renamed = outboard
            .rename(path_of(&blob.root, Part::Tree))
            .and_then(|()| import.scratch.rename(path_of(&blob.root, Part::Data)));
        self.handles.forget(&blob.root);
        blob.state().files = None;
        renamed?;
        let dir = dir_of(&blob.root);
        self.disk
            .sync_dir(&dir)
            .map_err(|e| WriteError::io(IoFault::new("sync", dir, e)))?;
        self.commit_presence(blob, &blob.all(), None)?;
        let mut state = blob.state();
        // What it took from the quota while it was written passes to the blob.
        self.space.release(blob.cost(&state.present));
        self.space.release(std::mem::take(&mut import.charged));
        self.space.count(blob.cost(&blob.all()));
        state.present = blob.all();
        state.durable = blob.all();
        state.dirty = 0;
        state.row = true;
        lock(&self.dirty).retain(|root| *root != blob.root);
        Ok(())
    }

    /// Takes an entry out again of which nothing came to be stored.
    fn forget_if_empty(&self, blob: &Blob) {
        if self.is_active(&blob.root) {
            return; // Somebody is about to fetch it.
        }
        let mut blobs = self.blobs_mut();
        let state = blob.state();
        if state.present.is_empty() && !state.row && !state.gone {
            blobs.remove(&blob.root);
        }
    }
}

impl Scratch {
    /// Makes its bytes durable.
    pub(super) fn sync(&self) -> Result<(), WriteError> {
        self.file.sync().map_err(|e| self.fault("sync", e))
    }

    /// Gives it another name, under which it stays.
    pub(super) fn rename(&mut self, to: PathBuf) -> Result<(), WriteError> {
        if let Some(path) = &self.path {
            self.inner
                .disk
                .rename(path, &to)
                .map_err(|e| WriteError::io(IoFault::new("rename", path, e)))?;
        }
        self.path = None;
        Ok(())
    }

    fn fault(&self, doing: &'static str, error: io::Error) -> WriteError {
        WriteError::io(IoFault::new(
            doing,
            self.path.as_deref().unwrap_or(Path::new(TMP_DIR)),
            error,
        ))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // If this fails, the next open removes it.
            let _ = self.inner.disk.remove(path);
        }
    }
}

impl ReadAt for Scratch {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(offset, buf)
    }
}

impl WriteAt for Scratch {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_at(offset, &[bytes])?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> From<&'a [u8]> for Outboard<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Bytes(bytes)
    }
}

impl<'a> From<&'a Vec<u8>> for Outboard<'a> {
    fn from(bytes: &'a Vec<u8>) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<Scratch> for Outboard<'_> {
    fn from(scratch: Scratch) -> Self {
        Self::Scratch(scratch)
    }
}
