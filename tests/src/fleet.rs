//! Several nodes that joined one fleet, in one temporary directory.

use std::ops::{Index, IndexMut};
use std::path::{Path, PathBuf};

use crate::node::Node;

/// Nodes of one fleet; the first made it, and is the others' first address.
pub struct Fleet {
    nodes: Vec<Node>,
    dir: tempfile::TempDir,
}

impl Fleet {
    /// A fleet of one running node with all roles.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        let mut first = Node::new(dir.path().join("node0"));
        first.init();
        first.start();
        Self {
            nodes: vec![first],
            dir,
        }
    }

    /// A fleet of several running nodes; all but the first are plain members.
    pub fn of(count: usize) -> Self {
        let mut fleet = Self::new();
        let token = fleet.invite(&[]);
        (1..count).for_each(|_| {
            fleet.join(&token);
        });
        fleet
    }

    /// A token of the first node.
    pub fn invite(&self, options: &[&str]) -> String {
        let address = self[0].address().to_owned();
        self[0]
            .ok(&[&["fleet", "invite", "--addr", &address], options].concat())
            .trim()
            .to_owned()
    }

    /// Adds a node by a token and starts it; returns its position.
    pub fn join(&mut self, token: &str) -> usize {
        let mut node = Node::new(self.path(&format!("node{}", self.nodes.len())));
        node.ok(&["join", token]);
        node.start();
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    /// The nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A path in the fleet's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The fleet's directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

impl Default for Fleet {
    fn default() -> Self {
        Self::new()
    }
}

impl Index<usize> for Fleet {
    type Output = Node;

    fn index(&self, index: usize) -> &Node {
        &self.nodes[index]
    }
}

impl IndexMut<usize> for Fleet {
    fn index_mut(&mut self, index: usize) -> &mut Node {
        &mut self.nodes[index]
    }
}
