//! Where content is cut: spans at places that the content itself chooses, and runs of zeros.
//!
//! Cutting by content makes equal content give equal spans wherever it lies, which is what finds repeats within a layer
//! and, by the frame table, in what a receiver has already. Spans are put together to frames in `assemble`.
//! Nothing here is part of a format: the cuts are the encoder's choice, so the numbers may change at any time.

use std::ops::Range;

/// Pages, in which disks and memory are written.
pub(crate) const PAGE_LEN: usize = 4096;
/// Shortest run of zeros within data that becomes a zero run: below, its entry in the index costs about what it saves.
pub(super) const ZERO_RUN_LEN: usize = 4 * PAGE_LEN;
/// Longest span, unless content is so large that the table of spans would be too long.
const SPAN_LEN: usize = 128 << 10;
/// Most spans aimed at in a layer: 2^21 of half of [`SPAN_LEN`] are 128 GiB; beyond, spans grow with the content.
const SPAN_COUNT: u64 = 1 << 21;
/// Longest span however large the content is.
const MAX_SPAN_LEN: usize = 1 << 20;
/// Bytes that the rolling hash of [`Cuts::Bytes`] depends on: one for each bit of it.
const WINDOW_LEN: usize = 64;

/// Where cuts may fall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cuts {
    /// At any byte: files and trees, in which content moves by any distance.
    Bytes,
    /// At multiples of 4 KiB: disks and memory, in which content moves by whole pages, and is read by them.
    Pages,
}

/// Cuts runs of data into spans.
#[derive(Clone, Debug)]
pub(crate) struct Cutter {
    cuts: Cuts,
    min: usize,
    max: usize,
    /// A place is a cut where so many of the hash's upper bits are zero.
    bits: u32,
}

/// The end of a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Length of the span.
    pub len: usize,
    /// Whether the content marks it as a good end for a frame too: one cut in four.
    pub strong: bool,
}

impl Cutter {
    /// Cuts for content of `size` bytes, in frames of at most `frame_max`.
    pub fn new(cuts: Cuts, size: u64, frame_max: usize) -> Self {
        let wanted = (size / SPAN_COUNT * 2)
            .next_power_of_two()
            .min(MAX_SPAN_LEN as u64) as usize;
        let max = wanted.max(SPAN_LEN).min(frame_max);
        // Half of the longest on average: the shortest, a quarter, and a geometric distribution above it.
        let min = max / 4;
        let step = if cuts == Cuts::Pages { PAGE_LEN } else { 1 };
        Self {
            cuts,
            min,
            max,
            bits: (max / 4 / step).max(2).ilog2(),
        }
    }

    /// Longest span.
    pub const fn max(&self) -> usize {
        self.max
    }

    /// Where the span ends that begins at the start of `data`, which lies at byte `at` of the content.
    ///
    /// `data` ends where a span must end at the latest; the span is all of it when nothing in it marks a cut.
    pub fn cut(&self, data: &[u8], at: u64) -> Cut {
        let data = &data[..data.len().min(self.max)];
        match self.cuts {
            Cuts::Bytes => self.cut_at_byte(data),
            Cuts::Pages => self.cut_at_page(data, at),
        }
    }

    /// A gear hash (as in FastCDC, Xia et al., ATC 2016): each step shifts the oldest byte out.
    fn cut_at_byte(&self, data: &[u8]) -> Cut {
        let step = |hash: u64, byte: &u8| (hash << 1).wrapping_add(GEAR[usize::from(*byte)]);
        let Some(first) = (self.min - 1)
            .checked_sub(WINDOW_LEN)
            .filter(|_| data.len() > self.min)
        else {
            return Cut {
                len: data.len(),
                strong: false,
            };
        };
        let mut hash = data[first..self.min - 1].iter().fold(0, step);
        let limit = 1 << (64 - self.bits);
        let found = data[self.min - 1..].iter().position(|byte| {
            hash = step(hash, byte);
            hash < limit
        });
        match found {
            Some(at) => Cut {
                len: self.min + at,
                strong: self.is_strong(hash),
            },
            None => Cut {
                len: data.len(),
                strong: false,
            },
        }
    }

    /// The last page before the cut decides: 64 words of it, one a cache line.
    fn cut_at_page(&self, data: &[u8], at: u64) -> Cut {
        let to_page = at.next_multiple_of(PAGE_LEN as u64) - at;
        let mut end = to_page as usize;
        while end <= data.len() {
            if end >= self.min.max(PAGE_LEN) {
                let hash = page_hash(&data[end - PAGE_LEN..end]);
                if hash >> (64 - self.bits) == 0 {
                    return Cut {
                        len: end,
                        strong: self.is_strong(hash),
                    };
                }
            }
            end += PAGE_LEN;
        }
        // Only the end of a run of data, or the longest span, cuts within a page.
        let last = end.saturating_sub(PAGE_LEN);
        let len = if data.len() == self.max && last > 0 {
            last
        } else {
            data.len()
        };
        Cut { len, strong: false }
    }

    fn is_strong(&self, hash: u64) -> bool {
        hash >> (64 - self.bits - 2) == 0
    }
}

fn page_hash(page: &[u8]) -> u64 {
    page.chunks_exact(64).fold(0, |hash: u64, line| {
        let word = u64::from_le_bytes([
            line[0], line[1], line[2], line[3], line[4], line[5], line[6], line[7],
        ]);
        (hash.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    })
}

/// Random words, one for each byte value: SplitMix64 (Steele, Lea, Flood 2014) from 0.
pub(crate) static GEAR: [u64; 256] = {
    let mut table = [0; 256];
    let mut state = 0u64;
    let mut i = 0;
    while i < 256 {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        table[i] = z ^ (z >> 31);
        i += 1;
    }
    table
};

/// Runs of at least [`ZERO_RUN_LEN`] zeros, in whole pages of the content, in data that lies at byte `at` of it.
pub(super) fn zero_runs(data: &[u8], at: u64) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let mut start = (at.next_multiple_of(PAGE_LEN as u64) - at) as usize;
    let mut end = start;
    while end + PAGE_LEN <= data.len() {
        let next = end + PAGE_LEN;
        if is_zero(&data[end..next]) {
            end = next;
            continue;
        }
        if end - start >= ZERO_RUN_LEN {
            runs.push(start..end);
        }
        (start, end) = (next, next);
    }
    if end - start >= ZERO_RUN_LEN && end <= data.len() {
        runs.push(start..end);
    }
    runs
}

fn is_zero(page: &[u8]) -> bool {
    // Most pages differ in the first line; comparing a line at a time uses wide registers.
    page.chunks_exact(64).all(|line| line == [0; 64])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng, rngs::SmallRng};

    use super::*;

    fn random(seed: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        SmallRng::seed_from_u64(seed).fill_bytes(&mut data);
        data
    }

    fn spans(cutter: &Cutter, data: &[u8]) -> Vec<usize> {
        let mut ends = vec![0];
        while *ends.last().unwrap() < data.len() {
            let start = *ends.last().unwrap();
            ends.push(start + cutter.cut(&data[start..], start as u64).len);
        }
        ends
    }

    #[test]
    fn spans_have_the_lengths_aimed_at() {
        for cuts in [Cuts::Bytes, Cuts::Pages] {
            let cutter = Cutter::new(cuts, 1 << 30, 1 << 20);
            let ends = spans(&cutter, &random(1, 16 << 20));
            let lens: Vec<_> = ends.windows(2).map(|w| w[1] - w[0]).collect();
            let (last, all) = lens.split_last().unwrap();
            assert!(*last <= cutter.max);
            assert!(
                all.iter()
                    .all(|len| (cutter.min..=cutter.max).contains(len))
            );
            let mean = (16 << 20) / lens.len();
            assert!((48 << 10..80 << 10).contains(&mean), "{cuts:?}: {mean}");
        }
    }

    // What lies behind an insertion is cut as before.
    #[test]
    fn cuts_follow_the_content() {
        let plain = random(2, 4 << 20);
        for (cuts, inserted) in [(Cuts::Bytes, 1001), (Cuts::Pages, 3 * PAGE_LEN)] {
            let cutter = Cutter::new(cuts, 1 << 30, 1 << 20);
            let moved = [random(3, inserted), plain.clone()].concat();
            let before = spans(&cutter, &plain);
            let after = spans(&cutter, &moved);
            let common = before
                .iter()
                .filter(|end| after.contains(&(**end + inserted)))
                .count();
            assert!(
                common * 10 > before.len() * 8,
                "{cuts:?}: {common} of {}",
                before.len()
            );
        }
    }

    #[test]
    fn spans_grow_only_with_huge_content() {
        assert_eq!(Cutter::new(Cuts::Bytes, 128 << 30, 1 << 20).max(), SPAN_LEN);
        assert_eq!(
            Cutter::new(Cuts::Bytes, 256 << 30, 1 << 20).max(),
            2 * SPAN_LEN
        );
        assert_eq!(
            Cutter::new(Cuts::Bytes, 1 << 50, 16 << 20).max(),
            MAX_SPAN_LEN
        );
        assert_eq!(Cutter::new(Cuts::Bytes, 128 << 30, 4096).max(), 4096);
    }

    proptest! {
        // Pages that are zero or not, at any offset, against a walk byte by byte.
        #[test]
        fn zero_runs_are_found(pages in prop::collection::vec(any::<bool>(), 0..40), at in 0..3u64 * PAGE_LEN as u64, cut in 0..PAGE_LEN) {
            let mut data: Vec<u8> = pages.iter().flat_map(|zero| [u8::from(!zero); PAGE_LEN]).collect();
            data.truncate(data.len().saturating_sub(cut));
            let runs = zero_runs(&data, at);
            let first = (at.next_multiple_of(PAGE_LEN as u64) - at) as usize;
            let mut expected = Vec::new();
            let mut page = first;
            while page + PAGE_LEN <= data.len() {
                let start = page;
                while page + PAGE_LEN <= data.len() && data[page..page + PAGE_LEN].iter().all(|b| *b == 0) {
                    page += PAGE_LEN;
                }
                if page - start >= ZERO_RUN_LEN {
                    expected.push(start..page);
                }
                page += PAGE_LEN;
            }
            prop_assert_eq!(runs, expected);
        }

        #[test]
        fn page_cuts_are_page_aligned(at in 0..10_000u64, len in 1..300_000usize) {
            let cutter = Cutter::new(Cuts::Pages, 1 << 20, 64 << 10);
            let data = random(at, len);
            let cut = cutter.cut(&data, at).len;
            prop_assert!((1..=cutter.max().min(len)).contains(&cut));
            prop_assert!(cut == len || (at + cut as u64).is_multiple_of(PAGE_LEN as u64));
        }
    }
}
