//! Patience: how long nothing may arrive, for each of those who wait for one transfer.
//!
//! The transfer goes on as long as one of them still waits. Who loses patience before the others leaves alone, and is told
//! why; the one with the most patience ends it. Pure: time comes as an argument.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::control::Failure;

/// Those who wait for a transfer.
#[derive(Debug, Default)]
pub struct Patience {
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    all: Vec<One>,
    next: u64,
}

#[derive(Debug)]
struct One {
    id: u64,
    /// Nothing that happened before counts against it.
    since: Instant,
    patience: Duration,
    leave: oneshot::Sender<Failure>,
}

/// The place of one who waits, until it is dropped.
#[derive(Debug)]
pub struct Place {
    among: Arc<Patience>,
    id: u64,
    /// Why to wait no longer, while others do.
    pub left: oneshot::Receiver<Failure>,
}

/// What those who wait make of how long nothing has arrived.
#[derive(Debug)]
pub enum Mood {
    /// All wait on.
    Wait,
    /// These wait no longer: they are to be told why. Others do.
    Leave(Leaving),
    /// Nobody waits any longer.
    Over,
}

/// Those who wait no longer.
#[derive(Debug)]
pub struct Leaving(Vec<oneshot::Sender<Failure>>);

impl Leaving {
    /// Tells them why.
    pub fn tell(self, failure: &Failure) {
        for one in self.0 {
            // It may have gone by itself.
            let _ = one.send(failure.clone());
        }
    }
}

impl Patience {
    /// Takes a place among those who wait, from now on.
    pub fn wait(self: &Arc<Self>, now: Instant, patience: Duration) -> Place {
        let (leave, left) = oneshot::channel();
        let mut waiting = self.lock();
        let id = waiting.next;
        waiting.next += 1;
        waiting.all.push(One {
            id,
            since: now,
            patience,
            leave,
        });
        Place {
            among: self.clone(),
            id,
            left,
        }
    }

    /// Asks them, where something arrived last at `last`. Who leaves has no place any more.
    pub fn ask(&self, now: Instant, last: Instant) -> Mood {
        let mut waiting = self.lock();
        let waits_on =
            |one: &One| now.saturating_duration_since(last.max(one.since)) <= one.patience;
        if !waiting.all.iter().any(waits_on) {
            return Mood::Over;
        }
        let leaving: Vec<_> = waiting
            .all
            .extract_if(.., |one| !waits_on(one))
            .map(|one| one.leave)
            .collect();
        if leaving.is_empty() {
            Mood::Wait
        } else {
            Mood::Leave(Leaving(leaving))
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.among.lock().all.retain(|one| one.id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// Who is told to leave.
    fn leaving(patience: &Patience, now: Instant, last: Instant) -> usize {
        match patience.ask(now, last) {
            Mood::Wait => 0,
            Mood::Leave(leaving) => leaving.0.len(),
            Mood::Over => panic!("somebody waits"),
        }
    }

    #[test]
    fn each_waits_as_long_as_it_said_and_the_longest_ends_it() {
        let (patience, start) = (Arc::new(Patience::default()), Instant::now());
        let at = |n| start + seconds(n);
        let _long = patience.wait(start, seconds(30));
        let mut short = patience.wait(start, seconds(5));
        assert_eq!(leaving(&patience, at(5), start), 0);
        let Mood::Leave(leaving_now) = patience.ask(at(6), start) else {
            panic!("one leaves")
        };
        assert_eq!(leaving_now.0.len(), 1);
        leaving_now.tell(&Failure::cancelled());
        assert!(short.left.try_recv().is_ok());
        assert_eq!(leaving(&patience, at(7), start), 0, "it has left already");
        // What arrives counts for all.
        assert_eq!(leaving(&patience, at(40), at(20)), 0);
        assert!(matches!(patience.ask(at(51), at(20)), Mood::Over));
    }

    #[test]
    fn what_was_before_does_not_count_against_who_comes_late() {
        let (patience, start) = (Arc::new(Patience::default()), Instant::now());
        let at = |n| start + seconds(n);
        let first = patience.wait(start, seconds(10));
        let _late = patience.wait(at(9), seconds(10));
        assert_eq!(leaving(&patience, at(11), start), 1);
        drop(first);
        assert_eq!(leaving(&patience, at(19), start), 0);
        assert!(matches!(patience.ask(at(20), start), Mood::Over));
        // A duration that no clock reaches is no fault.
        let _endless = patience.wait(start, Duration::MAX);
        assert_eq!(leaving(&patience, at(99), start), 1);
    }
}
