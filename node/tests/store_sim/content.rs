//! Blobs to store: content with its tree, and encodings of its ranges, as an honest provider sends them.

use std::ops::Range;
use std::sync::Arc;

use capsule_chunker::bao::{Tree, encode_range, tree_of};
use capsule_chunker::content::{Content, ReadError};
use capsule_node::store::{Component, ComponentProvider};
use capsule_proto::ranges::{Height, group_count};
use capsule_proto::{GROUP_LEN, RootHash};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Content and all that is known of it.
#[derive(Debug, Clone)]
pub struct Sample {
    pub bytes: Vec<u8>,
    pub tree: Tree,
    pub outboard: Vec<u8>,
}

impl Sample {
    /// Pseudo-random content of a number of bytes.
    pub fn new(seed: u64, len: usize) -> Self {
        let mut bytes = vec![0; len];
        SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
        let (tree, outboard) = tree_of(&bytes);
        Self {
            bytes,
            tree,
            outboard,
        }
    }

    /// Content of some groups, the last one short.
    pub fn groups(seed: u64, groups: u64) -> Self {
        Self::new(seed, (groups * GROUP_LEN - 1000) as usize)
    }

    pub fn root(&self) -> RootHash {
        self.tree.root
    }

    pub fn size(&self) -> u64 {
        self.tree.size
    }

    pub fn count(&self) -> u64 {
        group_count(self.size())
    }

    /// What a provider sends for a run of groups.
    pub fn encoded(&self, groups: Range<u64>) -> Vec<u8> {
        let mut out = Vec::new();
        encode_range(
            &self.tree,
            groups,
            Height::ROOT,
            &self.bytes,
            &self.outboard,
            &mut out,
        )
        .unwrap();
        out
    }
}

impl Content for Sample {
    fn len(&self) -> u64 {
        self.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        let range = offset..offset + buf.len() as u64;
        let found = self.bytes.get(range.start as usize..range.end as usize);
        buf.copy_from_slice(found.ok_or(ReadError::OutOfRange {
            range,
            size: self.size(),
        })?);
        Ok(())
    }
}

/// Provides samples as components.
#[derive(Debug, Default)]
pub struct Samples(pub Vec<Sample>);

impl ComponentProvider for Samples {
    fn open(
        &self,
        root: &RootHash,
        _: &Component,
    ) -> Result<Arc<dyn Content>, Box<dyn std::error::Error + Send + Sync>> {
        let found = self.0.iter().find(|sample| sample.root() == *root);
        found
            .map(|sample| Arc::new(sample.clone()) as Arc<dyn Content>)
            .ok_or_else(|| "no such component".into())
    }
}
