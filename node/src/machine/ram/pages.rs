//! What is known of each page, in two bits: 64 GiB of memory take 4 MiB.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Pages that one word tells of.
const IN_WORD: u64 = 32;
const MASK: u64 = 3;

/// What a generation says of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// Nothing: it is what lies below.
    Inherited,
    /// It is zeros, whatever the generation's file has there.
    Zero,
    /// It is in the generation's file, and was written by the machine.
    Data,
    /// It is in the generation's file, and is the base's.
    Clean,
}

/// Pages in a row of which the same is known, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where it begins, in the memory and in the generation's file.
    pub start: u64,
    /// How long it is.
    pub len: u64,
    /// Its bytes are in the file; otherwise they are zeros.
    pub data: bool,
}

/// See the module. Changed by many threads, of which no two change the same page.
pub struct Pages {
    words: Box<[AtomicU64]>,
    count: u64,
}

impl Pages {
    /// So many pages, all inherited.
    pub fn new(count: u64) -> Self {
        Self::of_words(std::iter::repeat_n(0, Self::words_of(count)), count)
    }

    /// What `bytes` told; nothing where they do not fit so many pages.
    pub fn of_bytes(bytes: &[u8], count: u64) -> Option<Self> {
        let (words, rest) = bytes.as_chunks::<8>();
        let fits = rest.is_empty() && words.len() == Self::words_of(count);
        fits.then(|| Self::of_words(words.iter().map(|word| u64::from_le_bytes(*word)), count))
    }

    /// All of it, for a file.
    pub fn bytes(&self) -> Vec<u8> {
        let words = self.words.iter().map(|word| word.load(Ordering::Acquire));
        words.flat_map(u64::to_le_bytes).collect()
    }

    /// How many bytes tell of so many pages.
    pub fn bytes_of(count: u64) -> u64 {
        8 * Self::words_of(count) as u64
    }

    fn words_of(count: u64) -> usize {
        count.div_ceil(IN_WORD) as usize
    }

    fn of_words(words: impl Iterator<Item = u64>, count: u64) -> Self {
        Self {
            words: words.map(AtomicU64::new).collect(),
            count,
        }
    }

    /// What is known of a page.
    pub fn get(&self, page: u64) -> Page {
        let word = self.words[(page / IN_WORD) as usize].load(Ordering::Acquire);
        Self::decode(word, page)
    }

    /// Says something of a page; what was said of it before.
    pub fn set(&self, page: u64, to: Page) -> Page {
        let shift = 2 * (page % IN_WORD);
        let bits = match to {
            Page::Inherited => 0,
            Page::Zero => 1,
            Page::Data => 2,
            Page::Clean => 3,
        };
        let word = &self.words[(page / IN_WORD) as usize];
        let mut before = word.load(Ordering::Relaxed);
        loop {
            let after = before & !(MASK << shift) | bits << shift;
            match word.compare_exchange_weak(before, after, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Self::decode(before, page),
                Err(changed) => before = changed,
            }
        }
    }

    fn decode(word: u64, page: u64) -> Page {
        match word >> (2 * (page % IN_WORD)) & MASK {
            0 => Page::Inherited,
            1 => Page::Zero,
            2 => Page::Data,
            _ => Page::Clean,
        }
    }

    /// What the machine wrote: zeros and data.
    pub fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for page in self.said() {
            let data = match self.get(page) {
                Page::Zero => false,
                Page::Data => true,
                Page::Inherited | Page::Clean => continue,
            };
            let start = page * PAGE;
            match runs.last_mut() {
                Some(last) if last.start + last.len == start && last.data == data => {
                    last.len += PAGE;
                }
                _ => runs.push(Run {
                    start,
                    len: PAGE,
                    data,
                }),
            }
        }
        runs
    }

    /// How many pages have data that the machine wrote.
    pub fn data(&self) -> u64 {
        let is_data = |page: &u64| self.get(*page) == Page::Data;
        self.said().filter(is_data).count() as u64
    }

    /// Pages of the words that say anything.
    fn said(&self) -> impl Iterator<Item = u64> {
        let says = |(_, word): &(u64, &AtomicU64)| word.load(Ordering::Acquire) != 0;
        let words = (0..).zip(&self.words).filter(says);
        words.flat_map(|(at, _)| pages_of_word(at, self.count))
    }
}

fn pages_of_word(at: u64, count: u64) -> Range<u64> {
    at * IN_WORD..((at + 1) * IN_WORD).min(count)
}
