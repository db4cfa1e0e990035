//! Who carries a rollout: our nodes, or another tool on the same links, one after the other in the same run.

use std::time::Duration;

use anyhow::{Context, Result};
use capsule_tests::data;
use capsule_tests::lab::{Lab, Scenario};

use super::crowd::Job;
use super::found::Found;
use super::{multicast, rsync, torrent};
use crate::Setting;
use crate::process::Deadline;
use crate::series::Series;
use crate::tools::bittorrent::Client;
use crate::tools::empty_dir;

/// A leg of another tool that takes longer is not measured again: it will not come out first.
const SLOW: Duration = Duration::from_secs(300);
/// How much longer than the least time a server may take that sends all of it to each, and how long whatever else it does.
const SERVER_FACTOR: f64 = 1.5;
const SERVER_EXTRA: Duration = Duration::from_secs(60);

/// Who carries it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Tool {
    /// Ours.
    Capsule,
    /// aria2, as a BitTorrent swarm.
    Aria2,
    /// transmission, as a BitTorrent swarm.
    Transmission,
    /// udpcast: multicast.
    Udpcast,
    /// rsync from one server.
    Rsync,
}

/// The legs of one scenario.
pub type Legs = Vec<(Tool, Series<Found>)>;

impl Tool {
    /// What the table calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Capsule => "capsule",
            Self::Aria2 => "aria2",
            Self::Transmission => "transmission",
            Self::Udpcast => "udpcast",
            Self::Rsync => "rsync, one server",
        }
    }

    /// Programs that it takes, and their Debian packages.
    pub const fn needs(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Capsule => &[],
            // transmission makes the torrents.
            Self::Aria2 => &[
                ("aria2c", "aria2"),
                ("transmission-create", "transmission-cli"),
            ],
            Self::Transmission => &[("transmission-cli", "transmission-cli")],
            Self::Udpcast => &[("udp-sender", "udpcast")],
            Self::Rsync => &[("rsync", "rsync")],
        }
    }

    /// Whether it can do anything in such a scenario.
    pub fn fits(self, scenario: &Scenario) -> bool {
        match self {
            Self::Capsule => true,
            // What goes wrong is done to our nodes alone.
            _ if !scenario.goes_well() || scenario.cap().is_some() => false,
            // Multicast does not leave its network.
            Self::Udpcast => scenario.sites.len() == 1,
            _ => true,
        }
    }

    fn series(self) -> Series<Found> {
        let series = Series::new(self.name());
        series.slow_from(if self == Self::Capsule {
            Duration::MAX
        } else {
            SLOW
        })
    }

    fn roll_out(self, setting: &Setting, lab: &Lab, run: u32) -> Result<Found> {
        let dir = setting.scratch.join("leg");
        empty_dir(&dir)?;
        if self == Self::Capsule {
            return Found::ours(lab, &lab.roll_out(&dir, run.into())?);
        }
        // The same content as ours.
        let source = setting.scratch.join("source/content");
        empty_dir(source.parent().context("it lies in a directory")?)?;
        data::noise_file(&source, run.into(), lab.scenario.bytes());
        let job = Job {
            lab,
            source: &source,
            dir: &dir,
            deadline: self.deadline(setting, lab),
        };
        job.make_places()?;
        match self {
            Self::Capsule => unreachable!("done above"),
            Self::Aria2 => torrent::roll_out(Client::Aria2, &job),
            Self::Transmission => torrent::roll_out(Client::Transmission, &job),
            Self::Udpcast => multicast::roll_out(&job),
            Self::Rsync => rsync::roll_out(&job),
        }
    }

    fn deadline(self, setting: &Setting, lab: &Lab) -> Deadline {
        let patience = lab.scenario.patience();
        setting.deadline_or(if self == Self::Rsync {
            SERVER_EXTRA + one_server(lab).mul_f64(SERVER_FACTOR)
        } else {
            patience
        })
    }
}

/// The least time in which one server sends all of it to each.
fn one_server(lab: &Lab) -> Duration {
    let scenario = &lab.scenario;
    let slowest = |site: usize, down: f64| scenario.nodes_of(site).len() as f64 / down;
    let sites = lab.measured.sites.iter().enumerate();
    let sites = sites.map(|(site, link)| slowest(site, link.down));
    let publisher = &lab.network.hosts[0];
    let own_link = (lab.network.hosts.len() - 1) as f64 * 8e-6 / publisher.rate.up;
    Duration::from_secs_f64(scenario.bytes() as f64 * sites.fold(own_link, f64::max))
}

/// Ours with slower nodes left out, where a scenario has some beside faster ones.
pub fn without_slower(
    setting: &Setting,
    scenario: &Scenario,
    tools: &[Tool],
) -> Result<Option<Series<Found>>> {
    let other = scenario.without_slower()?;
    ours_in(setting, other, tools, "capsule, without the slower")
}

/// Ours without caps, where a scenario has some that should cost nothing.
pub fn without_caps(
    setting: &Setting,
    scenario: &Scenario,
    tools: &[Tool],
) -> Result<Option<Series<Found>>> {
    ours_in(
        setting,
        scenario.without_caps(),
        tools,
        "capsule, without the cap",
    )
}

fn ours_in(
    setting: &Setting,
    scenario: Option<Scenario>,
    tools: &[Tool],
    name: &str,
) -> Result<Option<Series<Found>>> {
    let Some(scenario) = scenario.filter(|_| tools.contains(&Tool::Capsule)) else {
        return Ok(None);
    };
    let legs = compare(setting, &scenario, &[Tool::Capsule])?;
    let mut legs = legs.into_iter().map(|(_, series)| series);
    Ok(legs.next().map(|mut series| {
        series.name = name.into();
        series
    }))
}

/// Has each roll out, as often as asked for; the network is measured before each round.
pub fn compare(setting: &Setting, scenario: &Scenario, tools: &[Tool]) -> Result<Legs> {
    let tools = tools.iter().filter(|tool| tool.fits(scenario));
    let mut legs: Legs = tools.map(|tool| (*tool, tool.series())).collect();
    eprintln!("{}: setting up {} nodes", scenario.title, scenario.nodes());
    let mut lab = Lab::unmeasured(scenario.clone())?;
    for run in 1..=setting.runs {
        lab.measure()?;
        let label = format!("{}, run {run} of {}", scenario.title, setting.runs);
        for (tool, series) in &mut legs {
            series.measure(&label, || tool.roll_out(setting, &lab, run));
        }
    }
    empty_dir(&setting.scratch.join("leg"))?;
    Ok(legs)
}
