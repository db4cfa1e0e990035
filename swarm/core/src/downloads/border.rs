//! How many peers beyond the site a gateway asks at a time: as few as fill the link.
//!
//! Flows that share a thin link push each other's packets out of its queue, and what other sites relay takes their links both ways, with
//! the acknowledgements of it. So a gateway asks one peer, who holds all of the blob if there is such a one, and tries from time to time
//! whether its site gets more by more, or no less by fewer (hill climbing). What the site gets counts, not what the gateway does: of a
//! link that is full, who asks more only takes from the others.

use std::time::Duration;

use capsule_proto::ranges::GROUP_LEN;

use crate::Time;

/// Least time over which the pace is taken, and the most, where little comes.
pub(super) const LEG: Duration = Duration::from_secs(5);
const LONG_LEG: Duration = Duration::from_secs(20);
/// What has to come in a leg for its pace to be believed, unless it is a long one: responses come whole, and count as they end.
const ENOUGH: u64 = (1 << 20) / GROUP_LEN;
/// What about half as many again have to bring, and what a third fewer may cost: half of the way between nothing and all that they would, where
/// each gives as much as the others.
const GAIN: f64 = 1.25;
const LOSS: f64 = 0.83;
/// A leg of less than this part of the pace of before is looked into at once.
const FELL: f64 = 0.5;
/// Legs between two trials: at first, when the pace is still growing, and most of them, after trials in vain.
const FIRST_REST: u32 = 2;
const MAX_REST: u32 = 16;
/// Most peers asked at a time: of more, each gives too little to be worth its messages.
const MAX_WIDTH: usize = 16;

/// How many peers beyond are asked for one blob.
#[derive(Clone, Debug)]
pub(super) struct Border {
    width: usize,
    /// What is tried, and how many were asked before.
    trial: Option<(Trial, usize)>,
    /// The mean pace of the legs since the width last changed, and how many they are; of the width before a trial, during it.
    pace: f64,
    legs: u32,
    /// Legs between trials.
    rest: u32,
    /// Whether the next trial is of fewer.
    fewer_next: bool,
    leg: Option<Leg>,
}

/// A time over which the pace is taken.
#[derive(Clone, Copy, Debug)]
struct Leg {
    began: Time,
    /// Groups that the site lacked when it was last looked, and what came until then.
    lacking: u64,
    came: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trial {
    More,
    Fewer,
}

impl Default for Border {
    fn default() -> Self {
        Self {
            width: 1,
            trial: None,
            pace: 0.0,
            legs: 0,
            rest: FIRST_REST,
            fewer_next: false,
            leg: None,
        }
    }
}

impl Border {
    pub fn width(&self) -> usize {
        self.width
    }

    /// Nothing is asked beyond just now: time that passes says nothing.
    pub fn rest(&mut self) {
        self.leg = None;
    }

    /// Takes in how many groups nobody of the site holds by now, and whether all who are asked are silent.
    pub fn turn(&mut self, now: Time, lacking: u64, silent: bool) {
        let leg = self.leg.get_or_insert(Leg {
            began: now,
            lacking,
            came: 0,
        });
        // More may lack than before: a peer left, or more is wanted.
        leg.came += leg.lacking.saturating_sub(lacking);
        leg.lacking = lacking;
        let (took, came) = (now - leg.began, leg.came);
        let long = took >= LONG_LEG;
        let stuck = came == 0 && (long || silent && took >= LEG);
        if stuck || long || took >= LEG && came >= ENOUGH {
            self.rest();
            self.pace_of_leg(came as f64 / took.as_secs_f64());
        }
    }

    fn pace_of_leg(&mut self, pace: f64) {
        let fell = self.legs > 0 && pace < self.pace * FELL;
        match self.trial.take() {
            _ if pace == 0.0 => self.widen(pace),
            Some((Trial::More, before)) if pace < self.pace * GAIN => self.back(before, true),
            Some((Trial::More, _)) => {
                self.rest = FIRST_REST;
                self.widen(pace);
            }
            Some((Trial::Fewer, before)) if pace < self.pace * LOSS => self.back(before, false),
            Some((Trial::Fewer, _)) => {
                self.rest = FIRST_REST;
                // All of them together may cost as much as one of them.
                self.narrow(self.pace);
            }
            None if fell => {
                self.rest = FIRST_REST;
                self.widen(pace);
            }
            None => {
                self.legs += 1;
                self.pace += (pace - self.pace) / f64::from(self.legs);
                if self.legs >= self.rest {
                    if self.fewer_next {
                        self.narrow(self.pace);
                    } else {
                        self.widen(self.pace);
                    }
                }
            }
        }
    }

    /// Tries more than now, against the pace of now.
    fn widen(&mut self, pace: f64) {
        let before = self.width;
        self.width = (before + before.div_ceil(2)).min(MAX_WIDTH);
        if self.width > before {
            (self.trial, self.pace, self.legs) = (Some((Trial::More, before)), pace, 0);
        } else {
            self.back(before, true);
        }
    }

    /// Tries fewer than now, against the pace of now.
    fn narrow(&mut self, pace: f64) {
        let before = self.width;
        self.width = (2 * before / 3).max(1);
        if self.width < before {
            (self.trial, self.pace, self.legs) = (Some((Trial::Fewer, before)), pace, 0);
        } else {
            self.back(1, false);
        }
    }

    /// As it was before is best for a while; the next trial goes the other way, if it can.
    fn back(&mut self, width: usize, fewer_next: bool) {
        self.width = width;
        self.fewer_next = fewer_next && width > 1;
        self.rest = (2 * self.rest).min(MAX_REST);
        (self.pace, self.legs) = (0.0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A site that gets so many groups a second from so many peers.
    struct Link<'a> {
        border: Border,
        now: Time,
        lacking: u64,
        pace: &'a dyn Fn(usize) -> u64,
    }

    impl<'a> Link<'a> {
        fn new(pace: &'a dyn Fn(usize) -> u64) -> Self {
            Self {
                border: Border::default(),
                now: Time::ZERO,
                lacking: 1 << 40,
                pace,
            }
        }

        /// How many were asked in each second.
        fn run(&mut self, seconds: u64) -> Vec<usize> {
            let second = |_| {
                self.border.turn(self.now, self.lacking, true);
                self.now += Duration::from_secs(1);
                self.lacking -= (self.pace)(self.border.width());
                self.border.width()
            };
            (0..seconds).map(second).collect()
        }
    }

    #[test]
    fn one_peer_that_fills_the_link_is_the_only_one_most_of_the_time() {
        let mut link = Link::new(&|_| 30);
        let widths = link.run(300);
        let more = widths.iter().filter(|&&width| width > 1).count();
        assert!((5..30).contains(&more), "{more}");
        assert_eq!(widths.iter().max(), Some(&2));
    }

    #[test]
    fn many_are_asked_that_give_little_each() {
        let mut link = Link::new(&|width| 20 * width.min(10) as u64);
        let widths = link.run(60);
        assert!(widths[59] >= 8, "{widths:?}");
        // They are more than are needed at times, and never more than the bound.
        let widths = link.run(600);
        let all = widths.iter().all(|width| (8..=MAX_WIDTH).contains(width));
        assert!(all, "{widths:?}");
        // Then one gives as much as all did.
        link.pace = &|_| 200;
        assert_eq!(link.run(600)[599], 1);
    }

    #[test]
    fn one_that_gives_nothing_is_not_waited_for() {
        let mut link = Link::new(&|width| 10 * (width as u64 - 1));
        let widths = link.run(11);
        assert_eq!(widths[4..=5], [1, 2]);
        assert!(link.run(300).iter().all(|width| *width > 1));
    }

    #[test]
    fn who_lets_go_of_most_of_it_is_not_waited_for_either() {
        let mut link = Link::new(&|_| 300);
        link.run(100);
        link.pace = &|width| if width > 1 { 300 } else { 14 };
        assert!(link.run(25).iter().any(|width| *width > 1));
    }

    #[test]
    fn a_response_that_takes_long_is_not_silence() {
        let mut border = Border::default();
        for second in 0..20 {
            border.turn(Time::from_start(Duration::from_secs(second)), 100, false);
            assert_eq!(border.width(), 1);
        }
        border.turn(Time::from_start(LONG_LEG), 100, false);
        assert_eq!(border.width(), 2);
    }

    #[test]
    fn time_without_need_says_nothing() {
        let mut link = Link::new(&|_| 30);
        link.run(2);
        link.border.rest();
        link.now += Duration::from_secs(1000);
        assert_eq!(link.run(10), [1; 10]);
    }
}
