//! When the nodes of a rollout were done, in the figures that rollouts are compared by.

use serde::Serialize;

/// Seconds until part of the nodes were done; infinite where they were not.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Times {
    /// Half of them.
    pub p50: f64,
    /// 99 of 100.
    pub p99: f64,
    /// All.
    pub last: f64,
}

impl Times {
    /// Of the seconds of at least one node.
    ///
    /// # Panics
    /// Where there are none.
    pub fn of(mut seconds: Vec<f64>) -> Self {
        seconds.sort_by(f64::total_cmp);
        // The first by which so many of 100 were done.
        let by = |percent: usize| seconds[(seconds.len() * percent).div_ceil(100) - 1];
        Self {
            p50: by(50),
            p99: by(99),
            last: by(100),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_node_by_which_so_many_were_done() {
        let count = |nodes: u32| (1..=nodes).rev().map(f64::from).collect();
        let times = |p50, p99, last| Times { p50, p99, last };
        assert_eq!(Times::of(count(1)), times(1.0, 1.0, 1.0));
        assert_eq!(Times::of(count(3)), times(2.0, 3.0, 3.0));
        assert_eq!(Times::of(count(32)), times(16.0, 32.0, 32.0));
        assert_eq!(Times::of(count(200)), times(100.0, 198.0, 200.0));
        let mut one_failed = count(4);
        one_failed[0] = f64::INFINITY;
        assert_eq!(Times::of(one_failed).p50, 2.0);
    }
}
