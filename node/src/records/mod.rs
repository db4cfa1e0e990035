//! The records that this node knows: what it accepts, what counts, what it signs itself.
//!
//! Records lie in the store; here are the rules. A record is kept if its signer was a member with the right to say it, is not
//! revoked, and it has not ended. What the records say together lives in `names`, what is left of ended names in `floor`, the
//! network's side in `offer`.

mod floor;
mod names;
mod offer;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use capsule_proto::credential::{Credential, FleetId, MachineId, MachineKey, Revoked};
use capsule_proto::record::{Body, Record, RecordError, RecordId, SignedRecord};
use tokio::sync::{Notify, watch};

use crate::clock::Clock;
use crate::store::{DatabaseError, Store};

pub use floor::Ended;
pub use names::{KnownLayer, KnownName, Resolution, ResolveError};

/// Most records of one signer: years of publishing several versions a day, and no single member can fill the others' stores.
pub const MAX_PER_SIGNER: usize = 1 << 15;

/// Records and the rules about them. Calls block for a database look-up.
#[derive(Debug)]
pub struct Records {
    store: Store,
    fleet: FleetId,
    clock: Arc<Clock>,
    state: RwLock<State>,
    /// Counts changes, for those who wait for a name.
    changed: watch::Sender<u64>,
    /// What is read first of something may have to be looked at.
    told_of_reads: Notify,
}

#[derive(Debug, Default)]
struct State {
    ids: BTreeSet<RecordId>,
    per_signer: HashMap<MachineId, usize>,
    revoked: Revoked,
    /// The newest revocation; of several with its sequence, the one of the smallest id.
    head: Option<SignedRecord>,
}

impl Records {
    /// Takes up what the store has; what no longer counts (ended, revoked, of another fleet) is dropped.
    pub fn open(store: Store, fleet: FleetId, clock: Arc<Clock>) -> Result<Self, DatabaseError> {
        let records = Self {
            store,
            fleet,
            clock,
            state: RwLock::default(),
            changed: watch::channel(0).0,
            told_of_reads: Notify::new(),
        };
        let revocations = records.store.revocations()?;
        let now = records.clock.now();
        let valid =
            |record: &&SignedRecord| record.verify(&fleet, now, &Revoked::default()).is_ok();
        let mut state = State::default();
        revocations
            .iter()
            .filter(valid)
            .for_each(|record| state.take_revocation(record));
        *records.write() = state;
        records.purge()?;
        Ok(records)
    }

    /// Drops what no longer counts; when the next record ends, if one does.
    pub fn purge(&self) -> Result<Option<u64>, DatabaseError> {
        let now = self.clock.now();
        let revoked = self.read().revoked.clone();
        let (mut ids, mut per_signer, mut next) = (BTreeSet::new(), HashMap::new(), None);
        for id in self.store.record_ids()? {
            let Some(bytes) = self.store.record(&id)? else {
                continue;
            };
            let Ok(record) = SignedRecord::decode(&bytes) else {
                self.store.remove_record(&id)?;
                continue;
            };
            if let Err(why) = record.verify(&self.fleet, now, &revoked) {
                self.note_ended(&record, &why)?;
                self.store.remove_record(&id)?;
                continue;
            }
            ids.insert(id);
            *per_signer.entry(record.signer()).or_default() += 1;
            next = next.into_iter().chain(record.record().expires).min();
        }
        let mut state = self.write();
        // What came meanwhile is not in the list that was walked.
        let came: Vec<_> = state.ids.difference(&ids).copied().collect();
        ids.extend(
            came.into_iter()
                .filter(|id| self.store.record(id).is_ok_and(|found| found.is_some())),
        );
        state.ids = ids;
        state.per_signer = per_signer;
        drop(state);
        self.tell_change();
        Ok(next)
    }

    /// Signs a statement and keeps it. Spreading it is the caller's.
    pub fn sign(
        &self,
        (sequence, body): (u64, Body),
        expires: Option<u64>,
        credential: &Credential,
        key: &MachineKey,
    ) -> Result<SignedRecord, SignError> {
        let record = Record {
            issued: self.clock.now(),
            expires,
            sequence,
            body,
        };
        let signed = SignedRecord::sign(record, credential, key)?;
        signed.verify(&self.fleet, self.clock.now(), &self.read().revoked)?;
        self.keep(&signed)?;
        Ok(signed)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.read().ids.len()
    }

    /// Changes with every change of the records.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Returns when somebody told what is read first of something, or it was asked to be looked at, since this was asked last.
    pub async fn told_of_reads(&self) {
        self.told_of_reads.notified().await;
    }

    /// Has what is read first looked at.
    pub fn look_at_reads(&self) {
        self.told_of_reads.notify_one();
    }

    fn keep(&self, record: &SignedRecord) -> Result<(), DatabaseError> {
        if self.store.put_record(record)? {
            let mut state = self.write();
            state.ids.insert(record.id());
            *state.per_signer.entry(record.signer()).or_default() += 1;
        }
        self.store
            .note_time(self.clock.note(record.record().issued))?;
        if matches!(record.record().body, Body::Prefetch(_)) {
            self.look_at_reads();
        }
        self.tell_change();
        Ok(())
    }

    /// Wakes those who wait for changes.
    pub fn touch(&self) {
        self.tell_change();
    }

    fn tell_change(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a statement could not be signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// It breaks a rule of the format.
    #[error("the statement is not well-formed: {0}")]
    Malformed(#[from] capsule_proto::codec::DecodeError),
    /// This machine may not say it.
    #[error(transparent)]
    NotAllowed(#[from] RecordError),
    /// It could not be kept.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl State {
    /// Counts a valid revocation unless a newer one is known; each lists everything, those of equal sequence count together.
    fn take_revocation(&mut self, record: &SignedRecord) {
        let Body::Revocation(revoked) = &record.record().body else {
            return;
        };
        let known = self
            .head
            .as_ref()
            .map(|head| (head.record().sequence, head.id()));
        match known {
            Some((sequence, _)) if record.record().sequence < sequence => {}
            Some((sequence, id)) if record.record().sequence == sequence => {
                self.revoked.tokens.extend(&revoked.tokens);
                self.revoked.machines.extend(&revoked.machines);
                if record.id() < id {
                    self.head = Some(record.clone());
                }
            }
            _ => {
                self.revoked = revoked.clone();
                self.head = Some(record.clone());
            }
        }
    }
}
