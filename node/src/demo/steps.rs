//! What the demo does, in order, and what it tells meanwhile.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use capsule_node::control::{
    CapsuleRef, Export, Ls, Publish, PublishAs, Published, Pull, Pulled, Status, Verified, Verify,
};
use capsule_proto::CapsuleId;

use super::change::{Held, hold_back, update};
use super::compare::compare;
use super::fleet::{Fleet, Node, go_on};
use super::pick::gather;
use super::processes::Children;
use super::report::{ExportReport, NodePull, Publisher, Report, UpdateReport};
use super::watch::Watch;
use crate::cli::format::{duration, plural, rate, size};
use crate::cli::interrupt::Interrupt;
use crate::cli::output::tell;
use crate::cli::progress::Display;
use crate::cli::style::Style;

/// The first version, and its update.
const FIRST: &str = "demo:1";
const SECOND: &str = "demo:2";
/// How long a node may wait for the name and for providers, in seconds. On loopback either comes at once or never.
const WAIT: u64 = 30;
/// How long the news and the nodes' finding each other may take.
const SPREAD: Duration = Duration::from_secs(30);
/// A node that knows this many others has been found by the discovery, not only told of the publisher.
const ENOUGH_PEERS: usize = 4;
const POLL: Duration = Duration::from_millis(50);

/// What the steps share.
pub struct Demo<'a> {
    /// The temporary directory.
    pub dir: &'a Path,
    /// Nodes, the publisher included.
    pub nodes: usize,
    /// Bytes of files to publish.
    pub budget: u64,
    /// Whether a program reads the report: then nothing is told.
    pub json: bool,
    /// Where nodes are noted, to be stopped.
    pub children: Children,
    /// Whether Ctrl-C came.
    pub interrupt: Interrupt,
}

impl Demo<'_> {
    /// Does it all.
    ///
    /// # Errors
    /// A node or the file system fails, or a signal has come. That the copy differs is no error here, but in the report.
    pub fn show(&self) -> Result<Report> {
        let began = Instant::now();
        let tree = self.dir.join("tree");
        self.gather(&tree)?;
        let held = hold_back(&tree, &self.dir.join("aside"))?;
        let fleet = self.start()?;
        let published = self.publish(&fleet, &tree, FIRST)?;
        self.spread(&fleet, published.capsule)?;
        let before = fleet.ask(fleet.publisher(), Status {})?.sent_bytes;
        let pulling = Instant::now();
        let pulled = self.pull(&fleet, FIRST)?;
        let pull_seconds = pulling.elapsed().as_secs_f64();
        let publisher = fleet.ask(fleet.publisher(), Status {})?;
        let export = self.export(&fleet, published.capsule, (&tree, "first"))?;
        let (update, second) = self.update(&fleet, &tree, held)?;
        let verified_nodes = self.verify(&fleet, second)?;
        let sent_bytes = publisher.sent_bytes.saturating_sub(before);
        let pull = |(node, pulled): (&Node, &Pulled)| node_pull(node, pulled, &publisher.peer);
        let same = |export: &ExportReport| export.differences.is_empty();
        Ok(Report {
            identical: same(&export) && same(&update.export) && verified_nodes == self.nodes,
            nodes: self.nodes,
            files: export.files,
            content_bytes: published.content_bytes,
            fetch_bytes: most_fetched(&pulled),
            pack_bytes: published.pack_bytes,
            publish_seconds: published.seconds,
            pull_seconds,
            publisher: Publisher {
                sent_bytes,
                copies: sent_bytes as f64 / published.pack_bytes.max(1) as f64,
            },
            pulls: fleet.others().iter().zip(&pulled).map(pull).collect(),
            export,
            update,
            verified_nodes,
            seconds: began.elapsed().as_secs_f64(),
        })
    }

    /// The second half: the tree changes, and everybody fetches what differs.
    fn update(&self, fleet: &Fleet, tree: &Path, held: Held) -> Result<(UpdateReport, CapsuleId)> {
        let (changed, _) = self.timed(|| update(tree, held))?;
        let (files, bytes) = (plural(changed.files, "file"), size(changed.bytes));
        let archive = size(changed.archive_bytes);
        self.tell(
            "changed",
            &format!(
                "{files} new or changed, {bytes}, {archive} as a tar.zst; as many renamed, or gone"
            ),
        );
        let published = self.publish(fleet, tree, SECOND)?;
        self.spread(fleet, published.capsule)?;
        let pulling = Instant::now();
        let pulled = self.pull(fleet, SECOND)?;
        let pull_seconds = pulling.elapsed().as_secs_f64();
        let export = self.export(fleet, published.capsule, (tree, "second"))?;
        let report = UpdateReport {
            files: changed.files,
            bytes: changed.bytes,
            archive_bytes: changed.archive_bytes,
            fetch_bytes: most_fetched(&pulled),
            pack_bytes: published.pack_bytes,
            publish_seconds: published.seconds,
            pull_seconds,
            export,
        };
        Ok((report, published.capsule))
    }

    fn gather(&self, tree: &Path) -> Result<()> {
        let (gathered, took) = self.timed(|| gather(tree, self.budget))?;
        let (files, bytes) = (plural(gathered.files, "file"), size(gathered.bytes));
        self.tell(
            "files",
            &format!("{files}, {bytes}, copied from this machine in {took}"),
        );
        Ok(())
    }

    fn start(&self) -> Result<Fleet> {
        let (fleet, took) =
            self.timed(|| Fleet::start(self.dir, self.nodes, &self.children, &self.interrupt))?;
        let others = plural(fleet.others().len() as u64, "other node");
        self.tell(
            "fleet",
            &format!("publisher and {others}, started and enrolled in {took}"),
        );
        Ok(fleet)
    }

    fn publish(&self, fleet: &Fleet, tree: &Path, name: &str) -> Result<Published> {
        let command = Publish {
            read_as: PublishAs::Tree,
            ..Publish::of(tree, name.parse()?)
        };
        let display = RefCell::new(Display::stderr(self.json));
        let published = fleet.ask_with(fleet.publisher(), command, |progress| {
            display.borrow_mut().progress(&progress)
        });
        display.into_inner().clear();
        let published = published?;
        let (packs, content) = (published.pack_bytes, published.content_bytes);
        let took = seconds(published.seconds);
        let share = packs as f64 * 100.0 / content.max(1) as f64;
        let (packed, time, speed) = (size(packs), duration(took), rate(content, took));
        self.tell(
            "published",
            &match &published.parent {
                None => format!("{name}, packed to {packed} ({share:.0} %), in {time} ({speed})"),
                Some(parent) => format!("{name} as {packed} upon {parent}, in {time}"),
            },
        );
        Ok(published)
    }

    /// Waits until all others have heard of the name and found each other: they are to pull at once, not one after the
    /// other as the news comes. Only the publisher's address was given to them.
    fn spread(&self, fleet: &Fleet, capsule: CapsuleId) -> Result<()> {
        let wait = |node| self.wait_until_known(fleet, node, capsule);
        let (connections, took) =
            self.timed(|| fleet.others().iter().map(wait).sum::<Result<usize>>())?;
        let each = connections as f64 / fleet.others().len().max(1) as f64;
        self.tell(
            "known",
            &format!(
                "to all nodes, which found each other ({each:.0} connections each), in {took}"
            ),
        );
        Ok(())
    }

    /// Waits for a node; gives how many connections it has.
    fn wait_until_known(&self, fleet: &Fleet, node: &Node, capsule: CapsuleId) -> Result<usize> {
        let deadline = Instant::now() + SPREAD;
        loop {
            let listed = fleet.ask(node, Ls::default())?;
            let known = listed
                .capsules
                .iter()
                .any(|listed| listed.capsule == capsule);
            let peers = fleet.ask(node, Status {})?.peers;
            if known && peers >= (self.nodes - 1).min(ENOUGH_PEERS) {
                return Ok(peers);
            }
            let (name, heard) = (&node.name, if known { "heard" } else { "not heard" });
            ensure!(
                Instant::now() < deadline,
                "{name} has {heard} of the capsule and found {peers} peers in {SPREAD:?}"
            );
            thread::sleep(POLL);
        }
    }

    /// All others pull at once.
    fn pull(&self, fleet: &Fleet, name: &str) -> Result<Vec<Pulled>> {
        let command = Pull {
            capsule: CapsuleRef(name.to_owned()),
            wait: Some(WAIT),
            like_path: None,
            like_capsule: None,
        };
        let finished = |pulled: &Pulled| {
            let (bytes, took) = (
                size(pulled.fetched_bytes),
                duration(seconds(pulled.seconds)),
            );
            format!(
                "complete  {bytes} in {took} from {}",
                plural(pulled.by_peer.len() as u64, "peer")
            )
        };
        let watch = self.watch(fleet.others());
        let (pulled, took) =
            self.timed(|| fleet.ask_all(fleet.others(), &watch, &command, finished))?;
        for (node, pulled) in fleet.others().iter().zip(&pulled) {
            ensure!(
                !pulled.unchanged,
                "{} says that it held the capsule before it was published",
                node.name
            );
        }
        let nodes = plural(pulled.len() as u64, "node");
        self.tell(
            "pulled",
            &format!("by {nodes} at once, and checked against its hashes, in {took}"),
        );
        Ok(pulled)
    }

    fn export(
        &self,
        fleet: &Fleet,
        capsule: CapsuleId,
        (tree, copy): (&Path, &str),
    ) -> Result<ExportReport> {
        let to: PathBuf = self.dir.join(copy);
        let node = fleet.others().last().unwrap_or(fleet.publisher());
        let capsule = CapsuleRef(capsule.to_string());
        let command = Export {
            capsule,
            to: to.clone(),
            component: None,
            force: false,
        };
        let exported = fleet.ask(node, command)?;
        let (found, _) = self.timed(|| compare(tree, &to))?;
        let verdict = if found.differences.is_empty() {
            "identical"
        } else {
            "DIFFERENT"
        };
        let took = duration(seconds(exported.seconds));
        self.tell(
            "exported",
            &format!(
                "by {} in {took}; beside the original, byte by byte: {verdict}",
                node.name
            ),
        );
        let (node, seconds, files, bytes) = (
            node.name.clone(),
            exported.seconds,
            found.files,
            found.bytes,
        );
        Ok(ExportReport {
            node,
            seconds,
            files,
            bytes,
            differences: found.differences,
        })
    }

    /// All read their stores again; gives how many hold what they should.
    fn verify(&self, fleet: &Fleet, capsule: CapsuleId) -> Result<usize> {
        let command = Verify {
            capsule: Some(CapsuleRef(capsule.to_string())),
            repair: false,
        };
        let nodes = fleet.nodes();
        let watch = self.watch(&nodes);
        let (verified, took) =
            self.timed(|| fleet.ask_all(&nodes, &watch, &command, |_| "verified".to_owned()))?;
        let bytes = verified.iter().map(|verified| verified.checked_bytes).sum();
        let nodes = plural(verified.len() as u64, "node");
        self.tell(
            "verified",
            &format!(
                "{} in the stores of {nodes}, read again in {took}",
                size(bytes)
            ),
        );
        let whole =
            |verified: &&Verified| verified.damaged.is_empty() && verified.checked_bytes > 0;
        Ok(verified.iter().filter(whole).count())
    }

    fn watch(&self, nodes: &[Node]) -> Watch {
        Watch::new(
            &nodes
                .iter()
                .map(|node| node.name.clone())
                .collect::<Vec<_>>(),
            self.json,
        )
    }

    /// Does a step unless a signal has come, and says how long it took.
    fn timed<T>(&self, step: impl FnOnce() -> Result<T>) -> Result<(T, String)> {
        go_on(&self.interrupt)?;
        let began = Instant::now();
        let result = step()?;
        Ok((result, duration(began.elapsed())))
    }

    fn tell(&self, label: &str, text: &str) {
        if !self.json {
            tell(format_args!(
                "{}  {text}",
                Style::stderr().bold(&format!("{label:<9}"))
            ));
        }
    }
}

fn node_pull(node: &Node, pulled: &Pulled, publisher: &str) -> NodePull {
    let from = |wanted: bool| {
        let peers = pulled
            .by_peer
            .iter()
            .filter(|peer| (peer.peer == publisher) == wanted);
        peers.map(|peer| peer.bytes).sum()
    };
    NodePull {
        node: node.name.clone(),
        seconds: pulled.seconds,
        planning_seconds: pulled.planning_seconds,
        fetch_seconds: pulled.fetch_seconds,
        check_seconds: pulled.check_seconds,
        bytes: pulled.fetched_bytes,
        bytes_per_second: (pulled.fetched_bytes as f64 / pulled.seconds.max(1e-9)) as u64,
        from_publisher: from(true),
        from_peers: from(false),
    }
}

/// What the node that fetched the most did fetch.
fn most_fetched(pulled: &[Pulled]) -> u64 {
    let bytes = pulled.iter().map(|pulled| pulled.fetched_bytes);
    bytes.max().unwrap_or(0)
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}
