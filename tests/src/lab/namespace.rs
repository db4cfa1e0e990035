//! Network namespaces: how threads and processes of the lab come into them.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::inside;

/// Where iproute2 keeps those that have names.
const NAMED: &str = "/run/netns";

/// A network namespace that has a name.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    handle: File,
}

impl Namespace {
    /// One that was made.
    pub fn open(name: &str) -> Result<Self> {
        let path = Path::new(NAMED).join(name);
        let handle = File::open(&path)
            .with_context(|| format!("opening the namespace {}", path.display()))?;
        Ok(Self {
            name: name.to_owned(),
            handle,
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Does something inside, on a thread of its own: sockets that it opens and processes that it starts stay there.
    ///
    /// # Panics
    /// Where the thread does.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let inside = || {
            self.enter()?;
            work()
        };
        thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Takes the calling thread inside, for good.
    pub fn enter(&self) -> Result<()> {
        use std::os::fd::AsFd;
        move_into_link_name_space(self.handle.as_fd(), Some(LinkNameSpaceType::Network))
            .with_context(|| format!("entering the namespace {}", self.name))
    }
}

/// Gives labs a place for names of their own, once a program; it ends with the mount namespace that the program runs in.
pub fn make_room_for_names() -> Result<()> {
    static MADE: Mutex<bool> = Mutex::new(false);
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    if !*made {
        let dir = Path::new(NAMED);
        std::fs::create_dir_all(dir).with_context(|| format!("making {NAMED}"))?;
        inside::mount_memory(dir)?;
        *made = true;
    }
    Ok(())
}

/// Has the lab's bridges pass packets on without showing them to a firewall, where the system would: all nodes share its processors, and no LAN
/// does that.
pub fn unfilter_bridges() {
    if inside::network() != Some(inside::Network::Own) {
        return;
    }
    for kind in ["arp", "ip", "ip6"] {
        // Where there is no such thing, nothing is shown to it.
        let _unfiltered = std::fs::write(
            format!("/proc/sys/net/bridge/bridge-nf-call-{kind}tables"),
            "0",
        );
    }
}

/// Runs a program that reads its orders from standard input.
pub fn batch(command: &mut Command, orders: &str) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {program}: the lab takes root and iproute2"))?;
    let mut stdin = child.stdin.take().context("it was piped")?;
    stdin.write_all(orders.as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "{program} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
