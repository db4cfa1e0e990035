//! Hostile members of a lab's fleet: processes of the program `hostile`, each in a namespace of its own like any node.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::network::Host;
use super::scenario::Group;
use crate::hostile::Part;

/// One of them, which ends when this is dropped.
pub struct Foe {
    /// Its number among the nodes.
    pub number: usize,
    /// Its network id; strangers have none.
    pub peer: Option<String>,
    child: Child,
}

/// What they all are told.
pub struct Orders<'a> {
    /// Where their homes are.
    pub dir: &'a Path,
    /// How they come in.
    pub token: &'a str,
    /// Whom those trouble who act by hand.
    pub at: &'a [String],
    /// Files with the blobs that they claim to have.
    pub blobs: &'a [PathBuf],
    /// Decides what is left to chance.
    pub seed: u64,
    /// When they end by themselves, in seconds.
    pub seconds: u64,
    /// Where they listen.
    pub port: u16,
}

impl Foe {
    /// Starts one.
    pub fn start(number: usize, group: &Group, host: &Host, orders: &Orders) -> Result<Self> {
        let part = group.hostile.context("it is hostile")?;
        let program = std::env::current_exe()?.with_file_name("hostile");
        let mut command = Command::new(&program);
        command
            .arg(name(part))
            .arg("--home")
            .arg(orders.dir.join(format!("foe{number}")))
            .args(["--token", orders.token])
            .args(["--listen", &format!("{}:{}", host.address, orders.port)])
            .args(["--percent", &group.percent.to_string()])
            .args(["--seed", &(orders.seed ^ number as u64).to_string()])
            .args(["--seconds", &orders.seconds.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        for at in orders.at {
            command.args(["--at", at]);
        }
        for blob in orders.blobs {
            command.arg("--blob").arg(blob);
        }
        let child = host.namespace.run(|| {
            let child = command.spawn();
            child.with_context(|| {
                let program = program.display();
                format!("starting {program}: build it with `cargo build -p capsule-tests --bins`")
            })
        })?;
        Ok(Self {
            number,
            peer: None,
            child,
        })
    }

    /// Waits until it is in.
    pub fn is_ready(&mut self) -> Result<()> {
        let stdout = self.child.stdout.take().context("it was piped")?;
        for line in BufReader::new(stdout).lines() {
            let line = line?;
            match line.strip_prefix("peer ") {
                Some(peer) => self.peer = Some(peer.to_owned()),
                None if line == "ready" => return Ok(()),
                None => {}
            }
        }
        let status = self.child.wait()?;
        ensure!(
            status.success(),
            "the hostile member {} ended with {status} before it was in",
            self.number
        );
        Ok(())
    }
}

/// As the command line has it.
fn name(part: Part) -> String {
    use clap::ValueEnum;
    let value = part.to_possible_value().expect("none is skipped");
    value.get_name().to_owned()
}

impl Drop for Foe {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
