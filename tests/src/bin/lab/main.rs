//! Runs a lab's scenario: `cargo run --release -p capsule-tests --bin lab -- tests/scenarios/NAME.toml`.
//!
//! Takes root. It runs itself again in namespaces of its own, with which everything ends, however it does.

mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use capsule_tests::inside::{self, Network};
use capsule_tests::lab::{Lab, Scenario};
use capsule_tests::stop;
use clap::Parser;

/// Runs a scenario in a lab of network namespaces.
#[derive(Parser)]
struct Args {
    /// The scenario, a TOML file.
    scenario: PathBuf,
    /// How often; medians are told at the end.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// With so many nodes that pull, in a scenario of equal nodes.
    #[arg(long)]
    pullers: Option<usize>,
    /// Where what each node did is written, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let mut scenario = Scenario::read(&args.scenario)?;
    if let Some(pullers) = args.pullers {
        scenario = scenario.with_nodes(pullers)?;
    }
    if inside::network().is_none() {
        // Built before the network is gone.
        capsule_tests::binary::capsule();
        return inside::enter(Network::Own).map(ExitCode::from);
    }
    let dir = tempfile::tempdir().context("making a scratch directory")?;
    stop::with_what_started_it(dir.path())?;
    inside::mount_memory(dir.path())?;
    let all_done = run(&args, scenario, dir.path());
    inside::unmount(dir.path());
    Ok(if all_done? {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs the scenario as often as asked for; whether all nodes came through it.
fn run(args: &Args, scenario: Scenario, dir: &Path) -> Result<bool> {
    eprintln!("{}: setting up {} nodes", scenario.title, scenario.nodes());
    let lab = Lab::set_up(scenario)?;
    table::network(&lab);
    let mut outcomes = Vec::new();
    for run in 0..args.runs {
        let outcome = lab.roll_out(dir, run.into())?;
        table::run(&lab, run, &outcome);
        outcomes.push(outcome);
    }
    table::medians(&lab, &outcomes);
    if let Some(path) = &args.json {
        let text = serde_json::to_string(&outcomes)?;
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(outcomes.iter().all(|outcome| outcome.failures().is_empty()))
}
