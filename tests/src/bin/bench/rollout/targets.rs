//! What rollouts are to reach, by scenario.

use super::found::Found;
use super::legs::{Legs, Tool};
use crate::report::{Limit, MIB, Target};
use crate::series::Series;

/// One figure of our own rollouts.
struct Goal {
    what: &'static str,
    figure: fn(&Found) -> f64,
    limit: Limit,
    unit: &'static str,
}

const LAST_AGAINST_BOUND: &str = "last node, speed against the bound";
/// A node's memory, in every scenario.
const MEMORY: Goal = Goal {
    what: "a node's memory",
    figure: |found| found.peak_bytes as f64 / MIB,
    limit: Limit::Below(128.0),
    unit: "MiB",
};
const EQUAL: &[Goal] = &[
    last_at_least(95.0),
    Goal {
        what: "p99 / p50",
        figure: Found::spread,
        limit: Limit::AtMost(1.1),
        unit: "",
    },
    Goal {
        what: "copies that the publisher sends",
        figure: |found| found.copies,
        limit: Limit::AtMost(1.1),
        unit: "",
    },
    Goal {
        what: "duplicates",
        figure: |found| 100.0 * found.duplicates.unwrap_or(f64::NAN),
        limit: Limit::Below(1.0),
        unit: "%",
    },
    Goal {
        what: "control traffic: bytes on interfaces beyond TCP's",
        figure: |found| 100.0 * found.beyond_tcp,
        limit: Limit::Below(1.0),
        unit: "%",
    },
    MEMORY,
];
const ADVERSITY: &[Goal] = &[last_at_least(70.0), MEMORY];
const SMALL: &[Goal] = &[last_at_least(80.0), MEMORY];
const SITES: &[Goal] = &[
    Goal {
        what: "copies into the site with the most, without headers",
        figure: Found::content_into_sites,
        limit: Limit::AtMost(1.03),
        unit: "",
    },
    Goal {
        what: "the same at the interface",
        figure: Found::interface_into_sites,
        limit: Limit::AtMost(1.08),
        unit: "",
    },
    Goal {
        what: "last node, speed against what the links are set to",
        figure: |found| 100.0 * found.part_of_nominal(),
        limit: Limit::AtLeast(90.0),
        unit: "%",
    },
    MEMORY,
];
const CAP: &[Goal] = &[
    Goal {
        what: "the window furthest from the cap, by which part of it",
        figure: |found| 100.0 * found.off_cap(),
        limit: Limit::AtMost(5.0),
        unit: "%",
    },
    MEMORY,
];
const ANY: &[Goal] = &[MEMORY];
/// The slowest number of nodes, by the fastest.
const SWEEP: f64 = 1.15;
/// Fast nodes beside slow ones, by the same without these.
const BESIDE_SLOWER: f64 = 1.1;
/// Nodes with a cap above their link, by the same without it.
const BESIDE_CAP: f64 = 1.02;

const fn last_at_least(percent: f64) -> Goal {
    Goal {
        what: LAST_AGAINST_BOUND,
        figure: |found| 100.0 * found.part_of_bound(),
        limit: Limit::AtLeast(percent),
        unit: "%",
    }
}

/// By the name of the scenario's file, without its ending.
fn goals(scenario: &str) -> &'static [Goal] {
    match scenario {
        "equal-32" => EQUAL,
        "small-update" => SMALL,
        "adversity-32" => ADVERSITY,
        "sites-3x10" => SITES,
        "cap-upload" | "cap-download" => CAP,
        _ => ANY,
    }
}

/// Our own figures, and how far the others are behind.
pub fn of(scenario: &str, legs: &Legs) -> Vec<Target> {
    let Some(ours) = leg(legs, Tool::Capsule) else {
        return vec![];
    };
    let own = goals(scenario).iter().map(|goal| Target {
        what: goal.what.into(),
        found: ours.median(goal.figure),
        limit: goal.limit,
        unit: goal.unit,
    });
    let others = legs.iter().filter(|(tool, _)| *tool != Tool::Capsule);
    let ahead = others.flat_map(|(_, theirs)| ahead_of(ours, theirs, Limit::Above(1.0)));
    own.chain(ahead).collect()
}

/// Of several numbers of nodes: how far apart they are, and from rsync where that was measured.
pub fn of_sweep(numbers: &[Legs]) -> Vec<Target> {
    let mut lasts = vec![];
    let mut targets = vec![];
    for legs in numbers {
        let Some(ours) = leg(legs, Tool::Capsule) else {
            continue;
        };
        lasts.push(ours.median(|found| found.times.last));
        if let Some(rsync) = leg(legs, Tool::Rsync) {
            let ahead = ahead_of(ours, rsync, Limit::AtLeast(1.0));
            targets.extend(ahead.into_iter().take(1));
        }
    }
    targets.insert(
        0,
        Target {
            what: "slowest number of nodes, by the fastest".into(),
            found: apart(&lasts),
            limit: Limit::AtMost(SWEEP),
            unit: "",
        },
    );
    targets
}

/// What a cap costs that is above the link.
pub fn beside_cap(legs: &Legs, without: &Series<Found>) -> Option<Target> {
    let what = "last node, by the same without the cap";
    beside(
        legs,
        |found| found.times.last,
        without,
        what,
        Limit::Below(BESIDE_CAP),
    )
}

/// What slower nodes cost the others.
pub fn beside_slower(legs: &Legs, without: &Series<Found>) -> Option<Target> {
    let what = "last of the fastest nodes, by the same without the slower";
    beside(
        legs,
        |found| found.fastest.last,
        without,
        what,
        Limit::AtMost(BESIDE_SLOWER),
    )
}

/// A figure of ours, by when the last node was done where something was left out.
fn beside(
    legs: &Legs,
    figure: fn(&Found) -> f64,
    without: &Series<Found>,
    what: &str,
    limit: Limit,
) -> Option<Target> {
    let with = leg(legs, Tool::Capsule)?.median(figure);
    let without = without.median(|found| found.times.last);
    Some(Target {
        what: what.into(),
        found: with.zip(without).map(|(with, without)| with / without),
        limit,
        unit: "",
    })
}

fn leg(legs: &Legs, wanted: Tool) -> Option<&Series<Found>> {
    let found = legs.iter().find(|(tool, _)| *tool == wanted);
    found.map(|(_, series)| series)
}

/// The largest by the smallest; none where one is missing, or there is nothing to compare.
fn apart(values: &[Option<f64>]) -> Option<f64> {
    let values: Option<Vec<f64>> = values.iter().copied().collect();
    let values = values.filter(|values| values.len() > 1)?;
    let most = values.iter().copied().max_by(f64::total_cmp)?;
    let least = values.iter().copied().min_by(f64::total_cmp)?;
    Some(most / least)
}

/// Last node and p50 of another tool, by ours: more than 1 where ours is ahead.
fn ahead_of(ours: &Series<Found>, theirs: &Series<Found>, limit: Limit) -> Vec<Target> {
    let ratio = |figure: fn(&Found) -> f64| Some(theirs.median(figure)? / ours.median(figure)?);
    let target = |what: &str, found| Target {
        what: format!("{what} of {}, by ours", theirs.name),
        found,
        limit,
        unit: "",
    };
    vec![
        target("last node", ratio(|found| found.times.last)),
        target("p50", ratio(|found| found.times.p50)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::found::tests::found;

    fn series(tool: Tool, runs: &[&[f64]]) -> (Tool, Series<Found>) {
        let mut series = Series::new(tool.name());
        for seconds in runs {
            series.measure("test", || Ok(found(seconds)));
        }
        (tool, series)
    }

    fn value(targets: &[Target], what: &str) -> f64 {
        let target = targets.iter().find(|target| target.what == what);
        target.and_then(|target| target.found).expect(what)
    }

    #[test]
    fn figures_stand_beside_their_targets() {
        let legs = vec![
            series(
                Tool::Capsule,
                &[&[40.0, 50.0], &[40.0, 44.0], &[42.0, 42.0]],
            ),
            series(Tool::Aria2, &[&[60.0, 88.0]]),
            series(Tool::Rsync, &[]),
        ];
        let targets = of("equal-32", &legs);
        // The median of 40/50, 40/44 and 40/42 of the bound.
        assert!((value(&targets, LAST_AGAINST_BOUND) - 100.0 * 40.0 / 44.0).abs() < 1e-9);
        assert_eq!(value(&targets, "last node of aria2, by ours"), 2.0);
        assert_eq!(value(&targets, "p50 of aria2, by ours"), 1.5);
        assert_eq!(value(&targets, "duplicates"), 0.5);
        let missing = targets.last().expect("there are some");
        assert_eq!(missing.what, "p50 of rsync, one server, by ours");
        assert_eq!(missing.found, None);
        // Without ours there is nothing to compare.
        assert!(of("equal-32", &vec![series(Tool::Aria2, &[&[1.0]])]).is_empty());
    }

    #[test]
    fn the_fastest_are_compared_with_themselves() {
        // The fastest is the first of them.
        let (_, without) = series(Tool::Capsule, &[&[38.0, 40.0]]);
        let legs = vec![series(Tool::Capsule, &[&[44.0, 90.0]])];
        let target = beside_slower(&legs, &without).expect("ours is there");
        assert_eq!(target.found, Some(1.1));
        let (_, failed) = series(Tool::Capsule, &[]);
        assert_eq!(beside_slower(&legs, &failed).and_then(|t| t.found), None);
    }

    #[test]
    fn a_sweep_is_as_wide_as_its_extremes() {
        let rows = vec![
            vec![
                series(Tool::Capsule, &[&[40.0]]),
                series(Tool::Rsync, &[&[50.0]]),
            ],
            vec![series(Tool::Capsule, &[&[42.0, 44.0]])],
        ];
        let targets = of_sweep(&rows);
        assert_eq!(
            value(&targets, "slowest number of nodes, by the fastest"),
            1.1
        );
        assert_eq!(
            value(&targets, "last node of rsync, one server, by ours"),
            1.25
        );
        assert_eq!(targets.len(), 2);
        // One that failed leaves no figure to be proud of.
        let mut failed = rows;
        failed.push(vec![series(Tool::Capsule, &[])]);
        assert_eq!(of_sweep(&failed)[0].found, None);
    }
}
