//! Long blocking work (encoding, checking, exporting, verifying) on few threads, with progress and cancelling.
//!
//! Async code starts work and waits for it; dropping the wait tells the work to stop, which it does within about a megabyte.
//! Its place is free again only when it really has.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use capsule_chunker::content::Progress as Watcher;
use tokio::sync::Semaphore;

use crate::control::{Failure, FailureCode, Phase, Progress, Reporter};
use crate::daemon::memory;

/// Works at a time: each uses all cores and some hundred MiB, so that a second one only keeps a short one from waiting for a long one.
const PLACES: usize = 2;
/// Works at a time for which nobody waits: one, on one core.
const PLACES_BEHIND: usize = 1;
/// How often progress is told: as often as people see a difference.
const TICK: Duration = Duration::from_millis(200);
/// Figures over which the rate is taken: two seconds.
const RATE_WINDOW: usize = 10;

/// The places for long work.
#[derive(Debug, Clone)]
pub struct Works {
    places: Arc<Semaphore>,
    behind: Arc<Semaphore>,
}

/// One piece of work, shared between the threads that do it and the task that waits for it.
#[derive(Debug, Default)]
pub struct Work {
    read: AtomicU64,
    written: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

/// What is told of work beside its figures.
#[derive(Debug, Clone)]
pub struct Task {
    /// What is being done.
    pub phase: Phase,
    /// Bytes in all, where they are known before.
    pub total: Option<u64>,
    /// Which component or blob.
    pub what: Option<String>,
}

impl Works {
    /// All places free.
    pub fn new() -> Self {
        Self {
            places: Arc::new(Semaphore::new(PLACES)),
            behind: Arc::new(Semaphore::new(PLACES_BEHIND)),
        }
    }

    /// Does work on a blocking thread, and tells how far it is.
    pub async fn run<T, F>(&self, task: Task, reporter: &dyn Tell, work: F) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: FnOnce(&Work) -> Result<T, Failure> + Send + 'static,
    {
        in_place(&self.places, task, reporter, work).await
    }

    /// Does work for which nobody waits, in a place of its own: it may take hours, and keeps nobody from theirs.
    pub async fn run_behind<T, F>(&self, task: Task, work: F) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: FnOnce(&Work) -> Result<T, Failure> + Send + 'static,
    {
        in_place(&self.behind, task, &|_: Progress| {}, work).await
    }
}

async fn in_place<T, F>(
    places: &Arc<Semaphore>,
    task: Task,
    reporter: &dyn Tell,
    work: F,
) -> Result<T, Failure>
where
    T: Send + 'static,
    F: FnOnce(&Work) -> Result<T, Failure> + Send + 'static,
{
    let place = places.clone().acquire_owned().await;
    let place = place.map_err(|_| Failure::cancelled())?;
    let state = Arc::new(Work::default());
    state
        .total
        .store(task.total.unwrap_or(0), Ordering::Relaxed);
    let _stop = StopOnDrop(state.clone());
    let shared = state.clone();
    let mut thread = tokio::task::spawn_blocking(move || {
        let _place = place;
        let result = work(&shared);
        // Idle again, perhaps for days.
        memory::trim();
        result
    });
    let mut meter = Meter::new();
    let mut ticks = tokio::time::interval(TICK);
    loop {
        tokio::select! {
            done = &mut thread => return done.unwrap_or_else(|panic| Err(panicked(&panic))),
            _ = ticks.tick() => reporter.tell(state.progress(&task, &mut meter)),
        }
    }
}

impl Default for Works {
    fn default() -> Self {
        Self::new()
    }
}

/// Does short blocking work: a few database look-ups.
pub async fn blocking<T, F>(work: F) -> Result<T, Failure>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, Failure> + Send + 'static,
{
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|panic| Err(panicked(&panic)))
}

/// What is told of a task that did not end by itself.
pub fn panicked(error: &tokio::task::JoinError) -> Failure {
    if error.is_cancelled() {
        return Failure::cancelled();
    }
    Failure::new(
        FailureCode::Internal,
        "a fault of the program stopped this command",
    )
    .hint("report it, with the node's log")
}

/// Hears progress.
pub trait Tell: Send + Sync {
    /// How far it is now.
    fn tell(&self, progress: Progress);
}

impl Tell for Reporter {
    fn tell(&self, progress: Progress) {
        self.progress(progress);
    }
}

impl<F: Fn(Progress) + Send + Sync> Tell for F {
    fn tell(&self, progress: Progress) {
        self(progress);
    }
}

impl Work {
    /// Bytes in all, once they are known.
    pub fn set_total(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    /// Counts bytes gone through.
    pub fn advance(&self, bytes: u64) {
        self.read.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Tells it to stop.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Fails where the work is to stop.
    pub fn check(&self) -> Result<(), Failure> {
        if self.cancelled.load(Ordering::Relaxed) {
            Err(Failure::cancelled())
        } else {
            Ok(())
        }
    }

    fn progress(&self, task: &Task, meter: &mut Meter) -> Progress {
        let total = self.total.load(Ordering::Relaxed);
        let (read, written) = (
            self.read.load(Ordering::Relaxed),
            self.written.load(Ordering::Relaxed),
        );
        // Publishing counts what it reads; restoring, which reads nothing, what it writes.
        let (done, written) = if task.phase == Phase::Publishing {
            (read, written)
        } else {
            (read.max(written), 0)
        };
        Progress {
            phase: task.phase,
            done,
            total: (total > 0).then_some(total),
            rate: meter.rate(Instant::now(), done),
            peers: 0,
            written,
            what: task.what.clone(),
        }
    }
}

impl Watcher for Work {
    fn read(&self, bytes: u64) {
        self.advance(bytes);
    }

    fn written(&self, bytes: u64) {
        self.written.fetch_add(bytes, Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

struct StopOnDrop(Arc<Work>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Bytes a second over the last few ticks.
#[derive(Debug)]
struct Meter {
    seen: std::collections::VecDeque<(Instant, u64)>,
}

impl Meter {
    fn new() -> Self {
        Self {
            seen: std::collections::VecDeque::with_capacity(RATE_WINDOW + 1),
        }
    }

    fn rate(&mut self, now: Instant, done: u64) -> u64 {
        self.seen.push_back((now, done));
        if self.seen.len() > RATE_WINDOW {
            self.seen.pop_front();
        }
        let Some(&(then, before)) = self.seen.front() else {
            return 0;
        };
        let seconds = now.duration_since(then).as_secs_f64();
        if seconds > 0.0 {
            (done.saturating_sub(before) as f64 / seconds) as u64
        } else {
            0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task() -> Task {
        Task {
            phase: Phase::Verifying,
            total: Some(10),
            what: None,
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn dropping_the_wait_stops_the_work_and_frees_its_place() {
        let works = Works::new();
        let (ended, end) = std::sync::mpsc::channel();
        {
            let silent = Reporter::silent();
            let endless = works.run(task(), &silent, move |work| {
                while work.check().is_ok() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                ended.send(()).unwrap();
                Err::<(), _>(Failure::cancelled())
            });
            assert!(
                tokio::time::timeout(Duration::from_millis(50), endless)
                    .await
                    .is_err()
            );
        }
        end.recv_timeout(Duration::from_secs(5)).unwrap();
        // All places can be taken again.
        let again = |n| works.run(task(), &(|_| ()), move |_| Ok(n));
        assert_eq!(
            (
                again(1).await.unwrap(),
                again(2).await.unwrap(),
                again(3).await.unwrap()
            ),
            (1, 2, 3)
        );
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_nobody_waits_for_keeps_nobody_from_a_place() {
        let works = Works::new();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let behind = works.clone();
        let long = tokio::spawn(async move {
            let waiting = move |_: &Work| Ok(ended.recv().is_ok());
            behind.run_behind(task(), waiting).await
        });
        // As many as there are places, each of which waits for all others to have one.
        let together = Arc::new(std::sync::Barrier::new(PLACES));
        let all = (0..PLACES).map(|_| {
            let (works, together) = (works.clone(), together.clone());
            tokio::spawn(async move {
                let meeting = move |_: &Work| {
                    together.wait();
                    Ok(())
                };
                works.run(task(), &(|_| ()), meeting).await
            })
        });
        for one in all.collect::<Vec<_>>() {
            let done = tokio::time::timeout(Duration::from_secs(10), one).await;
            done.unwrap().unwrap().unwrap();
        }
        assert!(!long.is_finished());
        end.send(()).unwrap();
        assert!(long.await.unwrap().unwrap());
    }

    #[tokio::test]
    async fn a_panic_is_a_failure_with_a_code() {
        let works = Works::new();
        let result = works
            .run(task(), &(|_| ()), |_| -> Result<(), Failure> {
                panic!("a test's")
            })
            .await;
        assert_eq!(result.unwrap_err().code, FailureCode::Internal);
    }
}
