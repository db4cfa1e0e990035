//! Benchmarks beside the tools that people would use instead: same data, same run, ratios.
//!
//! `cargo run --release -p capsule-tests --bin bench -- NAME`. Each prints a table and writes JSON, with figures as numbers in
//! plain units and every run's raw figures. `pair` and `rollout` need root: they install the other tools, and put all in namespaces of their own.

mod capsule;
mod delta;
mod files;
mod flow;
mod idle;
mod machine;
mod measure;
mod memory;
mod pair;
mod process;
mod publish;
mod report;
mod rollout;
mod series;
mod swarm;
mod tools;
mod transfer;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use capsule_tests::inside::{self, Network};
use capsule_tests::stop;
use clap::{Parser, Subcommand};

use crate::process::Deadline;
use crate::report::MIB;

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
    #[arg(long, global = true, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// How many seconds a leg may take; by default a minute and what the data takes at 4 MiB/s.
    #[arg(long, global = true)]
    deadline: Option<u64>,
}

#[derive(Subcommand)]
enum Bench {
    /// One node pulls from one peer; beside a TCP copy, rsync and BitTorrent clients.
    Pair(pair::Options),
    /// Publishing real files as a tree and as one tar; beside zstd and b3sum.
    Publish {
        /// Size of the data, in MiB.
        #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u64).range(1..))]
        mib: u64,
    },
    /// One publisher and several that pull at once.
    Swarm {
        /// Size of the data, in MiB.
        #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..))]
        mib: u64,
        /// How many pull.
        #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u64).range(1..=100))]
        pullers: u64,
    },
    /// Memory and CPU of a daemon that has nothing to do.
    Idle {
        /// How long to watch, in seconds.
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
        seconds: u64,
    },
    /// Scenarios of the lab: fleets on shaped links; beside aria2, transmission, udpcast and rsync, and with what is to be reached.
    Rollout(rollout::Options),
    /// Updates of systems made of Debian packages; beside casync, rsync, xdelta3, zstd, zchunk, OSTree and the packages themselves.
    Delta(delta::Options),
    /// Machines that move over a link of 384 kbit/s, on a Debian guest; beside what the paper reached.
    Machine(machine::Options),
    /// The sending end of the plain TCP copy.
    #[command(hide = true)]
    TcpSend { listen: SocketAddr, file: PathBuf },
    /// The receiving end of the plain TCP copy.
    #[command(hide = true)]
    TcpReceive { from: SocketAddr, file: PathBuf },
}

/// What all benchmarks need to know.
#[derive(Debug)]
pub struct Setting {
    /// A directory of their own.
    pub scratch: PathBuf,
    /// How often each leg is measured.
    pub runs: u32,
    deadline: Option<Duration>,
}

impl Setting {
    /// When a leg that moves so many bytes has to be done, if it begins now.
    pub fn deadline(&self, bytes: u64) -> Deadline {
        let default = 60.0 + bytes as f64 / (4.0 * MIB);
        self.deadline_or(Duration::from_secs_f64(default))
    }

    /// The same, but never longer than so; a deadline that was asked for holds.
    pub fn deadline_within(&self, bytes: u64, longest: Duration) -> Deadline {
        let default = Duration::from_secs_f64(60.0 + bytes as f64 / (4.0 * MIB));
        self.deadline_or(default.min(longest))
    }

    /// That long from now, if no other deadline was asked for.
    pub fn deadline_or(&self, span: Duration) -> Deadline {
        Deadline::after(self.deadline.unwrap_or(span))
    }

    /// Fails where the scratch directory's file system has less room.
    pub fn need_room(&self, bytes: u64) -> Result<()> {
        let file_system = rustix::fs::statvfs(&self.scratch)?;
        let free = file_system.f_bavail * file_system.f_frsize;
        ensure!(
            free >= bytes,
            "{} has {:.0} MiB free, this needs {:.0}: give another directory with --dir, or less data with --mib",
            self.scratch.display(),
            free as f64 / MIB,
            bytes as f64 / MIB
        );
        Ok(())
    }
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    match &args.bench {
        Bench::TcpSend { listen, file } => {
            return tools::tcp::send(*listen, file).map(|()| ExitCode::SUCCESS);
        }
        Bench::TcpReceive { from, file } => {
            return tools::tcp::receive(*from, file).map(|()| ExitCode::SUCCESS);
        }
        Bench::Pair(_) if inside::network().is_none() => {
            // Built before the network is gone.
            capsule_tests::binary::capsule();
            pair::install_tools();
            return inside::enter(Network::Own).map(ExitCode::from);
        }
        Bench::Rollout(options) if inside::network().is_none() => {
            options.check()?;
            capsule_tests::binary::capsule();
            options.install_tools();
            return inside::enter(Network::Own).map(ExitCode::from);
        }
        Bench::Delta(options) if inside::network().is_none() => {
            capsule_tests::binary::capsule();
            delta::install_tools();
            let code = if options.must_build()? {
                inside::enter(Network::Machine)?
            } else {
                0
            };
            if code != 0 || options.is_build_only() {
                return Ok(code.into());
            }
            return inside::enter(Network::Own).map(ExitCode::from);
        }
        Bench::Machine(options) if inside::network().is_none() => {
            capsule_tests::binary::capsule();
            machine::install_tools();
            let code = if options.must_build()? {
                inside::enter(Network::Machine)?
            } else {
                0
            };
            if code != 0 || options.is_build_only() {
                return Ok(code.into());
            }
            return inside::enter(Network::Own).map(ExitCode::from);
        }
        _ => {}
    }
    let scratch = match &args.dir {
        Some(dir) => tempfile::tempdir_in(dir),
        None => tempfile::tempdir(),
    };
    let scratch = scratch.context("making a scratch directory")?;
    // The homes of fleets lie in it too.
    tempfile::env::override_temp_dir(scratch.path())
        .map_err(|dir| anyhow!("temporary files go to {} already", dir.display()))?;
    stop::with_what_started_it(scratch.path())?;
    if let Bench::Delta(options) = &args.bench
        && inside::network() == Some(Network::Machine)
    {
        return options.build().map(|()| ExitCode::SUCCESS);
    }
    if let Bench::Machine(options) = &args.bench
        && inside::network() == Some(Network::Machine)
    {
        return options.build().map(|()| ExitCode::SUCCESS);
    }
    let setting = Setting {
        scratch: scratch.path().to_owned(),
        runs: args.runs,
        deadline: args.deadline.map(Duration::from_secs),
    };
    let (name, report) = match args.bench {
        Bench::Pair(options) => ("pair", pair::run(&setting, &options)?),
        Bench::Publish { mib } => ("publish", publish::run(&setting, mib << 20)?),
        Bench::Swarm { mib, pullers } => {
            ("swarm", swarm::run(&setting, mib << 20, pullers as usize)?)
        }
        Bench::Idle { seconds } => ("idle", idle::run(&setting, seconds)?),
        Bench::Rollout(options) => ("rollout", rollout::run(&setting, &options)?),
        Bench::Delta(options) => ("delta", delta::run(&setting, &options)?),
        Bench::Machine(options) => ("machine", machine::run(&setting, &options)?),
        Bench::TcpSend { .. } | Bench::TcpReceive { .. } => unreachable!("done above"),
    };
    report.print();
    let path = args
        .json
        .unwrap_or_else(|| format!("bench-{name}.json").into());
    report.write(&path)?;
    println!("\nwritten to {}", path.display());
    let failures = report.failures();
    if failures.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("failed: {}", failures.join(", "));
    Ok(ExitCode::FAILURE)
}
