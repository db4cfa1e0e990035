//! What is read first: ranges in the order in which they were read for the first time.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use capsule_chunker::content::ReadError;
use futures::FutureExt;
use futures::future::BoxFuture;

use crate::disk::Disk;

/// What is told apart: the smallest that programs and page tables know.
pub const PAGE: u64 = 4096;
/// Most ranges that are remembered: more than a record of them holds.
const MAX_RANGES: usize = 65_536;
/// Ranges that may still grow.
const GROWING: usize = 16;
/// Before what must not fail is tried again.
const AGAIN: Duration = Duration::from_secs(2);

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
        if self.order.len() >= MAX_RANGES {
            return;
        }
        let (start, end) = (range.start / PAGE * PAGE, range.end.next_multiple_of(PAGE));
        for new in self.uncovered(start..end) {
            self.cover(&new);
            let (len, count) = (new.end - new.start, self.order.len());
            let recent = &mut self.order[count.saturating_sub(GROWING)..];
            let mut growing = recent.iter_mut().rev();
            match growing.find(|(start, len)| start + len == new.start) {
                // One reader that goes on is one range, though others read by turns.
                Some((_, known)) => *known += len,
                None => self.order.push((new.start, len)),
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
        let failing = *self.failing();
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = waiting.first_key_value().map(|(_, since)| *since);
        let since = failing.into_iter().chain(oldest).min();
        since.map(|since| since.elapsed())
    }

    /// Reads, for as long as it may take.
    async fn read_in_time(
        self: &Arc<Self>,
        range: Range<u64>,
        into: Vec<u8>,
    ) -> Result<Vec<u8>, ReadError> {
        let Some(limit) = self.limit else {
            return Ok(self.read_at_last(range, into).await);
        };
        let (began, start) = (Instant::now(), range.start);
        let mut read = tokio::spawn(self.disk.clone().read(range, into));
        if let Ok(read) = tokio::time::timeout(limit, &mut read).await {
            return read.unwrap_or_else(|panic| {
                Err(ReadError::io("a read", start, std::io::Error::other(panic)))
            });
        }
        self.failing().get_or_insert(began);
        // It goes on all the same: when it comes, whoever stopped for it can try again.
        let watched = self.clone();
        tokio::spawn(async move {
            if read.await.is_ok_and(|read| read.is_ok()) {
                *watched.failing() = None;
            }
        });
        let late = std::io::ErrorKind::TimedOut.into();
        Err(ReadError::io("what no peer sends", start, late))
    }

    /// Reads what must not fail, again and again.
    async fn read_at_last(&self, range: Range<u64>, mut into: Vec<u8>) -> Vec<u8> {
        loop {
            match self.disk.clone().read(range.clone(), Vec::new()).await {
                Ok(read) => {
                    into.extend_from_slice(&read);
                    return into;
                }
                Err(error) => {
                    tracing::warn!(%error, "memory cannot be read: it is tried again");
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }

    fn failing(&self) -> MutexGuard<'_, Option<Instant>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
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
    use tokio::sync::watch;

    use super::*;

    /// Bytes that come when somebody says so.
    struct Coming(watch::Receiver<bool>);

    impl Disk for Coming {
        fn len(&self) -> u64 {
            1 << 20
        }

        fn is_zero(&self, _: Range<u64>) -> bool {
            false
        }

        fn read(
            self: Arc<Self>,
            range: Range<u64>,
            mut into: Vec<u8>,
        ) -> BoxFuture<'static, Result<Vec<u8>, ReadError>> {
            let mut come = self.0.clone();
            async move {
                let _come = come.wait_for(|come| *come).await;
                into.resize(into.len() + (range.end - range.start) as usize, 1);
                Ok(into)
            }
            .boxed()
        }
    }

    #[tokio::test]
    async fn reads_that_fail_for_waiting_are_known_to_come_again() {
        let (say, come) = watch::channel(false);
        let limit = Duration::from_millis(50);
        let disk = Arc::new(Watched::new(Arc::new(Coming(come)), Some(limit)));
        assert!(disk.oldest_wait().is_none());
        assert!(disk.clone().read(0..4096, Vec::new()).await.is_err());
        tokio::time::sleep(limit).await;
        assert!(disk.oldest_wait().is_some_and(|waits| waits >= limit * 2));
        // Nobody reads again, as whoever does has stopped; all the same it is seen.
        say.send_replace(true);
        let over = async {
            while disk.oldest_wait().is_some() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), over)
            .await
            .unwrap();
        assert_eq!(disk.clone().read(0..2, Vec::new()).await.unwrap(), [1, 1]);
        assert_eq!(disk.touched(), [(0, 4096)]);
    }

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
        // Pages 2; 0 and 1; what of 0..20,000 was new, pages 3 and 4, goes on from the first.
        let expected = [(8192, 12_288), (0, 8192), (40_960, 8192)];
        assert_eq!(touched.ranges(u64::MAX), expected);
        assert_eq!(touched.ranges(42_000)[2], (40_960, 1040));
        assert_eq!(touched.ranges(40_000).len(), 2);
        assert_eq!(
            touched.covered.into_iter().collect::<Vec<_>>(),
            [(0, 20_480), (40_960, 49_152)]
        );
    }
}
