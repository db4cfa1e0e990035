//! Where machines run: nodes in network namespaces of their own, joined by a bridge, and links that are shaped where they begin.
//!
//! | node | what it is | link |
//! |---|---|---|
//! | `HOME` | where machines are made and captured | 1 Gbit/s |
//! | `OTHER` | somebody who resumes a machine before the others, so that a prefetch record is there | 1 Gbit/s |
//! | `WORK` | the receiver | thin, but while it is given what it has before |

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use capsule_node::control::{Client, Status};
use capsule_tests::Node;
use capsule_tests::lab::Scenario;
use capsule_tests::lab::network::{Carried, Network};
use capsule_tests::lab::scenario::Rate;
use serde_json::Value;

use crate::process::Deadline;
use crate::tools::empty_dir;

/// Nodes by number.
pub const HOME: usize = 0;
/// See the module.
pub const OTHER: usize = 1;
/// See the module.
pub const WORK: usize = 2;

/// The links that are not thin, in Mbit/s.
pub const LAN: f64 = 1000.0;
/// Where nodes listen.
const PORT: u16 = 4277;
/// How long nodes may take to find each other.
const TOGETHER: Duration = Duration::from_secs(120);
/// How long a link is to carry nearly nothing before it counts as quiet, how little that is, and how long it may take.
const QUIET: Duration = Duration::from_secs(5);
const QUIET_BYTES: u64 = 4 << 10;
const QUIET_WITHIN: Duration = Duration::from_secs(120);

const SCENARIO: &str = "title = \"machines\"\nmib = 1\n[[sites]]\nlabel = \"room\"\nnodes = [{ count = 3, mbit = 1000 }]\n";

/// See the module.
pub struct Place {
    network: Network,
    nodes: Vec<Node>,
    token: String,
    dir: PathBuf,
    homes: usize,
    /// The thin link's rate, in Mbit/s.
    pub thin: f64,
}

impl Place {
    /// Sets up the network; the first node founds a fleet, which the others join as publishers.
    pub fn set_up(dir: &Path, thin: f64) -> Result<Self> {
        empty_dir(dir)?;
        let network = Network::set_up(&Scenario::parse(SCENARIO)?)?;
        let mut place = Self {
            nodes: Vec::new(),
            token: String::new(),
            dir: dir.to_owned(),
            homes: 0,
            thin,
            network,
        };
        for number in 0..place.network.hosts.len() {
            let node = place.new_node(number);
            place.nodes.push(node);
        }
        place.nodes[HOME].init();
        place.start(HOME);
        let home = &place.nodes[HOME];
        let invite = [
            "fleet",
            "invite",
            "--role",
            "publisher",
            "--addr",
            home.address(),
        ];
        place.token = home.ok(&invite).trim().to_owned();
        place.link(WORK, thin)?;
        for number in [OTHER, WORK] {
            place.nodes[number].ok(&["join", &place.token]);
            place.start(number);
        }
        place.together(WORK)?;
        Ok(place)
    }

    /// A node.
    pub fn node(&self, number: usize) -> &Node {
        &self.nodes[number]
    }

    /// Has a node be one that holds nothing, under a new identity.
    pub fn anew(&mut self, number: usize) -> Result<()> {
        if self.nodes[number].is_started() {
            self.nodes[number].stop();
        }
        let _none = std::fs::remove_dir_all(self.nodes[number].home());
        self.nodes[number] = self.new_node(number);
        self.nodes[number].ok(&["join", &self.token]);
        self.start(number);
        self.together(number)
    }

    /// Ends a node, or has it come back.
    pub fn has(&mut self, number: usize, there: bool) -> Result<()> {
        match (self.nodes[number].is_started(), there) {
            (true, false) => self.nodes[number].stop(),
            (false, true) => {
                self.start(number);
                self.together(number)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Shapes a node's link anew, in Mbit/s both ways.
    pub fn link(&self, number: usize, mbit: f64) -> Result<()> {
        let rate = Rate {
            up: mbit,
            down: mbit,
        };
        self.network.reshape(number, rate)
    }

    /// What a node's link has carried so far, headers included.
    pub fn carried(&self, number: usize) -> Result<Carried> {
        Ok(self.network.counters()?.hosts[number])
    }

    /// Waits until a node's link carries nothing but what idle nodes say.
    pub fn quiet(&self, number: usize) -> Result<()> {
        let deadline = Deadline::after(QUIET_WITHIN);
        deadline.wait("waiting for a quiet link", || {
            let before = self.carried(number)?;
            std::thread::sleep(QUIET);
            let since = self.carried(number)?.since(before);
            Ok(since.up + since.down < QUIET_BYTES)
        })
    }

    fn new_node(&mut self, number: usize) -> Node {
        self.homes += 1;
        let namespace = self.network.hosts[number].namespace.clone();
        Node::new(self.dir.join(format!("n{}", self.homes))).in_namespace(namespace)
    }

    fn start(&mut self, number: usize) {
        let address = self.network.hosts[number].address;
        self.nodes[number].start_on(&format!("{address}:{PORT}"));
    }

    /// Waits until a node knows another.
    fn together(&self, number: usize) -> Result<()> {
        let deadline = Deadline::after(TOGETHER);
        deadline.wait("nodes' finding each other", || {
            let status = Client::connect(self.nodes[number].home())?.call(Status::default())?;
            Ok(status.peers > 0)
        })
    }
}

/// Runs a command on a node's home, which must succeed; what it printed as JSON.
pub fn json(node: &Node, args: &[&str], deadline: &Deadline) -> Result<Value> {
    let what = || format!("capsule {}", args.join(" "));
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let beside = |end: &str| node.home().with_extension(format!("{number}.{end}"));
    let (out, err) = (beside("out"), beside("err"));
    let mut command = node.command(&[args, &["--json"]].concat());
    command
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(&out)?)
        .stderr(std::fs::File::create(&err)?);
    let mut child = Ended(command.spawn().with_context(what)?);
    let mut status = None;
    deadline.wait(&what(), || {
        status = child.0.try_wait()?;
        Ok(status.is_some())
    })?;
    let said = std::fs::read_to_string(&err).unwrap_or_default();
    ensure!(
        status.is_some_and(|status| status.success()),
        "{}: {}",
        what(),
        said.trim()
    );
    let out = std::fs::read_to_string(&out)?;
    // A command that tells progress prints its answer last.
    let last = out.trim().lines().last().unwrap_or_default();
    serde_json::from_str(&out)
        .or_else(|_| serde_json::from_str(last))
        .map_err(|error| anyhow!("{}: {error} in {out}", what()))
}

/// A child that ends when nobody waits for it any more.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _over = self.0.kill();
        let _reaped = self.0.wait();
    }
}
