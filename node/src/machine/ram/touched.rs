//! Which pages of the base a machine read, and in which order: what its next start fetches before it is asked for.

use super::pages::PAGE;

/// Ranges that are told; what is read when there are as many is not.
pub const MAX_RUNS: usize = 65_536;
/// Ranges that may still grow: a machine reads at several places by turns.
const GROWING: usize = 16;

/// See the module.
pub struct Touched {
    /// One bit a page: it was read.
    seen: Box<[u64]>,
    /// In pages: the first, and the one behind the last.
    runs: Vec<(u64, u64)>,
}

impl Touched {
    /// Of so many pages, none.
    pub fn new(count: u64) -> Self {
        Self {
            seen: std::iter::repeat_n(0, count.div_ceil(64) as usize).collect(),
            runs: Vec::new(),
        }
    }

    /// A page is read.
    pub fn mark(&mut self, page: u64) {
        let (word, bit) = (&mut self.seen[(page / 64) as usize], 1 << (page % 64));
        if *word & bit != 0 {
            return;
        }
        *word |= bit;
        let recent = self.runs.len().saturating_sub(GROWING);
        let mut growing = self.runs[recent..].iter_mut().rev();
        if let Some((_, end)) = growing.find(|(_, end)| *end == page) {
            *end += 1;
        } else if self.runs.len() < MAX_RUNS {
            self.runs.push((page, page + 1));
        }
    }

    /// Offsets and lengths.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        let bytes = |(first, end): &(u64, u64)| (first * PAGE, (end - first) * PAGE);
        self.runs.iter().map(bytes).collect()
    }
}
