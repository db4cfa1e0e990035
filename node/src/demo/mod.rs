//! `capsule demo`: the main job on one machine, with no set-up: a fleet of real nodes, one real tree, everybody pulls.
//!
//! Nothing here is simulated or known beforehand: the nodes are processes of this same program that know only a token
//! and the publisher's address, the demo talks to them as the command line does, and what it prints is what they
//! answered. What it proves it proves from outside: the exported copy is compared by code of its own (`compare`).
//!
//! | file | what lives there |
//! |---|---|
//! | `pick` | something to publish: files of this machine |
//! | `processes` | starting nodes, and ending them whatever happens |
//! | `watch`, `report` | bars while they pull; the table at the end |
//! | `compare` | the copy beside the original |

mod compare;
mod pick;
mod processes;
mod report;
mod watch;

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use capsule_node::control::{
    CapsuleRef, Client, Command, Export, Publish, PublishAs, Published, Progress, Pull, Pulled, Status, Verify,
};
use clap::Args;
use tempfile::TempDir;

use crate::cli::exit::{Exit, shell_word};
use crate::cli::format::{duration, parse_size, plural, rate, size};
use crate::cli::interrupt::Interrupt;
use crate::cli::output;
use crate::cli::progress::Display;
use crate::cli::style::Style;
use compare::compare;
use processes::{Children, StopOnDrop, capsule, start_node};
use report::{ExportReport, NodePull, Publisher, Report};
use watch::Watch;

const DEFAULT_SIZE: u64 = 300 << 20;
/// Less than this shows nothing.
const MIN_SIZE: u64 = 1 << 20;
const NAME: &str = "demo:1";
/// How long a node may wait for the name and for providers, in seconds. On loopback either comes at once or never.
const WAIT: u64 = 30;
const STOPPED: &str = "the demo's nodes are ended and its directory is removed";

/// Show the main job on this machine, with no set-up: 8 nodes, one publishes, the others pull at once
///
/// Starts a fleet of real nodes on loopback in a temporary directory, publishes a tree of this machine's own files, lets
/// all other nodes pull it at once, exports one copy, compares it with the original, and prints who sent what to whom.
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
    let dir = dir.with_context(|| format!("cannot make a directory in {}", std::env::temp_dir().display()))?;
    let children = Children::default();
    let interrupt = Interrupt::catch(false, {
        let children = children.clone();
        // What the demo waits for then fails, and it ends.
        move || children.stop()
    })?;
    let report = {
        // Ends before `dir`, whose files the nodes have open.
        let _stop = StopOnDrop(children.clone());
        Demo::new(args, dir.path(), children, interrupt.clone()).and_then(Demo::show)
    };
    let kept = args.keep && interrupt.signal().is_none();
    let report = match (report, interrupt.signal()) {
        (_, Some(signal)) => Err(Exit::Interrupted { signal, message: STOPPED }),
        (report, None) => report.map_err(Exit::from),
    };
    finish(dir, kept)?;
    conclude(&report?, args.json)
}

/// Removes the directory, or says where it is.
fn finish(dir: TempDir, keep: bool) -> Result<()> {
    if keep {
        let dir = dir.keep();
        let home = shell_word(&dir.join(node_name(0)));
        eprintln!("kept {}; go on with: capsule --home {home} node", dir.display());
        return Ok(());
    }
    let path = dir.path().to_owned();
    dir.close().with_context(|| format!("cannot remove {}: remove it by hand", path.display()))
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
    Err(Exit::failed(format!("what came out is not what went in:\n  {differences}"))
        .or_hint("this is a fault of capsule: please report it"))
}

/// A demo under way.
struct Demo<'a> {
    args: &'a DemoArgs,
    dir: &'a Path,
    program: PathBuf,
    children: Children,
    interrupt: Interrupt,
    began: Instant,
    style: Style,
}

impl<'a> Demo<'a> {
    fn new(args: &'a DemoArgs, dir: &'a Path, children: Children, interrupt: Interrupt) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        Ok(Self { args, dir, program, children, interrupt, began: Instant::now(), style: Style::stderr() })
    }

    fn show(self) -> Result<Report> {
        let budget = budget(self.args, self.dir)?;
        let tree = self.dir.join("tree");
        let gathered = self.timed("files", || pick::gather(&tree, budget), |gathered, took| {
            format!("{}, {}, copied from this machine in {took}", plural(gathered.files, "file"), size(gathered.bytes))
        })?;
        let homes = self.timed("fleet", || self.start_fleet(), |homes, took| {
            let others = plural(homes.len() as u64 - 1, "other node");
            format!("publisher and {others} are up after {took}; they know a token and the publisher's address")
        })?;
        let published = self.publish(&homes[0], &tree)?;
        let before = self.sent(&homes[0])?;
        let began = Instant::now();
        let pulled = self.pull_all(&homes[1..])?;
        let pull_seconds = began.elapsed().as_secs_f64();
        let sent_bytes = self.sent(&homes[0])? - before;
        let export = self.export(&homes[homes.len() - 1], &published, &tree)?;
        let verified_nodes = self.verify_all(&homes, &published)?;
        let publisher = self.ask(&homes[0], Status {})?.peer;
        Ok(Report {
            identical: export.differences.is_empty() && verified_nodes == homes.len(),
            nodes: homes.len(),
            files: gathered.files,
            content_bytes: published.content_bytes,
            fetch_bytes: pulled.iter().map(|pulled| pulled.fetched_bytes).max().unwrap_or(0),
            pack_bytes: published.pack_bytes,
            publish_seconds: published.seconds,
            pull_seconds,
            publisher: Publisher { sent_bytes, copies: sent_bytes as f64 / published.pack_bytes.max(1) as f64 },
            pulls: pulled.iter().enumerate().map(|(at, pulled)| node_pull(at + 1, pulled, &publisher)).collect(),
            export,
            verified_nodes,
            seconds: self.began.elapsed().as_secs_f64(),
        })
    }

    /// Founds the fleet, starts the publisher, enrols and starts the others; gives their homes, the publisher's first.
    fn start_fleet(&self) -> Result<Vec<PathBuf>> {
        let homes: Vec<PathBuf> = (0..usize::from(self.args.nodes)).map(|node| self.dir.join(node_name(node))).collect();
        let (first, others) = homes.split_first().ok_or_else(|| anyhow!("a demo needs nodes"))?;
        capsule(&self.program, first, &["fleet", "init", "--machine-name", &node_name(0)])?;
        let address = start_node(&self.program, first, &self.children)?.ready()?;
        let token = capsule(&self.program, first, &["fleet", "invite", "--expires", "1d", "--addr", &address])?;
        let mut starting = Vec::new();
        for (at, home) in others.iter().enumerate() {
            self.go_on()?;
            capsule(&self.program, home, &["join", "--machine-name", &node_name(at + 1), &token])?;
            starting.push(start_node(&self.program, home, &self.children)?);
        }
        for node in starting {
            node.ready()?;
        }
        Ok(homes)
    }

    fn publish(&self, home: &Path, tree: &Path) -> Result<Published> {
        let command = Publish {
            path: tree.to_owned(),
            name: NAME.parse()?,
            read_as: PublishAs::Tree,
            effort: Default::default(),
            frame_max: None,
            one_file_system: false,
            expires: None,
        };
        let display = std::cell::RefCell::new(Display::stderr(self.args.json));
        let client = self.client(home)?;
        let published = client.run(command, |progress| display.borrow_mut().progress(&progress), |_| {});
        display.into_inner().clear();
        let published = self.explain(home, published)?;
        let took = Duration::try_from_secs_f64(published.seconds).unwrap_or_default();
        let content = published.content_bytes;
        self.tell(
            "published",
            &format!(
                "{NAME}, packed to {} ({:.0} %) in {}, {}",
                size(published.pack_bytes),
                published.pack_bytes as f64 * 100.0 / content.max(1) as f64,
                duration(took),
                rate(content, took)
            ),
        );
        Ok(published)
    }

    /// All pull at once, each on a thread.
    fn pull_all(&self, homes: &[PathBuf]) -> Result<Vec<Pulled>> {
        let command = || Pull { capsule: CapsuleRef(NAME.to_owned()), wait: Some(WAIT) };
        let finished = |pulled: &Pulled| {
            let took = Duration::try_from_secs_f64(pulled.seconds).unwrap_or_default();
            let peers = plural(pulled.by_peer.len() as u64, "peer");
            format!("complete  {} in {} from {peers}", size(pulled.fetched_bytes), duration(took))
        };
        let pulled = self.timed("pulling", || self.all_at_once(homes, command, finished), |pulled: &Vec<Pulled>, took| {
            format!("{} have it, checked against its hashes, after {took}", plural(pulled.len() as u64, "node"))
        })?;
        for pull in &pulled {
            ensure!(!pull.unchanged, "a node says that it had the capsule before it was pulled");
        }
        Ok(pulled)
    }

    fn export(&self, home: &Path, published: &Published, tree: &Path) -> Result<ExportReport> {
        let to = self.dir.join("export");
        let command = Export {
            capsule: CapsuleRef(published.capsule.to_string()),
            to: to.clone(),
            component: None,
            force: false,
        };
        let exported = self.ask(home, command)?;
        self.go_on()?;
        let found = compare(tree, &to)?;
        let node = home.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let took = Duration::try_from_secs_f64(exported.seconds).unwrap_or_default();
        let verdict = if found.differences.is_empty() { "identical" } else { "DIFFERENT" };
        self.tell("exported", &format!("from {node} in {}; compared with the original: {verdict}", duration(took)));
        Ok(ExportReport {
            node,
            seconds: exported.seconds,
            files: found.files,
            bytes: found.bytes,
            differences: found.differences,
        })
    }

    /// Lets all nodes read their stores again; gives how many hold what they should.
    fn verify_all(&self, homes: &[PathBuf], published: &Published) -> Result<usize> {
        let capsule = CapsuleRef(published.capsule.to_string());
        let command = || Verify { capsule: Some(capsule.clone()), repair: false };
        let verified = self.timed("verified", || self.all_at_once(homes, command, |_| "verified".to_owned()), |all, took| {
            let bytes = all.iter().map(|verified| verified.checked_bytes).sum();
            format!("{} read again on {} in {took}", size(bytes), plural(all.len() as u64, "node"))
        })?;
        Ok(verified.iter().filter(|verified| verified.damaged.is_empty() && verified.checked_bytes > 0).count())
    }

    /// Gives all nodes the same command at once, with a bar each.
    fn all_at_once<C: Command>(
        &self,
        homes: &[PathBuf],
        command: impl Fn() -> C,
        finished: impl Fn(&C::Answer) -> String + Sync,
    ) -> Result<Vec<C::Answer>>
    where
        C: Send,
        C::Answer: Send,
    {
        let name = |home: &PathBuf| home.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let watch = Watch::new(&homes.iter().map(name).collect::<Vec<_>>(), self.args.json);
        let answers: Vec<Result<C::Answer>> = thread::scope(|scope| {
            let threads: Vec<_> = homes
                .iter()
                .enumerate()
                .map(|(at, home)| {
                    let (command, watch, finished) = (command(), &watch, &finished);
                    scope.spawn(move || {
                        let answer = self.client(home)?.run(command, |p: Progress| watch.progress(at, p), |_| {});
                        let answer = self.explain(home, answer)?;
                        watch.finished(at, &finished(&answer));
                        Ok(answer)
                    })
                })
                .collect();
            let join = |thread: thread::ScopedJoinHandle<'_, Result<C::Answer>>| {
                thread.join().unwrap_or_else(|_| Err(anyhow!("a thread of the demo panicked")))
            };
            threads.into_iter().map(join).collect()
        });
        watch.clear();
        answers.into_iter().collect()
    }

    fn sent(&self, home: &Path) -> Result<u64> {
        Ok(self.ask(home, Status {})?.sent_bytes)
    }

    fn ask<C: Command>(&self, home: &Path, command: C) -> Result<C::Answer> {
        let answer = self.client(home)?.call(command);
        self.explain(home, answer)
    }

    fn client(&self, home: &Path) -> Result<Client> {
        self.go_on()?;
        let client = Client::connect(home);
        self.explain(home, client)
    }

    /// Adds to an error which node it was, and the end of its log.
    fn explain<T, E: Into<anyhow::Error>>(&self, home: &Path, result: Result<T, E>) -> Result<T> {
        result.map_err(|error| {
            let node = home.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let error: anyhow::Error = error.into();
            anyhow!("{node}: {error:#}\nthe end of its log:\n{}", processes::log_tail(home))
        })
    }

    /// Does a step and tells what came of it.
    fn timed<T>(
        &self,
        label: &str,
        step: impl FnOnce() -> Result<T>,
        told: impl FnOnce(&T, String) -> String,
    ) -> Result<T> {
        self.go_on()?;
        let began = Instant::now();
        let result = step()?;
        self.tell(label, &told(&result, duration(began.elapsed())));
        Ok(result)
    }

    fn tell(&self, label: &str, text: &str) {
        if !self.args.json {
            eprintln!("{}  {text}", self.style.bold(&format!("{label:<9}")));
        }
    }

    /// An error once a signal has come.
    fn go_on(&self) -> Result<()> {
        if self.interrupt.signal().is_some() { bail!("stopped") } else { Ok(()) }
    }
}

fn node_name(node: usize) -> String {
    if node == 0 { "publisher".to_owned() } else { format!("pc-{node}") }
}

fn node_pull(node: usize, pulled: &Pulled, publisher: &str) -> NodePull {
    let from = |wanted: bool| {
        let peers = pulled.by_peer.iter().filter(|peer| (peer.peer == publisher) == wanted);
        peers.map(|peer| peer.bytes).sum()
    };
    NodePull {
        node: node_name(node),
        seconds: pulled.seconds,
        bytes: pulled.fetched_bytes,
        bytes_per_second: (pulled.fetched_bytes as f64 / pulled.seconds.max(1e-9)) as u64,
        from_publisher: from(true),
        from_peers: from(false),
    }
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
    ensure!(
        budget <= fits,
        "{} are free in {temp}, and {} nodes with {} each may need {}: free some, set TMPDIR to a directory on a larger \
         disk, or use a smaller --size",
        size(free),
        args.nodes,
        size(budget),
        size(budget * copies),
    );
    Ok(budget)
}

fn free_bytes(dir: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(dir).with_context(|| format!("cannot ask how much is free in {}", dir.display()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
