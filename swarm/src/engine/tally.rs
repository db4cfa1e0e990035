//! Content bytes sent and received, in all and by blob.

use std::collections::HashMap;

use capsule_proto::RootHash;

use crate::api::{BlobTotals, Totals};

/// Blobs that are counted apart: 2 MiB. More may be held, but people look at those that move.
const MAX_BLOBS: usize = 1 << 15;

/// See the module.
#[derive(Debug, Default)]
pub struct Tally {
    all: BlobTotals,
    blobs: HashMap<RootHash, BlobTotals>,
}

impl Tally {
    pub fn sent(&mut self, root: RootHash, bytes: u64) {
        self.all.sent += bytes;
        self.blob(root).sent += bytes;
    }

    pub fn received(&mut self, root: RootHash, bytes: u64) {
        self.all.received += bytes;
        self.blob(root).received += bytes;
    }

    pub fn totals(&self) -> Totals {
        Totals {
            all: self.all,
            blobs: self.blobs.iter().map(|(root, of)| (*root, *of)).collect(),
        }
    }

    fn blob(&mut self, root: RootHash) -> &mut BlobTotals {
        if self.blobs.len() >= MAX_BLOBS && !self.blobs.contains_key(&root) {
            self.forget_half();
        }
        self.blobs.entry(root).or_default()
    }

    /// Forgets the half of the blobs that moved least: rarely, so that a look at all of them is cheap for each.
    fn forget_half(&mut self) {
        let moved = |of: &BlobTotals| of.sent + of.received;
        let mut all: Vec<_> = self.blobs.drain().collect();
        all.sort_unstable_by_key(|(_, of)| std::cmp::Reverse(moved(of)));
        all.truncate(MAX_BLOBS / 2);
        self.blobs.extend(all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blobs_are_bounded_and_the_sum_is_not_touched_by_that() {
        let root = |i: usize| RootHash::of(&i.to_le_bytes());
        let mut tally = Tally::default();
        (0..3 * MAX_BLOBS).for_each(|i| {
            tally.sent(root(i), 1);
            tally.received(root(7), 1);
        });
        let Totals { all, blobs } = tally.totals();
        let many = 3 * MAX_BLOBS as u64;
        assert_eq!((all.sent, all.received), (many, many));
        assert!(blobs.len() <= MAX_BLOBS, "{}", blobs.len());
        let seventh = blobs.iter().find(|(of, _)| *of == root(7));
        assert_eq!(seventh.map(|(_, of)| of.received), Some(many));
    }
}
