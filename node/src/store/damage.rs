//! Damage: groups that no longer verify are taken out of what the store holds, durably, and reported.
//!
//! Found while serving, by reads on demand that fail, or by [`Store::verify`]. Fetching them again is the daemon's business.

use std::ops::Range;
use std::sync::{Arc, PoisonError};

use capsule_chunker::bao::{VerifyError, verify};
use capsule_proto::{GroupRanges, RootHash};

use super::blob::{Blob, Part, path_of};
use super::disk::OpenMode;
use super::error::{DatabaseError, IoFault, ReadError};
use super::{Inner, Store};

/// Groups that were held and no longer verify.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The blob or component.
    pub root: RootHash,
    /// Its size in bytes.
    pub size: u64,
    /// The groups.
    pub groups: GroupRanges,
}

/// What [`Store::verify_part`] read again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// The groups that were present.
    pub read: GroupRanges,
    /// Those of them that did not verify.
    pub bad: GroupRanges,
}

/// What is told of damage; called on the thread that found it.
pub type DamageHandler = Arc<dyn Fn(&Damage) + Send + Sync>;

impl Store {
    /// Sets who is told of damage, in place of who was.
    pub fn on_damage(&self, handler: DamageHandler) {
        *self
            .inner
            .damage_handler
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Some(handler);
    }

    /// Reads all that is present of a blob or component again, and returns the groups that do not
    /// verify; these no longer count as present, and are reported.
    pub fn verify(&self, root: &RootHash) -> Result<GroupRanges, ReadError> {
        Ok(self.verify_part(root, 0..u64::MAX)?.bad)
    }

    /// The same for what is present of a run of groups.
    pub fn verify_part(&self, root: &RootHash, part: Range<u64>) -> Result<Checked, ReadError> {
        let part = GroupRanges::from(part);
        let Some(blob) = self.inner.blob(root) else {
            return self.inner.verify_component(root, &part);
        };
        let read = blob.state().present.intersection(&part);
        let bad = self.inner.bad_groups(&blob, &read)?;
        if bad.is_empty() {
            return Ok(Checked { read, bad });
        }
        let bad = match self.inner.condemn(&blob, &bad)? {
            ReadError::Damaged { groups, .. } => groups,
            // Repaired or removed meanwhile.
            _ => GroupRanges::new(),
        };
        Ok(Checked { read, bad })
    }
}

/// Damage, and whether it could be committed.
type Condemned = (Damage, Result<(), DatabaseError>);

impl Inner {
    /// Which of the groups do not verify.
    fn bad_groups(&self, blob: &Blob, groups: &GroupRanges) -> Result<GroupRanges, ReadError> {
        if groups.is_empty() {
            return Ok(GroupRanges::new());
        }
        if blob.is_small() {
            return Ok(match self.small_bytes(blob) {
                Ok(bytes) if RootHash::of(&bytes) == blob.root => GroupRanges::new(),
                Ok(_) | Err(ReadError::Database(DatabaseError::Row { .. })) => groups.clone(),
                Err(other) => return Err(other),
            });
        }
        let files = match self
            .handles
            .get(&*self.disk, &blob.root, OpenMode::Existing)
        {
            Ok(files) => files,
            Err(fault) if fault.source.kind() == std::io::ErrorKind::NotFound => {
                return Ok(groups.clone());
            }
            Err(fault) => return Err(fault.into()),
        };
        let good =
            verify(&blob.tree(), groups, &files.data, &files.tree).map_err(
                |error| match error {
                    VerifyError::Data { source, .. } => {
                        IoFault::new("read", path_of(&blob.root, Part::Data), source)
                    }
                    VerifyError::Outboard { source, .. } => {
                        IoFault::new("read", path_of(&blob.root, Part::Tree), source)
                    }
                },
            )?;
        Ok(groups.difference(&good))
    }

    /// Takes those of the suspected groups that indeed do not verify out of presence, commits that,
    /// and reports it. The error for the reader comes back as a value.
    pub(super) fn condemn(
        &self,
        blob: &Arc<Blob>,
        suspects: &GroupRanges,
    ) -> Result<ReadError, ReadError> {
        let Some((damage, committed)) = self.condemn_in_turn(blob, suspects)? else {
            // Punched, removed or repaired since they were read.
            let first = suspects.runs().first().cloned().unwrap_or(0..0);
            return Ok(ReadError::Absent {
                root: blob.root,
                groups: first,
            });
        };
        self.report(&damage);
        committed?;
        Ok(ReadError::Damaged {
            root: damage.root,
            groups: damage.groups,
        })
    }

    /// The part of it that nothing else may come between; the outcome of the commit apart, as the damage
    /// is to be reported in any case.
    fn condemn_in_turn(
        &self,
        blob: &Blob,
        suspects: &GroupRanges,
    ) -> Result<Option<Condemned>, ReadError> {
        let _turn = blob.turn();
        let _alone = blob.gate_exclusive();
        let present = blob.state().present.intersection(suspects);
        let bad = self.bad_groups(blob, &present)?;
        if bad.is_empty() {
            return Ok(None);
        }
        let durable = {
            let mut state = blob.state();
            state.present = state.present.difference(&bad);
            state.durable = state.durable.difference(&bad);
            state.small = None;
            state.files = None;
            state.row.then(|| state.durable.clone())
        };
        self.space.release(blob.cost(&bad));
        // The hash pairs above may be what is damaged: they are to be written again.
        self.handles.forget(&blob.root);
        let committed = durable.map_or(Ok(()), |durable| {
            // Where this fails the next flush commits it; until then a restart would find the damage anew.
            self.commit_presence(blob, &durable, None)
                .inspect_err(|_| self.note_dirty(blob, &mut blob.state(), 1))
        });
        Ok(Some((
            Damage {
                root: blob.root,
                size: blob.size,
                groups: bad,
            },
            committed,
        )))
    }

    pub(super) fn report(&self, damage: &Damage) {
        tracing::warn!(root = %damage.root, groups = ?damage.groups, "stored data is damaged");
        let handler = self
            .damage_handler
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(handler) = handler {
            handler(damage);
        }
    }
}
