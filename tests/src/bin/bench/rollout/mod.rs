//! `bench rollout`: scenarios of the lab, our nodes beside other tools on the same links, and what is to be reached.
//!
//! | module | what |
//! |---|---|
//! | `legs` | who carries a rollout, and how often |
//! | `crowd` | another tool's processes on the lab's nodes; `torrent`, `multicast`, `rsync`: the tools |
//! | `idle` | nodes that have nothing to do |
//! | `found`, `targets`, `table` | figures; what they are to reach; how people see both |
//!
//! A scenario that is added to `tests/scenarios` can be named at once; what it is to reach belongs into `targets`.

mod crowd;
mod found;
mod idle;
mod legs;
mod multicast;
mod rsync;
mod table;
mod targets;
mod torrent;

use std::path::{Path, PathBuf};

use anyhow::Result;
use capsule_tests::inside;
use capsule_tests::lab::Scenario;

use self::legs::Tool;
use crate::Setting;
use crate::report::{Report, Table};
use crate::tools::install;

/// Nodes that have nothing to do; and one scenario with several numbers of nodes.
const IDLE: &str = "idle";
const SWEEP: &str = "sweep";
/// What these are made of.
const IDLE_SCENARIO: &str = "idle-200";
const SWEEP_SCENARIO: &str = "equal-32";
/// Up to so many nodes a sweep has rsync beside ours.
const SWEEP_RSYNC: usize = 2;

/// What `bench rollout` is asked for.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only these: names in tests/scenarios without their ending, or TOML files; `sweep` for several numbers of nodes, `idle` for nodes
    /// that have nothing to do.
    #[arg(long, value_delimiter = ',', default_values_t = ["equal-32", "small-update", "sites-3x10", "slow-quarter", "adversity-32", "cap-upload", "cap-download", "cap-above", SWEEP, IDLE].map(String::from))]
    only: Vec<String>,
    /// Who carries the scenarios.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Tool::Capsule, Tool::Aria2, Tool::Transmission, Tool::Udpcast, Tool::Rsync])]
    tools: Vec<Tool>,
    /// Numbers of nodes that pull in a sweep.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16, 32, 64])]
    nodes: Vec<usize>,
    /// How many nodes are idle, where 200 are too many for the machine.
    #[arg(long)]
    idle_nodes: Option<usize>,
    /// How long idle nodes are watched.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=3600))]
    idle_seconds: u64,
}

/// What is to be measured.
enum Work {
    Scenario(String, Scenario),
    Sweep(Vec<(usize, Scenario)>),
    Idle(Scenario),
}

impl Options {
    /// Fails where scenarios are missing or wrong: before anything takes long.
    pub fn check(&self) -> Result<()> {
        self.work().map(drop)
    }

    /// Installs the other tools, as far as it can: those that are there are measured, the others' legs fail.
    pub fn install_tools(&self) {
        let needs: Vec<_> = self.tools.iter().flat_map(|tool| tool.needs()).collect();
        let needs: Vec<_> = needs.into_iter().copied().collect();
        if let Err(error) = install(&needs) {
            eprintln!("{error:#}");
        }
    }

    fn work(&self) -> Result<Vec<Work>> {
        let one = |name: &String| {
            Ok(match name.as_str() {
                SWEEP => {
                    let scenario = Scenario::read(&file(SWEEP_SCENARIO))?;
                    let with = |nodes: &usize| Ok((*nodes, scenario.with_nodes(*nodes)?));
                    Work::Sweep(self.nodes.iter().map(with).collect::<Result<_>>()?)
                }
                IDLE => {
                    let scenario = Scenario::read(&file(IDLE_SCENARIO))?;
                    Work::Idle(match self.idle_nodes {
                        Some(nodes) => Scenario {
                            title: format!("{nodes} idle nodes in one LAN"),
                            ..scenario.with_nodes(nodes.saturating_sub(1))?
                        },
                        None => scenario,
                    })
                }
                _ => {
                    let file = file(name);
                    let stem = file.file_stem().unwrap_or_default();
                    Work::Scenario(stem.to_string_lossy().into(), Scenario::read(&file)?)
                }
            })
        };
        self.only.iter().map(one).collect()
    }
}

/// The file of a scenario's name, or the file that is named.
fn file(name: &str) -> PathBuf {
    let path = Path::new(name);
    if path.extension().is_some() || path.components().count() > 1 {
        return path.into();
    }
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    dir.join(name).with_extension("toml")
}

/// Measures all that was asked for; homes and content lie in memory meanwhile.
pub fn run(setting: &Setting, options: &Options) -> Result<Report> {
    inside::mount_memory(&setting.scratch)?;
    let report = measure(setting, options);
    inside::unmount(&setting.scratch);
    report
}

fn measure(setting: &Setting, options: &Options) -> Result<Report> {
    let mut report = Report::new();
    let mut work = options.work()?.into_iter();
    while let Some(now) = work.next() {
        let table = now.measure(setting, options);
        let table = table.unwrap_or_else(|error| Table::failed(now.title(), &error));
        // It may take hours until all of it is told.
        if work.len() > 0 {
            eprintln!("{}", table.text());
        }
        report.tables.push(table);
    }
    Ok(report)
}

impl Work {
    fn title(&self) -> String {
        match self {
            Self::Scenario(_, scenario) | Self::Idle(scenario) => scenario.title.clone(),
            Self::Sweep(scenarios) => {
                let mib = scenarios.first().map_or(0.0, |(_, scenario)| scenario.mib);
                format!("one publisher and N equal nodes, {mib} MiB")
            }
        }
    }

    fn measure(&self, setting: &Setting, options: &Options) -> Result<Table> {
        match self {
            Self::Scenario(name, scenario) => {
                let legs = legs::compare(setting, scenario, &options.tools)?;
                let slower = legs::without_slower(setting, scenario, &options.tools)?;
                let caps = legs::without_caps(setting, scenario, &options.tools)?;
                let without = table::Without { slower, caps };
                Ok(table::scenario(name, scenario, &legs, &without))
            }
            Self::Sweep(scenarios) => {
                let mut numbers = vec![];
                for (nodes, scenario) in scenarios {
                    let beside = |tool: &&Tool| match tool {
                        Tool::Capsule => true,
                        Tool::Rsync => *nodes <= SWEEP_RSYNC,
                        _ => false,
                    };
                    let tools: Vec<Tool> = options.tools.iter().filter(beside).copied().collect();
                    let mut legs = legs::compare(setting, scenario, &tools)?;
                    for (_, series) in &mut legs {
                        series.name = format!("{}, N = {nodes}", series.name);
                    }
                    numbers.push(legs);
                }
                Ok(table::sweep(&self.title(), &numbers))
            }
            Self::Idle(scenario) => idle::run(setting, scenario, options.idle_seconds),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scenarios_are_named_or_files() {
        assert!(file("equal-32").ends_with("tests/scenarios/equal-32.toml"));
        assert_eq!(file("other.toml"), Path::new("other.toml"));
        assert_eq!(file("dir/other"), Path::new("dir/other"));
    }

    #[test]
    fn all_that_can_be_asked_for_by_name_is_there() {
        use clap::Parser;
        #[derive(Parser)]
        struct Args {
            #[command(flatten)]
            options: Options,
        }
        let work = Args::parse_from(["bench"]).options.work().unwrap();
        assert_eq!(work.len(), 10);
        let Work::Sweep(numbers) = &work[8] else {
            panic!("the last but one is the sweep");
        };
        assert_eq!(numbers.last().map(|(_, lab)| lab.nodes()), Some(65));
        let wrong = Args::parse_from(["bench", "--only", "nowhere"]).options;
        let error = format!("{:#}", wrong.check().unwrap_err());
        assert!(error.contains("nowhere.toml"), "{error}");
    }
}
