//! Lines in which bytes wait for a cap, one a class.
//!
//! A token bucket seen from the other side: `reserved` counts the bytes that were let in line since the start, `granted` how many of
//! them may have gone by now. It grows with the cap, and is ahead of `reserved` by no more than a moment's worth, so that who was idle
//! saves nothing up. Who is in line keeps the place when the cap changes.

use std::time::Duration;

use super::{Caps, Class, Rate};
use crate::Time;

/// What may be saved up while nothing is to go: bridges late wake-ups, and is 1 % of the 10 s in which a cap is to hold.
const SAVED: Duration = Duration::from_millis(100);
/// Who is in line when the cap is lowered goes within this time: what was little by the old cap may be much by the new one.
const CARRIED: Duration = Duration::from_secs(1);
/// What goes in any case holds others up for so long at most.
const COUNTED: Duration = Duration::from_secs(2);
/// Bits in a byte, times nanoseconds in a second: how grants are counted.
const UNITS: u128 = 8_000_000_000;
/// Longest wait that is told; it is asked again then.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// A place in line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    class: Class,
    /// It may go when so much is granted.
    place: u64,
}

/// The lines of one direction.
#[derive(Clone, Debug, Default)]
pub struct Limiter {
    within: Line,
    beyond: Line,
}

impl Limiter {
    /// Has other caps hold from now on.
    pub fn set(&mut self, now: Time, caps: Caps) {
        self.within.set(now, caps.within);
        self.beyond.set(now, caps.beyond);
    }

    /// The caps that hold.
    pub const fn caps(&self) -> Caps {
        Caps {
            within: self.within.cap,
            beyond: self.beyond.cap,
        }
    }

    /// Lets bytes in line, behind all that are.
    pub fn reserve(&mut self, now: Time, class: Class, bytes: u64) -> Ticket {
        let line = self.line(class);
        line.advance(now);
        line.reserved += bytes;
        let place = line.reserved;
        Ticket { class, place }
    }

    /// Lets bytes in line that go in any case. They hold others up, but not for long: what waits in the middle of something must not be
    /// taken for dead.
    pub fn count(&mut self, now: Time, class: Class, bytes: u64) {
        let line = self.line(class);
        line.advance(now);
        let counted = line.reserved.saturating_add(bytes);
        let most = match line.cap {
            Some(cap) => line.granted.saturating_add(in_time(cap, COUNTED)),
            None => u64::MAX,
        };
        line.reserved = line.reserved.max(counted.min(most));
    }

    /// Takes bytes out of line that will not go after all.
    pub fn refund(&mut self, class: Class, bytes: u64) {
        let line = self.line(class);
        line.reserved = line.reserved.saturating_sub(bytes);
        if let Some(cap) = line.cap {
            let most = line.reserved.saturating_add(in_time(cap, SAVED));
            line.granted = line.granted.min(most);
        }
    }

    /// When who has this place may go; `None` is now.
    pub fn ready_at(&mut self, now: Time, ticket: Ticket) -> Option<Time> {
        let line = self.line(ticket.class);
        line.advance(now);
        line.granted_at(now, ticket.place)
    }

    /// When all that was let in line may have gone, up to what goes in `ahead`; `None` is now.
    pub fn clear_at(&mut self, now: Time, class: Class, ahead: Duration) -> Option<Time> {
        let line = self.line(class);
        line.advance(now);
        let ahead = line.cap.map_or(0, |cap| in_time(cap, ahead));
        line.granted_at(now, line.reserved.saturating_sub(ahead))
    }

    /// Bytes that go in a time; `None` where there is no cap.
    pub fn bytes_in(&self, class: Class, time: Duration) -> Option<u64> {
        Some(in_time(self.caps().of(class)?, time))
    }

    fn line(&mut self, class: Class) -> &mut Line {
        match class {
            Class::Within => &mut self.within,
            Class::Beyond => &mut self.beyond,
        }
    }
}

/// See the module.
#[derive(Clone, Debug, Default)]
struct Line {
    cap: Option<Rate>,
    reserved: u64,
    granted: u64,
    /// What is granted of the next byte.
    part: u128,
    counted: Time,
}

impl Line {
    fn set(&mut self, now: Time, cap: Option<Rate>) {
        self.advance(now);
        // Without a cap nobody waited, and what went then is not to be made up for.
        let carried = self.cap.and(cap).map_or(0, |cap| in_time(cap, CARRIED));
        self.granted = self.granted.max(self.reserved.saturating_sub(carried));
        self.cap = cap;
    }

    /// Grants what time has brought.
    fn advance(&mut self, now: Time) {
        let elapsed = now - self.counted;
        self.counted = self.counted.max(now);
        let Some(cap) = self.cap else { return };
        let most = self.reserved.saturating_add(in_time(cap, SAVED));
        if self.granted >= most {
            return;
        }
        let units = elapsed.as_nanos() * u128::from(cap.bits()) + self.part;
        let bytes = u64::try_from(units / UNITS).unwrap_or(u64::MAX);
        self.part = units % UNITS;
        self.granted = self.granted.saturating_add(bytes).min(most);
    }

    fn granted_at(&self, now: Time, place: u64) -> Option<Time> {
        let cap = self.cap?;
        let lacking = place.checked_sub(self.granted).filter(|&bytes| bytes > 0)?;
        let units = u128::from(lacking) * UNITS - self.part;
        let nanos = units.div_ceil(u128::from(cap.bits()));
        let wait = u64::try_from(nanos).map_or(LONGEST_WAIT, Duration::from_nanos);
        Some(now + wait.min(LONGEST_WAIT))
    }
}

fn in_time(cap: Rate, time: Duration) -> u64 {
    let bytes = u128::from(cap.bits()) * time.as_nanos() / UNITS;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAP: u64 = 5_000_000;
    const CHUNK: u64 = 16 << 10;

    fn at(ms: u64) -> Time {
        Time::from_start(Duration::from_millis(ms))
    }

    fn beyond(bits: u64) -> Caps {
        Caps {
            within: None,
            beyond: Some(Rate::from_bits(bits).unwrap()),
        }
    }

    #[test]
    fn what_is_counted_or_refunded_bends_the_line_a_little_only() {
        let mut limiter = Limiter::default();
        limiter.set(at(0), beyond(CAP));
        limiter.count(at(0), Class::Beyond, 100 << 20);
        let ticket = limiter.reserve(at(0), Class::Beyond, CHUNK);
        let ready = limiter.ready_at(at(0), ticket).expect("it waits");
        assert!((at(2_000)..at(2_200)).contains(&ready), "{ready:?}");
        // A minute's worth is given up when most of it was granted: nothing of that is saved up.
        limiter.reserve(at(3_000), Class::Beyond, CAP / 8 * 60);
        assert!(
            limiter
                .clear_at(at(50_000), Class::Beyond, Duration::ZERO)
                .is_some()
        );
        limiter.refund(Class::Beyond, CAP / 8 * 60);
        let ticket = limiter.reserve(at(50_000), Class::Beyond, CAP / 8);
        let ready = limiter.ready_at(at(50_000), ticket).expect("it waits");
        assert!(ready >= at(50_880), "{ready:?}");
    }

    /// Sends chunks as often as the line lets it, late by a few milliseconds each time; when each went, and its length.
    fn drive(limiter: &mut Limiter, from: Time, to: Time) -> Vec<(Time, u64)> {
        let (mut now, mut sent, mut late) = (from, Vec::new(), 0);
        while now < to {
            let ticket = limiter.reserve(now, Class::Beyond, CHUNK);
            while let Some(ready) = limiter.ready_at(now, ticket) {
                assert!(ready > now);
                late = (late + 3) % 7;
                now = ready + Duration::from_millis(late);
            }
            sent.push((now, CHUNK));
        }
        sent
    }

    fn in_window(sent: &[(Time, u64)], from: Time, length: Duration) -> u64 {
        let inside = |&&(at, _): &&(Time, u64)| at >= from && at < from + length;
        sent.iter().filter(inside).map(|(_, bytes)| bytes).sum()
    }

    #[test]
    fn each_window_of_10_s_is_within_5_percent_of_the_cap() {
        for cap in [64_000, 600_000, CAP, 1_000_000_000] {
            let mut limiter = Limiter::default();
            limiter.set(at(0), beyond(cap));
            let length = Duration::from_secs(10);
            // Chunks are as long as those who send them make them: some 20 ms.
            let chunk = limiter
                .bytes_in(Class::Beyond, Duration::from_millis(20))
                .unwrap();
            let (mut now, mut sent) = (at(5_000), Vec::new());
            while now < at(40_000) {
                let ticket = limiter.reserve(now, Class::Beyond, chunk);
                while let Some(ready) = limiter.ready_at(now, ticket) {
                    now = ready + Duration::from_millis(2);
                }
                sent.push((now, chunk));
            }
            for start in (5_000..30_000).step_by(500) {
                let share = in_window(&sent, at(start), length) as f64 / (cap as f64 / 8.0 * 10.0);
                assert!((0.97..1.03).contains(&share), "{cap} from {start}: {share}");
            }
        }
    }

    #[test]
    fn idleness_is_not_saved_up() {
        let mut limiter = Limiter::default();
        limiter.set(at(0), beyond(CAP));
        let sent = drive(&mut limiter, at(3_600_000), at(3_601_000));
        let bytes = in_window(&sent, at(3_600_000), Duration::from_secs(1));
        assert!(bytes < CAP / 8 * 115 / 100, "{bytes}");
    }

    #[test]
    fn classes_are_apart_and_no_cap_never_waits() {
        let mut limiter = Limiter::default();
        limiter.set(at(0), beyond(CAP));
        let waits = limiter.reserve(at(0), Class::Beyond, 1 << 30);
        assert!(limiter.ready_at(at(0), waits).is_some());
        let free = limiter.reserve(at(0), Class::Within, 1 << 30);
        assert_eq!(limiter.ready_at(at(0), free), None);
        assert_eq!(limiter.clear_at(at(0), Class::Within, Duration::ZERO), None);
        assert_eq!(
            limiter.bytes_in(Class::Within, Duration::from_secs(1)),
            None
        );
        assert_eq!(
            limiter.bytes_in(Class::Beyond, Duration::from_secs(1)),
            Some(CAP / 8)
        );
    }

    #[test]
    fn a_changed_cap_holds_for_who_is_in_line_already() {
        let mut limiter = Limiter::default();
        limiter.set(at(0), beyond(CAP));
        let ticket = limiter.reserve(at(0), Class::Beyond, CAP / 8 * 10);
        assert_eq!(limiter.ready_at(at(0), ticket), Some(at(10_000)));
        limiter.set(at(5_000), beyond(10 * CAP));
        assert_eq!(limiter.ready_at(at(5_000), ticket), Some(at(5_500)));
        // Lowered, it would keep who is in line for 25 s.
        limiter.set(at(5_250), beyond(CAP / 10));
        assert_eq!(limiter.ready_at(at(5_250), ticket), Some(at(6_250)));
        limiter.set(at(5_500), Caps::default());
        assert_eq!(limiter.ready_at(at(5_500), ticket), None);
        // And what went in the meantime is not made up for.
        limiter.reserve(at(7_000), Class::Beyond, 1 << 40);
        limiter.set(at(8_000), beyond(CAP));
        let next = limiter.reserve(at(8_000), Class::Beyond, CAP / 8);
        assert_eq!(limiter.ready_at(at(8_000), next), Some(at(9_000)));
    }

    #[test]
    fn what_is_taken_out_of_line_is_there_for_others() {
        let mut limiter = Limiter::default();
        limiter.set(at(0), beyond(CAP));
        limiter.reserve(at(0), Class::Beyond, CAP / 8);
        let clear = |limiter: &mut Limiter, ahead| {
            limiter.clear_at(at(0), Class::Beyond, Duration::from_millis(ahead))
        };
        assert_eq!(clear(&mut limiter, 0), Some(at(1_000)));
        assert_eq!(clear(&mut limiter, 400), Some(at(600)));
        limiter.refund(Class::Beyond, CAP / 16);
        assert_eq!(clear(&mut limiter, 0), Some(at(500)));
        assert_eq!(clear(&mut limiter, 500), None);
        limiter.refund(Class::Beyond, u64::MAX);
        assert_eq!(clear(&mut limiter, 0), None);
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_grants_nothing() {
        let mut limiter = Limiter::default();
        limiter.set(at(1_000), beyond(CAP));
        let ticket = limiter.reserve(at(1_000), Class::Beyond, CAP / 8);
        assert!(limiter.ready_at(at(500), ticket).is_some());
        assert_eq!(limiter.ready_at(at(1_000), ticket), Some(at(2_000)));
    }
}
