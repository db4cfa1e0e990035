//! `capsule demo`: the main job on one machine, with no set-up: a fleet of real nodes, one real tree, everybody pulls.
//!
//! Nothing here is simulated or known beforehand: the nodes are processes of this same program that know only a token
//! and the publisher's address, the demo talks to them as the command line does, and what it prints is what they
//! answered. What it proves it proves from outside: the exported copy is compared by code of its own (`compare`).
//!
//! | file | what lives there |
//! |---|---|
//! | `steps` | what happens, in order |
//! | `pick` | something to publish: files of this machine |
//! | `fleet` | the nodes, and asking them |
//! | `processes` | starting nodes, and ending them whatever happens |
//! | `watch`, `report` | bars while they pull; the table at the end |
//! | `change` | an update of the tree |
//! | `compare` | the copies beside the originals |

mod change;
mod compare;
mod fleet;
mod pick;
mod processes;
mod report;
mod steps;
mod watch;

use std::fs;
use std::path::Path;
use std::thread;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use tempfile::TempDir;

use crate::cli::exit::{Exit, shell_word};
use crate::cli::format::{parse_size, size};
use crate::cli::interrupt::Interrupt;
use crate::cli::output;
use crate::cli::style::Style;
use processes::{Children, StopOnDrop};
use report::Report;
use steps::Demo;

const DEFAULT_SIZE: u64 = 300 << 20;
/// Less than this shows nothing.
const MIN_SIZE: u64 = 1 << 20;
const STOPPED: &str = "the demo's nodes are ended and its directory is removed";

/// Show the main job on this machine, with no set-up
///
/// Starts a fleet of real nodes on loopback in a temporary directory, publishes a tree of this machine's own files, lets
/// all other nodes pull it at once, exports one copy, and compares it with the original. Then some of the files change, the
/// update is published, and all others fetch what differs. Prints who sent what to whom, and what the update cost.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Nodes, the publisher included
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u8).range(2..=64))]
    nodes: u8,
    /// Bytes of files to publish [default: 300M, or less where the disk is small]
    #[arg(long, value_parser = parse_size)]
    size: Option<u64>,
    /// Keep the nodes' directories, to look at them or to go on with them
    #[arg(long)]
    keep: bool,
    /// Print one JSON object, with stable keys (documented in node/docs/cli.md)
    #[arg(long)]
    json: bool,
}

/// Runs the demo.
///
/// # Errors
/// A node fails, the copy differs from the original, there is no room, or Ctrl-C.
pub fn run(args: &DemoArgs) -> Result<(), Exit> {
    let dir = tempfile::Builder::new().prefix("capsule-demo-").tempdir();
    let dir = dir.with_context(|| {
        format!(
            "cannot make a directory in {}",
            std::env::temp_dir().display()
        )
    })?;
    let children = Children::default();
    let interrupt = Interrupt::catch(false, {
        let children = children.clone();
        // What the demo waits for then fails, and it ends.
        move || children.stop()
    })?;
    let report = {
        // Ends before `dir`, whose files the nodes have open.
        let _stop = StopOnDrop(children.clone());
        budget(args, dir.path()).and_then(|budget| {
            let (dir, nodes, interrupt) = (dir.path(), usize::from(args.nodes), interrupt.clone());
            Demo {
                dir,
                nodes,
                budget,
                json: args.json,
                children,
                interrupt,
            }
            .show()
        })
    };
    let kept = args.keep && interrupt.signal().is_none();
    let outcome = match (report, interrupt.signal()) {
        (_, Some(signal)) => Err(Exit::Interrupted {
            signal,
            message: STOPPED,
        }),
        (report, None) => report
            .map_err(Exit::from)
            .and_then(|report| conclude(&report, args.json)),
    };
    // Last, as it may take as long as the rest where the disk discards what is freed.
    finish(dir, kept);
    outcome
}

/// Removes the directory, or says where it is.
fn finish(dir: TempDir, keep: bool) {
    if keep {
        let dir = dir.keep();
        let home = shell_word(&dir.join("publisher"));
        output::tell(format_args!(
            "kept {}; go on with: capsule --home {home} node",
            dir.display()
        ));
        return;
    }
    remove_entries(dir.path());
    let path = dir.path().to_owned();
    if let Err(error) = dir.close() {
        output::tell(format_args!(
            "warning: cannot remove {}: {error}: remove it by hand",
            path.display()
        ));
    }
}

/// Removes what is in the directory, all at once: on file systems that discard what they free, each removal waits for
/// the disk, and the waits then overlap (measured: 1 to 3 s in place of 7 to 17).
fn remove_entries(dir: &Path) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    thread::scope(|scope| {
        for path in entries.map(|entry| entry.path()) {
            // What stays is tried again, and told, by whoever removes the directory itself.
            scope.spawn(move || {
                if path.is_dir() {
                    fs::remove_dir_all(&path)
                } else {
                    fs::remove_file(&path)
                }
            });
        }
    });
}

fn conclude(report: &Report, json: bool) -> Result<(), Exit> {
    if json {
        output::print_json(report)?;
    } else {
        output::print(&("\n".to_owned() + &report.render(Style::stdout())))?;
    }
    if report.identical {
        return Ok(());
    }
    let differences = report.export.differences.join("\n  ");
    Err(Exit::failed(format!(
        "what came out is not what went in:\n  {differences}"
    ))
    .or_hint("this is a fault of capsule: please report it"))
}

/// How much to publish: what was asked for, or what is usual, if that fits into the temporary directory: the tree, its
/// export, and a store a node whose packs may be as long as the tree if nothing can be compressed.
fn budget(args: &DemoArgs, dir: &Path) -> Result<u64> {
    let copies = 2 + u64::from(args.nodes);
    let free = free_bytes(dir)?;
    let fits = free / 10 * 9 / copies;
    let budget = match args.size {
        Some(asked) => asked.max(MIN_SIZE),
        None => DEFAULT_SIZE.min(fits).max(MIN_SIZE),
    };
    let temp = dir.parent().unwrap_or(dir).display();
    let (nodes, free, need) = (args.nodes, size(free), size(budget.saturating_mul(copies)));
    ensure!(
        budget <= fits,
        "{nodes} nodes with {} each may need {need}, and {free} are free in {temp}: free some, set TMPDIR to a directory \
         on a larger disk, or use a smaller --size",
        size(budget),
    );
    Ok(budget)
}

fn free_bytes(dir: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(dir)
        .with_context(|| format!("cannot ask how much is free in {}", dir.display()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
