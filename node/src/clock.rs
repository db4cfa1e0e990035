//! Time as the node believes it: the system's clock, but never before the newest signed time seen.
//!
//! Lab machines lose their clocks with their batteries. A machine whose clock says 1970 would take every record for one from the
//! future, and every expired credential for a good one; signed statements tell it better. A machine whose clock is right raises its
//! floor to no more than that clock, so that a member who signs ahead of time cannot push the fleet's time forward.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// A system clock so far behind the floor is known to be wrong; less is the usual difference between machines.
const KNOWN_WRONG: u64 = 24 * 3600;

/// Seconds since 1970, floored.
#[derive(Debug)]
pub struct Clock {
    system: fn() -> u64,
    floor: AtomicU64,
}

impl Clock {
    /// The system's clock with a floor.
    pub fn new(floor: u64) -> Self {
        Self::with_system(system_seconds, floor)
    }

    /// Another clock in the system's place.
    pub fn with_system(system: fn() -> u64, floor: u64) -> Self {
        Self {
            system,
            floor: AtomicU64::new(floor),
        }
    }

    /// Seconds since 1970.
    pub fn now(&self) -> u64 {
        (self.system)().max(self.floor.load(Ordering::Relaxed))
    }

    /// The time to check a statement against that was signed at `issued`: a machine that knows its clock to be wrong takes
    /// the statement's word for the present.
    pub fn now_for(&self, issued: u64) -> u64 {
        let now = self.now();
        if self.is_known_wrong() {
            now.max(issued)
        } else {
            now
        }
    }

    /// Takes note of a valid statement's time; the floor now, to be kept.
    pub fn note(&self, issued: u64) -> u64 {
        let bound = if self.is_known_wrong() {
            issued
        } else {
            issued.min((self.system)())
        };
        self.floor.fetch_max(bound, Ordering::Relaxed).max(bound)
    }

    fn is_known_wrong(&self) -> bool {
        (self.system)().saturating_add(KNOWN_WRONG) < self.floor.load(Ordering::Relaxed)
    }
}

/// The system's clock, 0 where it stands before 1970.
pub fn system_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_clock_follows_signed_times_and_a_good_one_is_not_pushed() {
        let dead = Clock::with_system(|| 0, 1_800_000_000);
        assert_eq!(dead.now(), 1_800_000_000);
        assert_eq!(dead.now_for(1_900_000_000), 1_900_000_000);
        assert_eq!(dead.note(1_900_000_000), 1_900_000_000);
        assert_eq!(dead.now(), 1_900_000_000);
        let good = Clock::with_system(|| 1_800_000_000, 1_700_000_000);
        assert_eq!(good.now_for(1_800_080_000), 1_800_000_000);
        assert_eq!(good.note(1_800_080_000), 1_800_000_000);
        assert_eq!(good.now(), 1_800_000_000);
    }
}
