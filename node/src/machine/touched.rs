//! What is read first: ranges in the order in which they were read for the first time.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use capsule_chunker::content::ReadError;
use futures::FutureExt;
use futures::future::BoxFuture;

use crate::disk::Disk;

/// What is told apart: the smallest that programs and page tables know.
const PAGE: u64 = 4096;
/// Most ranges that are remembered: more than a record of them holds.
const MAX_RANGES: usize = 65_536;

/// Ranges that were touched.
#[derive(Debug, Default)]
pub struct Touched {
    /// By where they start, and where they end; they do not touch each other.
    covered: BTreeMap<u64, u64>,
    /// In order of first use: start and length.
    order: Vec<(u64, u64)>,
}

impl Touched {
    /// Notes that a range was read.
    pub fn note(&mut self, range: &Range<u64>) {
        let (start, end) = (range.start / PAGE * PAGE, range.end.next_multiple_of(PAGE));
        for new in self.uncovered(start..end) {
            self.cover(&new);
            let (len, count) = (new.end - new.start, self.order.len());
            match self.order.last_mut() {
                // One reader that goes on is one range.
                Some(last) if last.0 + last.1 == new.start => last.1 += len,
                _ if count < MAX_RANGES => self.order.push((new.start, len)),
                _ => {}
            }
        }
    }

    /// All of them, in order of first use, within a length.
    pub fn ranges(&self, within: u64) -> Vec<(u64, u64)> {
        let cut = |&(start, len): &(u64, u64)| (start, len.min(within.saturating_sub(start)));
        self.order
            .iter()
            .map(cut)
            .filter(|(_, len)| *len > 0)
            .collect()
    }

    /// What of a range was not touched yet.
    fn uncovered(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut new = Vec::new();
        let mut at = range.start;
        let before = self.covered.range(..=at).next_back();
        if let Some((_, end)) = before {
            at = at.max(*end);
        }
        for (start, end) in self.covered.range(range.start..range.end) {
            if at < *start {
                new.push(at..*start);
            }
            at = at.max(*end);
        }
        if at < range.end {
            new.push(at..range.end);
        }
        new
    }

    fn cover(&mut self, range: &Range<u64>) {
        let (mut start, mut end) = (range.start, range.end);
        if let Some((&before, &until)) = self.covered.range(..=start).next_back()
            && until == start
        {
            start = before;
        }
        if let Some(after) = self.covered.remove(&end) {
            end = after;
        }
        self.covered.insert(start, end);
    }
}

/// A disk of which is remembered what is read of it, and since when something waits.
pub struct Watched {
    disk: Arc<dyn Disk>,
    /// A read that waits for so long fails, where it may.
    limit: Option<Duration>,
    /// Since when reads have failed because of that, and none has come.
    failing: Mutex<Option<Instant>>,
    touched: Mutex<Touched>,
    /// When the reads began that are not answered, by number.
    waiting: Mutex<BTreeMap<u64, Instant>>,
    numbers: AtomicU64,
}

impl Watched {
    /// Nothing was read yet. Where there is a `limit`, reads that wait for longer fail.
    pub fn new(disk: Arc<dyn Disk>, limit: Option<Duration>) -> Self {
        Self {
            disk,
            limit,
            failing: Mutex::default(),
            touched: Mutex::default(),
            waiting: Mutex::default(),
            numbers: AtomicU64::new(0),
        }
    }

    /// How long something has waited that did not come, if anything does.
    pub fn oldest_wait(&self) -> Option<Duration> {
        let failing = *self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = waiting.first_key_value().map(|(_, since)| *since);
        let since = failing.into_iter().chain(oldest).min();
        since.map(|since| since.elapsed())
    }

    /// Reads, for as long as it may take.
    async fn read_in_time(&self, range: Range<u64>, into: Vec<u8>) -> Result<Vec<u8>, ReadError> {
        let began = Instant::now();
        let start = range.start;
        let read = self.disk.clone().read(range, into);
        let Some(limit) = self.limit else {
            return read.await;
        };
        let read = tokio::time::timeout(limit, read).await;
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        match read {
            Ok(read) => {
                *failing = None;
                read
            }
            Err(_elapsed) => {
                failing.get_or_insert(began);
                let late = std::io::ErrorKind::TimedOut.into();
                Err(ReadError::io("what no peer sends", start, late))
            }
        }
    }

    /// What was read, in order of first use.
    pub fn touched(&self) -> Vec<(u64, u64)> {
        let touched = self.touched.lock().unwrap_or_else(PoisonError::into_inner);
        touched.ranges(self.disk.len())
    }
}

impl Disk for Watched {
    fn len(&self) -> u64 {
        self.disk.len()
    }

    fn is_zero(&self, range: Range<u64>) -> bool {
        self.disk.is_zero(range)
    }

    fn read(
        self: Arc<Self>,
        range: Range<u64>,
        into: Vec<u8>,
    ) -> BoxFuture<'static, Result<Vec<u8>, ReadError>> {
        // What is known to be zeros is not fetched.
        if !self.disk.is_zero(range.clone()) {
            let mut touched = self.touched.lock().unwrap_or_else(PoisonError::into_inner);
            touched.note(&range);
        }
        async move {
            let _waits = Waits::begin(&self);
            self.read_in_time(range, into).await
        }
        .boxed()
    }
}

/// A read that is not answered.
struct Waits<'a> {
    watched: &'a Watched,
    number: u64,
}

impl<'a> Waits<'a> {
    fn begin(watched: &'a Watched) -> Self {
        let number = watched.numbers.fetch_add(1, Ordering::Relaxed);
        let mut waiting = watched
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        waiting.insert(number, Instant::now());
        Self { watched, number }
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        let waiting = self.watched.waiting.lock();
        waiting
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_told_once_in_the_order_of_their_first_use() {
        let mut touched = Touched::default();
        for range in [
            8192..8193,
            0..4096,
            4096..8192,
            0..20_000,
            12_288..16_384,
            40_960..49_152,
        ] {
            touched.note(&range);
        }
        // Pages 2; 0; 1; then what of 0..20,000 was new: pages 3 and 4.
        let expected = [(8192, 4096), (0, 8192), (12_288, 8192), (40_960, 8192)];
        assert_eq!(touched.ranges(u64::MAX), expected);
        assert_eq!(touched.ranges(42_000)[3], (40_960, 1040));
        assert_eq!(touched.ranges(40_000).len(), 3);
        assert_eq!(
            touched.covered.into_iter().collect::<Vec<_>>(),
            [(0, 20_480), (40_960, 49_152)]
        );
    }
}
