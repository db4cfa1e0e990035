//! Ends of tokens as people write them: `30d`, `12h`, `2027-01-31`.

use thiserror::Error;

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// How long a token, and the credentials made with it, hold where nothing is said: a year, as machines that nobody looks
/// after should not drop out after a month.
pub const DEFAULT_EXPIRY: u64 = 365 * DAY;

/// Text that is no end.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ExpiryError {
    /// Neither a span nor a date.
    #[error("{0:?} is no time: write 90m, 12h, 30d, 8w, 2y, or a date such as 2027-01-31")]
    Malformed(String),
    /// A date that has passed, or a span of nothing.
    #[error("{0:?} is not in the future")]
    Past(String),
}

/// When something ends, in seconds since 1970: a span from `now`, or the start of a day (UTC).
pub fn parse_expiry(text: &str, now: u64) -> Result<u64, ExpiryError> {
    let text = text.trim();
    let malformed = || ExpiryError::Malformed(text.chars().take(40).collect());
    let end = match text.split_once('-') {
        Some(_) => date(text).ok_or_else(malformed)?,
        None => now.saturating_add(span(text).ok_or_else(malformed)?),
    };
    if end <= now {
        Err(ExpiryError::Past(text.into()))
    } else {
        Ok(end)
    }
}

fn span(text: &str) -> Option<u64> {
    let unit = match text.chars().last()? {
        's' => 1,
        'm' => MINUTE,
        'h' => HOUR,
        'd' => DAY,
        'w' => 7 * DAY,
        'y' => 365 * DAY,
        _ => return None,
    };
    text[..text.len() - 1]
        .parse::<u32>()
        .ok()
        .map(|count| u64::from(count) * unit)
}

fn date(text: &str) -> Option<u64> {
    let mut parts = text.split('-');
    let (year, month, day) = (
        parts.next()?.parse().ok()?,
        parts.next()?.parse().ok()?,
        parts.next()?.parse().ok()?,
    );
    let fine = parts.next().is_none() && (1970..10000).contains(&year) && (1..=12).contains(&month);
    (fine && (1..=days_in(year, month)).contains(&day)).then(|| days_before(year, month, day) * DAY)
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_in(year: u64, month: u64) -> u64 {
    match month {
        2 => 28 + u64::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to a date.
fn days_before(year: u64, month: u64, day: u64) -> u64 {
    let years: u64 = (1970..year)
        .map(|year| 365 + u64::from(is_leap(year)))
        .sum();
    years + (1..month).map(|month| days_in(year, month)).sum::<u64>() + day - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_and_dates() {
        assert_eq!(parse_expiry("90m", 1000), Ok(1000 + 5400));
        assert_eq!(parse_expiry("30d", 0), Ok(30 * DAY));
        assert_eq!(parse_expiry("1970-01-02", 0), Ok(DAY));
        // By `date -u -d 2028-03-01 +%s`.
        assert_eq!(parse_expiry("2028-03-01", 0), Ok(1_835_481_600));
        assert_eq!(parse_expiry("2028-02-29", 0), Ok(1_835_395_200));
        for bad in [
            "",
            "d",
            "-1d",
            "3",
            "3x",
            "1.5h",
            "2027-02-29",
            "2027-13-01",
            "2027-1",
            "2027-01-01-01",
            "é",
        ] {
            assert!(
                matches!(parse_expiry(bad, 0), Err(ExpiryError::Malformed(_))),
                "{bad}"
            );
        }
        assert!(matches!(parse_expiry("0h", 5), Err(ExpiryError::Past(_))));
        assert!(matches!(
            parse_expiry("2020-01-01", 1_800_000_000),
            Err(ExpiryError::Past(_))
        ));
    }
}
