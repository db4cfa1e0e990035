//! Commands that serve something until they are stopped, and what a node came to hold meanwhile.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::node::Node;
use crate::short::number;

/// Such a command, which ends when it is dropped.
pub struct Serving {
    child: Child,
    /// What it said when it was ready.
    pub answer: Value,
}

impl Serving {
    /// Starts one, and waits until it is ready.
    ///
    /// # Panics
    /// Where it does not become so.
    pub fn start(node: &Node, args: &[&str]) -> Self {
        let mut command = node.command(&[args, &["--json"]].concat());
        let child = command.stdout(Stdio::piped()).spawn();
        let mut child = child.expect("the program runs");
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        stdout.read_line(&mut line).expect("it can be read");
        let answer = serde_json::from_str(&line);
        Self {
            child,
            answer: answer.unwrap_or_else(|error| panic!("{args:?}: {error} in {line:?}")),
        }
    }

    /// Ends it as Ctrl-C does, which must be well.
    ///
    /// # Panics
    /// Where it is not.
    pub fn stop(&mut self) {
        kill_process(Pid::from_child(&self.child), Signal::INT).expect("the process is ours");
        let ended = self.child.wait().expect("the process is ours");
        assert_eq!(ended.code(), Some(0));
    }

    /// Whether it has ended.
    ///
    /// # Panics
    /// Never, as the process is ours.
    pub fn is_over(&mut self) -> bool {
        let ended = self.child.try_wait().expect("the process is ours");
        ended.is_some()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// What a node holds of packs, in bytes.
///
/// # Panics
/// Where it does not say.
pub fn packs(node: &Node) -> u64 {
    let held = node.json(&["hashes"]);
    let held = held["hashes"].as_array().expect("a list");
    let packs = held.iter().filter(|blob| blob["kind"] == "pack");
    packs.map(|blob| number(blob, "have")).sum()
}
