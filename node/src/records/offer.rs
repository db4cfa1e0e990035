//! Records from the network: what a peer offers is checked, kept, or refused.
//!
//! A peer is at fault for what is malformed or was never right, not for what has ended, is revoked, is dated by another
//! clock, or is written in a newer format: that it may not know. What cannot be kept now is left for later.

use capsule_proto::codec::DecodeError;
use capsule_proto::credential::{CredentialError, Revoked};
use capsule_proto::record::{Body, RecordError, RecordId, SignedRecord};
use capsule_swarm::{Offer, RecordStore};

use super::{MAX_PER_SIGNER, Records};
use crate::store::DatabaseError;

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
            Err(error) if is_newer(&error, bytes) => {
                tracing::debug!(%error, "a record of a newer format");
                return Offer::Known;
            }
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
            Err(error @ RecordError::FromTheFuture { .. }) => Offer::Later(error.to_string()),
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

/// First bytes of a record of whatever version.
const MAGIC: &[u8] = b"CAPR";

/// Whether the fault may be that this node is older than the record. Its signature is not checked then, so it is neither
/// kept nor passed on.
fn is_newer(error: &DecodeError, bytes: &[u8]) -> bool {
    match error {
        DecodeError::Format { .. } => bytes.starts_with(MAGIC),
        DecodeError::Invalid { what, .. } => *what == "statement kind",
        _ => false,
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
        if matches!(record.record().body, Body::Revocation(_)) {
            return self.accept_revocation(record);
        }
        let count = self.read().per_signer.get(&record.signer()).copied();
        if count.is_some_and(|count| count >= MAX_PER_SIGNER) {
            let reason = "its signer has signed more records than a node keeps of one";
            return Offer::Later(reason.to_owned());
        }
        match self.keep(record) {
            Ok(()) => Offer::New,
            Err(error) => not_kept(&error),
        }
    }

    /// A revocation counts however many records its signer made, and whether or not there is room for it.
    fn accept_revocation(&self, record: &SignedRecord) -> Offer {
        {
            let mut state = self.write();
            let newest = state.head.as_ref().map_or(0, |head| head.record().sequence);
            if record.record().sequence < newest {
                return Offer::Known;
            }
            state.take_revocation(record);
        }
        let kept = self.keep(record);
        // What revoked members said no longer counts.
        if let Err(error) = self.purge() {
            tracing::warn!(%error, "records of revoked members could not be dropped");
        }
        match kept {
            Ok(()) => Offer::New,
            Err(error) => not_kept(&error),
        }
    }
}

fn not_kept(error: &DatabaseError) -> Offer {
    tracing::warn!(%error, "a record could not be kept");
    Offer::Later(error.to_string())
}
