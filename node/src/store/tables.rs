//! The daemon's tables: records, capsules, pins, follows, bans, single values.
//!
//! Plain storage with types: each call is one transaction, durable when it returns. Which record counts,
//! what a pin keeps alive, when a ban ends: that is decided elsewhere.

use capsule_proto::name::Channel;
use capsule_proto::record::{Body, RecordId, SignedRecord};
use capsule_proto::{CapsuleId, RootHash};
use redb::{ReadTransaction, ReadableTable, ReadableTableMetadata};

use super::Store;
use super::error::DatabaseError;
use super::meta::{
    BANS, CAPSULES, FOLLOWS, Hash, PINS, RECORDS, RECORDS_BY_NAME, RECORDS_BY_TARGET, VALUES,
    decode, rows,
};
use super::rows::{Ban, Follow, HeldCapsule, PinOrigin, Row};

/// Most records kept: years of releases of a large fleet, a few hundred bytes each.
pub const MAX_RECORDS: u64 = 1 << 18;
/// Most peers remembered as banned.
pub const MAX_BANS: u64 = 1 << 16;
/// Longest peer id in bytes: libp2p's are at most 42.
pub const MAX_PEER_LEN: usize = 64;
/// Longest single value in bytes.
pub const MAX_VALUE_LEN: usize = 64 << 10;
const NEWEST_TIME: &str = "newest signed time";

type Result<T> = std::result::Result<T, DatabaseError>;

/// Records: kept whole, found by id, by channel and by what they are about.
impl Store {
    /// Keeps a record (verified by the caller); whether it is new.
    pub fn put_record(&self, record: &SignedRecord) -> Result<bool> {
        let id = record.id();
        let key = id.0.as_bytes();
        self.inner.meta.write(|tx| {
            let mut table = tx.open_table(RECORDS)?;
            if table.get(key)?.is_some() {
                return Ok(false);
            }
            if table.len()? >= MAX_RECORDS {
                return Err(DatabaseError::TooMany {
                    table: "records",
                    limit: MAX_RECORDS,
                });
            }
            table.insert(key, record.as_bytes())?;
            let (name, targets) = subjects(record);
            if let Some(name) = name {
                tx.open_table(RECORDS_BY_NAME)?
                    .insert((&name[..], key), ())?;
            }
            let mut by_target = tx.open_table(RECORDS_BY_TARGET)?;
            targets
                .iter()
                .try_for_each(|target| by_target.insert((target.as_bytes(), key), ()).map(drop))?;
            Ok(true)
        })
    }

    /// A record's bytes.
    pub fn record(&self, id: &RecordId) -> Result<Option<Vec<u8>>> {
        self.inner.meta.read(|tx| {
            Ok(tx
                .open_table(RECORDS)?
                .get(id.0.as_bytes())?
                .map(|bytes| bytes.value().to_vec()))
        })
    }

    /// The ids of all records.
    pub fn record_ids(&self) -> Result<Vec<RecordId>> {
        self.inner.meta.read(|tx| {
            let table = tx.open_table(RECORDS)?;
            let ids = table
                .iter()?
                .map(|entry| Ok(RecordId(RootHash::from_bytes(*entry?.0.value()))));
            ids.collect()
        })
    }

    /// All names' channels of which there are records.
    pub fn channels(&self) -> Result<Vec<String>> {
        self.inner.meta.read(|tx| {
            let mut channels = Vec::new();
            for entry in tx
                .open_table(RECORDS_BY_NAME)?
                .range((NAME, &[0; 32])..(NAME_END, &[0; 32]))?
            {
                let (key, _) = entry?;
                channels.push(key.value().0[NAME.len()..].to_owned());
            }
            channels.dedup();
            Ok(channels)
        })
    }

    /// The records that name versions of a channel.
    pub fn names_of(&self, channel: &Channel) -> Result<Vec<SignedRecord>> {
        self.records_by_name(&format!("{NAME}{channel}"))
    }

    /// The revocations.
    pub fn revocations(&self) -> Result<Vec<SignedRecord>> {
        self.records_by_name(REVOCATION)
    }

    /// The records about a hash: layers that lead to a component or start from it, its prefetch lists,
    /// names and releases of a capsule.
    pub fn records_about(&self, target: &RootHash) -> Result<Vec<SignedRecord>> {
        let key = target.as_bytes();
        self.inner.meta.read(|tx| {
            let table = tx.open_table(RECORDS_BY_TARGET)?;
            let found = table
                .range((key, &[0; 32])..=(key, &[0xff; 32]))?
                .map(|entry| Ok(*entry?.0.value().1));
            records_of(tx, found)
        })
    }

    /// Forgets a record; whether it was there.
    pub fn remove_record(&self, id: &RecordId) -> Result<bool> {
        let key = id.0.as_bytes();
        self.inner.meta.write(|tx| {
            let Some(bytes) = tx
                .open_table(RECORDS)?
                .remove(key)?
                .map(|bytes| bytes.value().to_vec())
            else {
                return Ok(false);
            };
            let (name, targets) = subjects(&decode_record(&bytes)?);
            if let Some(name) = name {
                tx.open_table(RECORDS_BY_NAME)?.remove((&name[..], key))?;
            }
            let mut by_target = tx.open_table(RECORDS_BY_TARGET)?;
            targets
                .iter()
                .try_for_each(|target| by_target.remove((target.as_bytes(), key)).map(drop))?;
            Ok(true)
        })
    }

    fn records_by_name(&self, name: &str) -> Result<Vec<SignedRecord>> {
        self.inner.meta.read(|tx| {
            let table = tx.open_table(RECORDS_BY_NAME)?;
            let found = table
                .range((name, &[0; 32])..=(name, &[0xff; 32]))?
                .map(|entry| Ok(*entry?.0.value().1));
            records_of(tx, found)
        })
    }
}

/// Prefixes of the keys by name: one key space for each kind of statement.
const NAME: &str = "name:";
/// The first key after all that begin with [`NAME`].
const NAME_END: &str = "name;";
const RELEASE: &str = "release:";
const REVOCATION: &str = "revocation";

/// What a record is found by.
fn subjects(record: &SignedRecord) -> (Option<String>, Vec<RootHash>) {
    match &record.record().body {
        Body::Name(name) => (
            Some(format!("{NAME}{}", name.channel)),
            vec![name.capsule.0],
        ),
        Body::Release(release) => (
            Some(format!("{RELEASE}{}", release.channel)),
            vec![release.capsule.0],
        ),
        Body::Layer(layer) => (
            None,
            layer.parent.into_iter().chain([layer.target]).collect(),
        ),
        Body::Prefetch(prefetch) => (None, vec![prefetch.component]),
        Body::Revocation(_) => (Some(REVOCATION.into()), Vec::new()),
    }
}

fn decode_record(bytes: &[u8]) -> Result<SignedRecord> {
    SignedRecord::decode(bytes).map_err(|_| DatabaseError::Row {
        table: "records",
        reason: "damaged, or of a newer version",
    })
}

fn records_of(
    tx: &ReadTransaction,
    ids: impl Iterator<Item = Result<Hash>>,
) -> Result<Vec<SignedRecord>> {
    let table = tx.open_table(RECORDS)?;
    let missing = DatabaseError::Row {
        table: "records",
        reason: "an index names a record that is not there",
    };
    let mut found = Vec::new();
    for id in ids {
        match table.get(&id?)? {
            Some(bytes) => found.push(decode_record(bytes.value())?),
            None => return Err(missing),
        }
    }
    Ok(found)
}

/// Capsules and pins.
impl Store {
    /// Notes that a capsule is held, or being fetched.
    pub fn put_capsule(&self, id: &CapsuleId, held: &HeldCapsule) -> Result<()> {
        let bytes = held.encode();
        self.inner.meta.write(|tx| {
            tx.open_table(CAPSULES)?
                .insert(id.0.as_bytes(), &bytes[..])?;
            Ok(())
        })
    }

    /// Notes whether all of a capsule is here, if it is held at all; whether it is. One that was removed stays removed.
    pub fn mark_capsule(&self, id: &CapsuleId, complete: bool) -> Result<bool> {
        let key = id.0.as_bytes();
        self.inner.meta.write(|tx| {
            let mut table = tx.open_table(CAPSULES)?;
            let known = table.get(key)?.map(|bytes| decode(bytes.value()));
            let Some(held) = known.transpose()? else {
                return Ok(false);
            };
            let marked = HeldCapsule { complete, ..held }.encode();
            table.insert(key, &marked[..])?;
            Ok(true)
        })
    }

    /// A capsule that is held.
    pub fn capsule(&self, id: &CapsuleId) -> Result<Option<HeldCapsule>> {
        self.inner
            .meta
            .read(|tx| match tx.open_table(CAPSULES)?.get(id.0.as_bytes())? {
                Some(bytes) => decode(bytes.value()).map(Some),
                None => Ok(None),
            })
    }

    /// All capsules that are held.
    pub fn capsules(&self) -> Result<Vec<(CapsuleId, HeldCapsule)>> {
        let rows = self.inner.meta.read(|tx| rows(tx, CAPSULES))?;
        Ok(rows
            .into_iter()
            .map(|(key, held)| (capsule_id(&key), held))
            .collect())
    }

    /// Forgets that a capsule is held, with its pins; whether it was known.
    pub fn remove_capsule(&self, id: &CapsuleId) -> Result<bool> {
        let key = id.0.as_bytes();
        self.inner.meta.write(|tx| {
            tx.open_table(PINS)?
                .retain(|(capsule, _), ()| capsule != key)?;
            Ok(tx.open_table(CAPSULES)?.remove(key)?.is_some())
        })
    }

    /// Forgets that a capsule is held unless somebody pins it; whether it is forgotten.
    pub fn remove_unpinned(&self, id: &CapsuleId) -> Result<bool> {
        let key = id.0.as_bytes();
        self.inner.meta.write(|tx| {
            // Pins of one capsule lie together, the first at or after the key with an empty origin.
            let pinned = match tx.open_table(PINS)?.range((key, "")..)?.next() {
                Some(entry) => entry?.0.value().0 == key,
                None => false,
            };
            if !pinned {
                tx.open_table(CAPSULES)?.remove(key)?;
            }
            Ok(!pinned)
        })
    }

    /// Pins a capsule for somebody; whether that is new.
    pub fn pin(&self, id: &CapsuleId, origin: &PinOrigin) -> Result<bool> {
        let key = origin.key();
        self.inner.meta.write(|tx| {
            Ok(tx
                .open_table(PINS)?
                .insert((id.0.as_bytes(), &key[..]), ())?
                .is_none())
        })
    }

    /// Takes a pin away; whether there was one.
    pub fn unpin(&self, id: &CapsuleId, origin: &PinOrigin) -> Result<bool> {
        let key = origin.key();
        self.inner.meta.write(|tx| {
            Ok(tx
                .open_table(PINS)?
                .remove((id.0.as_bytes(), &key[..]))?
                .is_some())
        })
    }

    /// All pins.
    pub fn pins(&self) -> Result<Vec<(CapsuleId, PinOrigin)>> {
        self.inner.meta.read(|tx| {
            let mut pins = Vec::new();
            for entry in tx.open_table(PINS)?.iter()? {
                let (key, _) = entry?;
                let (capsule, origin) = key.value();
                let unknown = DatabaseError::Row {
                    table: "pins",
                    reason: "an origin of a newer version",
                };
                pins.push((
                    capsule_id(capsule),
                    PinOrigin::from_key(origin).ok_or(unknown)?,
                ));
            }
            Ok(pins)
        })
    }
}

fn capsule_id(key: &Hash) -> CapsuleId {
    CapsuleId(RootHash::from_bytes(*key))
}

/// Follows, bans, single values.
impl Store {
    /// Follows a channel, or changes how.
    pub fn follow(&self, channel: &Channel, follow: &Follow) -> Result<()> {
        let bytes = follow.encode();
        self.inner.meta.write(|tx| {
            tx.open_table(FOLLOWS)?
                .insert(channel.as_str(), &bytes[..])?;
            Ok(())
        })
    }

    /// Follows a channel no longer; whether it did.
    pub fn unfollow(&self, channel: &Channel) -> Result<bool> {
        self.inner
            .meta
            .write(|tx| Ok(tx.open_table(FOLLOWS)?.remove(channel.as_str())?.is_some()))
    }

    /// All channels followed.
    pub fn follows(&self) -> Result<Vec<(Channel, Follow)>> {
        self.inner.meta.read(|tx| {
            let mut follows = Vec::new();
            for entry in tx.open_table(FOLLOWS)?.iter()? {
                let (key, value) = entry?;
                let bad = |_| DatabaseError::Row {
                    table: "follows",
                    reason: "the key is no channel",
                };
                follows.push((key.value().parse().map_err(bad)?, decode(value.value())?));
            }
            Ok(follows)
        })
    }

    /// Bans a peer, by the bytes of its id.
    pub fn ban(&self, peer: &[u8], ban: &Ban) -> Result<()> {
        bounded("bans", peer.len(), MAX_PEER_LEN)?;
        let bytes = ban.encode();
        self.inner.meta.write(|tx| {
            let mut table = tx.open_table(BANS)?;
            if table.len()? >= MAX_BANS && table.get(peer)?.is_none() {
                return Err(DatabaseError::TooMany {
                    table: "bans",
                    limit: MAX_BANS,
                });
            }
            table.insert(peer, &bytes[..])?;
            Ok(())
        })
    }

    /// All bans that hold at a time (seconds since 1970).
    pub fn bans(&self, now: u64) -> Result<Vec<(Vec<u8>, Ban)>> {
        self.inner.meta.read(|tx| {
            let mut bans = Vec::new();
            for entry in tx.open_table(BANS)?.iter()? {
                let (key, value) = entry?;
                let ban: Ban = decode(value.value())?;
                if ban.until.is_none_or(|until| until > now) {
                    bans.push((key.value().to_vec(), ban));
                }
            }
            Ok(bans)
        })
    }

    /// Forgets bans that have ended at a time (seconds since 1970); whose they were.
    pub fn lift_ended_bans(&self, now: u64) -> Result<Vec<Vec<u8>>> {
        let ended = |bytes: &[u8]| {
            Ban::decode(bytes).is_ok_and(|ban| ban.until.is_some_and(|until| until <= now))
        };
        // Mostly there are none, which costs no commit.
        let any = self.inner.meta.read(|tx| {
            for entry in tx.open_table(BANS)?.iter()? {
                if ended(entry?.1.value()) {
                    return Ok(true);
                }
            }
            Ok(false)
        })?;
        if !any {
            return Ok(Vec::new());
        }
        self.inner.meta.write(|tx| {
            let mut lifted = Vec::new();
            tx.open_table(BANS)?.retain(|peer, bytes| {
                if ended(bytes) {
                    lifted.push(peer.to_vec());
                }
                !ended(bytes)
            })?;
            Ok(lifted)
        })
    }

    /// Sets a single value of the daemon's.
    pub fn set_value(&self, key: &str, value: &[u8]) -> Result<()> {
        bounded("values", value.len(), MAX_VALUE_LEN)?;
        self.inner.meta.write(|tx| {
            tx.open_table(VALUES)?.insert(key, value)?;
            Ok(())
        })
    }

    /// Forgets single values of the daemon's; what is not there is no matter.
    pub fn remove_values(&self, keys: &[String]) -> Result<()> {
        if keys.is_empty() {
            return Ok(());
        }
        self.inner.meta.write(|tx| {
            let mut table = tx.open_table(VALUES)?;
            keys.iter()
                .try_for_each(|key| table.remove(&key[..]).map(drop))?;
            Ok(())
        })
    }

    /// A single value of the daemon's.
    pub fn value(&self, key: &str) -> Result<Option<Vec<u8>>> {
        self.inner.meta.read(|tx| {
            Ok(tx
                .open_table(VALUES)?
                .get(key)?
                .map(|value| value.value().to_vec()))
        })
    }

    /// Raises the newest signed time seen (seconds since 1970): the floor for a clock whose battery is dead.
    pub fn note_time(&self, seconds: u64) -> Result<()> {
        if seconds <= self.newest_time()? {
            return Ok(());
        }
        self.inner.meta.write(|tx| {
            let mut table = tx.open_table(VALUES)?;
            // Another thread may have raised it further meanwhile.
            let known = table
                .get(NEWEST_TIME)?
                .map_or(0, |value| time(value.value()));
            table.insert(NEWEST_TIME, &seconds.max(known).to_le_bytes()[..])?;
            Ok(())
        })
    }

    /// The newest signed time seen, 0 if none.
    pub fn newest_time(&self) -> Result<u64> {
        Ok(self.value(NEWEST_TIME)?.map_or(0, |value| time(&value)))
    }
}

fn time(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

fn bounded(table: &'static str, len: usize, limit: usize) -> Result<()> {
    if len > limit {
        Err(DatabaseError::TooLong { table, len, limit })
    } else {
        Ok(())
    }
}
