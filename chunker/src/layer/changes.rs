//! Where a layer's content is not just its parent's: what has to be looked at if the parent's is known.

use std::ops::Range;

use capsule_proto::GroupRanges;
use capsule_proto::index::RunFrom;
use capsule_proto::ranges::{group_count, groups_touching, whole_groups};

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
        let mut own: Vec<Range<u64>> = Vec::new();
        let mut zero: Vec<Range<u64>> = Vec::new();
        let mut parts = self.parts(0..size);
        // Each part may pay as a read of its own: the index's length bounds them all.
        while let Some(part) = parts.next(&mut Budget::new(0))? {
            let bytes = part.range;
            match part.from {
                PartFrom::Inherited => continue,
                PartFrom::Mentioned(RunFrom::Zero) => add(&mut zero, whole_groups(&bytes, size)),
                PartFrom::Mentioned(_) => {}
            }
            add(&mut own, groups_touching(&bytes));
        }
        if size == 0 {
            own.push(0..group_count(size));
        }
        Ok(Changes {
            groups: own.into_iter().collect(),
            zero: zero.into_iter().collect(),
        })
    }
}

/// Adds groups that begin where those before end, or later, but for the group that both have.
fn add(runs: &mut Vec<Range<u64>>, groups: Range<u64>) {
    match runs.last_mut() {
        _ if groups.is_empty() => {}
        Some(last) if groups.start <= last.end => last.end = last.end.max(groups.end),
        _ => runs.push(groups),
    }
}
