//! A node's part in a rollout: it pulls, and goes on after it was killed and started again.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use capsule_node::control::{CapsuleRef, Client, ClientError, Phase, Pull, Pulled};
use serde::Serialize;

/// Between two attempts of a node that is down.
const PAUSE: Duration = Duration::from_millis(100);
/// Between two points of a timeline.
const STEP: f64 = 0.25;

/// How far a node had come, by seconds from the start.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Point {
    /// Seconds.
    pub at: f64,
    /// Bytes fetched and checked.
    pub bytes: u64,
}

/// How a node's pull went.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Went {
    /// Seconds until all was here, checked and on the disk; none where that did not happen.
    pub seconds: Option<f64>,
    /// Bytes of blobs that the last attempt fetched, and that it had from those before.
    pub fetched_bytes: u64,
    /// The same, of what was here before.
    pub had_bytes: u64,
    /// What the last attempt spent on finding out what to fetch.
    pub planning_seconds: f64,
    /// On fetching it.
    pub fetch_seconds: f64,
    /// On checking what it makes.
    pub check_seconds: f64,
    /// How often it was begun.
    pub attempts: u32,
    /// On the way.
    pub timeline: Vec<Point>,
    /// Why it failed.
    pub failed: Option<String>,
}

/// Who pulls what, until when.
#[derive(Debug)]
pub struct Puller {
    /// The node's home.
    pub home: PathBuf,
    /// What it pulls.
    pub name: String,
    /// When that began.
    pub start: Instant,
    /// When it has to be done.
    pub deadline: Instant,
    /// Whether it may be down for a while.
    pub may_be_down: bool,
}

impl Puller {
    /// Pulls to the end.
    pub fn run(&self) -> Went {
        let timeline = Mutex::new(Vec::new());
        let mut went = Went::default();
        let pulled = self.attempts(&mut went.attempts, &timeline);
        let ended = self.start.elapsed().as_secs_f64();
        went.timeline = timeline.into_inner().unwrap_or_else(|e| e.into_inner());
        match pulled {
            Ok(pulled) => {
                went.seconds = Some(ended);
                went.fetched_bytes = pulled.fetched_bytes;
                went.had_bytes = pulled.had_bytes;
                went.planning_seconds = pulled.planning_seconds;
                went.fetch_seconds = pulled.fetch_seconds;
                went.check_seconds = pulled.check_seconds;
                went.timeline.push(Point {
                    at: ended,
                    bytes: pulled.fetched_bytes + pulled.had_bytes,
                });
            }
            Err(error) => went.failed = Some(format!("{error:#}")),
        }
        went
    }

    fn attempts(&self, count: &mut u32, timeline: &Mutex<Vec<Point>>) -> Result<Pulled> {
        loop {
            *count += 1;
            let error = match self.attempt(timeline) {
                Ok(pulled) => return Ok(pulled),
                Err(error) => error,
            };
            if Instant::now() >= self.deadline {
                return Err(error).context("it was not done in time");
            }
            let is_down = matches!(
                error,
                ClientError::Lost | ClientError::NoDaemon { .. } | ClientError::Connect { .. }
            );
            if !self.may_be_down || !is_down {
                bail!(error);
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn attempt(&self, timeline: &Mutex<Vec<Point>>) -> Result<Pulled, ClientError> {
        let client = Client::connect(&self.home)?;
        let canceller = client.canceller().map_err(|_| ClientError::Lost)?;
        let request = Pull {
            capsule: CapsuleRef(self.name.clone()),
            wait: Some(
                self.deadline
                    .saturating_duration_since(Instant::now())
                    .as_secs()
                    .max(3),
            ),
            like_path: None,
            like_capsule: None,
        };
        let (done, waiting) = std::sync::mpsc::channel::<()>();
        let left = self.deadline.saturating_duration_since(Instant::now());
        std::thread::scope(|scope| {
            scope.spawn(move || {
                use std::sync::mpsc::RecvTimeoutError::Timeout;
                if waiting.recv_timeout(left) == Err(Timeout) {
                    canceller.cancel();
                }
            });
            let on_progress = |progress: capsule_node::control::Progress| {
                if progress.phase == Phase::Fetching {
                    self.note(timeline, progress.done);
                }
            };
            let pulled = client.run(request, on_progress, drop);
            drop(done);
            pulled
        })
    }

    fn note(&self, timeline: &Mutex<Vec<Point>>, bytes: u64) {
        let at = self.start.elapsed().as_secs_f64();
        let mut points = timeline.lock().unwrap_or_else(|e| e.into_inner());
        if points.last().is_none_or(|last| at - last.at >= STEP) {
            points.push(Point { at, bytes });
        }
    }
}
