//! Runs a lab's scenario: `cargo run --release -p capsule-tests --bin lab -- tests/scenarios/NAME.toml`.
//!
//! Takes root. It runs itself again in namespaces of its own, with which everything ends, however it does.

mod table;

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result};
use capsule_tests::lab::{Lab, Scenario, homes_in_memory};
use clap::Parser;

/// Tells the program that it is inside already.
const INSIDE: &str = "CAPSULE_LAB";

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
    if std::env::var_os(INSIDE).is_none() {
        // Built before the network is gone.
        capsule_tests::binary::capsule();
        return enter();
    }
    let dir = tempfile::tempdir().context("making a scratch directory")?;
    homes_in_memory(dir.path())?;
    eprintln!("{}: setting up {} nodes", scenario.title, scenario.nodes());
    let lab = Lab::set_up(scenario)?;
    table::network(&lab);
    let mut outcomes = Vec::new();
    for run in 0..args.runs {
        let outcome = lab.roll_out(dir.path(), run.into())?;
        table::run(&lab, run, &outcome);
        outcomes.push(outcome);
    }
    table::medians(&lab, &outcomes);
    if let Some(path) = &args.json {
        let text = serde_json::to_string(&outcomes)?;
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    let all_done = outcomes.iter().all(|outcome| outcome.failures().is_empty());
    Ok(if all_done {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs this program again inside.
fn enter() -> Result<ExitCode> {
    let mut inside = Command::new("unshare");
    inside.args([
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]);
    // Not `exec`: the first process of its namespace would be deaf to Ctrl-C.
    inside.args(["sh", "-c", "\"$0\" \"$@\"; exit $?"]);
    inside
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .stdin(Stdio::null());
    let status = inside.status().context("starting unshare (util-linux)")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.unwrap_or(1).into())
}
