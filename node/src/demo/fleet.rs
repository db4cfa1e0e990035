//! The demo's fleet: its nodes, and asking them as the command line does.

use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context as _, Result, anyhow, bail};
use capsule_node::control::{Client, ClientError, Command, Progress};

use super::processes::{Children, Starting, capsule, log_tail, start_node};
use super::watch::Watch;
use crate::cli::interrupt::Interrupt;

/// A node.
#[derive(Debug, Clone)]
pub struct Node {
    /// For people.
    pub name: String,
    /// Its directory.
    pub home: PathBuf,
}

/// Nodes that run.
#[derive(Debug)]
pub struct Fleet {
    publisher: Node,
    others: Vec<Node>,
    interrupt: Interrupt,
}

impl Fleet {
    /// Founds a fleet, starts its publisher, enrols and starts the others: they know a token, and in it the publisher's
    /// address only. Call from a thread that lives as long as the fleet ([`start_node`]).
    ///
    /// # Errors
    /// A node fails, or a signal has come.
    pub fn start(
        dir: &Path,
        nodes: usize,
        children: &Children,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let publisher = Node::new(dir, "publisher".to_owned());
        let others: Vec<Node> = (1..nodes)
            .map(|at| Node::new(dir, format!("pc-{at}")))
            .collect();
        let run = |node: &Node, args: &[&str]| capsule(&program, &node.home, args);
        run(
            &publisher,
            &["fleet", "init", "--machine-name", &publisher.name],
        )?;
        let address = start_node(&program, &publisher.home, children)?.ready()?;
        let token = run(
            &publisher,
            &["fleet", "invite", "--expires", "1d", "--addr", &address],
        )?;
        let fleet = Self {
            publisher,
            others,
            interrupt: interrupt.clone(),
        };
        let mut starting = Vec::new();
        for node in &fleet.others {
            fleet.go_on()?;
            run(node, &["join", "--machine-name", &node.name, &token])?;
            starting.push(start_node(&program, &node.home, children)?);
        }
        starting
            .into_iter()
            .try_for_each(|node: Starting| node.ready().map(drop))?;
        Ok(fleet)
    }

    /// Who publishes.
    pub const fn publisher(&self) -> &Node {
        &self.publisher
    }

    /// Who pulls.
    pub fn others(&self) -> &[Node] {
        &self.others
    }

    /// All, the publisher first.
    pub fn nodes(&self) -> Vec<Node> {
        [std::slice::from_ref(&self.publisher), &self.others].concat()
    }

    /// Asks a node.
    ///
    /// # Errors
    /// What it says, with the end of its log; or a signal has come.
    pub fn ask<C: Command>(&self, node: &Node, command: C) -> Result<C::Answer> {
        self.ask_with(node, command, |_| {})
    }

    /// Asks a node, and hears how far it has come.
    ///
    /// # Errors
    /// As [`Fleet::ask`].
    pub fn ask_with<C: Command>(
        &self,
        node: &Node,
        command: C,
        on_progress: impl FnMut(Progress),
    ) -> Result<C::Answer> {
        self.go_on()?;
        let answer =
            Client::connect(&node.home).and_then(|client| client.run(command, on_progress, |_| {}));
        answer.map_err(|error| {
            let what = match error {
                ClientError::NoDaemon { .. } | ClientError::Lost => {
                    "its process has ended".to_owned()
                }
                other => format!("{:#}", anyhow::Error::from(other)),
            };
            anyhow!(
                "{}: {what}\nthe end of its log:\n{}",
                node.name,
                log_tail(&node.home)
            )
        })
    }

    /// Asks nodes the same at once, each from a thread of its own; the answers in the nodes' order.
    ///
    /// # Errors
    /// The first node's that fails, once all have ended.
    pub fn ask_all<C>(
        &self,
        nodes: &[Node],
        watch: &Watch,
        command: &C,
        finished: impl Fn(&C::Answer) -> String + Sync,
    ) -> Result<Vec<C::Answer>>
    where
        C: Command + Clone + Send,
        C::Answer: Send,
    {
        thread::scope(|scope| {
            let ask = |(at, node)| {
                let (command, finished) = (command.clone(), &finished);
                scope.spawn(move || {
                    let answer =
                        self.ask_with(node, command, |progress| watch.progress(at, progress))?;
                    watch.finished(at, &finished(&answer));
                    Ok(answer)
                })
            };
            // All are started before the first is waited for.
            let threads: Vec<_> = nodes.iter().enumerate().map(ask).collect();
            let join = |thread: thread::ScopedJoinHandle<'_, Result<C::Answer>>| {
                thread
                    .join()
                    .unwrap_or_else(|_| Err(anyhow!("a thread of the demo panicked")))
            };
            let answers: Vec<_> = threads.into_iter().map(join).collect();
            watch.clear();
            answers.into_iter().collect()
        })
    }

    fn go_on(&self) -> Result<()> {
        go_on(&self.interrupt)
    }
}

impl Node {
    fn new(dir: &Path, name: String) -> Self {
        Self {
            home: dir.join(&name),
            name,
        }
    }
}

/// An error once a signal has come; what it says is not shown.
///
/// # Errors
/// A signal has come.
pub fn go_on(interrupt: &Interrupt) -> Result<()> {
    if interrupt.signal().is_some() {
        bail!("stopped")
    } else {
        Ok(())
    }
}
