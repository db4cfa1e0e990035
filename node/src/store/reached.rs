//! Ways whose packs are only here as far as they are read: what of each pack a way takes, and whether that is here.
//!
//! The store does not know what is in a pack: which parts a way reaches is told it ([`Store::put_reached`]), and is true of that way
//! for ever, as everything in it is named by hash. A row is committed before anything is punched that it does not name, so that at
//! every instant it can be told whether a component is whole. A pack that no row names is taken as a whole.

use std::collections::{BTreeMap, BTreeSet};

use capsule_proto::codec::{DecodeError, Reader, Writer};
use capsule_proto::ranges::{MAX_CONTENT_LEN, MAX_RUNS};
use capsule_proto::{GroupRanges, RootHash};
use redb::{ReadTransaction, ReadableTable, TableError};

use super::error::DatabaseError;
use super::meta::{Hash, REACHED};
use super::rows::{LayerBlobs, MAX_LAYERS, Row, read_ranges, write_layers, write_ranges};
use super::{Presence, Store};

/// By pack, what of it a way takes.
pub type Reached = BTreeMap<RootHash, GroupRanges>;

/// A row: the packs of one way of which not all is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ReachedRow(pub Reached);

impl Row for ReachedRow {
    const TABLE: &'static str = "reached";

    fn write(&self, out: &mut Writer) {
        let packs: Vec<_> = self.0.iter().collect();
        out.list(&packs, |out, (pack, groups)| {
            out.hash(pack);
            write_ranges(groups, out);
        });
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let packs = input.list("packs", MAX_LAYERS, 33, |input| {
            let pack = input.hash("pack")?;
            Ok((pack, read_ranges(input, MAX_CONTENT_LEN)?))
        })?;
        Ok(Self(packs.into_iter().collect()))
    }
}

/// What a way goes by: the hash of its layers, in order.
pub(super) fn key_of(layers: &[LayerBlobs]) -> RootHash {
    let mut out = Writer::default();
    write_layers(layers, &mut out);
    RootHash::of(&out.finish())
}

/// All rows. A store that was made before there were any has no such table; a row that cannot be read is as none: of packs that no row
/// names, all is taken.
pub(super) fn all_reached(
    tx: &ReadTransaction,
) -> Result<BTreeMap<RootHash, Reached>, DatabaseError> {
    match tx.open_table(REACHED) {
        Err(TableError::TableDoesNotExist(_)) => Ok(BTreeMap::new()),
        Err(error) => Err(error.into()),
        Ok(table) => {
            let mut found = BTreeMap::new();
            for entry in table.iter()? {
                let (key, row) = entry?;
                let reached = readable(row.value());
                found.extend(reached.map(|row| (RootHash::from_bytes(*key.value()), row)));
            }
            Ok(found)
        }
    }
}

fn readable(row: &[u8]) -> Option<Reached> {
    let row = ReachedRow::decode(row);
    row.ok().map(|ReachedRow(reached)| reached)
}

/// Whether all that a way takes is here.
pub(super) fn is_whole(
    layers: &[LayerBlobs],
    reached: Option<&Reached>,
    here: impl Fn(&RootHash) -> Option<(GroupRanges, bool)>,
) -> bool {
    let complete = |blob: &RootHash| here(blob).is_some_and(|(_, complete)| complete);
    let pack_is_here = |pack: &RootHash| {
        let taken = reached.and_then(|reached| reached.get(pack));
        match (here(pack), taken) {
            (Some((_, true)), _) => true,
            (_, None) => false,
            (Some((groups, _)), Some(taken)) => taken.difference(&groups).is_empty(),
            (None, Some(taken)) => taken.is_empty(),
        }
    };
    layers
        .iter()
        .all(|layer| complete(&layer.index) && layer.pack.as_ref().is_none_or(&pack_is_here))
}

impl Store {
    /// Notes, durably, what of its packs a way takes: all of those that are not named. A way of more than [`MAX_LAYERS`] layers has no
    /// row; a pack with more runs than a row holds is not named in it.
    pub fn put_reached(
        &self,
        layers: &[LayerBlobs],
        mut reached: Reached,
    ) -> Result<(), DatabaseError> {
        let len = layers.len().max(reached.len());
        if len > MAX_LAYERS {
            return Err(DatabaseError::TooLong {
                table: ReachedRow::TABLE,
                len,
                limit: MAX_LAYERS,
            });
        }
        reached.retain(|_, groups| groups.runs().len() <= MAX_RUNS);
        let (key, row) = (key_of(layers), ReachedRow(reached).encode());
        self.inner.meta.write(|tx| {
            tx.open_table(REACHED)?.insert(key.as_bytes(), &row[..])?;
            Ok(())
        })
    }

    /// What was noted of a way.
    pub fn reached(&self, layers: &[LayerBlobs]) -> Result<Option<Reached>, DatabaseError> {
        let key = key_of(layers);
        self.inner.meta.read(|tx| {
            let table = match tx.open_table(REACHED) {
                Err(TableError::TableDoesNotExist(_)) => return Ok(None),
                table => table?,
            };
            let row = table.get(key.as_bytes())?;
            Ok(row.and_then(|row| readable(row.value())))
        })
    }

    /// Forgets what was noted of all other ways, and what cannot be read.
    pub fn keep_reached(&self, ways: &BTreeSet<Vec<LayerBlobs>>) -> Result<(), DatabaseError> {
        let kept: BTreeSet<RootHash> = ways.iter().map(|way| key_of(way)).collect();
        let is_gone = |key: &Hash, row: &[u8]| {
            !kept.contains(&RootHash::from_bytes(*key)) || readable(row).is_none()
        };
        let gone = self.inner.meta.read(|tx| {
            let mut gone: Vec<Hash> = Vec::new();
            match tx.open_table(REACHED) {
                Err(TableError::TableDoesNotExist(_)) => {}
                table => {
                    for entry in table?.iter()? {
                        let (key, row) = entry?;
                        gone.extend(is_gone(key.value(), row.value()).then(|| *key.value()));
                    }
                }
            }
            Ok(gone)
        })?;
        if gone.is_empty() {
            return Ok(());
        }
        self.inner.meta.write(|tx| {
            let mut table = tx.open_table(REACHED)?;
            gone.iter()
                .try_for_each(|key| table.remove(key).map(drop))?;
            Ok(())
        })
    }

    /// Whether content can be read through layers: their indexes are here, and of their packs what that takes.
    pub fn is_readable(&self, layers: &[LayerBlobs]) -> Result<bool, DatabaseError> {
        let here = |blob: &RootHash| {
            let Presence {
                ranges, complete, ..
            } = self.durable(blob)?;
            Some((ranges, complete))
        };
        if is_whole(layers, None, here) {
            return Ok(true);
        }
        let reached = self.reached(layers)?;
        Ok(reached.is_some() && is_whole(layers, reached.as_ref(), here))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(n: u8) -> RootHash {
        RootHash::from_bytes([n; 32])
    }

    #[test]
    fn rows_have_one_encoding() {
        let groups: GroupRanges = [1..3, 7..8].into_iter().collect();
        let row = ReachedRow([(hash(1), groups), (hash(2), GroupRanges::new())].into());
        let bytes = row.encode();
        let first = [&[1; 32][..], &[2, 1, 2, 4, 1]].concat();
        assert_eq!(bytes, [&[1, 2], &first[..], &[2; 32], &[0]].concat());
        assert_eq!(ReachedRow::decode(&bytes), Ok(row));
        for len in 0..bytes.len() {
            assert!(ReachedRow::decode(&bytes[..len]).is_err());
        }
    }

    #[test]
    fn what_no_row_holds_is_refused_and_a_bad_row_is_as_none() {
        let temp = tempfile::tempdir().unwrap();
        let options = super::super::StoreOptions::default;
        let store = Store::open(temp.path(), options()).unwrap();
        let layer = LayerBlobs {
            index: hash(1),
            pack: Some(hash(2)),
        };
        let reached = |runs: u64| {
            let groups: GroupRanges = (0..runs).map(|n| 2 * n..2 * n + 1).collect();
            Reached::from([(hash(2), groups)])
        };
        let long = vec![layer; MAX_LAYERS + 1];
        let refused = store.put_reached(&long, reached(1)).unwrap_err();
        assert!(matches!(refused, DatabaseError::TooLong { .. }));
        assert_eq!(store.reached(&long).unwrap(), None);
        store.put_reached(&long[1..], reached(1)).unwrap();
        assert_eq!(store.reached(&long[1..]).unwrap(), Some(reached(1)));
        // Of a pack with too many runs, all is taken.
        store
            .put_reached(&[layer], reached(MAX_RUNS as u64 + 1))
            .unwrap();
        assert_eq!(store.reached(&[layer]).unwrap(), Some(Reached::new()));

        let key = key_of(&[layer]);
        let spoil = |tx: &redb::WriteTransaction| {
            let mut table = tx.open_table(REACHED)?;
            table.insert(key.as_bytes(), &[1, 9][..])?;
            Ok(())
        };
        store.inner.meta.write(spoil).unwrap();
        assert_eq!(store.reached(&[layer]).unwrap(), None);
        drop(store);
        let store = Store::open(temp.path(), options()).unwrap();
        assert_eq!(store.reached(&long[1..]).unwrap(), Some(reached(1)));
        let kept = [vec![layer], long[1..].to_vec()].into();
        store.keep_reached(&kept).unwrap();
        let rows = store
            .inner
            .meta
            .read(|tx| Ok(tx.open_table(REACHED)?.iter()?.count()));
        assert_eq!(rows.unwrap(), 1, "the bad one went");
    }

    #[test]
    fn a_way_needs_its_indexes_and_what_it_takes_of_its_packs() {
        let layer = |n| LayerBlobs {
            index: hash(n),
            pack: Some(hash(n + 100)),
        };
        let layers = [layer(1), layer(2)];
        let whole = || (GroupRanges::from(0..9), true);
        let part = || (GroupRanges::from(2..5), false);
        let check = |reached: Option<&Reached>, without: u8, partly: u8| {
            is_whole(&layers, reached, |blob| match blob.as_bytes()[0] {
                n if n == without => None,
                n if n == partly => Some(part()),
                _ => Some(whole()),
            })
        };
        let reached = |run: std::ops::Range<u64>| Reached::from([(hash(101), run.into())]);
        assert!(check(None, 0, 0));
        assert!(!check(None, 0, 101));
        assert!(check(Some(&reached(2..5)), 0, 101));
        assert!(!check(Some(&reached(2..6)), 0, 101));
        assert!(!check(Some(&reached(2..5)), 0, 102), "it is not named");
        assert!(!check(Some(&reached(2..5)), 0, 1), "an index in part");
        assert!(!check(Some(&reached(2..5)), 101, 0));
        assert!(
            check(Some(&reached(0..0)), 101, 0),
            "nothing of it is taken"
        );
    }
}
