//! Looking at a short run of a long set of groups, in logarithmic time.
//!
//! The set algebra of `GroupRanges` walks whole sets; the scheduler asks about one piece at a time.

use std::ops::Range;

use capsule_proto::ranges::GroupRanges;

/// What of the run is in the set, as sorted runs.
pub(crate) fn overlaps(
    set: &GroupRanges,
    run: Range<u64>,
) -> impl Iterator<Item = Range<u64>> + '_ {
    let runs = set.runs();
    let first = runs.partition_point(|r| r.end <= run.start);
    runs[first..]
        .iter()
        .take_while({
            let end = run.end;
            move |r| r.start < end
        })
        .map(move |r| r.start.max(run.start)..r.end.min(run.end))
        .filter(|r| !r.is_empty())
}

/// What of the run is not in the set, as sorted runs.
pub(crate) fn gaps(set: &GroupRanges, run: Range<u64>) -> Vec<Range<u64>> {
    let mut gaps = Vec::new();
    let mut start = run.start;
    for held in overlaps(set, run.clone()) {
        if start < held.start {
            gaps.push(start..held.start);
        }
        start = held.end;
    }
    if start < run.end {
        gaps.push(start..run.end);
    }
    gaps
}

/// The first part of the run that is in both sets.
pub(crate) fn first_in_both(
    a: &GroupRanges,
    b: &GroupRanges,
    run: Range<u64>,
) -> Option<Range<u64>> {
    overlaps(a, run).find_map(|part| overlaps(b, part).next())
}

/// Groups in a run.
pub(crate) fn len(run: &Range<u64>) -> u64 {
    run.end.saturating_sub(run.start)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agree_with_set_algebra(
            runs in prop::collection::vec((0u64..50, 0u64..6), 0..12),
            others in prop::collection::vec((0u64..50, 0u64..6), 0..12),
            start in 0u64..50,
            length in 0u64..20,
        ) {
            let set = |runs: &[(u64, u64)]| runs.iter().map(|&(s, l)| s..s + l).collect::<GroupRanges>();
            let (a, b, run) = (set(&runs), set(&others), start..start + length);
            let window = GroupRanges::from(run.clone());
            let inside = overlaps(&a, run.clone()).collect::<Vec<_>>();
            let expected = a.intersection(&window);
            prop_assert_eq!(&inside, expected.runs());
            let gaps = gaps(&a, run.clone());
            let outside = window.difference(&a);
            prop_assert_eq!(&gaps, outside.runs());
            let both = a.intersection(&b).intersection(&window);
            prop_assert_eq!(first_in_both(&a, &b, run), both.runs().first().cloned());
        }
    }
}
