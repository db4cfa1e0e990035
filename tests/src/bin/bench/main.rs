//! Benchmarks beside the tools that people would use instead: same data, same run, ratios.
//!
//! `cargo run --release -p capsule-tests --bin bench -- NAME`. Each prints a table and writes JSON. Needs root where other
//! tools are measured: it installs them, and puts all in a network namespace of its own.

mod idle;
mod measure;
mod pair;
mod publish;
mod report;
mod swarm;
mod tools;
mod tracker;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Capsule's benchmarks.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    bench: Bench,
    /// Where data and homes lie meanwhile; a temporary directory by default.
    #[arg(long, global = true)]
    dir: Option<PathBuf>,
    /// Where the JSON goes; `bench-NAME.json` in the working directory by default.
    #[arg(long, global = true)]
    json: Option<PathBuf>,
    /// How often each is measured; medians are printed.
    #[arg(long, global = true, default_value_t = 3)]
    runs: usize,
}

#[derive(Subcommand)]
enum Bench {
    /// One node pulls from one peer; beside a TCP copy, rsync, aria2 and transmission.
    Pair {
        /// Size of each data set, in MiB.
        #[arg(long, default_value_t = 2048)]
        mib: u64,
    },
    /// Publishing real files as a tree and as one tar; beside zstd and b3sum.
    Publish {
        /// Size of the data, in MiB.
        #[arg(long, default_value_t = 4096)]
        mib: u64,
    },
    /// One publisher and seven that pull at once.
    Swarm {
        /// Size of the data, in MiB.
        #[arg(long, default_value_t = 512)]
        mib: u64,
        /// How many pull.
        #[arg(long, default_value_t = 7)]
        pullers: usize,
    },
    /// Memory and CPU of a daemon that has nothing to do.
    Idle {
        /// How long to watch, in seconds.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
}

fn main() -> Result<()> {
    let args = Args::parse();
    let scratch = match &args.dir {
        Some(dir) => tempfile::tempdir_in(dir)?,
        None => tempfile::tempdir()?,
    };
    let (name, report) = match args.bench {
        Bench::Pair { mib } => ("pair", pair::run(scratch.path(), mib << 20, args.runs)?),
        Bench::Publish { mib } => (
            "publish",
            publish::run(scratch.path(), mib << 20, args.runs)?,
        ),
        Bench::Swarm { mib, pullers } => (
            "swarm",
            swarm::run(scratch.path(), mib << 20, pullers, args.runs)?,
        ),
        Bench::Idle { seconds } => ("idle", idle::run(scratch.path(), seconds)?),
    };
    report.print();
    let path = args
        .json
        .unwrap_or_else(|| format!("bench-{name}.json").into());
    report.write(&path)?;
    println!("\nwritten to {}", path.display());
    Ok(())
}
