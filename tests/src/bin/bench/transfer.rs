//! One transfer over loopback, measured the same way whoever does it.
//!
//! Four moments: the receiver is told what to fetch; the first data crosses the loopback interface; the last does; everything is
//! on the receiver's disk, and it says so. The three spans between them are told apart: waiting (start of the program,
//! tracker, choking rounds, planning), the data itself, and the end. No tool's timers are taken for its speed.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use capsule_tests::accounts::cpu_of_machine;
use serde::Serialize;

use crate::flow::Flow;
use crate::measure::{Family, Used, sync_result};
use crate::memory::Memory;
use crate::process::{Deadline, Process};

/// How often the processes' accounts are looked at.
const LOOK: Duration = Duration::from_millis(20);
/// How often the file is looked for by which a client tells that it is done.
const KNOCK: Duration = Duration::from_millis(4);

/// What a transfer cost.
#[derive(Debug, Clone, Serialize)]
pub struct Transfer {
    /// From the order to everything on the disk.
    pub wall_seconds: f64,
    /// Of these, until the first data crossed.
    pub wait_seconds: f64,
    /// From the first data to the last.
    pub data_seconds: f64,
    /// From the last data on.
    pub end_seconds: f64,
    /// From the order until the receiver knew the sender, for BitTorrent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_known_seconds: Option<f64>,
    /// What the sending end used.
    pub sender: Used,
    /// What the receiving end used.
    pub receiver: Used,
    /// CPU seconds of the whole machine meanwhile: also what the kernel did on nobody's account, and this program.
    pub machine_cpu_seconds: f64,
}

impl Transfer {
    /// CPU seconds of both ends.
    pub fn cpu_seconds(&self) -> f64 {
        self.sender.cpu_seconds + self.receiver.cpu_seconds
    }
}

/// How a receiver tells that it has everything.
#[derive(Debug, Clone, Copy)]
pub enum Done<'a> {
    /// It ends.
    Ends,
    /// It makes this file.
    Makes(&'a Path),
}

/// Measures one transfer.
#[derive(Debug)]
pub struct Meter {
    started: Instant,
    flow: Flow,
    machine: f64,
    sender: Family,
    receiver: Family,
}

impl Meter {
    /// Begins, right before the order of so many bytes; both ends run already.
    pub fn start(bytes: u64, sender: u32, receiver: u32) -> Result<Self> {
        let memory = Memory::touch(bytes)?;
        Ok(Self::of(
            memory,
            Family::watch(sender),
            Family::watch(receiver),
            Instant::now(),
        ))
    }

    /// Begins, and starts the receiver, to which its command line is the order.
    pub fn start_with(
        bytes: u64,
        sender: u32,
        receiver: impl FnOnce() -> Result<Process>,
    ) -> Result<(Self, Process)> {
        let memory = Memory::touch(bytes)?;
        let sender = Family::watch(sender);
        let started = Instant::now();
        let receiver = receiver()?;
        // All that it used since it exists counts: it has no past.
        let meter = Self::of(memory, sender, Family::new(receiver.pid()), started);
        Ok((meter, receiver))
    }

    fn of(memory: Memory, sender: Family, receiver: Family, started: Instant) -> Self {
        Self {
            started,
            flow: Flow::watch(started, memory),
            machine: cpu_of_machine(),
            sender,
            receiver,
        }
    }

    /// When it began.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Waits until the receiver has everything, and that is on the disk.
    pub fn finish(
        mut self,
        receiver: &mut Process,
        done: Done<'_>,
        target: &Path,
        deadline: &Deadline,
    ) -> Result<Transfer> {
        let mut looked = Instant::now();
        loop {
            match done {
                Done::Ends if receiver.ended(LOOK).is_some() => break,
                Done::Ends => {}
                Done::Makes(file) if file.exists() => break,
                Done::Makes(_) => {
                    receiver.check_runs()?;
                    std::thread::sleep(KNOCK);
                }
            }
            if looked.elapsed() >= LOOK {
                self.now();
                looked = Instant::now();
            }
            deadline.check("the transfer")?;
        }
        sync_result(target)?;
        let transfer = self.now();
        if matches!(done, Done::Ends) {
            receiver.succeeded()?;
        }
        Ok(transfer)
    }

    /// What it has cost so far.
    pub fn now(&mut self) -> Transfer {
        let wall = self.started.elapsed().as_secs_f64();
        self.sender.look();
        self.receiver.look();
        // Whoever moves less than can be told from chatter does nothing but wait.
        let (first, last) = self.flow.span().unwrap_or((wall, wall));
        let (first, last) = (first.min(wall), last.min(wall));
        Transfer {
            wall_seconds: wall,
            wait_seconds: first,
            data_seconds: last - first,
            end_seconds: wall - last,
            peer_known_seconds: None,
            sender: self.sender.used(),
            receiver: self.receiver.used(),
            machine_cpu_seconds: cpu_of_machine() - self.machine,
        }
    }
}

/// Fails unless two files hold the same bytes: a tool that was measured must have done its work.
pub fn same_content(source: &Path, target: &Path) -> Result<()> {
    let hash = |path: &Path| -> Result<blake3::Hash> {
        let mut hasher = blake3::Hasher::new();
        let file =
            std::fs::File::open(path).with_context(|| format!("opening {}", path.display()))?;
        hasher.update_reader(file)?;
        Ok(hasher.finalize())
    };
    ensure!(
        hash(source)? == hash(target)?,
        "it said that it was done, but delivered other bytes than the source's"
    );
    Ok(())
}
