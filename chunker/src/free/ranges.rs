//! Gathering free ranges: joined, cut to whole pages, and bounded in number.

use std::ops::Range;

/// Layers of disks are cut by pages; free space that is less than one, or begins within one, gains nothing.
const PAGE: u64 = 4 << 10;
/// Most ranges that are kept (16 MiB); where a disk has more, the smallest are not worth it.
const MAX_RANGES: usize = 1 << 20;

/// Takes ranges of bytes, mostly in order, and joins those that adjoin.
#[derive(Debug)]
pub(super) struct Gatherer {
    kept: Vec<Range<u64>>,
    open: Range<u64>,
    least: u64,
    most: usize,
}

impl Default for Gatherer {
    fn default() -> Self {
        Self {
            kept: Vec::new(),
            open: 0..0,
            least: PAGE,
            most: MAX_RANGES,
        }
    }
}

impl Gatherer {
    pub fn add(&mut self, range: Range<u64>) {
        if range.start == self.open.end && !self.open.is_empty() {
            self.open.end = range.end;
        } else {
            self.close();
            self.open = range;
        }
    }

    fn close(&mut self) {
        let open = std::mem::replace(&mut self.open, 0..0);
        let start = open.start.next_multiple_of(PAGE);
        let end = open.end - open.end % PAGE;
        if end < start || end - start < self.least {
            return;
        }
        self.kept.push(start..end);
        while self.kept.len() > self.most {
            self.least *= 2;
            let least = self.least;
            self.kept.retain(|range| range.end - range.start >= least);
        }
    }

    /// All ranges in order, joined where they adjoin or overlap.
    pub fn finish(mut self) -> Vec<Range<u64>> {
        self.close();
        joined(self.kept)
    }
}

/// Sorts ranges, and joins those that adjoin or overlap.
pub(super) fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let joins = next.start <= last.end;
        if joins {
            last.end = last.end.max(next.end);
        }
        joins
    });
    ranges
}

/// Index of the first of ordered ranges that ends after a place.
pub(super) fn first_after(ranges: &[Range<u64>], at: u64) -> usize {
    ranges.partition_point(|range| range.end <= at)
}

/// Whether a range has bytes in common with one of ordered ranges.
pub(super) fn overlaps(ranges: &[Range<u64>], range: &Range<u64>) -> bool {
    ranges
        .get(first_after(ranges, range.start))
        .is_some_and(|next| next.start < range.end)
}

#[cfg(test)]
#[allow(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges, some of one"
)]
mod tests {
    use super::*;

    fn gathered(ranges: &[Range<u64>], most: usize) -> Vec<Range<u64>> {
        let mut gatherer = Gatherer {
            most,
            ..Gatherer::default()
        };
        ranges.iter().cloned().for_each(|range| gatherer.add(range));
        gatherer.finish()
    }

    #[test]
    fn neighbours_are_joined_before_they_are_cut_to_pages() {
        let small = [1024..2048, 2048..5120, 5120..9000];
        assert_eq!(gathered(&small, 9), [4096..8192]);
        assert_eq!(gathered(&[1..4095, 4097..8191], 9), []);
        assert_eq!(gathered(&[8192..12288, 0..8192], 9), [0..12288]);
        assert_eq!(gathered(&[], 9), []);
    }

    #[test]
    fn too_many_ranges_leave_the_largest() {
        let page = |at: u64, pages: u64| at * PAGE..(at + pages) * PAGE;
        let ranges = [page(0, 1), page(2, 4), page(8, 1), page(10, 2), page(20, 3)];
        assert_eq!(gathered(&ranges, 3), [page(2, 4), page(10, 2), page(20, 3)]);
        assert_eq!(gathered(&ranges, 1), [page(2, 4)]);
    }

    #[test]
    fn overlaps_are_found() {
        let ranges = [10..20, 30..40];
        for (range, expected) in [
            (0..10, false),
            (0..11, true),
            (19..30, true),
            (20..30, false),
            (25..50, true),
            (40..41, false),
        ] {
            assert_eq!(overlaps(&ranges, &range), expected, "{range:?}");
        }
    }
}
