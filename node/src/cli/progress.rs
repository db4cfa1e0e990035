//! How far long work has come, on standard error: a bar on a terminal, else a line every few seconds.
//!
//! What the figures mean is [`Progress`]'s; this only draws them.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use capsule_node::control::{Phase, Progress};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::format::{duration, percent, plural, rate, size};
use super::output::tell;
use super::style::printable;

/// Between lines where there is no terminal: logs stay short, and people see that it lives.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// Between drawings of a bar: smooth, and cheap beside the work.
const DRAW_HZ: u8 = 10;
/// Characters in a bar: leaves room for amounts, rate, peers and time left on a terminal of 80 columns.
const GAUGE: usize = 10;

/// Where progress goes.
#[derive(Debug)]
pub enum Display {
    /// A bar on a terminal.
    Bar(Bar),
    /// Lines in a log.
    Lines {
        /// When the last was written; the first comes after one pause.
        last: Instant,
    },
    /// Nowhere.
    Silent,
}

impl Display {
    /// What suits standard error. Without a terminal a program that asked for JSON is told nothing.
    pub fn stderr(json: bool) -> Self {
        if io::stderr().is_terminal() {
            Self::Bar(Bar::alone())
        } else if json {
            Self::Silent
        } else {
            Self::Lines {
                last: Instant::now(),
            }
        }
    }

    /// Shows how far the work has come.
    pub fn progress(&mut self, progress: &Progress) {
        match self {
            Self::Bar(bar) => bar.update(progress),
            Self::Lines { last } => {
                if last.elapsed() >= LINE_EVERY {
                    *last = Instant::now();
                    tell(line(progress));
                }
            }
            Self::Silent => {}
        }
    }

    /// Shows something that a person should know; always, even beside JSON.
    pub fn notice(&mut self, text: &str) {
        let text = format!("note: {}", printable(text));
        match self {
            Self::Bar(bar) => bar.0.suspend(|| tell(&text)),
            Self::Lines { .. } | Self::Silent => tell(&text),
        }
    }

    /// Takes the bar away: results follow.
    pub fn clear(&mut self) {
        if let Self::Bar(bar) = self {
            bar.0.finish_and_clear();
        }
    }
}

/// One bar, alone or among others.
#[derive(Debug, Clone)]
pub struct Bar(ProgressBar);

impl Bar {
    fn alone() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(DRAW_HZ));
        Self::styled(bar)
    }

    /// A bar with a label among others.
    pub fn among(bars: &MultiProgress, label: &str) -> Self {
        let bar = Self::styled(bars.add(ProgressBar::no_length()));
        bar.0.set_prefix(format!("{label}  "));
        bar
    }

    /// The whole line is text of ours, so that amounts, bar and rate are always drawn together; the spinner moves with
    /// each, so that people see that it lives.
    fn styled(bar: ProgressBar) -> Self {
        let style = ProgressStyle::with_template("{prefix}{spinner} {wide_msg}");
        // The template is a constant; the default is only for the type.
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        Self(bar)
    }

    /// Shows how far the work has come.
    pub fn update(&self, progress: &Progress) {
        self.0.set_message(drawn(progress));
        self.0.tick();
    }

    /// Leaves the bar full, with a last word.
    pub fn finish(&self, message: &str) {
        self.0.finish_with_message(gauge(1, 1) + " " + message);
    }
}

/// What a bar shows: `[====>     ] fetching  126 MiB of 300 MiB  93.0 MiB/s  5 peers  1.9 s left`.
fn drawn(progress: &Progress) -> String {
    match progress.total {
        Some(total) if total > 0 && progress.phase != Phase::Waiting => format!(
            "{} {}  {}",
            gauge(progress.done, total),
            phase(progress.phase),
            details(progress)
        ),
        _ => line(progress),
    }
}

/// `[====>     ]`
fn gauge(done: u64, total: u64) -> String {
    let filled = (u128::from(done.min(total)) * GAUGE as u128 / u128::from(total.max(1))) as usize;
    let head = if filled < GAUGE { ">" } else { "" };
    format!("[{:<GAUGE$}]", "=".repeat(filled) + head)
}

/// A line for a log: `fetching  42 %  126 MiB of 300 MiB  93.0 MiB/s  5 peers  1.9 s left`.
pub fn line(progress: &Progress) -> String {
    if let (Phase::Waiting, Some(what)) = (progress.phase, &progress.what) {
        return format!("waiting for {}", printable(what));
    }
    let share = progress
        .total
        .filter(|&total| total > 0)
        .map(|total| percent(progress.done, total) + "  ");
    format!(
        "{}  {}{}",
        phase(progress.phase),
        share.unwrap_or_default(),
        details(progress)
    )
}

/// Amounts, rate, peers and time left, as far as they are known; last what a narrow terminal may cut off.
fn details(progress: &Progress) -> String {
    let mut parts = Vec::new();
    match progress.total {
        Some(total) if total > 0 => {
            parts.push(format!("{} of {}", size(progress.done), size(total)))
        }
        _ if progress.done > 0 => parts.push(size(progress.done)),
        _ => {}
    }
    if progress.rate > 0 {
        parts.push(rate(progress.rate, Duration::from_secs(1)));
    }
    if progress.phase == Phase::Fetching {
        parts.push(plural(progress.peers as u64, "peer"));
    }
    if let Some(left) = time_left(progress) {
        parts.push(format!("{} left", duration(left)));
    }
    if progress.written > 0 {
        parts.push(format!("packed to {}", size(progress.written)));
    }
    if let Some(what) = &progress.what {
        parts.push(printable(what));
    }
    parts.join("  ")
}

/// At the present rate.
fn time_left(progress: &Progress) -> Option<Duration> {
    let left = progress
        .total?
        .checked_sub(progress.done)
        .filter(|&left| left > 0)?;
    let seconds = left as f64 / (progress.rate > 0).then_some(progress.rate)? as f64;
    Duration::try_from_secs_f64(seconds).ok()
}

const fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Waiting => "waiting",
        Phase::Scanning => "scanning",
        Phase::Publishing => "publishing",
        Phase::Planning => "planning",
        Phase::Fetching => "fetching",
        Phase::Checking => "checking",
        Phase::Exporting => "exporting",
        Phase::Verifying => "verifying",
        Phase::Repairing => "repairing",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_is_seen_on_80_columns() {
        let mut progress = Progress {
            phase: Phase::Fetching,
            done: 1001 << 20,
            total: Some(10_001 << 20),
            rate: 1001 << 20,
            peers: 24,
            written: 0,
            what: Some("a-channel-with-a-long-name:2026-11".into()),
        };
        let spinner = 2;
        for (phase, written) in [(Phase::Fetching, 0), (Phase::Publishing, 900 << 20)] {
            (progress.phase, progress.written) = (phase, written);
            let text = drawn(&progress);
            let left = text.find("s left").unwrap() + "s left".len();
            assert!(spinner + left <= 80, "{text}");
            assert!(text.starts_with("[=>        ] "), "{text}");
        }
    }

    #[test]
    fn a_line_tells_what_is_known() {
        let mut progress = Progress {
            phase: Phase::Fetching,
            done: 126 << 20,
            total: Some(300 << 20),
            rate: 93 << 20,
            peers: 5,
            written: 0,
            what: None,
        };
        assert_eq!(
            line(&progress),
            "fetching  42 %  126 MiB of 300 MiB  93.0 MiB/s  5 peers  1.9 s left"
        );
        progress = Progress {
            phase: Phase::Waiting,
            done: 0,
            total: None,
            rate: 0,
            peers: 0,
            ..progress
        };
        assert_eq!(line(&progress).trim_end(), "waiting");
        let news = Progress {
            what: Some("lab:1".into()),
            ..progress.clone()
        };
        assert_eq!(line(&news), "waiting for lab:1");
        progress = Progress {
            phase: Phase::Publishing,
            total: Some(0),
            written: 7 << 10,
            ..progress
        };
        assert_eq!(line(&progress), "publishing  packed to 7.00 KiB");
    }
}
