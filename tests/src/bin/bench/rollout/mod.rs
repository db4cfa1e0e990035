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
use crate::report::Report;
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
    #[arg(long, value_delimiter = ',', default_values_t = ["equal-32", "small-update", "sites-3x10", SWEEP, IDLE].map(String::from))]
    only: Vec<String>,
    /// Who carries the scenarios.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Tool::Capsule, Tool::Aria2, Tool::Transmission, Tool::Udpcast, Tool::Rsync])]
    tools: Vec<Tool>,
    /// Numbers of nodes that pull in a sweep.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16, 32, 64])]
    nodes: Vec<usize>,
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
                IDLE => Work::Idle(Scenario::read(&file(IDLE_SCENARIO))?),
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
    for work in options.work()? {
        match work {
            Work::Scenario(name, scenario) => {
                let legs = legs::compare(setting, &scenario, &options.tools)?;
                let without = legs::without_slower(setting, &scenario, &options.tools)?;
                let without = without.as_ref();
                let table = table::scenario(&name, &scenario, &legs, without);
                report.tables.push(table);
            }
            Work::Sweep(scenarios) => {
                let mut numbers = vec![];
                for (nodes, scenario) in scenarios {
                    let beside = |tool: &Tool| {
                        *tool == Tool::Capsule || *tool == Tool::Rsync && nodes <= SWEEP_RSYNC
                    };
                    let tools: Vec<Tool> = options.tools.iter().copied().filter(beside).collect();
                    let mut legs = legs::compare(setting, &scenario, &tools)?;
                    for (_, series) in &mut legs {
                        series.name = format!("{}, N = {nodes}", series.name);
                    }
                    numbers.push((nodes, legs));
                }
                let title = "one publisher and N nodes on equal links, 96 MiB";
                report.tables.push(table::sweep(title, &numbers));
            }
            Work::Idle(scenario) => {
                idle::run(setting, &scenario, options.idle_seconds, &mut report)?;
            }
        }
        // What was found so far is seen even where the rest fails.
        if let Some(table) = report.tables.last() {
            eprintln!("{}", table.text());
        }
    }
    Ok(report)
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
        assert_eq!(work.len(), 5);
        let Work::Sweep(numbers) = &work[3] else {
            panic!("the fourth is the sweep");
        };
        assert_eq!(numbers.last().map(|(_, lab)| lab.nodes()), Some(65));
        let wrong = Args::parse_from(["bench", "--only", "nowhere"]).options;
        let error = format!("{:#}", wrong.check().unwrap_err());
        assert!(error.contains("nowhere.toml"), "{error}");
    }
}
