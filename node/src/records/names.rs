//! What the records say together: which capsule a name means, which layers lead to a component.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::ops::Range;

use capsule_proto::CapsuleId;
use capsule_proto::RootHash;
use capsule_proto::credential::MachineId;
use capsule_proto::name::{CapsuleName, Channel, Version};
use capsule_proto::record::{Body, Layer, Prefetch, RecordId, SignedRecord};
use thiserror::Error;

use super::Records;
use crate::control::CapsuleRef;
use crate::store::DatabaseError;

/// Fewest digits of an id's beginning.
const MIN_PREFIX: usize = 8;

/// A record that names a version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownName {
    /// `CHANNEL:VERSION`.
    pub name: CapsuleName,
    /// What it names.
    pub capsule: CapsuleId,
    /// Bytes of the capsule's manifest.
    pub manifest_size: u64,
    /// Orders the channel.
    pub sequence: u64,
    /// When it was signed.
    pub issued: u64,
    /// When it ends.
    pub expires: Option<u64>,
    /// Who signed it.
    pub signer: MachineId,
    /// The record.
    pub id: RecordId,
}

/// A layer and who vouches for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownLayer {
    /// The layer.
    pub layer: Layer,
    /// Of one in several orders, which: higher ones are put by what is read first, as somebody told.
    pub sequence: u64,
    /// Who signed the record.
    pub signer: MachineId,
    /// When.
    pub issued: u64,
}

/// What a reference means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolution {
    /// The capsule.
    pub capsule: CapsuleId,
    /// Its name; of an id the newest one.
    pub name: Option<CapsuleName>,
    /// Bytes of its manifest, where a record tells.
    pub manifest_size: Option<u64>,
}

/// Why a reference means nothing, or too much.
#[derive(Debug, Error)]
pub enum ResolveError {
    /// No record of that name.
    #[error("no capsule named {0} is known")]
    UnknownName(CapsuleName),
    /// The channel has other versions.
    #[error("{name} is not known; the newest version of the channel is {newest}")]
    UnknownVersion {
        /// What was asked for.
        name: CapsuleName,
        /// What there is.
        newest: CapsuleName,
    },
    /// The channel's newest version has ended; an older one is meant only when it is named.
    #[error("the newest version of channel {}, {ended}, has ended", .ended.channel)]
    Ended {
        /// The version.
        ended: CapsuleName,
        /// The newest that has not ended, if there is one.
        newest: Option<CapsuleName>,
    },
    /// No known id begins so.
    #[error("no known capsule's id begins with {0}")]
    UnknownPrefix(String),
    /// Several capsules with equal right.
    #[error("{reference} means several capsules: {}", list(.candidates))]
    Ambiguous {
        /// What was asked for.
        reference: String,
        /// What it means, with names.
        candidates: Vec<(Option<CapsuleName>, CapsuleId)>,
    },
    /// Neither a name nor an id.
    #[error(
        "{0:?} is neither a name (CHANNEL or CHANNEL:VERSION) nor an id (64 hexadecimal digits, or the first {MIN_PREFIX} or more)"
    )]
    Malformed(String),
    /// The records could not be read.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

fn list(candidates: &[(Option<CapsuleName>, CapsuleId)]) -> String {
    let one = |(name, id): &(Option<CapsuleName>, CapsuleId)| match name {
        Some(name) => format!("{id} ({name})"),
        None => id.to_string(),
    };
    candidates.iter().map(one).collect::<Vec<_>>().join(", ")
}

impl Records {
    /// The names of a channel's versions, newest first.
    pub fn names_of(&self, channel: &Channel) -> Result<Vec<KnownName>, DatabaseError> {
        Ok(self.sorted(self.store.names_of(channel)?))
    }

    /// All names, by channel, newest first.
    pub fn all_names(&self) -> Result<Vec<KnownName>, DatabaseError> {
        let mut all = Vec::new();
        for channel in self.store.channels()? {
            if let Ok(channel) = channel.parse() {
                all.extend(self.names_of(&channel)?);
            }
        }
        Ok(all)
    }

    /// The names of a capsule, newest first.
    pub fn names_for(&self, capsule: &CapsuleId) -> Result<Vec<KnownName>, DatabaseError> {
        Ok(self.sorted(self.store.records_about(&capsule.0)?))
    }

    /// The newest version of a channel: where two have equal right, the one signed last, so that all nodes choose the same.
    pub fn newest(&self, channel: &Channel) -> Result<Option<KnownName>, DatabaseError> {
        Ok(self.names_of(channel)?.into_iter().next())
    }

    /// The sequence for the next version of a channel: above all that there were.
    pub fn next_sequence(&self, channel: &Channel) -> Result<u64, DatabaseError> {
        let newest = self.newest(channel)?.map(|newest| newest.sequence);
        let ended = self.newest_ended(channel)?.map(|ended| ended.sequence);
        Ok(newest.max(ended).map_or(1, |last| last.saturating_add(1)))
    }

    /// The newest version of a channel, where that has ended.
    pub fn ended(&self, channel: &Channel) -> Result<Option<CapsuleName>, DatabaseError> {
        let newest = self.newest(channel)?.map(|newest| newest.sequence);
        let ended = self.newest_ended(channel)?;
        let ended = ended.filter(|ended| newest.is_none_or(|newest| newest < ended.sequence));
        Ok(ended.map(|ended| ended.name))
    }

    /// The word of [`prefetches_of`](Self::prefetches_of) that counts.
    pub fn prefetch_of(&self, component: &RootHash) -> Result<Option<Prefetch>, DatabaseError> {
        let told = self.prefetches_of(component)?;
        Ok(told.into_iter().next().map(|(_, prefetch)| prefetch))
    }

    /// What is read first of a component, by the word that counts; nothing where there is none.
    pub fn first_reads_of(&self, component: &RootHash) -> Result<Vec<Range<u64>>, DatabaseError> {
        let told = self.prefetch_of(component)?;
        let ranges = told.into_iter().flat_map(|told| told.ranges);
        let ranges = ranges.map(|(start, len)| start..start.saturating_add(len));
        Ok(ranges.collect())
    }

    /// What those who resumed a component read of it first, by the members who may say so, with the sequence of each word: what counts is first.
    pub fn prefetches_of(
        &self,
        component: &RootHash,
    ) -> Result<Vec<(u64, Prefetch)>, DatabaseError> {
        let (now, mut told) = (self.clock.now(), vec![]);
        for record in self.store.records_about(component)? {
            let record = record.record();
            let ended = record.expires.is_some_and(|end| end <= now);
            if let Body::Prefetch(prefetch) = &record.body
                && !ended
            {
                told.push(((record.sequence, record.issued), prefetch.clone()));
            }
        }
        told.sort_by_key(|(order, _)| Reverse(*order));
        let with_sequence = |((sequence, _), prefetch)| (sequence, prefetch);
        Ok(told.into_iter().map(with_sequence).collect())
    }

    /// The layers that lead to a component.
    pub fn layers_to(&self, target: &RootHash) -> Result<Vec<KnownLayer>, DatabaseError> {
        let now = self.clock.now();
        let layers = self
            .store
            .records_about(target)?
            .into_iter()
            .filter_map(|record| {
                let (signer, record) = (record.signer(), record.record());
                let ended = record.expires.is_some_and(|end| end <= now);
                match &record.body {
                    Body::Layer(layer) if layer.target == *target && !ended => Some(KnownLayer {
                        layer: layer.clone(),
                        sequence: record.sequence,
                        signer,
                        issued: record.issued,
                    }),
                    _ => None,
                }
            });
        Ok(layers.collect())
    }

    /// What a reference means. `held` are ids known otherwise than by name.
    pub fn resolve(
        &self,
        reference: &CapsuleRef,
        held: &[CapsuleId],
    ) -> Result<Resolution, ResolveError> {
        let text = reference.0.trim();
        if let Ok(capsule) = text.parse::<CapsuleId>() {
            return Ok(self.of_capsule(capsule)?);
        }
        let name = text
            .parse::<CapsuleName>()
            .map_err(|_| ResolveError::Malformed(text.chars().take(80).collect()))?;
        let is_prefix = text.len() >= MIN_PREFIX
            && text.len() < 64
            && text.bytes().all(|b| b.is_ascii_hexdigit());
        match self.by_name(&name) {
            Err(ResolveError::UnknownName(_)) if is_prefix => {
                self.by_prefix(&text.to_ascii_lowercase(), held)
            }
            other => other,
        }
    }

    fn of_capsule(&self, capsule: CapsuleId) -> Result<Resolution, DatabaseError> {
        let newest = self.names_for(&capsule)?.into_iter().next();
        let manifest_size = newest.as_ref().map(|name| name.manifest_size);
        Ok(Resolution {
            capsule,
            name: newest.map(|name| name.name),
            manifest_size,
        })
    }

    fn by_name(&self, name: &CapsuleName) -> Result<Resolution, ResolveError> {
        let known = self.names_of(&name.channel)?;
        if name.version.is_none()
            && let Some(ended) = self.ended(&name.channel)?
        {
            let newest = known.first().map(|newest| newest.name.clone());
            return Err(ResolveError::Ended { ended, newest });
        }
        let Some(newest) = known.first() else {
            return Err(ResolveError::UnknownName(name.clone()));
        };
        let meant: Vec<&KnownName> = match &name.version {
            Some(version) => known
                .iter()
                .filter(|known| known.name.version.as_ref() == Some(version))
                .collect(),
            None => known
                .iter()
                .filter(|known| known.sequence == newest.sequence)
                .collect(),
        };
        let Some(first) = meant.first() else {
            return Err(ResolveError::UnknownVersion {
                name: name.clone(),
                newest: newest.name.clone(),
            });
        };
        if meant.iter().any(|other| other.capsule != first.capsule) {
            let candidates = meant
                .iter()
                .map(|name| (Some(name.name.clone()), name.capsule))
                .collect();
            return Err(ResolveError::Ambiguous {
                reference: name.to_string(),
                candidates,
            });
        }
        let (capsule, manifest_size) = (first.capsule, Some(first.manifest_size));
        Ok(Resolution {
            capsule,
            name: Some(first.name.clone()),
            manifest_size,
        })
    }

    fn by_prefix(&self, prefix: &str, held: &[CapsuleId]) -> Result<Resolution, ResolveError> {
        let named = self.all_names()?;
        let known: BTreeSet<CapsuleId> = named
            .iter()
            .map(|name| name.capsule)
            .chain(held.iter().copied())
            .collect();
        let found: Vec<CapsuleId> = known
            .into_iter()
            .filter(|id| id.to_string().starts_with(prefix))
            .collect();
        match found[..] {
            [] => Err(ResolveError::UnknownPrefix(prefix.to_owned())),
            [capsule] => Ok(self.of_capsule(capsule)?),
            _ => {
                let name_of = |id: &CapsuleId| {
                    named
                        .iter()
                        .find(|name| name.capsule == *id)
                        .map(|name| name.name.clone())
                };
                let candidates = found.iter().map(|id| (name_of(id), *id)).collect();
                Err(ResolveError::Ambiguous {
                    reference: prefix.to_owned(),
                    candidates,
                })
            }
        }
    }

    /// The names among records that have not ended, newest first.
    fn sorted(&self, records: Vec<SignedRecord>) -> Vec<KnownName> {
        let now = self.clock.now();
        let mut names: Vec<KnownName> = records.iter().filter_map(known_name).collect();
        names.retain(|name| name.expires.is_none_or(|end| end > now));
        names.sort_by_key(|name| {
            std::cmp::Reverse((name.sequence, name.issued, name.capsule, name.id))
        });
        names
    }

    /// What a version is already, if it is.
    pub fn version(
        &self,
        channel: &Channel,
        version: &Version,
    ) -> Result<Vec<KnownName>, DatabaseError> {
        let mut names = self.names_of(channel)?;
        names.retain(|name| name.name.version.as_ref() == Some(version));
        Ok(names)
    }
}

fn known_name(record: &SignedRecord) -> Option<KnownName> {
    let Body::Name(name) = &record.record().body else {
        return None;
    };
    Some(KnownName {
        name: CapsuleName {
            channel: name.channel.clone(),
            version: Some(name.version.clone()),
        },
        capsule: name.capsule,
        manifest_size: name.manifest_size,
        sequence: record.record().sequence,
        issued: record.record().issued,
        expires: record.record().expires,
        signer: record.signer(),
        id: record.id(),
    })
}
