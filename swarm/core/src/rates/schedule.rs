//! Hours of the day with a cap of their own.
//!
//! The time of day is the caller's: minutes since local midnight. Where clocks are put forward or back it jumps, and the cap with it:
//! nothing here counts on a day being 24 hours long.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use super::{Rate, RateError};

/// Minutes in a day.
pub const DAY: u16 = 24 * 60;
/// Most hours in a schedule: every hour and a half.
const MAX_HOURS: usize = 16;
/// Longest text of a schedule.
const MAX_TEXT: usize = 1024;

/// A cap for the whole day, and other caps for some hours of it.
///
/// As text: `RATE[, HH:MM-HH:MM RATE]...`, as in `5 Mbit/s, 22:00-06:00 unlimited`. Without a first rate there is no cap outside the
/// hours. Hours may go past midnight.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    otherwise: Option<Rate>,
    /// In the order of their beginnings; no two have a minute in common.
    hours: Vec<Hours>,
}

/// From a minute of the day up to another, which may be of the next day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hours {
    from: u16,
    to: u16,
    cap: Option<Rate>,
}

/// Why a text is no schedule.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ScheduleError {
    /// A rate in it is none.
    #[error(transparent)]
    Rate(#[from] RateError),
    /// Hours in it are none.
    #[error(
        "{0:?} is not hours of the day: write HH:MM-HH:MM, from 00:00 to 24:00, as in \"22:00-06:00\""
    )]
    Hours(String),
    /// Hours that are no time, or the whole day.
    #[error("{0} begins where it ends: for the whole day write the rate alone")]
    Empty(String),
    /// A moment with two rates.
    #[error("{0} and {1} overlap: each moment may have one rate")]
    Overlap(String, String),
    /// Two rates without hours.
    #[error(
        "{0} and {1} are both for the whole day: write one of them with its hours, as in \"22:00-06:00 {1}\""
    )]
    Twice(String, String),
    /// Too long.
    #[error("a schedule may have {MAX_HOURS} hours at most, in {MAX_TEXT} characters")]
    TooLong,
}

impl Schedule {
    /// One cap all day.
    pub const fn always(cap: Option<Rate>) -> Self {
        Self {
            otherwise: cap,
            hours: Vec::new(),
        }
    }

    /// Whether there is never a cap.
    pub fn is_unlimited(&self) -> bool {
        self.otherwise.is_none() && self.hours.iter().all(|hours| hours.cap.is_none())
    }

    /// The cap at a minute of the day.
    pub fn at(&self, minute: u16) -> Option<Rate> {
        let inside = self.hours.iter().find(|hours| hours.contains(minute));
        inside.map_or(self.otherwise, |hours| hours.cap)
    }

    /// The next minute of the day, after this one, at which the cap is another, and that cap; `None` where it never changes.
    pub fn next_change(&self, minute: u16) -> Option<(u16, Option<Rate>)> {
        let now = self.at(minute);
        let mut edges: Vec<u16> = self
            .hours
            .iter()
            .flat_map(|hours| [hours.from, hours.to % DAY])
            .filter(|&edge| edge != minute)
            .collect();
        edges.sort_unstable_by_key(|&edge| (edge + DAY - minute) % DAY);
        let edge = edges.into_iter().find(|&edge| self.at(edge) != now)?;
        Some((edge, self.at(edge)))
    }

    fn add(&mut self, new: Hours) -> Result<(), ScheduleError> {
        if self.hours.len() >= MAX_HOURS {
            return Err(ScheduleError::TooLong);
        }
        let overlaps = |other: &&Hours| other.contains(new.from) || new.contains(other.from);
        if let Some(other) = self.hours.iter().find(overlaps) {
            return Err(ScheduleError::Overlap(other.to_string(), new.to_string()));
        }
        let place = self.hours.partition_point(|hours| hours.from < new.from);
        self.hours.insert(place, new);
        Ok(())
    }
}

impl Hours {
    const fn contains(&self, minute: u16) -> bool {
        if self.from < self.to {
            self.from <= minute && minute < self.to
        } else {
            self.from <= minute || minute < self.to
        }
    }
}

impl FromStr for Schedule {
    type Err = ScheduleError;

    fn from_str(text: &str) -> Result<Self, ScheduleError> {
        if text.len() > MAX_TEXT {
            return Err(ScheduleError::TooLong);
        }
        let (mut schedule, mut whole_day) = (Self::default(), None::<&str>);
        for part in text.split(',').map(str::trim) {
            let first = part.split_whitespace().next().unwrap_or_default();
            if !first.contains(':') {
                schedule.otherwise = Rate::parse_cap(part)?;
                if let Some(other) = whole_day.replace(part) {
                    return Err(ScheduleError::Twice(other.into(), part.into()));
                }
                continue;
            }
            let cap = Rate::parse_cap(part[first.len()..].trim_start());
            let (from, to) = hours(first).ok_or_else(|| ScheduleError::Hours(first.into()))?;
            if from == to || to - from.min(to) == DAY {
                return Err(ScheduleError::Empty(first.into()));
            }
            schedule.add(Hours {
                from,
                to,
                cap: cap?,
            })?;
        }
        Ok(schedule)
    }
}

fn hours(text: &str) -> Option<(u16, u16)> {
    let (from, to) = text.split_once('-')?;
    Some((minute(from).filter(|&from| from < DAY)?, minute(to)?))
}

fn minute(text: &str) -> Option<u16> {
    let (hour, minute) = text.split_once(':')?;
    let number = |text: &str, lens: std::ops::RangeInclusive<usize>| {
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        (digits && lens.contains(&text.len())).then(|| text.parse::<u16>().ok())?
    };
    let (hour, minute) = (number(hour, 1..=2)?, number(minute, 2..=2)?);
    (minute < 60 && 60 * hour + minute <= DAY).then_some(60 * hour + minute)
}

impl fmt::Display for Hours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clock = |minute: u16| format!("{:02}:{:02}", minute / 60, minute % 60);
        write!(f, "{}-{}", clock(self.from), clock(self.to))
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cap = |cap: Option<Rate>| cap.map_or("unlimited".to_owned(), |rate| rate.to_string());
        f.write_str(&cap(self.otherwise))?;
        for hours in &self.hours {
            write!(f, ", {hours} {}", cap(hours.cap))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(text: &str) -> Schedule {
        text.parse()
            .unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn rate(text: &str) -> Option<Rate> {
        Rate::parse_cap(text).unwrap()
    }

    const fn time(hour: u16, minute: u16) -> u16 {
        60 * hour + minute
    }

    #[test]
    fn hours_hold_from_their_first_minute_up_to_their_last_and_past_midnight() {
        let schedule = schedule("5 Mbit/s, 22:00-06:00 unlimited, 12:00-13:30 1 Mbit/s");
        for (minute, cap) in [
            (time(21, 59), "5 Mbit/s"),
            (time(22, 0), "unlimited"),
            (time(23, 59), "unlimited"),
            (time(0, 0), "unlimited"),
            (time(5, 59), "unlimited"),
            (time(6, 0), "5 Mbit/s"),
            (time(11, 59), "5 Mbit/s"),
            (time(12, 0), "1 Mbit/s"),
            (time(13, 29), "1 Mbit/s"),
            (time(13, 30), "5 Mbit/s"),
        ] {
            assert_eq!(schedule.at(minute), rate(cap), "{minute}");
        }
    }

    #[test]
    fn the_next_change_is_the_next_that_changes_anything() {
        let night = schedule("5 Mbit/s, 22:00-06:00 unlimited");
        assert_eq!(night.next_change(time(12, 0)), Some((time(22, 0), None)));
        assert_eq!(
            night.next_change(time(22, 0)),
            Some((time(6, 0), rate("5 Mbit/s")))
        );
        assert_eq!(
            night.next_change(time(5, 59)),
            Some((time(6, 0), rate("5 Mbit/s")))
        );
        assert_eq!(schedule("5 Mbit/s").next_change(0), None);
        // Side by side with the same cap, and hours of the cap that holds otherwise: nothing changes there.
        let same =
            schedule("1 Mbit/s, 08:00-09:00 2 Mbit/s, 09:00-10:00 2 Mbit/s, 11:00-12:00 1 Mbit/s");
        assert_eq!(
            same.next_change(time(8, 0)),
            Some((time(10, 0), rate("1 Mbit/s")))
        );
        assert_eq!(
            same.next_change(time(10, 0)),
            Some((time(8, 0), rate("2 Mbit/s")))
        );
        let to_midnight = schedule("18:00-24:00 1 Mbit/s");
        assert_eq!(to_midnight.next_change(time(18, 0)), Some((0, None)));
        assert_eq!(to_midnight.at(time(23, 59)), rate("1 Mbit/s"));
        assert_eq!(to_midnight.at(0), None);
    }

    #[test]
    fn every_minute_agrees_with_the_changes() {
        let schedule =
            schedule("23:30-00:15 1 Mbit/s, 00:15-03:00 2 Mbit/s, 3 Mbit/s, 09:00-17:00 64 kbit/s");
        for minute in 0..DAY {
            let (next, cap) = schedule.next_change(minute).unwrap();
            let mut walk = minute;
            while schedule.at(walk) == schedule.at(minute) {
                walk = (walk + 1) % DAY;
            }
            assert_eq!((next, cap), (walk, schedule.at(walk)), "from {minute}");
        }
    }

    #[test]
    fn schedules_are_written_as_they_are_read() {
        for (text, written) in [
            ("unlimited", "unlimited"),
            (
                "22:00-06:00 unlimited,5Mbit/s",
                "5 Mbit/s, 22:00-06:00 unlimited",
            ),
            ("9:00-17:00 600 kbit/s", "unlimited, 09:00-17:00 600 kbit/s"),
            (
                "20:00-24:00 1 MB/s, 0:00-6:00 2 MB/s",
                "unlimited, 00:00-06:00 16 Mbit/s, 20:00-24:00 8 Mbit/s",
            ),
        ] {
            assert_eq!(schedule(text).to_string(), written);
            assert_eq!(schedule(written), schedule(text));
        }
        assert!(schedule("unlimited, 1:00-2:00 unlimited").is_unlimited());
        assert!(!schedule("1:00-2:00 1 Mbit/s").is_unlimited());
        assert_eq!(schedule("1 Mbit/s"), Schedule::always(rate("1 Mbit/s")));
    }

    #[test]
    fn what_is_no_schedule_is_told_why() {
        let refused = |text: &str| text.parse::<Schedule>().unwrap_err().to_string();
        for (text, why) in [
            ("", "\"\" is not a rate"),
            ("5 Mbit/s,", "\"\" is not a rate"),
            ("22:00-06:00", "\"\" is not a rate"),
            ("22:00-06:00 fast", "\"fast\" is not a rate"),
            (
                "22:00 - 06:00 unlimited",
                "\"22:00\" is not hours of the day: write HH:MM-HH:MM",
            ),
            ("22:00-6 unlimited", "\"22:00-6\" is not hours"),
            ("24:00-06:00 unlimited", "\"24:00-06:00\" is not hours"),
            ("22:00-24:01 unlimited", "\"22:00-24:01\" is not hours"),
            ("22:60-23:00 unlimited", "\"22:60-23:00\" is not hours"),
            ("22:0-23:00 unlimited", "\"22:0-23:00\" is not hours"),
            ("+2:00-23:00 unlimited", "\"+2:00-23:00\" is not hours"),
            ("06:00-06:00 unlimited", "06:00-06:00 begins where it ends"),
            ("00:00-24:00 unlimited", "00:00-24:00 begins where it ends"),
            (
                "22:00-06:00 unlimited, 05:59-07:00 1 Mbit/s",
                "22:00-06:00 and 05:59-07:00 overlap",
            ),
            (
                "1 Mbit/s, 2 Mbit/s",
                "1 Mbit/s and 2 Mbit/s are both for the whole day: write one of them with its hours",
            ),
        ] {
            let refused = refused(text);
            assert!(refused.starts_with(why), "{text}: {refused}");
        }
        let many: Vec<_> = (0..17)
            .map(|hour| format!("{hour}:00-{hour}:30 1 Mbit/s"))
            .collect();
        assert_eq!(schedule(&many[..16].join(",")).hours.len(), 16);
        assert!(refused(&many.join(",")).contains("16 hours at most"));
        assert!(refused(&" ".repeat(2000)).contains("1024 characters"));
    }
}
