//! What of each pack a component is read from: the frames that its bytes lie in, and those that these refer to, through all of its
//! layers. What lies in a pack beside them is dead as far as this component is concerned.
//!
//! Indexes tell it, nothing is decoded. Layers are looked at from the top down, each once: first its runs, which mark its frames and
//! say what is wanted of the layers below; then its frames from the last to the first, as references go back. In memory are a page, a
//! bit a frame of one layer, and what is wanted of the layers below as ranges, of which there is a bound. Large packs are reached in units of
//! several chunk groups, by their size, which bounds the runs of each.

use std::collections::BTreeMap;
use std::ops::Range;

use capsule_proto::GroupRanges;
use capsule_proto::index::{ReferenceTo, RunFrom};
use capsule_proto::ranges::{group_count, groups_touching};

use super::budget::{Budget, Spent};
use super::error::LayerError;
use super::pages::{IndexFault, PartFrom};
use super::read::LayerContent;
use crate::content::{Content, Progress};

/// Most ranges that are kept of what is wanted of a layer: 64 MiB. Beyond, they are rounded to blocks, so that more counts as wanted.
const MAX_WANTED: usize = 1 << 22;
/// The first blocks that ranges are rounded to; each next is four times as long.
const FIRST_BLOCK: u64 = 4 << 10;
/// Most runs of chunk groups of a pack: each is a row's entry, a have and a request.
const MAX_REACHED_RUNS: u64 = 1 << 14;
/// Whether to stop is asked after so many parts.
const ASK_EVERY: u32 = 1 << 12;

/// What a component is read from.
#[derive(Clone, Debug, Default)]
pub struct Reach {
    layers: BTreeMap<u64, LayerReach>,
}

/// What of one layer it is.
#[derive(Clone, Debug, Default)]
struct LayerReach {
    groups: GroupRanges,
    frames: u64,
    decoded: u64,
}

impl Reach {
    /// Goes through the indexes of a component's layers, which must all be there; their packs need not.
    ///
    /// The same layers give the same answer everywhere: what one machine keeps is what another asks for.
    pub fn of(top: &LayerContent, progress: &dyn Progress) -> Result<Self, LayerError> {
        Self::of_range(top, 0..top.len(), progress)
    }

    /// The same for a range of the component, which lies within it.
    pub fn of_range(
        top: &LayerContent,
        range: Range<u64>,
        progress: &dyn Progress,
    ) -> Result<Self, LayerError> {
        let (mut reach, mut left) = (Self::default(), Left::new());
        let mut wanted = Wanted::default();
        wanted.add(range);
        left.insert(top.key(0).0, (top, wanted));
        // What a layer reads was opened before it, so the last of those left is wanted by none of them.
        while let Some((number, (layer, wanted))) = left.pop_last() {
            let mut steps = Steps { progress, taken: 0 };
            let found = look(layer, wanted, &mut left, &mut steps);
            let found = found.map_err(|error| top.of_below(layer, error))?;
            reach.layers.insert(number, found);
        }
        Ok(reach)
    }

    /// The chunk groups of a layer's pack that are read.
    pub fn groups(&self, layer: &LayerContent) -> GroupRanges {
        let found = self.layers.get(&layer.key(0).0);
        found.map_or_else(GroupRanges::new, |found| found.groups.clone())
    }

    /// How many frames all of the component takes.
    pub fn frames(&self) -> u64 {
        self.layers.values().map(|layer| layer.frames).sum()
    }

    /// Bytes of these frames, decoded: what reading all of the component makes, each frame once.
    pub fn decoded(&self) -> u64 {
        self.layers.values().map(|layer| layer.decoded).sum()
    }
}

/// Layers that were not looked at yet, by number, and what is wanted of their components.
type Left<'a> = BTreeMap<u64, (&'a LayerContent, Wanted)>;

/// Asks now and then whether to stop.
struct Steps<'a> {
    progress: &'a dyn Progress,
    taken: u32,
}

impl Steps<'_> {
    fn step(&mut self) -> Result<(), LayerError> {
        self.taken = self.taken.wrapping_add(1);
        if self.taken.is_multiple_of(ASK_EVERY) {
            self.check()?;
        }
        Ok(())
    }

    fn check(&self) -> Result<(), LayerError> {
        match self.progress.cancelled() {
            true => Err(Spent::Cancelled.into()),
            false => Ok(()),
        }
    }
}

fn look<'a>(
    layer: &'a LayerContent,
    mut wanted: Wanted,
    left: &mut Left<'a>,
    steps: &mut Steps<'_>,
) -> Result<LayerReach, LayerError> {
    let mut marked = Marked::new(layer);
    wanted.settle();
    for range in wanted.ranges {
        let mut parts = layer.parts(range.start..range.end.min(layer.len()));
        // Each part may pay as a read of its own: the indexes' lengths bound them all.
        while let Some(part) = parts.next(&mut Budget::new(0))? {
            steps.step()?;
            match part.from {
                PartFrom::Inherited => want(layer, 0, part.range, left),
                PartFrom::Mentioned(RunFrom::Zero) => {}
                PartFrom::Mentioned(RunFrom::Frame { id, .. }) => marked.mark(id)?,
                PartFrom::Mentioned(RunFrom::Copy { source, offset }) => {
                    want(layer, source.into(), offset..offset + part.len(), left);
                }
            }
        }
    }
    let mut found = LayerReach::default();
    let mut runs = Vec::new();
    let directory = layer.pages().directory();
    for (number, entry) in directory.frame_pages().iter().enumerate().rev() {
        steps.check()?;
        let ids = entry.first..entry.first + entry.count;
        if !ids.clone().any(|id| marked.has(id)) {
            continue;
        }
        let frames = layer.pages().read_frames(number)?;
        for (id, frame) in ids.zip(&frames).rev() {
            if !marked.has(id) {
                continue;
            }
            steps.step()?;
            found.frames += 1;
            found.decoded += u64::from(frame.len);
            let end = frame.pack_offset + u64::from(frame.pack_len);
            put_before(&mut runs, groups_touching(&(frame.pack_offset..end)));
            for reference in &frame.references {
                match reference.to {
                    // An earlier one, as was checked when the page was parsed.
                    ReferenceTo::Frame(to) => marked.mark(to)?,
                    ReferenceTo::Source(source) => {
                        let end = reference.offset + u64::from(reference.len);
                        want(layer, source.into(), reference.offset..end, left);
                    }
                }
            }
        }
    }
    runs.reverse();
    let unit = unit_of(directory.pack_len());
    found.groups = in_units(runs, unit, directory.pack_len());
    Ok(found)
}

/// Notes that a range of a source is wanted, where that is read through a layer.
fn want<'a>(layer: &'a LayerContent, source_id: usize, range: Range<u64>, left: &mut Left<'a>) {
    if let Some(below) = layer.source(source_id).as_layer() {
        let (_, wanted) = left
            .entry(below.key(0).0)
            .or_insert_with(|| (below, Wanted::default()));
        wanted.add(range);
    }
}

/// Adds a run in front of others, of which the last is the first.
fn put_before(runs: &mut Vec<Range<u64>>, run: Range<u64>) {
    match runs.last_mut() {
        Some(first) if first.start <= run.end => first.start = first.start.min(run.start),
        _ => runs.push(run),
    }
}

/// In how many chunk groups at a time a pack is reached: so many that no set of such units has more than [`MAX_REACHED_RUNS`] runs.
///
/// By the pack's size alone. So whoever reaches less comes out with less, whichever way they look: what one version's machines
/// have freed, no later version through the same layers asks for; and sets of several ways join in as few runs.
const fn unit_of(pack_len: u64) -> u64 {
    let units = group_count(pack_len).div_ceil(2 * MAX_REACHED_RUNS);
    // A pack has one group at least.
    if units == 0 {
        1
    } else {
        units.next_power_of_two()
    }
}

/// Runs, in order, rounded outward to units of the pack.
fn in_units(runs: Vec<Range<u64>>, unit: u64, pack_len: u64) -> GroupRanges {
    let end = group_count(pack_len);
    let rounded = runs.into_iter().map(|run| {
        let last = run.end.next_multiple_of(unit);
        run.start / unit * unit..last.min(end)
    });
    rounded.collect()
}

/// A set of a pack's chunk groups, rounded outward to the units in which it is reached: few runs.
pub fn rounded(groups: &GroupRanges, pack_len: u64) -> GroupRanges {
    in_units(groups.runs().to_vec(), unit_of(pack_len), pack_len)
}

/// Frames of a layer: a bit each.
struct Marked<'a> {
    layer: &'a LayerContent,
    bits: Vec<u64>,
}

impl<'a> Marked<'a> {
    fn new(layer: &'a LayerContent) -> Self {
        let frames = layer.pages().directory().frame_count();
        let bits = vec![0; frames.div_ceil(64) as usize];
        Self { layer, bits }
    }

    fn mark(&mut self, id: u32) -> Result<(), LayerError> {
        let directory = self.layer.pages().directory();
        directory.frame_page_of(id).ok_or(IndexFault::NoFrame(id))?;
        self.bits[id as usize / 64] |= 1 << (id % 64);
        Ok(())
    }

    fn has(&self, id: u32) -> bool {
        self.bits[id as usize / 64] & 1 << (id % 64) != 0
    }
}

/// Ranges of a component, in any order until they are settled.
#[derive(Default)]
struct Wanted {
    ranges: Vec<Range<u64>>,
    /// How many there were when they were settled last.
    settled: usize,
}

impl Wanted {
    fn add(&mut self, range: Range<u64>) {
        match self.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.ranges.push(range),
        }
        if self.ranges.len() >= (2 * self.settled).max(1 << 16) {
            self.settle();
        }
    }

    /// Sorts and joins them.
    fn settle(&mut self) {
        self.join();
        let mut block = FIRST_BLOCK;
        while self.ranges.len() > MAX_WANTED / 2 {
            for range in &mut self.ranges {
                *range = range.start / block * block..range.end.next_multiple_of(block);
            }
            self.join();
            block *= 4;
        }
        self.settled = self.ranges.len();
    }

    fn join(&mut self) {
        self.ranges.sort_unstable_by_key(|range| range.start);
        self.ranges.dedup_by(|next, last| {
            let touches = next.start <= last.end;
            if touches {
                last.end = last.end.max(next.end);
            }
            touches
        });
    }
}

#[cfg(test)]
mod tests {
    use capsule_proto::GROUP_LEN;
    use capsule_proto::ranges::MAX_CONTENT_LEN;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn units_follow_from_a_packs_size_and_bound_the_runs() {
        let most = MAX_REACHED_RUNS;
        let size = |groups: u64| groups * GROUP_LEN;
        for (groups, unit) in [
            (0, 1),
            (1, 1),
            (2 * most, 1),
            (2 * most + 1, 2),
            (4 * most, 2),
            (4 * most + 1, 4),
            (200 * most, 128),
            (group_count(MAX_CONTENT_LEN), 1 << 21),
        ] {
            assert_eq!(unit_of(size(groups)), unit, "{groups} groups");
        }
        // A byte more is a group more.
        assert_eq!(unit_of(size(2 * most) + 1), 2);
        let groups = 7 * most + 5;
        let every_other: GroupRanges = (0..groups).step_by(2).map(|n| n..n + 1).collect();
        let rounded_all = rounded(&every_other, size(groups));
        assert_eq!(rounded_all, GroupRanges::all(size(groups)));
        let worst = (0..groups).step_by(8).map(|n| n + 1..n + 2);
        let found = rounded(&worst.collect(), size(groups));
        assert_eq!(found.runs().len() as u64, groups.div_ceil(8));
        assert!(found.runs().len() as u64 <= most);
        let last = rounded(&(groups - 1..groups).into(), size(groups));
        assert_eq!(last, (groups - 1..groups).into(), "no more than there is");
    }

    proptest! {
        #[test]
        fn who_reaches_less_comes_out_with_less(
            pack_groups in 1u64..2_000_000,
            picks in prop::collection::vec((any::<u64>(), 1u64..200, any::<bool>()), 0..300),
        ) {
            let len = pack_groups * GROUP_LEN;
            let run = |start: &u64, len: &u64| {
                let start = start % pack_groups;
                start..(start + len).min(pack_groups)
            };
            let all: GroupRanges = picks.iter().map(|(start, len, _)| run(start, len)).collect();
            let some = picks.iter().filter(|(.., kept)| *kept);
            let some: GroupRanges = some.map(|(start, len, _)| run(start, len)).collect();
            let (more, less) = (rounded(&all, len), rounded(&some, len));
            prop_assert!(all.difference(&more).is_empty());
            prop_assert!(less.difference(&more).is_empty());
            prop_assert!(more.difference(&GroupRanges::all(len)).is_empty());
            // Rounded once, rounded for good; sets join as they would have been rounded together.
            prop_assert_eq!(&rounded(&more, len), &more);
            let mut joined = less;
            joined.union_with(&more);
            prop_assert_eq!(joined, more);
        }
    }

    #[test]
    fn what_is_wanted_is_bounded_and_never_less() {
        let mut wanted = Wanted::default();
        let count = MAX_WANTED as u64 + 5;
        // Backwards, with gaps that the first blocks fill.
        for n in (0..count).rev() {
            wanted.add(n * 100..n * 100 + 10);
        }
        wanted.settle();
        assert!(wanted.ranges.len() <= MAX_WANTED);
        let covers = |at: u64| {
            let place = wanted.ranges.partition_point(|range| range.end <= at);
            wanted
                .ranges
                .get(place)
                .is_some_and(|range| range.start <= at)
        };
        assert!((0..count).all(|n| covers(n * 100) && covers(n * 100 + 9)));
        let mut few = Wanted::default();
        [5..9, 0..2, 8..12, 2..3]
            .into_iter()
            .for_each(|range| few.add(range));
        few.settle();
        assert_eq!(few.ranges, [0..3, 5..12]);
    }
}
