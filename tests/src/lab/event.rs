//! What happens in a lab, as data, and in which order and to whom it does.

use std::time::Duration;

use anyhow::{Result, ensure};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use serde::Deserialize;

use super::scenario::Scenario;

/// Most events: each node can have its own.
const MAX_EVENTS: usize = 1000;

/// Something that happens.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    /// When, in seconds from the start of the pulls.
    pub at: f64,
    /// To each node at a time of its own until then, chosen by the seed, instead of at once.
    pub until: Option<f64>,
    /// What.
    #[serde(rename = "do")]
    pub deed: Deed,
    /// To which nodes, by number.
    #[serde(default)]
    pub nodes: Vec<usize>,
    /// Or to so many of the honest ones that pull, chosen by the seed: the same for all events of one share.
    pub share: Option<f64>,
    /// Or to a site, by label.
    pub site: Option<String>,
    /// Of a crash: how long the node is down, in seconds.
    pub lasts: Option<f64>,
}

/// What happens to nodes or to a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Deed {
    /// Nodes end without notice, as at a power cut.
    Kill,
    /// Killed nodes start again, and go on with the pull.
    Restart,
    /// Both: a node is killed, and starts again `lasts` seconds later.
    Crash,
    /// A node's cable, or a site's link, is out.
    Cut,
    /// It is back.
    Join,
    /// Nodes reach each other, and nobody else.
    Partition,
    /// They reach all again.
    Heal,
    /// The publisher is killed as soon as the others hold each chunk group of what it published, all together. Later events wait for
    /// that.
    PublisherLeaves,
}

/// Something that is to be done, and when.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Seconds from the start of the pulls.
    pub at: f64,
    /// What.
    pub deed: Deed,
    /// To whom.
    pub target: Target,
}

/// Whom a step concerns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Nodes by number.
    Nodes(Vec<usize>),
    /// A site's link.
    Site(usize),
}

impl Scenario {
    /// All that is to be done, in order.
    pub fn steps(&self) -> Result<Vec<Step>> {
        let mut steps = Vec::new();
        for event in &self.events {
            let step = |at, deed, target| Step { at, deed, target };
            if let Some(label) = &event.site {
                steps.push(step(event.at, event.deed, Target::Site(self.site(label)?)));
                continue;
            }
            let nodes = self.targets(event);
            let mut chance = SmallRng::seed_from_u64(self.seed);
            let times: Vec<(f64, Vec<usize>)> = match event.until {
                None => vec![(event.at, nodes)],
                Some(until) => (nodes.into_iter())
                    .map(|node| (chance.random_range(event.at..until), vec![node]))
                    .collect(),
            };
            for (at, nodes) in times {
                let target = Target::Nodes(nodes);
                if event.deed == Deed::Crash {
                    let back = at + event.lasts.unwrap_or(0.0);
                    steps.push(step(at, Deed::Kill, target.clone()));
                    steps.push(step(back, Deed::Restart, target));
                } else {
                    steps.push(step(at, event.deed, target));
                }
            }
        }
        steps.sort_by(|a, b| a.at.total_cmp(&b.at));
        Ok(steps)
    }

    /// Nodes that an event falls on.
    fn targets(&self, event: &Event) -> Vec<usize> {
        let Some(share) = event.share else {
            return event.nodes.clone();
        };
        let mut pullers = self.honest_pullers();
        pullers.shuffle(&mut SmallRng::seed_from_u64(self.seed));
        pullers.truncate((share * pullers.len() as f64).round() as usize);
        pullers
    }

    /// Checks all events.
    pub(super) fn check_events(&self) -> Result<()> {
        ensure!(
            self.events.len() <= MAX_EVENTS,
            "there are {} events: give at most {MAX_EVENTS}",
            self.events.len()
        );
        self.events
            .iter()
            .try_for_each(|event| self.check_event(event))
    }

    fn check_event(&self, event: &Event) -> Result<()> {
        let what = format!("the event at {} s", event.at);
        let (deed, times) = (event.deed, 0.0..self.give_up as f64);
        ensure!(
            times.contains(&event.at),
            "{what}: give a time from 0 to `give_up`"
        );
        ensure!(
            (event.until).is_none_or(|until| until > event.at && times.contains(&until)),
            "{what}: `until` is a later time, and before `give_up`"
        );
        ensure!(
            event.lasts.is_some() == (deed == Deed::Crash)
                && event.lasts.is_none_or(|lasts| times.contains(&lasts)),
            "{what}: a crash, and nothing else, `lasts` so many seconds"
        );
        let targets = [
            !event.nodes.is_empty(),
            event.share.is_some(),
            event.site.is_some(),
        ];
        let given = targets.into_iter().filter(|target| *target).count();
        if deed == Deed::PublisherLeaves {
            ensure!(
                given == 0 && event.until.is_none(),
                "{what}: it is about the publisher alone"
            );
            return Ok(());
        }
        ensure!(
            given == 1,
            "{what}: give one of `nodes`, `share` and `site`"
        );
        let honest = self.honest_pullers();
        ensure!(
            event.nodes.iter().all(|node| *node < self.nodes()),
            "{what}: there are only {} nodes, from 0 on",
            self.nodes()
        );
        ensure!(
            !matches!(deed, Deed::Kill | Deed::Restart | Deed::Crash)
                || event.nodes.iter().all(|node| honest.contains(node)),
            "{what}: it can only fall on nodes that pull, are not hostile and have room"
        );
        ensure!(
            event.share.is_none_or(|share| share > 0.0 && share <= 1.0),
            "{what}: a share is more than 0 and at most 1"
        );
        if let Some(label) = &event.site {
            ensure!(
                matches!(deed, Deed::Cut | Deed::Join)
                    && self.sites.len() > 1
                    && event.until.is_none(),
                "{what}: only the link of one of several sites can be cut and joined, at once"
            );
            self.site(label)?;
        }
        Ok(())
    }
}

impl Step {
    /// When, from the start of the pulls.
    pub fn after(&self) -> Duration {
        Duration::from_secs_f64(self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenario(events: &str) -> Result<Scenario> {
        let text = r#"
            title = "some"
            mib = 16
            [[sites]]
            label = "room"
            nodes = [{ count = 11, mbit = 20 }, { count = 2, mbit = 20, hostile = "stall" }, { count = 1, mbit = 20, disk_mib = 8 }]
        "#;
        Scenario::parse(&format!("{text}\n{events}"))
    }

    #[test]
    fn crashes_fall_at_times_of_the_seed_on_honest_nodes() {
        let event = "[[events]]\nat = 2\nuntil = 9\ndo = \"crash\"\nshare = 0.4\nlasts = 3";
        let steps = scenario(event).unwrap().steps().unwrap();
        assert_eq!(steps, scenario(event).unwrap().steps().unwrap());
        let (kills, restarts): (Vec<_>, Vec<_>) =
            steps.iter().partition(|step| step.deed == Deed::Kill);
        assert_eq!((kills.len(), restarts.len()), (4, 4));
        for (kill, restart) in kills.iter().zip(restarts) {
            assert_eq!(kill.target, restart.target);
            assert_eq!(kill.at + 3.0, restart.at);
            assert!((2.0..9.0).contains(&kill.at));
            let Target::Nodes(nodes) = &kill.target else {
                panic!("{kill:?}");
            };
            assert!((1..11).contains(&nodes[0]), "{kill:?}");
        }
        assert!(kills.windows(2).all(|two| two[0].at < two[1].at));
    }

    #[test]
    fn what_cannot_happen_is_refused() {
        for (event, told) in [
            ("at = 1\ndo = \"crash\"\nnodes = [1]", "`lasts`"),
            ("at = 1\ndo = \"kill\"\nnodes = [1]\nlasts = 2", "`lasts`"),
            ("at = 1\nuntil = 1\ndo = \"kill\"\nnodes = [1]", "`until`"),
            ("at = 1\ndo = \"kill\"\nnodes = [0]", "nodes that pull"),
            ("at = 1\ndo = \"kill\"\nnodes = [11]", "not hostile"),
            ("at = 1\ndo = \"kill\"\nnodes = [13]", "have room"),
            ("at = 1\ndo = \"publisher-leaves\"\nshare = 0.5", "alone"),
            ("at = 1\ndo = \"heal\"\nsite = \"room\"", "only the link"),
        ] {
            let error = scenario(&format!("[[events]]\n{event}")).unwrap_err();
            let text = format!("{error:#}");
            assert!(text.contains(told), "{event}: {text}");
        }
        assert!(scenario("[[events]]\nat = 1\ndo = \"partition\"\nnodes = [0, 3, 11]").is_ok());
    }
}
