//! Looking whether all tables agree: for simulations and tests, after any step.

use std::collections::BTreeMap;

use thiserror::Error;

use super::Downloads;
use super::blob::Blob;
use super::peer::MAX_OPEN;
use crate::spans;

/// Two tables of [`Downloads`] contradict each other.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct Inconsistency(String);

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), Inconsistency> {
    if holds {
        Ok(())
    } else {
        Err(Inconsistency(what()))
    }
}

impl Downloads {
    /// Whether each piece is in exactly one state, what is open, in requests and held of each blob fits together, and peers'
    /// accounts are those of their requests. Linear in pieces times providers: for simulations and tests.
    pub fn audit(&self) -> Result<(), Inconsistency> {
        for blob in self.blobs.iter().flatten() {
            self.audit_blob(blob)?;
        }
        self.audit_peers()
    }

    fn audit_blob(&self, blob: &Blob) -> Result<(), Inconsistency> {
        let root = blob.root;
        blob.map
            .audit()
            .map_err(|error| Inconsistency(format!("blob {root}: {error}")))?;
        let in_requests = blob.flights.groups();
        let open = blob.map.lacking().difference(&in_requests);
        ensure(open == *blob.map.open(), || {
            format!("blob {root}: open and in requests are not what is lacking")
        })?;
        for piece in 0..blob.map.geometry().pieces() {
            let groups = blob.map.geometry().groups_of(piece);
            let holds = |have: &capsule_proto::ranges::GroupRanges| {
                spans::overlaps(have, groups.clone()).next().is_some()
            };
            let partial = blob
                .providers()
                .filter(|(_, view)| !view.is_seeder() && holds(view.have()))
                .count();
            ensure(partial == usize::from(blob.map.partial(piece)), || {
                format!(
                    "blob {root}: piece {piece} has {partial} partial providers, and counts {}",
                    blob.map.partial(piece)
                )
            })?;
        }
        Ok(())
    }

    fn audit_peers(&self) -> Result<(), Inconsistency> {
        let mut asked: BTreeMap<usize, u64> = BTreeMap::new();
        for (id, flight) in self.flights.iter().filter(|(_, flight)| flight.live) {
            *asked.entry(flight.slot).or_default() += flight.bytes - flight.arrived;
            let known = self.peers[flight.slot]
                .as_ref()
                .is_some_and(|peer| peer.live.contains(id));
            ensure(known, || format!("{id:?} is not among its peer's requests"))?;
        }
        for (slot, peer) in self.peers.iter().enumerate() {
            let Some(peer) = peer else { continue };
            let (left, open) = (asked.get(&slot).copied().unwrap_or(0), peer.live.len());
            ensure(peer.outstanding() == left, || {
                format!(
                    "{:?}: {left} bytes are asked, {} count",
                    peer.key,
                    peer.outstanding()
                )
            })?;
            ensure(open <= MAX_OPEN, || {
                format!("{:?}: {open} requests are open", peer.key)
            })?;
            ensure(peer.ready == self.ready.contains(&slot), || {
                format!("{:?}: whether it waits for requests", peer.key)
            })?;
        }
        Ok(())
    }
}
