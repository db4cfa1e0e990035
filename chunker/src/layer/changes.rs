//! Where a layer's content is not just its parent's: what has to be looked at if the parent's is known.

use capsule_proto::GroupRanges;
use capsule_proto::index::RunFrom;
use capsule_proto::ranges::{groups_touching, whole_groups};

use super::budget::Budget;
use super::error::LayerError;
use super::pages::PartFrom;
use super::read::LayerContent;

/// Chunk groups of a layer's content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Those that have bytes which the layer mentions; beyond the parent's end all of them.
    pub groups: GroupRanges,
    /// Those that the layer says are zero.
    pub zero: GroupRanges,
}

impl LayerContent {
    /// What this layer changes, by its index alone.
    pub fn changes(&self) -> Result<Changes, LayerError> {
        let size = self.header().target_size;
        let mut changes = Changes::default();
        let mut parts = self.parts(0..size);
        // Each part may pay as a read of its own: the index's length bounds them all.
        while let Some(part) = parts.next(&mut Budget::new(0))? {
            let bytes = part.range;
            match part.from {
                PartFrom::Inherited => continue,
                PartFrom::Mentioned(RunFrom::Zero) => {
                    changes.zero.insert(whole_groups(&bytes, size));
                }
                PartFrom::Mentioned(_) => {}
            }
            changes.groups.insert(groups_touching(&bytes));
        }
        if size == 0 {
            changes.groups = GroupRanges::all(size);
        }
        Ok(changes)
    }
}
