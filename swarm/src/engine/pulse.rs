//! Whether a peer lives: silence, pings and the round trip. No sockets, no clock.
//!
//! While content moves, or is wanted, whoever is silent is asked soon, so that nobody waits for the dead; in other sites only who was asked for
//! something, unless there is nobody else. Otherwise nothing
//! depends on it, and hundreds of idle nodes should not be heard on their network: then TCP's keep-alive has to do (`transport`), and a
//! question now and then, as a kernel also answers for a program that hangs.

use std::time::{Duration, Instant};

/// Silence after which a peer is asked whether it lives, while content moves.
const ASK_AFTER: Duration = Duration::from_secs(6);
/// The same while nothing moves.
const ASK_IDLE_AFTER: Duration = Duration::from_secs(600);
/// A peer that was asked and is not heard of for so long is dead.
const DEAD_AFTER: Duration = Duration::from_secs(10);
/// How often the round trip is measured of a peer that is never silent.
const MEASURE_EVERY: Duration = Duration::from_secs(30);

/// What is to be done about a peer's silence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vital {
    Fine,
    Ping(u64),
    Dead,
}

/// When a peer was last heard, and how far it is.
#[derive(Debug)]
pub struct Pulse {
    heard: Instant,
    /// The ping that is not answered yet.
    ping: Option<(u64, Instant)>,
    pings: u64,
    measured: Option<Instant>,
    rtt: Option<Duration>,
}

impl Pulse {
    pub fn new(now: Instant) -> Self {
        Self {
            heard: now,
            ping: None,
            pings: 0,
            measured: None,
            rtt: None,
        }
    }

    /// Anything came from it.
    pub fn heard(&mut self, now: Instant) {
        self.heard = now;
    }

    /// It answered a ping.
    pub fn pong(&mut self, now: Instant, nonce: u64) {
        let Some((_, sent)) = self.ping.filter(|(expected, _)| *expected == nonce) else {
            return;
        };
        let sample = now - sent;
        self.rtt = Some(self.rtt.map_or(sample, |rtt| (rtt * 3 + sample) / 4));
        self.ping = None;
    }

    /// The round trip, once it is measured.
    pub fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    /// Looks at its silence; `idle` says that nothing depends on it just now.
    pub fn tick(&mut self, now: Instant, idle: bool) -> Vital {
        if let Some((_, sent)) = self.ping.filter(|(_, sent)| self.heard < *sent) {
            return if now - sent > DEAD_AFTER {
                Vital::Dead
            } else {
                Vital::Fine
            };
        }
        let silent = now - self.heard;
        let due = match self.measured {
            None => true,
            Some(_) if idle => silent > ASK_IDLE_AFTER,
            Some(at) => silent > ASK_AFTER || now - at > MEASURE_EVERY,
        };
        if !due {
            return Vital::Fine;
        }
        self.pings += 1;
        self.ping = Some((self.pings, now));
        self.measured = Some(now);
        Vital::Ping(self.pings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    const NOTHING: [u32; 0] = [];

    /// A peer whose round trip was measured when it connected.
    fn measured(start: Instant) -> Pulse {
        let mut pulse = Pulse::new(start);
        assert_eq!(pulse.tick(start, true), Vital::Ping(1));
        pulse.pong(start, 1);
        pulse
    }

    /// When it is asked, and when it is dead, if it stays silent for so many seconds.
    fn silence(
        pulse: &mut Pulse,
        start: Instant,
        span: std::ops::Range<u32>,
        idle: bool,
    ) -> [Vec<u32>; 2] {
        let (mut asked, mut dead) = (vec![], vec![]);
        for second in span {
            match pulse.tick(start + SECOND * second, idle) {
                Vital::Ping(_) => asked.push(second),
                Vital::Dead => dead.push(second),
                Vital::Fine => {}
            }
        }
        [asked, dead.into_iter().take(1).collect()]
    }

    #[test]
    fn who_is_silent_is_asked_and_then_dead() {
        let start = Instant::now();
        let mut pulse = measured(start);
        assert_eq!(
            silence(&mut pulse, start, 1..30, false),
            [vec![7], vec![18]]
        );
    }

    #[test]
    fn hardly_anybody_is_asked_while_nothing_moves() {
        let start = Instant::now();
        let mut pulse = measured(start);
        assert_eq!(
            silence(&mut pulse, start, 1..1000, true),
            [vec![601], vec![612]],
            "its kernel answers, but it does not"
        );
    }

    #[test]
    fn who_was_long_silent_is_asked_when_something_moves_and_has_time_to_answer() {
        let start = Instant::now();
        let mut pulse = measured(start);
        assert_eq!(silence(&mut pulse, start, 1..100, true).concat(), NOTHING);
        assert_eq!(
            silence(&mut pulse, start, 100..105, false),
            [vec![100], NOTHING.to_vec()]
        );
        pulse.heard(start + SECOND * 105);
        pulse.pong(start + SECOND * 105, 2);
        assert_eq!(
            silence(&mut pulse, start, 106..120, false),
            [vec![112], NOTHING.to_vec()]
        );
    }

    #[test]
    fn who_speaks_but_does_not_answer_pings_lives() {
        let start = Instant::now();
        let mut pulse = Pulse::new(start);
        for second in 0..100 {
            let vital = pulse.tick(start + SECOND * second, false);
            assert_ne!(vital, Vital::Dead);
            pulse.heard(start + SECOND * second + SECOND / 2);
        }
        assert_eq!(pulse.rtt(), None);
    }

    #[test]
    fn only_the_right_answer_measures_the_round_trip() {
        let start = Instant::now();
        let mut pulse = Pulse::new(start);
        assert_eq!(pulse.tick(start, false), Vital::Ping(1));
        pulse.pong(start + SECOND / 10, 77);
        assert_eq!(pulse.rtt(), None);
        pulse.pong(start + SECOND / 10, 1);
        assert_eq!(pulse.rtt(), Some(SECOND / 10));
    }
}
