//! The layers through which components are read, where the store has no row for them: kept as values of its own.
//!
//! Of a tree, its two ways; of a component that is its own pack, that layer; of one that was encoded anew here, those layers; and layers that are
//! kept for others, though the component is read through others here.

use capsule_proto::RootHash;
use capsule_proto::codec::{DecodeError, Reader, Writer};
use capsule_proto::index::Space;

use super::{Holdings, TreeWay, space_word};
use crate::control::{Failure, FailureCode};
use crate::store::{DatabaseError, LayerBlobs, MAX_LAYERS, read_layers, write_layers};

const WAY_VERSION: u8 = 1;
/// Most layers kept for others, of one component.
const MAX_OFFERED: usize = 16;

fn tree_key(root: &RootHash) -> String {
    format!("tree way {root}")
}

fn offer_key(root: &RootHash) -> String {
    format!("offered layers {root}")
}

fn own_key(space: Space, root: &RootHash) -> String {
    format!("own way {} {root}", space_word(space))
}

fn blob_key(root: &RootHash) -> String {
    format!("blob way {root}")
}

impl TreeWay {
    fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.u8(WAY_VERSION);
        write_layers(&self.listing, &mut out);
        write_layers(&self.contents, &mut out);
        out.finish()
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Reader::new(bytes);
        if input.u8("version")? != WAY_VERSION {
            return Err(DecodeError::Format {
                what: "way to a tree",
                version: WAY_VERSION,
            });
        }
        let way = Self {
            listing: read_layers(&mut input)?,
            contents: read_layers(&mut input)?,
        };
        input.finish()?;
        Ok(way)
    }
}

/// Fails where nothing is to be read through so many layers: no row holds them.
pub fn check_len(layers: usize) -> Result<(), Failure> {
    if layers <= MAX_LAYERS {
        return Ok(());
    }
    let message =
        format!("it would be read through {layers} layers, and at most {MAX_LAYERS} are followed");
    Err(Failure::new(FailureCode::Refused, message).hint(
        "on a machine that has it, `capsule publish --rebase` adds a layer from nothing to a version; pull again after that",
    ))
}

impl Holdings {
    /// Layers that were made here to read something that is told of with others.
    pub fn own_way(
        &self,
        space: Space,
        root: &RootHash,
    ) -> Result<Option<Vec<LayerBlobs>>, DatabaseError> {
        self.layers_under(&own_key(space, root))
    }

    /// Keeps these.
    pub fn put_own_way(
        &self,
        space: Space,
        root: &RootHash,
        layers: &[LayerBlobs],
    ) -> Result<(), Failure> {
        self.note_reached(layers)?;
        let mut out = Writer::default();
        write_layers(layers, &mut out);
        Ok(self.store.set_value(&own_key(space, root), &out.finish())?)
    }

    /// Forgets those layers of a component of which this holds: the component is read through others, and they are made again.
    pub fn drop_own_ways(
        &self,
        component: &RootHash,
        is_bad: impl Fn(&[LayerBlobs]) -> Result<bool, DatabaseError>,
    ) -> Result<bool, DatabaseError> {
        let mut bad = Vec::new();
        for space in [Space::Stream, Space::Contents] {
            if let Some(own) = self.own_way(space, component)?
                && is_bad(&own)?
            {
                bad.push(own_key(space, component));
            }
        }
        self.store.remove_values(&bad)?;
        Ok(!bad.is_empty())
    }

    /// Whether layers to a component are kept for others.
    pub fn is_offered(&self, root: &RootHash) -> Result<bool, DatabaseError> {
        Ok(!self.offered(root)?.is_empty())
    }

    /// The layers to a component that is its own pack.
    pub(super) fn blob_way(
        &self,
        root: &RootHash,
    ) -> Result<Option<Vec<LayerBlobs>>, DatabaseError> {
        self.layers_under(&blob_key(root))
    }

    /// Layers that are kept as a value.
    fn layers_under(&self, key: &str) -> Result<Option<Vec<LayerBlobs>>, DatabaseError> {
        let value = self.store.value(key)?;
        let decode = |bytes: Vec<u8>| {
            let mut input = Reader::new(&bytes);
            let layers = read_layers(&mut input)?;
            input.finish()?;
            Ok(layers)
        };
        value
            .map(decode)
            .transpose()
            .map_err(|_: DecodeError| DatabaseError::Row {
                table: "values",
                reason: "the layers of a component are damaged, or of a newer version",
            })
    }

    /// Keeps the layers to a component that is its own pack.
    pub fn put_blob_way(
        &self,
        root: &RootHash,
        layers: &[LayerBlobs],
    ) -> Result<(), DatabaseError> {
        let mut out = Writer::default();
        write_layers(layers, &mut out);
        self.store.set_value(&blob_key(root), &out.finish())
    }

    /// Layers to a component that are kept for others, though it is read through others here.
    pub(super) fn offered(&self, root: &RootHash) -> Result<Vec<LayerBlobs>, DatabaseError> {
        Ok(self.layers_under(&offer_key(root))?.unwrap_or_default())
    }

    /// Keeps a layer to a component for others; of many, the newest.
    pub fn offer(&self, root: &RootHash, layer: LayerBlobs) -> Result<(), DatabaseError> {
        let mut layers = self.offered(root)?;
        layers.retain(|known| *known != layer);
        if layers.len() >= MAX_OFFERED {
            layers.remove(0);
        }
        layers.push(layer);
        self.put_offered(root, &layers)
    }

    fn put_offered(&self, root: &RootHash, layers: &[LayerBlobs]) -> Result<(), DatabaseError> {
        let mut out = Writer::default();
        write_layers(layers, &mut out);
        self.store.set_value(&offer_key(root), &out.finish())
    }

    /// No longer keeps those layers to a component for others of which this holds.
    pub fn take_back(
        &self,
        root: &RootHash,
        is_bad: impl Fn(&LayerBlobs) -> bool,
    ) -> Result<(), DatabaseError> {
        let mut layers = self.offered(root)?;
        let before = layers.len();
        layers.retain(|layer| !is_bad(layer));
        match layers.len() == before {
            true => Ok(()),
            false => self.put_offered(root, &layers),
        }
    }

    /// The layers through which a tree was checked here.
    pub fn tree_way(&self, root: &RootHash) -> Result<Option<TreeWay>, DatabaseError> {
        let value = self
            .store
            .value(&tree_key(root))?
            .filter(|value| !value.is_empty());
        let decode = |value: Vec<u8>| TreeWay::decode(&value);
        let bad = |_| DatabaseError::Row {
            table: "values",
            reason: "a tree's layers are damaged, or of a newer version",
        };
        value.map(decode).transpose().map_err(bad)
    }

    /// Keeps the layers through which a tree was checked.
    pub fn put_tree_way(&self, root: &RootHash, way: &TreeWay) -> Result<(), Failure> {
        for layers in [&way.listing, &way.contents] {
            self.note_reached(layers)?;
        }
        Ok(self.store.set_value(&tree_key(root), &way.encode())?)
    }

    /// Notes what of its packs a way takes, where not all of them are here: whether it is whole can be told from then on. One whose
    /// indexes are not here is not.
    pub fn note_reached(&self, layers: &[LayerBlobs]) -> Result<(), Failure> {
        check_len(layers.len())?;
        let has_indexes = layers.iter().all(|layer| self.is_complete(&layer.index));
        if !has_indexes || self.store.is_readable(layers)? {
            return Ok(());
        }
        let reached = crate::layers::reached(&self.store, layers, &())?;
        Ok(self.store.put_reached(layers, reached)?)
    }

    /// Forgets the layers of trees whose listings are gone, and of components that were their own packs; others are passed over.
    pub fn forget_ways<'a>(
        &self,
        removed: impl Iterator<Item = &'a RootHash>,
    ) -> Result<(), DatabaseError> {
        let mut keys = Vec::new();
        for root in removed {
            let own = [Space::Stream, Space::Contents].map(|space| own_key(space, root));
            let keys_of = [tree_key(root), blob_key(root), offer_key(root)];
            for key in keys_of.into_iter().chain(own) {
                if self.store.value(&key)?.is_some() {
                    keys.push(key);
                }
            }
        }
        self.store.remove_values(&keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_round_trip_and_cut_ones_are_refused() {
        let hash = |n| RootHash::from_bytes([n; 32]);
        let way = TreeWay {
            listing: vec![LayerBlobs {
                index: hash(1),
                pack: Some(hash(2)),
            }],
            contents: vec![LayerBlobs {
                index: hash(3),
                pack: None,
            }],
        };
        let bytes = way.encode();
        let listing = [&[1][..], &[1; 32], &[1], &[2; 32]].concat();
        let contents = [&[1][..], &[3; 32], &[0]].concat();
        assert_eq!(bytes, [&[1], &listing[..], &contents].concat());
        assert_eq!(TreeWay::decode(&bytes), Ok(way));
        for len in 0..bytes.len() {
            assert!(TreeWay::decode(&bytes[..len]).is_err());
        }
    }
}
