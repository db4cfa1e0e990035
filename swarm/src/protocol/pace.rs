//! What is sent waits here for the cap of its class: content in steps, between which others go; messages are counted, and do
//! not wait.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use capsule_swarm_core::{Caps, Class, Limiter, Ticket, Time, wire_bytes};
use tokio::sync::Notify;
use tokio::time::sleep_until;

/// Time of the cap that one step takes: short, as each of many connections waits for a step of all others.
const STEP: Duration = Duration::from_millis(20);
/// Shortest step: a packet's worth.
const LEAST_STEP: usize = 1 << 10;

/// The lines for what all connections send.
#[derive(Debug)]
pub struct Pace {
    start: Instant,
    limiter: Mutex<Limiter>,
    /// Caps are others now.
    changed: Notify,
}

/// One connection's place in them.
#[derive(Clone, Debug)]
pub struct Lanes {
    pace: Arc<Pace>,
    within: Arc<AtomicBool>,
}

impl Pace {
    /// Without caps.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            start: Instant::now(),
            limiter: Mutex::default(),
            changed: Notify::new(),
        })
    }

    /// Has other caps hold from now on, also for what waits.
    pub fn set(&self, caps: Caps) {
        self.with(|limiter, now| limiter.set(now, caps));
        self.changed.notify_waiters();
    }

    /// The lines as seen by a connection whose peer counts as beyond the site.
    pub fn lanes(self: &Arc<Self>) -> Lanes {
        Lanes {
            pace: self.clone(),
            within: Arc::default(),
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut Limiter, Time) -> T) -> T {
        let mut limiter = self.limiter.lock().unwrap_or_else(PoisonError::into_inner);
        work(&mut limiter, Time::from_start(self.start.elapsed()))
    }

    async fn wait(&self, ticket: Ticket) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            // Before the look, so that no change is missed between the two.
            changed.as_mut().enable();
            let Some(ready) = self.with(|limiter, now| limiter.ready_at(now, ticket)) else {
                return;
            };
            tokio::select! {
                () = sleep_until((self.start + ready.since_start()).into()) => {}
                () = changed => {}
            }
        }
    }
}

impl Lanes {
    /// Says where the peer is.
    pub fn set_class(&self, class: Class) {
        self.within.store(class == Class::Within, Ordering::Relaxed);
    }

    /// How many bytes of content are written at most in one step, if so many at most suit the lane.
    pub fn step(&self, most: usize) -> usize {
        let class = self.class();
        let bytes = self.pace.with(|limiter, _| limiter.bytes_in(class, STEP));
        let bytes = bytes.map_or(most, |bytes| usize::try_from(bytes).unwrap_or(most));
        bytes.clamp(LEAST_STEP.min(most), most)
    }

    /// Waits until a step of content may be written.
    pub async fn pass(&self, len: usize) {
        let ticket = self.reserve(len);
        self.pace.wait(ticket).await;
    }

    /// Counts a message that is written at once.
    pub fn count(&self, len: usize) {
        let class = self.class();
        self.pace
            .with(|limiter, now| limiter.count(now, class, wire_bytes(len as u64)));
    }

    fn reserve(&self, len: usize) -> Ticket {
        let class = self.class();
        self.pace
            .with(|limiter, now| limiter.reserve(now, class, wire_bytes(len as u64)))
    }

    fn class(&self) -> Class {
        if self.within.load(Ordering::Relaxed) {
            Class::Within
        } else {
            Class::Beyond
        }
    }
}

#[cfg(test)]
mod tests {
    use capsule_swarm_core::Rate;
    use tokio::time::timeout;

    use super::*;

    fn beyond(kbit: u64) -> Caps {
        Caps {
            within: None,
            beyond: Some(Rate::from_bits(kbit * 1000).unwrap()),
        }
    }

    #[tokio::test]
    async fn connections_share_the_cap_and_who_is_within_the_site_does_not_wait() {
        let pace = Pace::new();
        pace.set(beyond(8_000));
        let begun = Instant::now();
        let send = |lanes: Lanes| async move {
            let (mut sent, step) = (0, lanes.step(256 << 10));
            while begun.elapsed() < Duration::from_millis(600) {
                lanes.pass(step).await;
                sent += step;
            }
            sent
        };
        let near = pace.lanes();
        near.set_class(Class::Within);
        assert_eq!(near.step(256 << 10), 256 << 10);
        let (a, b) = tokio::join!(send(pace.lanes()), send(pace.lanes()));
        // 600 ms of 1 MB/s; the last steps end late.
        assert!((500_000..750_000).contains(&(a + b)), "{a} and {b}");
        assert!(a.abs_diff(b) < 60_000, "{a} and {b}");
        let begun = Instant::now();
        near.pass(100 << 20).await;
        assert!(begun.elapsed() < Duration::from_millis(100));
    }

    #[tokio::test]
    async fn a_changed_cap_holds_for_what_waits() {
        let pace = Pace::new();
        pace.set(beyond(64));
        let lanes = pace.lanes();
        let waits = tokio::spawn(async move { lanes.pass(10 << 20).await });
        tokio::time::sleep(Duration::from_millis(50)).await;
        pace.set(Caps::default());
        timeout(Duration::from_secs(1), waits)
            .await
            .expect("it goes at once")
            .unwrap();
    }
}
