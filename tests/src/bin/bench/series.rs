//! What is measured several times: legs. One that fails is told in the table; the others go on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use serde::Serialize;

/// A leg that takes longer than this is not measured again: it will not come out first.
const SLOW: Duration = Duration::from_secs(60);

/// The runs of one leg.
#[derive(Debug)]
pub struct Series<T> {
    /// Its name in the table.
    pub name: String,
    /// What each run that succeeded found.
    pub runs: Vec<T>,
    /// Why it was given up.
    pub failed: Option<String>,
    slow_from: Duration,
    slow: bool,
}

impl<T: Serialize> Series<T> {
    /// No run yet.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            runs: vec![],
            failed: None,
            slow_from: SLOW,
            slow: false,
        }
    }

    /// The same, measured only once if it takes so long, and not a minute.
    pub fn slow_from(self, slow_from: Duration) -> Self {
        Self { slow_from, ..self }
    }

    /// Whether it is measured no more: it failed, or is so slow that once is enough.
    pub fn is_over(&self) -> bool {
        self.failed.is_some() || self.slow
    }

    /// Measures once more, telling so on standard error; does nothing where it is over.
    pub fn measure(&mut self, what: &str, leg: impl FnOnce() -> Result<T>) {
        if self.is_over() {
            return;
        }
        eprintln!("{what}: {} ...", self.name);
        let started = Instant::now();
        // Fleets of the tests panic where something fails.
        let outcome = catch_unwind(AssertUnwindSafe(leg))
            .unwrap_or_else(|panic| Err(anyhow!("{}", message(panic.as_ref()))));
        match outcome {
            Ok(found) => {
                eprintln!(
                    "{what}: {} done in {:.1} s with preparations",
                    self.name,
                    started.elapsed().as_secs_f64()
                );
                self.runs.push(found);
                self.slow = started.elapsed() > self.slow_from;
            }
            Err(error) => {
                eprintln!("{what}: {} failed: {error:#}", self.name);
                self.failed = Some(format!("{error:#}"));
            }
        }
    }

    /// The median of a figure; none without runs.
    pub fn median(&self, figure: impl Fn(&T) -> f64) -> Option<f64> {
        median(self.runs.iter().map(figure).collect())
    }

    /// The largest of a figure; none without runs.
    pub fn most(&self, figure: impl Fn(&T) -> f64) -> Option<f64> {
        self.runs.iter().map(figure).max_by(f64::total_cmp)
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without words")
        .to_owned()
}

/// The middle one, or the mean of the two in the middle.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.len().checked_sub(1)? / 2, values.len() / 2);
    Some((values.get(low)? + values.get(high)?) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leg_that_fails_or_panics_is_told_and_not_tried_again() {
        let mut series = Series::<f64>::new("leg");
        series.measure("test", || Ok(2.0));
        series.measure("test", || panic!("the {} broke", "node"));
        series.measure("test", || Ok(3.0));
        assert_eq!(series.runs, [2.0]);
        assert_eq!(series.failed.as_deref(), Some("the node broke"));
        let mut series = Series::<f64>::new("leg");
        series.measure("test", || Err(anyhow!("inner").context("outer")));
        assert_eq!(series.failed.as_deref(), Some("outer: inner"));
        assert!(series.median(|&run| run).is_none() && series.is_over());
    }

    #[test]
    fn a_leg_that_is_slow_is_measured_once() {
        let mut slow = Series::<f64>::new("leg").slow_from(Duration::ZERO);
        slow.measure("test", || Ok(1.0));
        slow.measure("test", || Ok(2.0));
        assert_eq!(slow.runs, [1.0]);
    }

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
