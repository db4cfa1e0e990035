//! When LAN discovery asks and answers: jitter, suppression and backing off. No sockets, no clock.
//!
//! Answers are multicast, so everybody learns from them. Hence a node that hears a few answers to a query keeps
//! its own back, and one that hears a query need not ask itself: at 500 nodes a query costs some ten packets.

use std::ops::Range;
use std::time::Duration;

use rand::{RngExt, rngs::SmallRng};

/// Answers to one query after which others keep theirs back: enough to find the fleet by, the rest is told by peers.
const ANSWERS_ENOUGH: u32 = 6;
/// After which answers are spread so far that suppression works in a large LAN.
const LAN_IS_LARGE: u32 = 16;
/// How long an answer waits, in a small LAN (RFC 6762's range) and in a large one.
const ANSWER_JITTER: Range<Duration> = Duration::from_millis(20)..Duration::from_millis(120);
const ANSWER_JITTER_LARGE: Range<Duration> = Duration::from_millis(20)..Duration::from_millis(1500);
/// How long a query waits: a room of machines that are switched on together asks a few times, not once each.
const QUERY_JITTER: Range<Duration> = Duration::from_millis(10)..Duration::from_millis(400);
/// A query heard this recently is as good as one's own.
const QUERY_FRESH: Duration = Duration::from_secs(1);
/// Least and most time between two queries of one node.
const QUERY_BACKOFF: Range<Duration> = Duration::from_secs(1)..Duration::from_secs(60);
/// Least time between two answers of one node (RFC 6762, section 6).
const ANSWER_INTERVAL: Duration = Duration::from_secs(1);

/// What to send now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Send {
    Query,
    Answer,
}

/// The timing of one node on one interface. Times are since an arbitrary start.
#[derive(Debug)]
pub struct Schedule {
    rng: SmallRng,
    query_at: Option<Duration>,
    answer_at: Option<Duration>,
    answers_heard: u32,
    last_query: Option<Duration>,
    last_answer: Option<Duration>,
    backoff: Duration,
}

impl Schedule {
    pub fn new(rng: SmallRng) -> Self {
        Self {
            rng,
            query_at: None,
            answer_at: None,
            answers_heard: 0,
            last_query: None,
            last_answer: None,
            backoff: QUERY_BACKOFF.start,
        }
    }

    /// A number that tells this node's queries from others'.
    pub fn nonce(&mut self) -> u16 {
        self.rng.random()
    }

    /// The node would like more peers.
    pub fn handle_search(&mut self, now: Duration) {
        if self.query_at.is_some() {
            return;
        }
        let earliest = self
            .last_query
            .map_or(now, |last| (last + self.backoff).max(now));
        self.query_at = Some(earliest + self.jitter(QUERY_JITTER));
    }

    /// Somebody else asked.
    pub fn handle_query(&mut self, now: Duration) {
        self.last_query = Some(now);
        let large = self.answers_heard >= LAN_IS_LARGE;
        self.answers_heard = 0;
        let rests = self
            .last_answer
            .is_some_and(|last| now < last + ANSWER_INTERVAL);
        if self.answer_at.is_none() && !rests {
            let range = if large {
                ANSWER_JITTER_LARGE
            } else {
                ANSWER_JITTER
            };
            self.answer_at = Some(now + self.jitter(range));
        }
    }

    /// Somebody else answered.
    pub fn handle_answer(&mut self) {
        self.answers_heard = self.answers_heard.saturating_add(1);
    }

    /// What is due.
    pub fn poll(&mut self, now: Duration) -> Option<Send> {
        if self.answer_at.is_some_and(|at| at <= now) {
            self.answer_at = None;
            if self.answers_heard < ANSWERS_ENOUGH {
                self.last_answer = Some(now);
                return Some(Send::Answer);
            }
        }
        if self.query_at.is_some_and(|at| at <= now) {
            self.query_at = None;
            self.backoff = (self.backoff * 2).min(QUERY_BACKOFF.end);
            if self.last_query.is_none_or(|last| now >= last + QUERY_FRESH) {
                self.last_query = Some(now);
                self.answers_heard = 0;
                return Some(Send::Query);
            }
        }
        None
    }

    /// When to poll again if nothing is heard.
    pub fn timeout(&self) -> Option<Duration> {
        self.query_at.into_iter().chain(self.answer_at).min()
    }

    fn jitter(&mut self, range: Range<Duration>) -> Duration {
        self.rng.random_range(range)
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    /// Delivers everything at once to everybody else; counts packets.
    fn room(nodes: usize, end: Duration) -> (usize, usize) {
        let mut room: Vec<_> = (0..nodes as u64)
            .map(|i| Schedule::new(SmallRng::seed_from_u64(i)))
            .collect();
        room.iter_mut()
            .for_each(|s| s.handle_search(Duration::ZERO));
        let (mut queries, mut answers) = (0, 0);
        while let Some(now) = room
            .iter()
            .filter_map(Schedule::timeout)
            .min()
            .filter(|t| *t < end)
        {
            for sender in 0..nodes {
                let Some(sent) = room[sender].poll(now) else {
                    continue;
                };
                for (i, hearer) in room.iter_mut().enumerate().filter(|(i, _)| *i != sender) {
                    assert_ne!(i, sender);
                    match sent {
                        Send::Query => hearer.handle_query(now),
                        Send::Answer => hearer.handle_answer(),
                    }
                }
                match sent {
                    Send::Query => queries += 1,
                    Send::Answer => answers += 1,
                }
            }
        }
        (queries, answers)
    }

    #[test]
    fn two_nodes_find_each_other() {
        assert_eq!(room(2, Duration::from_secs(1)), (1, 1));
    }

    #[test]
    fn a_room_switched_on_together_stays_quiet() {
        let (queries, answers) = room(500, Duration::from_secs(3));
        assert!(
            queries <= 3 && answers <= 30,
            "{queries} queries, {answers} answers"
        );
    }

    #[test]
    fn searching_in_vain_backs_off() {
        let mut lonely = Schedule::new(SmallRng::seed_from_u64(1));
        let (mut now, mut queries) = (Duration::ZERO, 0);
        while now < Duration::from_secs(600) {
            lonely.handle_search(now);
            queries += usize::from(lonely.poll(now) == Some(Send::Query));
            now += Duration::from_millis(100);
        }
        assert!((10..=20).contains(&queries), "{queries}");
    }
}
