//! Reading: verified ranges for peers, whole blobs for exports and decoding.
//!
//! What goes to peers is checked against its root while it is encoded, so that a disk's silent damage is
//! found here and not by them. Whoever reads through [`Store::open_blob`] checks what it decodes itself.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use capsule_chunker::bao::{EncodeError, encode_range};
use capsule_proto::ranges::{Height, group_count};
use capsule_proto::{GROUP_LEN, GroupRanges, RootHash};
use positioned_io::ReadAt;

use super::blob::{Blob, BlobFiles, Part, path_of};
use super::disk::OpenMode;
use super::error::{DatabaseError, IoFault, ReadError};
use super::gc::ActiveGuard;
use super::meta::SMALL;
use super::{Inner, Store};

/// What is here of a blob or component.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Presence {
    /// Size in bytes.
    pub size: u64,
    /// The groups that are here.
    pub ranges: GroupRanges,
    /// Whether these are all.
    pub complete: bool,
}

impl Presence {
    pub(super) fn new(size: u64, ranges: GroupRanges) -> Self {
        let complete = ranges.contains_run(&(0..group_count(size)));
        Self {
            size,
            ranges,
            complete,
        }
    }
}

impl Store {
    /// What can be served of a root: a blob's verified groups (committed or not), or a component's.
    ///
    /// Where both are known, the blob if it is complete, else the component.
    pub fn present(&self, root: &RootHash) -> Option<Presence> {
        let blob = self
            .inner
            .blob(root)
            .map(|blob| Presence::new(blob.size, blob.state().present.clone()));
        match blob {
            Some(blob) if blob.complete => Some(blob),
            other => self.inner.component_presence(root).or(other),
        }
    }

    /// What is here of a blob whatever happens to this process: the committed groups.
    pub fn durable(&self, root: &RootHash) -> Option<Presence> {
        let blob = self.inner.blob(root)?;
        let ranges = blob.state().durable.clone();
        Some(Presence::new(blob.size, ranges))
    }

    /// Appends the encoding of a run of groups of a blob or component, up to the node of that height, verified while it is made.
    ///
    /// On error `out` is as it was. Groups found damaged are taken out of what is present, durably, and
    /// reported ([`Store::on_damage`]).
    pub fn read_encoded(
        &self,
        root: &RootHash,
        groups: Range<u64>,
        height: Height,
        out: &mut Vec<u8>,
    ) -> Result<(), ReadError> {
        let blob = self.inner.blob(root);
        if let Some(blob) = &blob
            && blob.state().present.contains_run(&groups)
            && !groups.is_empty()
        {
            return self.inner.encode_blob(blob, groups, height, out);
        }
        if let Some(component) = self.inner.component_entry(root) {
            return self
                .inner
                .encode_component(root, &component, groups, height, out);
        }
        match blob {
            Some(_) => Err(ReadError::Absent {
                root: *root,
                groups,
            }),
            None => Err(ReadError::Unknown(*root)),
        }
    }

    /// Opens a complete blob for reading at any place, unverified; it is not collected meanwhile.
    ///
    /// Holds two file descriptors of its own accord while it lives: bound how many you keep.
    pub fn open_blob(&self, root: &RootHash) -> Result<Arc<BlobReader>, ReadError> {
        let guard = self.guard([*root]);
        let blob = self.inner.complete_blob(root)?;
        let bytes = if blob.is_small() {
            Bytes::Small(self.inner.small_bytes(&blob)?)
        } else {
            Bytes::Files(
                self.inner
                    .handles
                    .get(&*self.inner.disk, root, OpenMode::Existing)?,
            )
        };
        Ok(Arc::new(BlobReader {
            bytes,
            size: blob.size,
            _guard: guard,
        }))
    }

    /// Opens a blob of which only some chunk groups may be here: others fail when they are read. Nothing that comes later is seen.
    pub fn open_partial(&self, root: &RootHash) -> Result<Arc<PartialReader>, ReadError> {
        let guard = self.guard([*root]);
        let blob = self.inner.blob(root).ok_or(ReadError::Unknown(*root))?;
        let here = blob.state().durable.clone();
        if blob.completes(&here) {
            return Ok(Arc::new(PartialReader {
                reader: self.open_blob(root)?,
                here: None,
            }));
        }
        // Where nothing is here there may be no files either.
        let bytes = if here.is_empty() {
            Bytes::Small(Arc::default())
        } else {
            let handles = &self.inner.handles;
            Bytes::Files(handles.get(&*self.inner.disk, root, OpenMode::Existing)?)
        };
        Ok(Arc::new(PartialReader {
            reader: Arc::new(BlobReader {
                bytes,
                size: blob.size,
                _guard: guard,
            }),
            here: Some(here),
        }))
    }

    /// Opens a blob that may be coming: what is here when it is read can be read, and the rest fails.
    pub fn open_coming(&self, root: &RootHash) -> Result<Arc<ComingReader>, ReadError> {
        let guard = self.guard([*root]);
        let blob = self.inner.blob(root).ok_or(ReadError::Unknown(*root))?;
        Ok(Arc::new(ComingReader {
            inner: Arc::clone(&self.inner),
            blob,
            _guard: guard,
        }))
    }

    /// Opens the hash tree of a complete blob, or of a component. Who reads it verifies it.
    pub fn open_outboard(
        &self,
        root: &RootHash,
    ) -> Result<Arc<dyn ReadAt + Send + Sync>, ReadError> {
        match self.inner.complete_blob(root) {
            Ok(blob) if blob.is_small() => Ok(Arc::new(Vec::<u8>::new())),
            Ok(_) => {
                let files = self
                    .inner
                    .handles
                    .get(&*self.inner.disk, root, OpenMode::Existing)?;
                Ok(Arc::new(files.tree.clone()))
            }
            Err(error) => match self.inner.component_entry(root) {
                Some(_) => Ok(Arc::new(self.inner.component_outboard(root)?)),
                None => Err(error),
            },
        }
    }

    /// Reads all of a complete blob of at most `limit` bytes (a manifest, a listing, an index), checked
    /// against its root.
    pub fn read_whole(&self, root: &RootHash, limit: u64) -> Result<Vec<u8>, ReadError> {
        let reader = self.open_blob(root)?;
        if reader.size > limit {
            return Err(ReadError::TooLong {
                root: *root,
                size: reader.size,
                limit,
            });
        }
        let mut bytes = vec![0; reader.size as usize];
        let read = reader.read_exact_at(0, &mut bytes);
        match read {
            Err(e) if e.kind() != io::ErrorKind::UnexpectedEof => {
                Err(IoFault::new("read", path_of(root, Part::Data), e).into())
            }
            Ok(()) if RootHash::of(&bytes) == *root => Ok(bytes),
            _ => {
                let blob = self.inner.complete_blob(root)?;
                Err(self.inner.condemn(&blob, &blob.all())?)
            }
        }
    }
}

/// Reads a complete blob, and keeps it from being collected.
#[derive(Debug)]
pub struct BlobReader {
    bytes: Bytes,
    size: u64,
    _guard: ActiveGuard,
}

#[derive(Debug)]
enum Bytes {
    Small(Arc<Vec<u8>>),
    Files(Arc<BlobFiles>),
}

impl BlobReader {
    /// Size of the blob in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl ReadAt for BlobReader {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.size.saturating_sub(offset).min(buf.len() as u64) as usize;
        let buf = &mut buf[..left];
        match &self.bytes {
            Bytes::Small(bytes) => bytes.as_slice().read_at(offset, buf),
            Bytes::Files(files) => files.data.read_at(offset, buf),
        }
    }
}

/// Reads the part of a blob that is here.
#[derive(Debug)]
pub struct PartialReader {
    reader: Arc<BlobReader>,
    /// None: all of it.
    here: Option<GroupRanges>,
}

impl ReadAt for PartialReader {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let end = self
            .reader
            .size
            .min(offset.saturating_add(buf.len() as u64));
        let groups = offset / GROUP_LEN..end.div_ceil(GROUP_LEN);
        let absent = |here: &GroupRanges| offset < end && !here.contains_run(&groups);
        if self.here.as_ref().is_some_and(absent) {
            return Err(not_here(offset..end));
        }
        self.reader.read_at(offset, buf)
    }
}

/// Reads what has come of a blob, committed or not.
pub struct ComingReader {
    inner: Arc<Inner>,
    blob: Arc<Blob>,
    _guard: ActiveGuard,
}

impl ReadAt for ComingReader {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let blob = &self.blob;
        let end = blob.size.min(offset.saturating_add(buf.len() as u64));
        if offset >= end {
            return Ok(0);
        }
        let groups = offset / GROUP_LEN..end.div_ceil(GROUP_LEN);
        if !blob.state().present.contains_run(&groups) {
            return Err(not_here(offset..end));
        }
        let buf = &mut buf[..(end - offset) as usize];
        if blob.is_small() {
            let bytes = self.inner.small_bytes(blob).map_err(io::Error::other)?;
            return bytes.as_slice().read_at(offset, buf);
        }
        let (disk, handles) = (&*self.inner.disk, &self.inner.handles);
        let files = handles.get(disk, &blob.root, OpenMode::Existing);
        files.map_err(io::Error::other)?.data.read_at(offset, buf)
    }
}

fn not_here(bytes: Range<u64>) -> io::Error {
    let message = format!(
        "bytes {}..{} of the blob are not here",
        bytes.start, bytes.end
    );
    io::Error::new(io::ErrorKind::NotFound, message)
}

impl Inner {
    fn complete_blob(&self, root: &RootHash) -> Result<Arc<Blob>, ReadError> {
        let blob = self.blob(root).ok_or(ReadError::Unknown(*root))?;
        let complete = blob.completes(&blob.state().present);
        if complete {
            Ok(blob)
        } else {
            Err(ReadError::Absent {
                root: *root,
                groups: 0..group_count(blob.size),
            })
        }
    }

    fn encode_blob(
        &self,
        blob: &Arc<Blob>,
        groups: Range<u64>,
        height: Height,
        out: &mut Vec<u8>,
    ) -> Result<(), ReadError> {
        if blob.is_small() {
            let bytes = self.small_bytes(blob)?;
            if RootHash::of(&bytes) != blob.root {
                return Err(self.condemn(blob, &blob.all())?);
            }
            out.extend_from_slice(&bytes);
            return Ok(());
        }
        let files = match self
            .handles
            .get(&*self.disk, &blob.root, OpenMode::Existing)
        {
            Ok(files) => files,
            // Somebody removed the file beneath us.
            Err(fault) if fault.source.kind() == io::ErrorKind::NotFound => {
                return Err(self.condemn(blob, &GroupRanges::from(groups))?);
            }
            Err(fault) => return Err(fault.into()),
        };
        let before = out.len();
        let (tree, run) = (blob.tree(), groups.clone());
        encode_range(&tree, run, height, &files.data, &files.tree, out).or_else(|error| {
            out.truncate(before);
            match classify(error) {
                Trouble::Damage => Err(self.condemn(blob, &GroupRanges::from(groups))?),
                Trouble::Range => Err(ReadError::Absent {
                    root: blob.root,
                    groups,
                }),
                Trouble::Data(e) => {
                    Err(IoFault::new("read", path_of(&blob.root, Part::Data), e).into())
                }
                Trouble::Outboard(e) => {
                    Err(IoFault::new("read", path_of(&blob.root, Part::Tree), e).into())
                }
            }
        })
    }

    /// A small blob's bytes, flushed or not.
    pub(super) fn small_bytes(&self, blob: &Blob) -> Result<Arc<Vec<u8>>, ReadError> {
        if let Some(bytes) = blob.state().small.clone() {
            return Ok(bytes);
        }
        let stored = self.meta.read(|tx| {
            let table = tx.open_table(SMALL)?;
            Ok(table
                .get(blob.root.as_bytes())?
                .map(|bytes| bytes.value().to_vec()))
        })?;
        let missing = DatabaseError::Row {
            table: "small",
            reason: "missing",
        };
        stored.map(Arc::new).ok_or(ReadError::Database(missing))
    }
}

/// What a failed encoding means.
pub(super) enum Trouble {
    /// Bytes are there and wrong, or are missing where there should be some.
    Damage,
    /// The groups are not groups of this content.
    Range,
    /// The content could not be read.
    Data(io::Error),
    /// The outboard could not be read.
    Outboard(io::Error),
}

pub(super) fn classify(error: EncodeError) -> Trouble {
    match error {
        EncodeError::Damaged { .. } | EncodeError::Pair { .. } => Trouble::Damage,
        EncodeError::OutOfRange { .. } => Trouble::Range,
        EncodeError::Data { source, .. } | EncodeError::Outboard { source, .. }
            if source.kind() == io::ErrorKind::UnexpectedEof =>
        {
            Trouble::Damage
        }
        EncodeError::Data { source, .. } => Trouble::Data(source),
        EncodeError::Outboard { source, .. } => Trouble::Outboard(source),
    }
}
