//! What one rollout came to, whoever carried it.

use anyhow::{Result, ensure};
use capsule_tests::lab::network::{Carried, Counters};
use capsule_tests::lab::{Lab, Outcome, Times, bound, goodput::Measured};
use serde::Serialize;

/// Figures of a rollout.
#[derive(Debug, Clone, Serialize)]
pub struct Found {
    /// When each node was done, by number.
    pub seconds: Vec<f64>,
    /// The same in short.
    #[serde(flatten)]
    pub times: Times,
    /// Of those whose links are as fast as any.
    pub fastest: Times,
    /// What each node has to receive.
    pub bytes: u64,
    /// The least possible by what TCP carried just before; and by what the links are set to.
    pub bound_seconds: f64,
    /// See `bound_seconds`.
    pub nominal_bound_seconds: f64,
    /// What the publisher sent, by what one node receives.
    pub copies: f64,
    /// What came twice, by all that came, where the tool tells.
    pub duplicates: Option<f64>,
    /// Bytes that came in on nodes' interfaces, beyond those of plain TCP with the same content.
    pub beyond_tcp: f64,
    /// Largest resident set of any node.
    pub peak_bytes: u64,
    /// CPU time of all nodes.
    pub cpu_seconds: f64,
    /// What part of the machine's CPU time was used meanwhile, by whomever.
    pub machine_busy: f64,
    /// What came into the sites other than the publisher's.
    pub links: Vec<Link>,
    /// Where there is a cap: what came in each window of ten seconds, by the cap.
    pub by_cap: Vec<f64>,
}

/// A site's link, inwards.
#[derive(Debug, Clone, Serialize)]
pub struct Link {
    site: String,
    /// Without headers, in copies of what one node receives.
    content_copies: f64,
    /// With all of them.
    interface_copies: f64,
}

/// What the processes of a tool used.
#[derive(Debug, Clone, Copy)]
pub struct Used {
    /// All of them.
    pub cpu_seconds: f64,
    /// The largest.
    pub peak_bytes: u64,
    /// See [`Found`].
    pub machine_busy: f64,
}

impl Found {
    /// Of our own honest nodes that have room, all of which must have come through it.
    pub fn ours(lab: &Lab, outcome: &Outcome) -> Result<Self> {
        let failures = outcome.failures();
        ensure!(failures.is_empty(), "{}", failures.join("; "));
        let summary = outcome.summary(lab);
        let pulls = lab.scenario.honest_pullers().into_iter();
        let used = Used {
            cpu_seconds: summary.cpu_seconds,
            peak_bytes: summary.peak_bytes,
            machine_busy: outcome.machine_busy,
        };
        let seconds = pulls.map(|node| outcome.nodes[node].went.seconds);
        let seconds = seconds.map(|at| at.unwrap_or(f64::INFINITY)).collect();
        Ok(Self {
            copies: summary.copies,
            duplicates: Some(summary.duplicates),
            beyond_tcp: summary.beyond_tcp,
            links: links(lab, outcome.bytes, &outcome.sites),
            by_cap: lab.scenario.cap().map_or_else(Vec::new, |cap| {
                outcome.windows.iter().map(|came| came / cap).collect()
            }),
            ..Self::timed(lab, outcome.bytes, seconds, used)
        })
    }

    /// Of another tool's: what it does not tell itself follows from what interfaces carried.
    pub fn others(
        lab: &Lab,
        bytes: u64,
        seconds: Vec<f64>,
        carried: &Counters,
        used: Used,
    ) -> Self {
        let came: u64 = carried.hosts[1..].iter().map(|host| host.down).sum();
        let needed = bytes as f64 * seconds.len() as f64 * lab.measured.overhead;
        Self {
            copies: carried.hosts[0].content_up() as f64 / bytes as f64,
            beyond_tcp: came as f64 / needed - 1.0,
            links: links(lab, bytes, &carried.sites),
            ..Self::timed(lab, bytes, seconds, used)
        }
    }

    fn timed(lab: &Lab, bytes: u64, seconds: Vec<f64>, used: Used) -> Self {
        let pullers = lab.scenario.honest_pullers();
        let home = lab.network.hosts[0].site;
        let least = |measured| bound::of(bytes, measured, home, &pullers);
        let fastest = lab.scenario.fastest();
        let fastest = pullers
            .iter()
            .zip(&seconds)
            .filter(|(node, _)| fastest.contains(node));
        Self {
            times: Times::of(seconds.clone()),
            fastest: Times::of(fastest.map(|(_, at)| *at).collect()),
            seconds,
            bytes,
            bound_seconds: least(&lab.measured),
            nominal_bound_seconds: least(&Measured::nominal(&lab.scenario)),
            copies: f64::NAN,
            duplicates: None,
            beyond_tcp: f64::NAN,
            peak_bytes: used.peak_bytes,
            cpu_seconds: used.cpu_seconds,
            machine_busy: used.machine_busy,
            links: vec![],
            by_cap: vec![],
        }
    }

    /// Of the speed that is possible by what TCP carried, what the last node saw.
    pub fn part_of_bound(&self) -> f64 {
        self.bound_seconds / self.times.last
    }

    /// The same by what the links are set to.
    pub fn part_of_nominal(&self) -> f64 {
        self.nominal_bound_seconds / self.times.last
    }

    /// How far the window is from the cap that is furthest from it, as a part of the cap; not known where no window was seen.
    pub fn off_cap(&self) -> f64 {
        let off = self.by_cap.iter().map(|part| (part - 1.0).abs());
        off.max_by(f64::total_cmp).unwrap_or(f64::NAN)
    }

    /// How far apart nodes are.
    pub fn spread(&self) -> f64 {
        self.times.p99 / self.times.p50
    }

    /// Copies that came into the site into which most came, without headers.
    pub fn content_into_sites(&self) -> f64 {
        let copies = self.links.iter().map(|link| link.content_copies);
        copies.fold(0.0, f64::max)
    }

    /// The same with headers.
    pub fn interface_into_sites(&self) -> f64 {
        let copies = self.links.iter().map(|link| link.interface_copies);
        copies.fold(0.0, f64::max)
    }
}

fn links(lab: &Lab, bytes: u64, carried: &[Carried]) -> Vec<Link> {
    let home = lab.network.hosts[0].site;
    let sites = lab.scenario.sites.iter().zip(carried).enumerate();
    let others = sites.filter(|(number, _)| *number != home);
    others
        .map(|(_, (site, carried))| Link {
            site: site.label.clone(),
            content_copies: carried.content_down() as f64 / bytes as f64,
            interface_copies: carried.down as f64 / bytes as f64,
        })
        .collect()
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A rollout with a bound of 40 s, whose nodes took so long.
    pub fn found(seconds: &[f64]) -> Found {
        let link = |content_copies, interface_copies| Link {
            site: "a".into(),
            content_copies,
            interface_copies,
        };
        Found {
            seconds: seconds.to_vec(),
            times: Times::of(seconds.to_vec()),
            fastest: Times::of(seconds[..1].to_vec()),
            bytes: 100,
            bound_seconds: 40.0,
            nominal_bound_seconds: 38.0,
            copies: 1.05,
            duplicates: Some(0.005),
            beyond_tcp: 0.01,
            peak_bytes: 64 << 20,
            cpu_seconds: 3.0,
            machine_busy: 0.5,
            links: vec![link(1.0, 1.07), link(1.02, 1.05)],
            by_cap: vec![1.01, 0.96, 1.03],
        }
    }

    #[test]
    fn figures_follow_from_times_and_links() {
        let found = found(&[30.0, 50.0, 40.0, 44.0]);
        assert_eq!(found.part_of_bound(), 0.8);
        assert_eq!(found.part_of_nominal(), 0.76);
        assert_eq!(found.spread(), 1.25);
        assert_eq!(found.content_into_sites(), 1.02);
        assert_eq!(found.interface_into_sites(), 1.07);
        assert!((found.off_cap() - 0.04).abs() < 1e-9);
    }
}
