//! Quantities as people write and read them: sizes, rates, durations, dates, hashes.
//!
//! Pure functions; the clock and the terminal are elsewhere. What `--json` prints never passes through here: it has
//! bytes, seconds and whole hashes.

use std::time::Duration;

const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// Bytes with three significant digits in binary units: `17 B`, `1.50 KiB`, `300 MiB`.
pub fn size(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // 1023.5 would print as "1024" of the smaller unit.
    while value >= 1023.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", three_digits(value), UNITS[unit])
}

/// Bytes in a time as a rate: `93.1 MiB/s`; `-` when no time has passed.
pub fn rate(bytes: u64, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64();
    if seconds <= 0.0 {
        return "-".to_owned();
    }
    format!("{}/s", size((bytes as f64 / seconds) as u64))
}

fn three_digits(value: f64) -> String {
    let decimals = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.decimals$}")
}

/// A duration in its two largest units: `84 ms`, `1.8 s`, `12 s`, `3 min 05 s`, `2 h 14 min`, `3 d 4 h`.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if duration < Duration::from_secs(1) {
        return format!("{} ms", duration.as_millis());
    }
    if duration < Duration::from_millis(9950) {
        return format!("{:.1} s", duration.as_secs_f64());
    }
    match seconds {
        0..MINUTE => format!("{seconds} s"),
        MINUTE..HOUR => format!("{} min {:02} s", seconds / MINUTE, seconds % MINUTE),
        HOUR..DAY => format!("{} h {:02} min", seconds / HOUR, seconds % HOUR / MINUTE),
        _ => format!("{} d {} h", seconds / DAY, seconds % DAY / HOUR),
    }
}

/// Seconds since 1970 as a UTC date: `2026-11-22 21:03`.
pub fn date(unix: u64) -> String {
    let (year, month, day) = civil(unix / DAY);
    let (hour, minute) = (unix % DAY / HOUR, unix % HOUR / MINUTE);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}")
}

/// Year, month and day of a count of days since 1970-01-01, in the proleptic Gregorian calendar.
///
/// Years are counted from 1 March, so that the leap day comes last and months have a closed form
/// (H. Hinnant, "chrono-compatible low-level date algorithms").
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // from 0000-03-01
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

/// How long ago something was, in its largest unit: `just now`, `5 min ago`, `3 days ago`; later is `just now` too.
pub fn ago(then: u64, now: u64) -> String {
    let seconds = now.saturating_sub(then);
    match seconds {
        0..10 => "just now".to_owned(),
        10..MINUTE => format!("{seconds} s ago"),
        MINUTE..HOUR => format!("{} min ago", seconds / MINUTE),
        HOUR..DAY => format!("{} h ago", seconds / HOUR),
        _ => plural(seconds / DAY, "day") + " ago",
    }
}

/// A count with its noun: `1 file`, `12 files`.
pub fn plural(count: u64, noun: &str) -> String {
    match (count, noun.strip_suffix('y')) {
        (1, _) => format!("1 {noun}"),
        (_, Some(stem)) if !noun.ends_with("ay") => format!("{count} {stem}ies"),
        _ => format!("{count} {noun}s"),
    }
}

/// A part of a whole: `42 %`; 100 only when nothing is missing.
pub fn percent(part: u64, whole: u64) -> String {
    if whole == 0 || part >= whole {
        return "100 %".to_owned();
    }
    let percent = (u128::from(part) * 100 / u128::from(whole)).min(99);
    format!("{percent} %")
}

/// The first characters of a hash or id, enough to tell a fleet's objects apart.
pub fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

/// Reads a size: bytes, or a number with `K`, `M`, `G` or `T` (binary, also as `MiB`): `300M`, `1.5GiB`.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => {
            return Err(format!(
                "{text:?} is not a size: write bytes or a binary unit, such as 300M or 2GiB"
            ));
        }
    };
    let wrong = || format!("{text:?} is not a size: write a number such as 300M or 2GiB");
    // Whole numbers exactly; fractions are for people and may round.
    if let Ok(whole) = number.parse::<u64>() {
        return whole
            .checked_mul(1 << shift)
            .ok_or_else(|| format!("{text:?} is larger than any file can be"));
    }
    let value: f64 = number.parse().map_err(|_| wrong())?;
    let bytes = value * (1_u64 << shift) as f64;
    if bytes >= u64::MAX as f64 {
        return Err(format!("{text:?} is larger than any file can be"));
    }
    Ok(bytes as u64)
}

/// Reads a duration: a number with `s`, `m`, `h`, `d`, `w` or `y`: `30d`, `12h`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || {
        format!("{text:?} is not a duration: write a number with s, m, h, d, w or y, such as 30d")
    };
    let unit = text.chars().next_back().ok_or_else(wrong)?;
    let scale = match unit {
        's' => 1,
        'm' => MINUTE,
        'h' => HOUR,
        'd' => DAY,
        'w' => 7 * DAY,
        'y' => 365 * DAY,
        _ => return Err(wrong()),
    };
    let count: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    match count.checked_mul(scale) {
        Some(0) => Err(format!(
            "{text:?} is over before it begins: write at least 1s"
        )),
        // What is later than any certificate is better said than wrapped around.
        Some(seconds) if seconds <= 100 * 365 * DAY => Ok(Duration::from_secs(seconds)),
        _ => Err(format!("{text:?} is longer than 100y")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits_and_never_1024_of_a_unit() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
            (10 << 10, "10.0 KiB"),
            ((1 << 20) - 1, "1.00 MiB"),
            (300 << 20, "300 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn durations_show_two_units() {
        for (millis, text) in [
            (0, "0 ms"),
            (999, "999 ms"),
            (1_840, "1.8 s"),
            (9_949, "9.9 s"),
            (9_999, "9 s"),
            (59_999, "59 s"),
            (185_000, "3 min 05 s"),
            (8_040_000, "2 h 14 min"),
            (273_600_000, "3 d 4 h"),
        ] {
            assert_eq!(duration(Duration::from_millis(millis)), text, "{millis}");
        }
    }

    #[test]
    fn dates_agree_with_the_calendar() {
        for (unix, text) in [
            (0, "1970-01-01 00:00"),
            (951_782_400, "2000-02-29 00:00"),
            (1_767_225_599, "2025-12-31 23:59"),
            (1_795_381_380, "2026-11-22 21:03"),
            (4_107_542_400, "2100-03-01 00:00"),
        ] {
            assert_eq!(date(unix), text);
        }
    }

    #[test]
    fn sizes_and_durations_are_read_as_they_are_written() {
        assert_eq!(parse_size("300M"), Ok(300 << 20));
        assert_eq!(parse_size("1.5 GiB"), Ok(3 << 29));
        assert_eq!(parse_size("17"), Ok(17));
        for bad in [
            "",
            "M",
            "-1",
            "3X",
            "1..2K",
            "99999999T",
            "20000000000000000000",
        ] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_duration("30d"), Ok(Duration::from_secs(30 * DAY)));
        for bad in [
            "",
            "d",
            "30",
            "0d",
            "1.5h",
            "101y",
            "99999999999999999999s",
            "3é",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn parts_and_counts() {
        assert_eq!(percent(999, 1000), "99 %");
        assert_eq!(percent(0, 0), "100 %");
        assert_eq!(plural(1, "copy"), "1 copy");
        assert_eq!(plural(2, "copy"), "2 copies");
        assert_eq!(plural(3, "day") + " ago", ago(0, 3 * DAY + 5));
    }
}
