//! Taking bytes out again: removal, collection of what is not live, dead ranges of a pack.
//!
//! One order for all: first the commit that says they are no longer held, then the bytes. What a crash
//! leaves between is bytes that nobody counts, which the next open removes. What is live is the caller's
//! knowledge; what is in use right now is known here, by [`ActiveGuard`]s.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use capsule_proto::ranges::group_bytes;
use capsule_proto::{GROUP_LEN, GroupRanges, RootHash};

use super::blob::{Blob, Part, lock, path_of};
use super::disk::OpenMode;
use super::error::{DatabaseError, IoFault, RemoveError};
use super::meta::{BLOBS, SMALL};
use super::rows::BlobKind;
use super::{Inner, Store};

/// Keeps blobs from being removed while it lives: held by transfers, imports, exports.
///
/// May be taken of roots that are not here yet.
pub struct ActiveGuard {
    inner: Arc<Inner>,
    roots: Vec<RootHash>,
}

/// How many guards there are of each root.
pub(super) type Active = HashMap<RootHash, usize>;

/// Whether a collection only says what it would do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GcMode {
    /// Removes what is not live.
    Collect,
    /// Removes nothing.
    DryRun,
}

/// What a collection removed (or would).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GcReport {
    /// The blobs: root, kind, bytes that were held of it.
    pub blobs: Vec<(RootHash, BlobKind, u64)>,
    /// Components no longer served.
    pub components: Vec<RootHash>,
    /// Packs and other blobs that stay, of which dead ranges were freed: root, bytes of these.
    pub punched: Vec<(RootHash, u64)>,
    /// Bytes freed: the sum over all of these, and the components' outboards.
    pub freed: u64,
    /// Blobs that are not live, but in use.
    pub in_use: Vec<RootHash>,
}

impl Store {
    /// Guards roots from removal until the guard is dropped.
    pub fn guard(&self, roots: impl IntoIterator<Item = RootHash>) -> ActiveGuard {
        let roots: Vec<_> = roots.into_iter().collect();
        let mut active = lock(&self.inner.active);
        roots
            .iter()
            .for_each(|root| *active.entry(*root).or_default() += 1);
        drop(active);
        ActiveGuard {
            inner: Arc::clone(&self.inner),
            roots,
        }
    }

    /// Whether a root is guarded from removal: it is in use.
    pub fn is_active(&self, root: &RootHash) -> bool {
        self.inner.is_active(root)
    }

    /// Removes one blob, and the components that are read through it; the bytes that were held of it.
    pub fn remove(&self, root: &RootHash) -> Result<u64, RemoveError> {
        let _one_at_a_time = lock(&self.inner.gc_turn);
        let blob = self.inner.blob(root).ok_or(RemoveError::Unknown(*root))?;
        if !self.inner.claim(&blob) {
            return Err(RemoveError::Busy(*root));
        }
        let components = self.inner.components_through(|through| through == root);
        let dead = [blob];
        self.inner
            .drop_components(&components)
            .inspect_err(|_| self.inner.disclaim(&dead))?;
        self.inner.remove_claimed(&dead)
    }

    /// Removes all blobs and components that `live` does not name and no guard holds.
    ///
    /// `live` is asked once for each; it must name the layers of the components it names.
    pub fn gc(
        &self,
        live: &dyn Fn(&RootHash) -> bool,
        mode: GcMode,
    ) -> Result<GcReport, RemoveError> {
        let _one_at_a_time = lock(&self.inner.gc_turn);
        let mut report = GcReport::default();
        let mut dead = Vec::new();
        for blob in self
            .inner
            .all_blobs()
            .into_iter()
            .filter(|blob| !live(&blob.root))
        {
            let free = match mode {
                GcMode::Collect => self.inner.claim(&blob),
                GcMode::DryRun => !self.inner.is_active(&blob.root),
            };
            if free {
                let held = blob.cost(&blob.state().present);
                report.blobs.push((blob.root, blob.kind, held));
                report.freed += held;
                dead.push(blob);
            } else {
                report.in_use.push(blob.root);
            }
        }
        let dying: BTreeSet<_> = dead.iter().map(|blob| blob.root).collect();
        let through = self.inner.components_through(|root| dying.contains(root));
        for (root, entry) in self.inner.components().iter() {
            if !live(root) || through.contains(root) {
                report.components.push(*root);
                report.freed += entry.cost();
            }
        }
        if mode == GcMode::Collect {
            self.inner
                .drop_components(&report.components)
                .inspect_err(|_| self.inner.disclaim(&dead))?;
            self.inner.remove_claimed(&dead)?;
        }
        Ok(report)
    }

    /// Frees dead ranges of blobs, where no guard holds these; adds to what a collection did.
    pub fn punch_all<'a>(
        &self,
        dead: impl IntoIterator<Item = (&'a RootHash, &'a GroupRanges)>,
        mode: GcMode,
        report: &mut GcReport,
    ) -> Result<(), RemoveError> {
        for (root, dead) in dead {
            let Some(blob) = self.inner.blob(root) else {
                continue;
            };
            let here = blob.state().present.intersection(dead);
            let freed = match mode {
                GcMode::Collect => self.punch(root, dead),
                GcMode::DryRun if self.inner.is_active(root) => Err(RemoveError::Busy(*root)),
                GcMode::DryRun => Ok(blob.cost(&here)),
            };
            match freed {
                Ok(0) => {}
                Ok(freed) => {
                    report.punched.push((*root, freed));
                    report.freed += freed;
                }
                Err(RemoveError::Busy(root)) if !here.is_empty() => report.in_use.push(root),
                Err(RemoveError::Busy(_) | RemoveError::Unknown(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Frees dead ranges of a blob: they no longer count as held; the bytes that were held of them.
    ///
    /// Durably not present first, then the hole: the other way round, a crash between would leave zeros
    /// that the database calls verified.
    pub fn punch(&self, root: &RootHash, dead: &GroupRanges) -> Result<u64, RemoveError> {
        let blob = self.inner.blob(root).ok_or(RemoveError::Unknown(*root))?;
        let _turn = blob.turn();
        let _alone = blob.gate_exclusive();
        let (dead, absent) = {
            let active = lock(&self.inner.active);
            let mut state = blob.state();
            if state.gone {
                return Err(RemoveError::Unknown(*root));
            }
            if active.contains_key(root) {
                return Err(RemoveError::Busy(*root));
            }
            let dead = state.present.intersection(dead);
            state.present = state.present.difference(&dead);
            state.durable = state.durable.difference(&dead);
            // Once in the life of a process, also what a crash left behind.
            let absent = match state.swept {
                true => dead.clone(),
                false => blob.all().difference(&state.present),
            };
            (dead, absent)
        };
        let freed = blob.cost(&dead);
        self.inner.space.release(freed);
        if !dead.is_empty() {
            self.inner.commit_less(&blob)?;
        }
        self.inner.free(&blob, &absent)?;
        blob.state().swept = true;
        Ok(freed)
    }
}

impl Inner {
    pub(super) fn is_active(&self, root: &RootHash) -> bool {
        lock(&self.active).contains_key(root)
    }

    /// Marks a blob as gone unless it is in use. From then on nobody finds it.
    fn claim(&self, blob: &Blob) -> bool {
        // Under the lock that guards take: a guard comes either before, and is seen here, or after, and
        // its holder finds that the blob is gone.
        let active = lock(&self.active);
        let free = !active.contains_key(&blob.root);
        if free {
            blob.state().gone = true;
        }
        free
    }

    /// Takes claims back after a commit failed. Whether it took effect is not known: the blobs are durable
    /// again when the next flush says so.
    fn disclaim(&self, blobs: &[Arc<Blob>]) {
        for blob in blobs {
            // The bytes of a small blob may have gone with its row.
            let small = if blob.is_small() {
                self.small_bytes(blob).ok()
            } else {
                None
            };
            let mut state = blob.state();
            if blob.is_small() && small.is_none() {
                self.space.release(blob.cost(&state.present));
                state.present = GroupRanges::new();
            }
            state.small = small;
            state.durable = GroupRanges::new();
            state.row = false;
            state.gone = false;
            self.note_dirty(blob, &mut state, 1);
        }
    }

    /// Components that are read through a blob.
    fn components_through(&self, blob: impl Fn(&RootHash) -> bool) -> Vec<RootHash> {
        let components = self.components();
        let through = components
            .iter()
            .filter(|(_, entry)| entry.component.recipe.blobs().iter().any(&blob));
        through.map(|(root, _)| *root).collect()
    }

    /// Removes blobs that were claimed: rows in one commit, then the files.
    fn remove_claimed(&self, blobs: &[Arc<Blob>]) -> Result<u64, RemoveError> {
        if blobs.is_empty() {
            return Ok(0);
        }
        // Waits for flushes under way.
        let _turns: Vec<_> = blobs.iter().map(|blob| blob.turn()).collect();
        // What lives in the database only needs the row's removal: one commit for all.
        self.commit_removal(blobs)
            .inspect_err(|_| self.disclaim(blobs))?;
        let mut freed = 0;
        let mut unlinked = Ok(());
        for blob in blobs {
            // Waits for writes under way.
            let _alone = blob.gate_exclusive();
            let held = {
                let mut state = blob.state();
                state.files = None;
                state.small = None;
                state.durable = GroupRanges::new();
                std::mem::take(&mut state.present)
            };
            freed += blob.cost(&held);
            self.space.release(blob.cost(&held));
            self.handles.forget(&blob.root);
            lock(&self.dirty).retain(|root| *root != blob.root);
            if !blob.is_small() {
                unlinked = unlinked
                    .and(self.unlink(&blob.root, Part::Data))
                    .and(self.unlink(&blob.root, Part::Tree));
            }
            self.blobs_mut().remove(&blob.root);
        }
        unlinked?;
        Ok(freed)
    }

    fn commit_removal(&self, blobs: &[Arc<Blob>]) -> Result<(), DatabaseError> {
        self.meta.write(|tx| {
            let (mut rows, mut small) = (tx.open_table(BLOBS)?, tx.open_table(SMALL)?);
            for blob in blobs {
                rows.remove(blob.root.as_bytes())?;
                small.remove(blob.root.as_bytes())?;
            }
            Ok(())
        })
    }

    fn unlink(&self, root: &RootHash, part: Part) -> Result<(), IoFault> {
        let path = path_of(root, part);
        match self.disk.remove(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(IoFault::new("remove", path, e))
            }
            _ => Ok(()),
        }
    }

    /// Commits that groups are no longer present. The caller holds turn and gate.
    fn commit_less(&self, blob: &Blob) -> Result<(), RemoveError> {
        let (durable, row) = {
            let state = blob.state();
            (state.durable.clone(), state.row)
        };
        if row {
            self.commit_presence(blob, &durable, None)
                .inspect_err(|_| self.note_dirty(blob, &mut blob.state(), 1))?;
        }
        Ok(())
    }

    /// Frees the space of groups that are absent, and durably so. The caller holds turn and gate.
    fn free(&self, blob: &Blob, absent: &GroupRanges) -> Result<(), RemoveError> {
        if absent.is_empty() {
            return Ok(());
        }
        if blob.is_small() {
            blob.state().small = None;
            return Ok(());
        }
        let files = match self
            .handles
            .get(&*self.disk, &blob.root, OpenMode::Existing)
        {
            Ok(files) => files,
            Err(fault) if fault.source.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(fault) => return Err(fault.into()),
        };
        for run in absent.runs() {
            let start = run.start * GROUP_LEN;
            // To the end of the group, though the blob may end before: whole file-system blocks are freed.
            let len = group_bytes(run, u64::MAX).end - start;
            let fault = |e| IoFault::new("punch", path_of(&blob.root, Part::Data), e);
            if !files.data.0.punch(start, len).map_err(fault)? {
                break; // This file system cannot; the space comes back with the blob's removal.
            }
        }
        Ok(())
    }
}

impl Drop for ActiveGuard {
    fn drop(&mut self) {
        let mut active = lock(&self.inner.active);
        for root in &self.roots {
            if let Some(count) = active.get_mut(root) {
                *count -= 1;
                if *count == 0 {
                    active.remove(root);
                }
            }
        }
    }
}

impl fmt::Debug for ActiveGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ActiveGuard").field(&self.roots).finish()
    }
}
