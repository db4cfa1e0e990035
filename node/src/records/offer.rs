//! Records from the network: what a peer offers is checked, kept, or refused.
//!
//! A peer is at fault for what is malformed or was never right, not for what has ended, is revoked, or is dated by another
//! clock: that it may not know.

use capsule_proto::credential::{CredentialError, Revoked};
use capsule_proto::record::{Body, RecordError, RecordId, SignedRecord};
use capsule_swarm::{Offer, RecordStore};

use super::{MAX_PER_SIGNER, Records};

impl RecordStore for Records {
    fn ids(&self) -> Vec<RecordId> {
        self.read().ids.iter().copied().collect()
    }

    fn get(&self, id: &RecordId) -> Option<Vec<u8>> {
        self.store.record(id).unwrap_or_else(|error| {
            tracing::warn!(%error, "a record could not be read");
            None
        })
    }

    fn offer(&self, bytes: &[u8]) -> Offer {
        let record = match SignedRecord::decode(bytes) {
            Ok(record) => record,
            Err(error) => return Offer::Rejected(error.to_string()),
        };
        if self.read().ids.contains(&record.id()) {
            return Offer::Known;
        }
        let revoked = self.read().revoked.clone();
        let now = self.clock.now_for(record.record().issued);
        match record.verify(&self.fleet, now, &revoked) {
            Ok(_) => self.accept(&record),
            Err(error) if is_fault(&error) => Offer::Rejected(error.to_string()),
            Err(error) => {
                tracing::debug!(%error, "a record does not count");
                Offer::Known
            }
        }
    }

    fn revocation_head(&self) -> Option<Vec<u8>> {
        self.read()
            .head
            .as_ref()
            .map(|head| head.as_bytes().to_vec())
    }

    fn revoked(&self) -> Revoked {
        self.read().revoked.clone()
    }
}

/// Whether the one who sent it should have known better.
fn is_fault(error: &RecordError) -> bool {
    match error {
        RecordError::Malformed(_) | RecordError::Signature | RecordError::NotAllowed { .. } => true,
        RecordError::Signer(error) => !matches!(error, CredentialError::Revoked(_)),
        RecordError::Expired { .. } | RecordError::FromTheFuture { .. } => false,
    }
}

impl Records {
    fn accept(&self, record: &SignedRecord) -> Offer {
        let is_revocation = matches!(record.record().body, Body::Revocation(_));
        {
            let state = self.read();
            if state
                .per_signer
                .get(&record.signer())
                .is_some_and(|count| *count >= MAX_PER_SIGNER)
            {
                tracing::warn!(signer = %record.signer(), "this member signed more records than a node keeps of one");
                return Offer::Known;
            }
            let newest = state.head.as_ref().map_or(0, |head| head.record().sequence);
            if is_revocation && record.record().sequence < newest {
                return Offer::Known;
            }
        }
        if let Err(error) = self.keep(record) {
            tracing::warn!(%error, "a record could not be kept");
            return Offer::Known;
        }
        if is_revocation {
            self.write().take_revocation(record);
            // What revoked members said no longer counts.
            if let Err(error) = self.purge() {
                tracing::warn!(%error, "records of revoked members could not be dropped");
            }
        }
        Offer::New
    }
}
