//! Channels do not go back: the newest version of a channel stays its newest when its name ends, though it names nothing then.
//!
//! An ended record goes; what stays of it is one small value a channel: its place in the channel's order, and its version, which
//! cannot come to mean something else.

use capsule_proto::codec::{Reader, Writer};
use capsule_proto::name::{CapsuleName, Channel, Version};
use capsule_proto::record::{Body, RecordError, SignedRecord};

use super::Records;
use crate::store::DatabaseError;

/// First byte of the value.
const FORMAT: u8 = 1;
/// Longest version, in bytes: the format's own bound.
const MAX_VERSION_LEN: usize = 64;

/// The newest version of a channel whose name has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// `CHANNEL:VERSION`.
    pub name: CapsuleName,
    /// Its place in the channel's order.
    pub sequence: u64,
}

impl Records {
    /// The newest version of a channel among those whose names have ended.
    pub fn newest_ended(&self, channel: &Channel) -> Result<Option<Ended>, DatabaseError> {
        let value = self.store.value(&key(channel))?;
        let noted = value.map(|bytes| decode(channel, &bytes)).transpose()?;
        // One that ended just now may not be purged yet.
        let now = self.clock.now();
        let records = self.store.names_of(channel)?;
        let ended = records
            .iter()
            .filter(|record| record.record().expires.is_some_and(|end| end <= now))
            .filter_map(of);
        Ok(ended.chain(noted).max_by_key(|ended| ended.sequence))
    }

    /// Notes what is left of a record that is dropped for `why`, if it is a name that ended.
    pub(super) fn note_ended(
        &self,
        record: &SignedRecord,
        why: &RecordError,
    ) -> Result<(), DatabaseError> {
        let (RecordError::Expired { .. }, Some(ended)) = (why, of(record)) else {
            return Ok(());
        };
        let channel = &ended.name.channel;
        let value = self.store.value(&key(channel))?;
        let known = value.map(|bytes| decode(channel, &bytes)).transpose()?;
        if known.is_some_and(|known| known.sequence >= ended.sequence) {
            return Ok(());
        }
        self.store.set_value(&key(channel), &encode(&ended))
    }
}

fn of(record: &SignedRecord) -> Option<Ended> {
    let Body::Name(name) = &record.record().body else {
        return None;
    };
    Some(Ended {
        name: CapsuleName {
            channel: name.channel.clone(),
            version: Some(name.version.clone()),
        },
        sequence: record.record().sequence,
    })
}

fn key(channel: &Channel) -> String {
    format!("ended {channel}")
}

fn encode(ended: &Ended) -> Vec<u8> {
    let mut out = Writer::default();
    out.u8(FORMAT);
    out.varint(ended.sequence);
    let version = ended.name.version.as_ref().map(ToString::to_string);
    out.bytes(version.unwrap_or_default().as_bytes());
    out.finish()
}

fn decode(channel: &Channel, bytes: &[u8]) -> Result<Ended, DatabaseError> {
    let read = || {
        let mut input = Reader::new(bytes);
        if input.u8("format").ok()? != FORMAT {
            return None;
        }
        let sequence = input.varint("sequence", u64::MAX).ok()?;
        let version = input.bytes("version", MAX_VERSION_LEN).ok()?;
        input.finish().ok()?;
        let version: Version = std::str::from_utf8(version).ok()?.parse().ok()?;
        let name = CapsuleName {
            channel: channel.clone(),
            version: Some(version),
        };
        Some(Ended { name, sequence })
    };
    read().ok_or(DatabaseError::Row {
        table: "values",
        reason: "what is known of a channel's ended names is damaged, or of a newer version",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_round_trip_and_are_pinned() {
        let name: CapsuleName = "lab:2026-11".parse().unwrap();
        let ended = Ended {
            name: name.clone(),
            sequence: 300,
        };
        let bytes = encode(&ended);
        assert_eq!(bytes, b"\x01\xac\x02\x072026-11");
        assert_eq!(decode(&name.channel, &bytes).unwrap(), ended);
        for len in 0..bytes.len() {
            assert!(decode(&name.channel, &bytes[..len]).is_err());
        }
    }
}
