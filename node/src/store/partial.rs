//! Writing: verified ranges from the network, and the flush that makes them durable.
//!
//! The one order that everything rests on is in [`Store::flush`]: data and outboard, sync, names, sync,
//! then the commit that says so. `node/docs/store.md` argues it; the crash tests try to break it.

use std::io::ErrorKind;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capsule_chunker::bao::{DecodeError, decode_range};
use capsule_proto::ranges::{Height, group_count};
use capsule_proto::{GROUP_LEN, GroupRanges, RootHash};

use super::blob::{Blob, BlobFiles, BlobState, Part, dir_of, lock, path_of};
use super::disk::OpenMode;
use super::error::{IoFault, WriteError};
use super::meta::{BLOBS, SMALL};
use super::rows::{BlobKind, Row, bounded};
use super::{Inner, Store};

/// Blobs with unsynced data at a time: each keeps two files open.
const MAX_DIRTY_BLOBS: usize = 64;

impl Store {
    /// Makes room in the books for a blob that is about to be fetched.
    ///
    /// Nothing is written yet; a blob of which nothing was ever flushed is forgotten by a restart. Where
    /// the blob is known already, its size is checked and what is there stays.
    pub fn create_partial(
        &self,
        root: &RootHash,
        size: u64,
        kind: BlobKind,
    ) -> Result<(), WriteError> {
        self.inner.entry(root, size, kind).map(drop)
    }

    /// Verifies an encoded run of groups (bao, see [`decode_range`]) and writes it. The encoding goes up to the node of that height.
    ///
    /// Thread-safe, many at once for one blob; blocking. Nothing is written unless all of it verifies.
    /// What was written counts as [`present`](Store::present) at once, and as
    /// [`durable`](Store::durable) after a flush: by the caller, each
    /// [`flush_bytes`](super::StoreOptions::flush_bytes), after [`flush_after`](super::StoreOptions::flush_after), or when the blob
    /// becomes complete.
    pub fn write_encoded(
        &self,
        root: &RootHash,
        groups: Range<u64>,
        height: Height,
        encoded: &[u8],
    ) -> Result<(), WriteError> {
        let blob = self.inner.blob(root).ok_or(WriteError::Unknown(*root))?;
        let (pairs, leaves) = self.inner.verified(&blob, &groups, height, encoded)?;
        if blob.is_small() {
            self.inner.keep_small(&blob, leaves.concat())?;
        } else {
            self.inner.write_groups(&blob, groups, &pairs, &leaves)?;
        }
        // Also where nothing was missing: an earlier flush may have failed.
        self.inner.flush_if_due(&blob)
    }

    /// Makes all that was written of a blob durable. Does nothing where all is.
    pub fn flush(&self, root: &RootHash) -> Result<(), WriteError> {
        let blob = self.inner.blob(root).ok_or(WriteError::Unknown(*root))?;
        self.inner.flush(&blob)
    }

    /// Makes all that was written of all blobs durable; goes on after a failure and returns the first.
    pub fn flush_all(&self) -> Result<(), WriteError> {
        let flushed: Vec<_> = self
            .inner
            .all_blobs()
            .iter()
            .map(|blob| self.inner.flush(blob))
            .collect();
        flushed.into_iter().collect()
    }
}

/// Verified parts of an encoding: pairs by offset in the outboard, and the content in order.
type Verified<'a> = (Vec<(u64, &'a [u8; 64])>, Vec<&'a [u8]>);

/// The files that a blob's unsynced data keeps open.
fn open_files(blob: &Blob) -> Result<Option<Arc<BlobFiles>>, WriteError> {
    let state = blob.state();
    match state.gone {
        true => Err(WriteError::Unknown(blob.root)),
        false => Ok(state.files.clone()),
    }
}

impl Inner {
    fn verified<'a>(
        &self,
        blob: &Blob,
        groups: &Range<u64>,
        height: Height,
        encoded: &'a [u8],
    ) -> Result<Verified<'a>, WriteError> {
        let (root, count) = (blob.root, group_count(blob.size));
        if groups.is_empty() || groups.end > count {
            return Err(WriteError::OutOfRange {
                root,
                groups: groups.clone(),
                count,
            });
        }
        let (mut pairs, mut leaves) = (Vec::new(), Vec::new());
        let (tree, run) = (blob.tree(), groups.clone());
        let parent = |offset, pair| pairs.push((offset, pair));
        let leaf = |_, leaf| leaves.push(leaf);
        let decoded = if height.groups() >= count {
            decode_range(&tree, run, height, &Vec::new(), encoded, parent, leaf)
        } else {
            // Neither made nor removed meanwhile.
            let _within = blob.gate_shared();
            match self.files_here(blob)? {
                Some(files) => decode_range(&tree, run, height, &files.tree, encoded, parent, leaf),
                None => decode_range(&tree, run, height, &Vec::new(), encoded, parent, leaf),
            }
        };
        if matches!(decoded, Err(DecodeError::Unknown { .. })) {
            // What is thought to be written is not: the pairs that come with the next encoding are to be.
            self.handles.forget(&blob.root);
            blob.state().files = None;
        }
        decoded.map_err(|source: DecodeError| WriteError::Invalid { root, source })?;
        Ok((pairs, leaves))
    }

    /// The blob's entry, made if there is none; waits while an older one is being removed.
    pub(super) fn entry(
        &self,
        root: &RootHash,
        size: u64,
        kind: BlobKind,
    ) -> Result<Arc<Blob>, WriteError> {
        loop {
            let blob = Arc::clone(
                self.blobs_mut()
                    .entry(*root)
                    .or_insert_with(|| Arc::new(Blob::new(*root, size, kind))),
            );
            if blob.size != size && self.replace_unused(&blob)? {
                continue;
            }
            if blob.size != size {
                return Err(WriteError::Size {
                    root: *root,
                    claimed: size,
                    known: blob.size,
                });
            }
            if !blob.state().gone {
                return Ok(blob);
            }
            // Until the removal that claimed it has ended.
            drop(lock(&self.gc_turn));
        }
    }

    /// Forgets an entry of which nothing ever came, unless somebody guards it: its size was a mistake, or a lie, and
    /// must not keep the right one out. Whether it did.
    fn replace_unused(&self, blob: &Arc<Blob>) -> Result<bool, WriteError> {
        // Neither a removal nor a write under way.
        let _one_at_a_time = lock(&self.gc_turn);
        let _turn = blob.turn();
        let _alone = blob.gate_exclusive();
        {
            let active = lock(&self.active);
            let mut state = blob.state();
            if state.gone {
                return Ok(true); // Its removal has ended by now.
            }
            let unused = state.present.is_empty() && !state.row;
            if !unused || active.contains_key(&blob.root) {
                return Ok(false);
            }
            state.gone = true;
        }
        self.handles.forget(&blob.root);
        lock(&self.dirty).retain(|root| *root != blob.root);
        // A write that failed may have made files, for the other size; they go before anybody can make new ones.
        let remove = |part| {
            let path = path_of(&blob.root, part);
            match self.disk.remove(&path) {
                Err(e) if e.kind() != ErrorKind::NotFound => {
                    Err(WriteError::io(IoFault::new("remove", path, e)))
                }
                _ => Ok(()),
            }
        };
        let removed = remove(Part::Data).and(remove(Part::Tree));
        self.blobs_mut().remove(&blob.root);
        removed.map(|()| true)
    }

    /// Writes verified groups, unless none of them is missing.
    fn write_groups(
        &self,
        blob: &Arc<Blob>,
        groups: Range<u64>,
        pairs: &[(u64, &[u8; 64])],
        leaves: &[&[u8]],
    ) -> Result<(), WriteError> {
        let missing = blob.missing(&groups);
        if missing.is_empty() {
            return Ok(());
        }
        let reserved = blob.cost(&missing);
        self.space.reserve(reserved)?;
        let result = self.write_within_gate(blob, groups, pairs, leaves);
        // Another writer may have brought some of the same groups meanwhile, and paid for them.
        let used = result.as_ref().map_or(0, |added| blob.cost(added));
        self.space.release(reserved - used.min(reserved));
        result.map(drop)
    }

    fn write_within_gate(
        &self,
        blob: &Arc<Blob>,
        groups: Range<u64>,
        pairs: &[(u64, &[u8; 64])],
        leaves: &[&[u8]],
    ) -> Result<GroupRanges, WriteError> {
        let _within = blob.gate_shared();
        let files = self.files_to_write(blob)?;
        let fault =
            |part| move |e| WriteError::io(IoFault::new("write", path_of(&blob.root, part), e));
        files
            .data
            .0
            .write_at(groups.start * GROUP_LEN, leaves)
            .map_err(fault(Part::Data))?;
        files.write_nodes(pairs).map_err(fault(Part::Tree))?;
        let mut state = blob.state();
        if state.gone {
            return Err(WriteError::Unknown(blob.root));
        }
        let added = GroupRanges::from(groups.clone()).difference(&state.present);
        state.present.insert(groups);
        self.note_dirty(blob, &mut state, added.bytes(blob.size));
        state.files = Some(files);
        Ok(added)
    }

    /// The files of a blob, if it has any.
    fn files_here(&self, blob: &Blob) -> Result<Option<Arc<BlobFiles>>, WriteError> {
        if let Some(files) = open_files(blob)? {
            return Ok(Some(files));
        }
        let existing = OpenMode::Existing;
        match self.handles.get(&*self.disk, &blob.root, existing) {
            Ok(files) => Ok(Some(files)),
            Err(fault) if fault.source.kind() == ErrorKind::NotFound => Ok(None),
            Err(fault) => Err(WriteError::io(fault)),
        }
    }

    fn files_to_write(&self, blob: &Blob) -> Result<Arc<BlobFiles>, WriteError> {
        if let Some(files) = open_files(blob)? {
            return Ok(files);
        }
        self.handles
            .get(&*self.disk, &blob.root, OpenMode::Create)
            .map_err(WriteError::io)
    }

    /// Keeps a small blob's verified bytes until the flush, unless they are here.
    pub(super) fn keep_small(&self, blob: &Arc<Blob>, bytes: Vec<u8>) -> Result<(), WriteError> {
        let cost = blob.cost(&blob.all());
        self.space.reserve(cost)?;
        let mut state = blob.state();
        if state.gone || !state.present.is_empty() {
            self.space.release(cost);
            return if state.gone {
                Err(WriteError::Unknown(blob.root))
            } else {
                Ok(())
            };
        }
        state.present = blob.all();
        // Empty blobs are to be flushed too.
        state.dirty += (bytes.len() as u64).max(1);
        state.small = Some(Arc::new(bytes));
        Ok(())
    }

    /// Notes bytes that the next flush is to make durable, or one byte where only the row is out of date.
    pub(super) fn note_dirty(&self, blob: &Blob, state: &mut BlobState, bytes: u64) {
        if state.dirty == 0 {
            lock(&self.dirty).push_back(blob.root);
            state.dirty_since = Some(Instant::now());
        }
        state.dirty += bytes.max(1);
    }

    fn flush_if_due(&self, blob: &Arc<Blob>) -> Result<(), WriteError> {
        let due = {
            let state = blob.state();
            let waited = state.dirty_since.map_or(Duration::ZERO, |at| at.elapsed());
            let late = waited >= self.flush_after || blob.completes(&state.present);
            state.dirty >= self.flush_bytes || (state.dirty > 0 && late)
        };
        if due {
            self.flush(blob)?;
        }
        // Bound the number of files that wait for their sync, the oldest first.
        let oldest = {
            let mut dirty = lock(&self.dirty);
            if dirty.len() > MAX_DIRTY_BLOBS {
                dirty.pop_front()
            } else {
                None
            }
        };
        match oldest.and_then(|root| self.blob(&root)) {
            Some(oldest) => self.flush(&oldest),
            None => Ok(()),
        }
    }

    /// Data, sync, names, sync, commit: in this order, and nothing counts as durable before the last.
    pub(super) fn flush(&self, blob: &Arc<Blob>) -> Result<(), WriteError> {
        let _turn = blob.turn();
        // Whatever counts as present here was written before; so the sync below covers it.
        let (written, files, small, named) = {
            let mut state = blob.state();
            if state.gone || state.dirty == 0 {
                return Ok(());
            }
            state.dirty = 0;
            (
                bounded(state.present.clone()),
                state.files.clone(),
                state.small.clone(),
                state.row,
            )
        };
        lock(&self.dirty).retain(|root| *root != blob.root);
        if !blob.is_small()
            && let Err(fault) = self.sync_files(blob, files, named)
        {
            self.abandon(blob);
            return Err(WriteError::io(fault));
        }
        self.commit_presence(blob, &written, small.as_deref().map(Vec::as_slice))
            .inspect_err(|_| {
                // The data is safe; only the commit is to be repeated, by the next flush.
                self.note_dirty(blob, &mut blob.state(), 1);
            })?;
        let mut state = blob.state();
        state.row = true;
        state.durable = written;
        state.small = None;
        if state.dirty == 0 {
            state.files = None;
        }
        Ok(())
    }

    fn sync_files(
        &self,
        blob: &Blob,
        files: Option<Arc<BlobFiles>>,
        named: bool,
    ) -> Result<(), IoFault> {
        let files = match files {
            Some(files) => files,
            None => self
                .handles
                .get(&*self.disk, &blob.root, OpenMode::Existing)?,
        };
        let fault = |part| move |e| IoFault::new("sync", path_of(&blob.root, part), e);
        files.data.0.sync().map_err(fault(Part::Data))?;
        files.tree.0.sync().map_err(fault(Part::Tree))?;
        if !named {
            let dir = dir_of(&blob.root);
            self.disk
                .sync_dir(&dir)
                .map_err(|e| IoFault::new("sync", dir, e))?;
        }
        Ok(())
    }

    /// Commits a blob's row, and a small blob's bytes with it. The caller holds the blob's turn.
    pub(super) fn commit_presence(
        &self,
        blob: &Blob,
        ranges: &GroupRanges,
        small: Option<&[u8]>,
    ) -> Result<(), super::DatabaseError> {
        let (key, row) = (blob.root.as_bytes(), blob.row(ranges.clone()).encode());
        self.meta.write(|tx| {
            tx.open_table(BLOBS)?.insert(key, &row[..])?;
            if let Some(bytes) = small {
                tx.open_table(SMALL)?.insert(key, bytes)?;
            }
            Ok(())
        })
    }

    /// Forgets what was written and not committed: after a failed sync nobody vouches for it, and a later
    /// sync of the same file would succeed without it (see `node/docs/store.md`). The caller holds the turn.
    fn abandon(&self, blob: &Blob) {
        // No write may be half-way: it might have been dropped by the failed sync, and count afterwards.
        let _alone = blob.gate_exclusive();
        let mut state = blob.state();
        let lost = state.present.difference(&state.durable);
        self.space.release(blob.cost(&lost));
        state.present = state.durable.clone();
        state.dirty = 0;
        state.files = None;
        lock(&self.dirty).retain(|root| *root != blob.root);
        self.handles.forget(&blob.root);
    }
}
