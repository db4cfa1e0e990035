//! Geometry of verified content: chunk groups, and sets of them.
//!
//! A chunk group (16 KiB) is the smallest unit that is verified, requested and announced. What peers
//! hold and want are sets of groups, kept as sorted runs.

use std::fmt;
use std::ops::Range;

use thiserror::Error;

/// BLAKE3's chunk, in bytes.
pub const CHUNK_LEN: u64 = 1024;
/// Bytes in a chunk group: a constant of the protocol.
pub const GROUP_LEN: u64 = 16 * CHUNK_LEN;
/// Largest blob or component: 2^50 bytes (1 PiB), so that offsets never overflow arithmetic on them.
pub const MAX_CONTENT_LEN: u64 = 1 << 50;
/// Most runs that a set decoded from outside may have; a longer one is refused.
pub const MAX_RUNS: usize = 1 << 16;

/// Height of a node of a content's hash tree: it stands above the 2^height groups of an aligned run, or what of them there is.
///
/// Who holds the hash of such a node needs nothing of what stands above it to verify groups below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Height(u8);

impl Height {
    /// Of the root, of whatever content.
    pub const ROOT: Self = Self(36);

    /// Of the node above so many groups, at least one of them.
    pub const fn of(groups: u64) -> Self {
        let height = groups.next_power_of_two().trailing_zeros() as u8;
        if height < Self::ROOT.0 {
            Self(height)
        } else {
            Self::ROOT
        }
    }

    /// By its number; none where it is more than the root's.
    pub const fn new(height: u8) -> Option<Self> {
        if height <= Self::ROOT.0 {
            Some(Self(height))
        } else {
            None
        }
    }

    /// Its number.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// Most groups below a node of that height.
    pub const fn groups(self) -> u64 {
        1 << self.0
    }

    /// Of the lowest node above a run of groups whose hash is known to whoever holds verified groups of the content: any of them came
    /// with the two hashes below each node above it.
    pub fn known(size: u64, run: &Range<u64>, held: &GroupRanges) -> Self {
        let mut known = Self::ROOT;
        let mut height = Self::of(group_count(size));
        while height.0 > 0 && Self(height.0 - 1).spans(run) {
            let first = run.start >> height.0 << height.0;
            if !held.intersects(&(first..first + height.groups())) {
                break;
            }
            height = Self(height.0 - 1);
            known = height;
        }
        known
    }

    /// Whether one node of that height stands above the whole run.
    pub const fn spans(self, run: &Range<u64>) -> bool {
        run.start < run.end && run.start >> self.0 == (run.end - 1) >> self.0
    }
}

/// Number of chunk groups of `size` bytes of content. Empty content has one (empty) group, as it has a hash.
pub const fn group_count(size: u64) -> u64 {
    if size == 0 {
        1
    } else {
        size.div_ceil(GROUP_LEN)
    }
}

/// Bytes that a run of groups covers in content of `size` bytes; the last group may be short.
pub fn group_bytes(groups: &Range<u64>, size: u64) -> Range<u64> {
    groups.start.saturating_mul(GROUP_LEN).min(size)..groups.end.saturating_mul(GROUP_LEN).min(size)
}

/// The groups that a range of bytes touches.
pub fn groups_touching(bytes: &Range<u64>) -> Range<u64> {
    if bytes.is_empty() {
        return 0..0;
    }
    bytes.start / GROUP_LEN..bytes.end.div_ceil(GROUP_LEN)
}

/// The groups of content of `size` bytes that lie within a range of bytes as a whole; the last may be short.
pub fn whole_groups(bytes: &Range<u64>, size: u64) -> Range<u64> {
    let start = bytes.start.div_ceil(GROUP_LEN);
    let end = if bytes.end >= size {
        group_count(size)
    } else {
        bytes.end / GROUP_LEN
    };
    start..end.max(start)
}

/// A set of chunk groups: sorted runs that neither touch nor overlap.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct GroupRanges {
    runs: Vec<Range<u64>>,
}

/// Runs that do not form a set.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RangesError {
    /// More runs than [`MAX_RUNS`].
    #[error("a set of {0} runs exceeds the bound of {MAX_RUNS}")]
    TooManyRuns(usize),
    /// A run that is empty, or does not come strictly after the one before it.
    #[error("run {0} is empty, or does not lie beyond the run before it")]
    OutOfOrder(usize),
    /// A run beyond the largest content.
    #[error("run {0} lies beyond the largest content")]
    TooLarge(usize),
}

impl GroupRanges {
    /// The empty set.
    pub const fn new() -> Self {
        Self { runs: Vec::new() }
    }

    /// All groups of content of `size` bytes.
    pub fn all(size: u64) -> Self {
        Self::from(0..group_count(size))
    }

    /// Checks runs that came from outside.
    pub fn from_runs(runs: Vec<Range<u64>>) -> Result<Self, RangesError> {
        if runs.len() > MAX_RUNS {
            return Err(RangesError::TooManyRuns(runs.len()));
        }
        let mut next = 0;
        for (i, run) in runs.iter().enumerate() {
            if run.start >= run.end || (i > 0 && run.start <= next) {
                return Err(RangesError::OutOfOrder(i));
            }
            if run.end > group_count(MAX_CONTENT_LEN) {
                return Err(RangesError::TooLarge(i));
            }
            next = run.end;
        }
        Ok(Self { runs })
    }

    /// The sorted runs.
    pub fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// How many groups are in the set.
    pub fn count(&self) -> u64 {
        self.runs.iter().map(|r| r.end - r.start).sum()
    }

    /// How many bytes of content of `size` bytes the set covers.
    pub fn bytes(&self, size: u64) -> u64 {
        self.runs
            .iter()
            .map(|r| group_bytes(r, size))
            .map(|b| b.end - b.start)
            .sum()
    }

    /// Whether the group is in the set.
    pub fn contains(&self, group: u64) -> bool {
        self.contains_run(&(group..group.saturating_add(1)))
    }

    /// Whether all groups of the run are in the set.
    pub fn contains_run(&self, run: &Range<u64>) -> bool {
        run.is_empty() || {
            let at = self.runs.partition_point(|r| r.end <= run.start);
            self.runs
                .get(at)
                .is_some_and(|r| r.start <= run.start && run.end <= r.end)
        }
    }

    /// Whether any group of the run is in the set.
    pub fn intersects(&self, run: &Range<u64>) -> bool {
        let at = self.runs.partition_point(|r| r.end <= run.start);
        !run.is_empty() && self.runs.get(at).is_some_and(|r| r.start < run.end)
    }

    /// Adds a run.
    pub fn insert(&mut self, run: Range<u64>) {
        if run.is_empty() {
            return;
        }
        // The runs that touch or overlap the new one become one with it.
        let first = self.runs.partition_point(|r| r.end < run.start);
        let last = self.runs.partition_point(|r| r.start <= run.end);
        let mut merged = run;
        if first < last {
            merged.start = merged.start.min(self.runs[first].start);
            merged.end = merged.end.max(self.runs[last - 1].end);
        }
        self.runs.splice(first..last, [merged]);
    }

    /// Takes a run out.
    pub fn remove(&mut self, run: Range<u64>) {
        if run.is_empty() {
            return;
        }
        let first = self.runs.partition_point(|r| r.end <= run.start);
        let last = self.runs.partition_point(|r| r.start < run.end);
        if first >= last {
            return;
        }
        let left = self.runs[first].start..run.start;
        let right = run.end..self.runs[last - 1].end;
        self.runs.splice(
            first..last,
            [left, right].into_iter().filter(|r| !r.is_empty()),
        );
    }

    /// Adds all of another set.
    pub fn union_with(&mut self, other: &Self) {
        if other.runs.len() <= 4 {
            other.runs.iter().cloned().for_each(|run| self.insert(run));
            return;
        }
        let mut all: Vec<_> = self.runs.iter().chain(&other.runs).cloned().collect();
        all.sort_unstable_by_key(|r| r.start);
        self.runs.clear();
        for run in all {
            match self.runs.last_mut() {
                Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
                _ => self.runs.push(run),
            }
        }
    }

    /// What both sets hold.
    pub fn intersection(&self, other: &Self) -> Self {
        let (mut a, mut b) = (self.runs.iter().peekable(), other.runs.iter().peekable());
        let mut runs = Vec::new();
        while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
            let both = x.start.max(y.start)..x.end.min(y.end);
            if !both.is_empty() {
                runs.push(both);
            }
            if x.end < y.end {
                a.next()
            } else {
                b.next()
            };
        }
        Self { runs }
    }

    /// What this set holds and the other does not.
    pub fn difference(&self, other: &Self) -> Self {
        let mut runs = Vec::new();
        let mut cuts = other.runs.iter().peekable();
        for run in &self.runs {
            let mut start = run.start;
            while let Some(cut) = cuts.peek() {
                if cut.start >= run.end {
                    break;
                }
                if cut.start > start {
                    runs.push(start..cut.start);
                }
                start = start.max(cut.end);
                if cut.end > run.end {
                    break;
                }
                cuts.next();
            }
            if start < run.end {
                runs.push(start..run.end);
            }
        }
        Self { runs }
    }

    /// Each group, in order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.runs.iter().cloned().flatten()
    }
}

impl From<Range<u64>> for GroupRanges {
    fn from(run: Range<u64>) -> Self {
        let mut set = Self::new();
        set.insert(run);
        set
    }
}

impl FromIterator<Range<u64>> for GroupRanges {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(runs: I) -> Self {
        let mut set = Self::new();
        runs.into_iter().for_each(|run| set.insert(run));
        set
    }
}

impl fmt::Debug for GroupRanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.runs).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn run() -> impl Strategy<Value = Range<u64>> {
        (0u64..60, 0u64..12).prop_map(|(start, len)| start..start + len)
    }

    proptest! {
        // The oracle is a plain set of numbers.
        #[test]
        fn operations_agree_with_a_plain_set(
            a in prop::collection::vec(run(), 0..12),
            b in prop::collection::vec(run(), 0..12),
            cuts in prop::collection::vec(run(), 0..4),
        ) {
            let set = |runs: &[Range<u64>]| runs.iter().cloned().flatten().collect::<BTreeSet<u64>>();
            let (sa, sb) = (set(&a), set(&b));
            let (ra, rb) = (a.iter().cloned().collect::<GroupRanges>(), b.iter().cloned().collect::<GroupRanges>());
            let same = |r: &GroupRanges, s: &BTreeSet<u64>| {
                r.iter().collect::<BTreeSet<_>>() == *s
                    && r.count() == s.len() as u64
                    && GroupRanges::from_runs(r.runs().to_vec()).is_ok()
            };
            prop_assert!(same(&ra, &sa));
            prop_assert!(same(&ra.intersection(&rb), &sa.intersection(&sb).copied().collect()));
            prop_assert!(same(&ra.difference(&rb), &sa.difference(&sb).copied().collect()));
            let mut union = ra.clone();
            union.union_with(&rb);
            prop_assert!(same(&union, &sa.union(&sb).copied().collect()));
            let (mut cut, mut cut_set) = (ra, sa);
            for run in cuts {
                prop_assert_eq!(cut.intersects(&run), run.clone().any(|g| cut_set.contains(&g)));
                prop_assert_eq!(cut.contains_run(&run), run.clone().all(|g| cut_set.contains(&g)));
                cut.remove(run.clone());
                run.for_each(|g| { cut_set.remove(&g); });
                prop_assert!(same(&cut, &cut_set));
            }
        }
    }

    #[test]
    fn runs_from_outside_are_checked() {
        let of = |runs: &[Range<u64>]| GroupRanges::from_runs(runs.to_vec());
        assert!(of(&[0..1, 2..3]).is_ok());
        assert_eq!(of(&[0..1, 1..3]), Err(RangesError::OutOfOrder(1)));
        #[expect(clippy::reversed_empty_ranges)]
        let reversed = GroupRanges::from_runs(vec![3..1, 4..5]);
        assert_eq!(reversed, Err(RangesError::OutOfOrder(0)));
        assert_eq!(of(&[0..1, 2..u64::MAX]), Err(RangesError::TooLarge(1)));
    }

    #[test]
    fn boundaries_of_groups() {
        assert_eq!(
            [0, 1, GROUP_LEN, GROUP_LEN + 1].map(group_count),
            [1, 1, 1, 2]
        );
        assert_eq!(group_bytes(&(0..2), GROUP_LEN + 5), 0..GROUP_LEN + 5);
        assert_eq!(groups_touching(&(GROUP_LEN - 1..GROUP_LEN + 1)), 0..2);
        assert_eq!(
            GroupRanges::all(GROUP_LEN + 1).bytes(GROUP_LEN + 1),
            GROUP_LEN + 1
        );
    }
}
