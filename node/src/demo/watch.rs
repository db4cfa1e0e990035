//! Several nodes' progress at once, on standard error: a bar each on a terminal, else a line every few seconds for all.

use std::io::{self, IsTerminal};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use capsule_node::control::{Phase, Progress};
use indicatif::{MultiProgress, ProgressDrawTarget};

use crate::cli::format::{percent, rate, size};
use crate::cli::output::tell;
use crate::cli::progress::Bar;

/// Between lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(2);
/// Between drawings of the bars.
const DRAW_HZ: u8 = 10;

/// Shows work that several nodes do at once. Used by all their threads.
#[derive(Debug)]
pub struct Watch(Shown);

#[derive(Debug)]
enum Shown {
    Bars { all: MultiProgress, bars: Vec<Bar> },
    Lines(Mutex<Lines>),
    Nothing,
}

#[derive(Debug)]
struct Lines {
    latest: Vec<Option<Progress>>,
    finished: usize,
    last: Instant,
}

impl Watch {
    /// For nodes of these names. Without a terminal a program that asked for JSON is told nothing.
    pub fn new(names: &[String], json: bool) -> Self {
        Self(if io::stderr().is_terminal() {
            let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(DRAW_HZ));
            let wide = names.iter().map(String::len).max().unwrap_or(0);
            let bar = |name| Bar::among(&all, &format!("{name:<wide$}"));
            let bars = names.iter().map(bar).collect();
            Shown::Bars { all, bars }
        } else if json {
            Shown::Nothing
        } else {
            let latest = vec![None; names.len()];
            Shown::Lines(Mutex::new(Lines {
                latest,
                finished: 0,
                last: Instant::now(),
            }))
        })
    }

    /// Shows how far a node has come.
    pub fn progress(&self, node: usize, progress: Progress) {
        match &self.0 {
            Shown::Bars { bars, .. } => bars[node].update(&progress),
            Shown::Lines(lines) => {
                let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                lines.latest[node] = Some(progress);
                if lines.last.elapsed() >= LINE_EVERY {
                    lines.last = Instant::now();
                    tell(format_args!("           {}", lines.line()));
                }
            }
            Shown::Nothing => {}
        }
    }

    /// Shows that a node is done.
    pub fn finished(&self, node: usize, message: &str) {
        match &self.0 {
            Shown::Bars { bars, .. } => bars[node].finish(message),
            Shown::Lines(lines) => {
                lines
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .finished += 1
            }
            Shown::Nothing => {}
        }
    }

    /// Takes bars away; what was learnt follows as text.
    pub fn clear(&self) {
        if let Shown::Bars { all, .. } = &self.0 {
            // Fails only where the terminal has gone.
            let _ = all.clear();
        }
    }
}

impl Lines {
    /// The nodes' fetching as one: `2 of 7 nodes done  42 %  500 MiB of 1.17 GiB  93.0 MiB/s`.
    fn line(&self) -> String {
        let fetching = || {
            self.latest
                .iter()
                .flatten()
                .filter(|progress| progress.phase == Phase::Fetching)
        };
        let sum = |of: fn(&Progress) -> u64| fetching().map(of).sum::<u64>();
        let (done, total) = (
            sum(|progress| progress.done),
            sum(|progress| progress.total.unwrap_or(progress.done)),
        );
        let mut line = format!("{} of {} nodes done", self.finished, self.latest.len());
        if total > 0 {
            let speed = rate(sum(|progress| progress.rate), Duration::from_secs(1));
            line += &format!(
                "  {}  {} of {}  {speed}",
                percent(done, total),
                size(done),
                size(total)
            );
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_adds_up_the_nodes_that_fetch() {
        let progress = Progress {
            phase: Phase::Fetching,
            done: 1 << 20,
            total: Some(4 << 20),
            rate: 1 << 20,
            peers: 3,
            written: 0,
            what: None,
        };
        let checking = Progress {
            phase: Phase::Checking,
            ..progress.clone()
        };
        let latest = vec![Some(progress.clone()), None, Some(checking), Some(progress)];
        let lines = Lines {
            latest,
            finished: 1,
            last: Instant::now(),
        };
        assert_eq!(
            lines.line(),
            "1 of 4 nodes done  25 %  2.00 MiB of 8.00 MiB  2.00 MiB/s"
        );
    }
}
