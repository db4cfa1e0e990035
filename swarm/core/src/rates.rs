//! Caps of rates: what they are, and the lines in which bytes wait for them.
//!
//! A cap holds for one direction and one class of peers: those within this node's site, and those beyond. What counts is what
//! passes the interface: [`wire_bytes`] of what is written. Hours of the day are in `schedule`, the limiter in `limiter`;
//! neither knows what the time is.

mod limiter;
mod schedule;

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

pub use limiter::{Limiter, Ticket};
pub use schedule::{DAY, Schedule, ScheduleError};

/// Least cap, in bits a second: below it the news of a fleet alone would fill it.
const LEAST: u64 = 64_000;
/// Greatest cap: beyond it arithmetic, and anybody's links, end.
const MOST: u64 = 1_000_000_000_000;
/// Longest text of a rate.
const MAX_TEXT: usize = 64;
/// Digits behind the point that are read: as many as a rate of Gbit/s has bits.
const MAX_DECIMALS: usize = 9;

/// Content of a TCP segment on a link of 1,500 bytes, and the headers before it: IPv4 and TCP with timestamps. Ethernet's 14 are not
/// counted, as caps are agreed on with whoever counts IP.
const SEGMENT: u64 = 1448;
const SEGMENT_HEADERS: u64 = 52;
/// What a TLS record, and in it a frame of the multiplexer, adds to 16 KiB at most.
const RECORD: u64 = 16 << 10;
const RECORD_HEADERS: u64 = 22 + 12;

/// A rate, in bits a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(u64);

/// Where a peer is, as far as caps go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Within this node's site.
    Within,
    /// Beyond it.
    Beyond,
}

/// The caps of one direction; `None` is no cap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caps {
    /// To or from peers within the site, all together.
    pub within: Option<Rate>,
    /// To or from peers beyond it, all together.
    pub beyond: Option<Rate>,
}

/// Why a text is no rate.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RateError {
    /// It does not read as one.
    #[error(
        "{0:?} is not a rate: write a number and its unit, as in \"5 Mbit/s\", \"600 kbit/s\" or \"2 MB/s\", or \"unlimited\""
    )]
    Malformed(String),
    /// Less than can be held.
    #[error("{0} is less than 64 kbit/s, the least cap that can be held")]
    TooLow(Rate),
    /// More than any link carries.
    #[error("{0:?} is more than 1000 Gbit/s: write \"unlimited\" for no cap")]
    TooHigh(String),
}

impl Caps {
    /// The cap of a class.
    pub const fn of(&self, class: Class) -> Option<Rate> {
        match class {
            Class::Within => self.within,
            Class::Beyond => self.beyond,
        }
    }
}

impl Rate {
    /// So many bits a second, if that may be a cap.
    pub fn from_bits(bits: u64) -> Result<Self, RateError> {
        match bits {
            ..LEAST => Err(RateError::TooLow(Self(bits))),
            LEAST..=MOST => Ok(Self(bits)),
            _ => Err(RateError::TooHigh(Self(bits).to_string())),
        }
    }

    /// Bits a second.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whole bytes a second.
    pub const fn bytes(self) -> u64 {
        self.0 / 8
    }

    /// Reads a cap: a rate, or `unlimited`.
    pub fn parse_cap(text: &str) -> Result<Option<Self>, RateError> {
        if text.trim().eq_ignore_ascii_case("unlimited") {
            return Ok(None);
        }
        text.parse().map(Some)
    }
}

impl FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Self, RateError> {
        let malformed = || RateError::Malformed(text.chars().take(MAX_TEXT).collect());
        let trimmed = text.trim();
        let number_len = trimmed
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(malformed)?;
        let (number, unit) = trimmed.split_at(number_len);
        let unit = unit_bits(unit.trim_start()).ok_or_else(malformed)?;
        let (whole, decimals) = number.split_once('.').unwrap_or((number, "0"));
        let fits = !whole.is_empty()
            && !decimals.is_empty()
            && decimals.len() <= MAX_DECIMALS
            && trimmed.len() <= MAX_TEXT;
        let number: Option<u128> = fits
            .then(|| format!("{whole}{decimals}").parse().ok())
            .flatten();
        let number = number.ok_or_else(malformed)?;
        let bits = number.saturating_mul(u128::from(unit)) / 10u128.pow(decimals.len() as u32);
        match u64::try_from(bits) {
            Ok(bits) if bits <= MOST => Self::from_bits(bits),
            _ => Err(RateError::TooHigh(trimmed.to_owned())),
        }
    }
}

/// Bits in a unit. Only bytes and bits must be told apart by their case: `b` alone could be either.
fn unit_bits(unit: &str) -> Option<u64> {
    let name = unit.strip_suffix("/s")?;
    let (prefix, bits) = match name.strip_suffix('B') {
        Some(prefix) => (prefix, 8),
        None => {
            let at = name.len().checked_sub(3)?;
            let bit = name.get(at..)?.eq_ignore_ascii_case("bit");
            (bit.then(|| &name[..at])?, 1)
        }
    };
    let factor = match prefix {
        "" => 1,
        "k" | "K" => 1_000,
        "m" | "M" => 1_000_000,
        "g" | "G" => 1_000_000_000,
        _ => return None,
    };
    Some(factor * bits)
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) = match self.0 {
            ..1_000 => (1, "bit/s"),
            1_000..1_000_000 => (1_000, "kbit/s"),
            1_000_000..1_000_000_000 => (1_000_000, "Mbit/s"),
            _ => (1_000_000_000, "Gbit/s"),
        };
        write!(f, "{}", self.0 / unit)?;
        let rest = self.0 % unit;
        if rest > 0 {
            let digits = format!("{:0width$}", rest, width = (unit.ilog10()) as usize);
            write!(f, ".{}", digits.trim_end_matches('0'))?;
        }
        write!(f, " {name}")
    }
}

/// What `len` bytes on a lane, written at once, are on the link: with the headers of the multiplexer, TLS, TCP and IP, about
/// 4 % more where they are many. What receipts take in the other direction is not counted: up to 2 %.
pub const fn wire_bytes(len: u64) -> u64 {
    let len = len + len.div_ceil(RECORD) * RECORD_HEADERS;
    len + len.div_ceil(SEGMENT) * SEGMENT_HEADERS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_in_their_units() {
        for (text, bits) in [
            ("5 Mbit/s", 5_000_000),
            ("5Mbit/s", 5_000_000),
            (" 600 kbit/s ", 600_000),
            ("600 KBIT/s", 600_000),
            ("64000 bit/s", 64_000),
            ("2 MB/s", 16_000_000),
            ("8000 B/s", 64_000),
            ("2.5 Gbit/s", 2_500_000_000),
            ("0.000000064 TB/s", 0),
            ("0.1000005 Mbit/s", 100_000),
            ("1000 Gbit/s", 1_000_000_000_000),
        ] {
            let read = text.parse::<Rate>();
            if bits == 0 {
                assert!(matches!(read, Err(RateError::Malformed(_))), "{text}");
            } else {
                assert_eq!(read, Ok(Rate(bits)), "{text}");
            }
        }
        assert_eq!(Rate::parse_cap(" Unlimited"), Ok(None));
        assert_eq!(Rate::parse_cap("64 kbit/s"), Ok(Some(Rate(64_000))));
    }

    #[test]
    fn what_is_no_rate_is_told_what_one_is() {
        for text in [
            "",
            "5",
            "Mbit/s",
            "5 Mb/s",
            "5 mbps",
            "-5 Mbit/s",
            "5,5 Mbit/s",
            "1e6 bit/s",
            "5..5 Mbit/s",
            ".5 Mbit/s",
            "5. Mbit/s",
            "5 é/s",
            "5 ébit/s",
            "0.1234567891 Mbit/s",
            "off",
        ] {
            let error = Rate::parse_cap(text).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("{text:?} is not a rate")) && error.contains("5 Mbit/s"),
                "{error}"
            );
        }
        let low = Rate::parse_cap("63.999 kbit/s").unwrap_err().to_string();
        assert!(
            low.starts_with("63.999 kbit/s is less than 64 kbit/s"),
            "{low}"
        );
        for text in ["0 bit/s", "0.5 bit/s"] {
            assert!(
                matches!(Rate::parse_cap(text), Err(RateError::TooLow(_))),
                "{text}"
            );
        }
        for text in ["1001 Gbit/s", "99999999999999999999 Gbit/s"] {
            assert_eq!(Rate::parse_cap(text), Err(RateError::TooHigh(text.into())));
        }
        let long = "9".repeat(10_000);
        assert!(Rate::parse_cap(&long).unwrap_err().to_string().len() < 300);
    }

    #[test]
    fn rates_are_written_as_they_are_read() {
        for text in [
            "64 kbit/s",
            "5 Mbit/s",
            "999.999999 Mbit/s",
            "2.5 Gbit/s",
            "1000 Gbit/s",
            "100.1 kbit/s",
        ] {
            assert_eq!(text.parse::<Rate>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn headers_are_a_few_percent_of_what_is_much() {
        let much = wire_bytes(1 << 20) as f64 / f64::from(1 << 20);
        assert!((1.035..1.045).contains(&much), "{much}");
        assert_eq!(wire_bytes(0), 0);
        assert_eq!(wire_bytes(10), 10 + 34 + 52);
    }
}
