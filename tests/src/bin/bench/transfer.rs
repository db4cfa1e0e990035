//! One transfer over loopback, measured the same way whoever does it.
//!
//! Three moments: the receiver is told what to fetch; the first data crosses the loopback interface; everything is on
//! the receiver's disk. What lies before the second (start of the program, tracker, choking rounds, planning) and what after
//! it are told apart, so that no tool's timers are taken for its speed.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::measure::{Family, Used, cpu_of_machine, loopback_bytes, sync_result};
use crate::process::{Deadline, Process};

/// Data flows once so many bytes have crossed: more than handshakes, announcements and the like take.
const FIRST_DATA: u64 = 256 << 10;
/// How often the loopback interface is looked at until data flows.
const GLANCE: Duration = Duration::from_millis(2);
/// How often the processes' accounts are looked at.
const LOOK: Duration = Duration::from_millis(20);
/// How often the file is looked for by which a client tells that it is done.
const KNOCK: Duration = Duration::from_millis(4);

/// What a transfer cost.
#[derive(Debug, Clone, Serialize)]
pub struct Transfer {
    /// From the order to everything on the disk.
    pub wall_seconds: f64,
    /// From the order to the first data.
    pub first_data_seconds: f64,
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
    /// From the first data to everything on the disk.
    pub fn transfer_seconds(&self) -> f64 {
        self.wall_seconds - self.first_data_seconds
    }

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
    first_data: FirstData,
    machine: f64,
    sender: Family,
    receiver: Family,
}

impl Meter {
    /// Begins, right before the order; both ends run already.
    pub fn start(sender: u32, receiver: u32) -> Self {
        Self::of(
            Family::watch(sender),
            Family::watch(receiver),
            Instant::now(),
        )
    }

    /// Begins, and starts the receiver, to which its command line is the order.
    pub fn start_with(
        sender: u32,
        receiver: impl FnOnce() -> Result<Process>,
    ) -> Result<(Self, Process)> {
        let sender = Family::watch(sender);
        let started = Instant::now();
        let receiver = receiver()?;
        // All that it used since it exists counts: it has no past.
        let meter = Self::of(sender, Family::new(receiver.pid()), started);
        Ok((meter, receiver))
    }

    fn of(sender: Family, receiver: Family, started: Instant) -> Self {
        Self {
            started,
            first_data: FirstData::watch(started),
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
        Transfer {
            wall_seconds: wall,
            first_data_seconds: self.first_data.seconds().unwrap_or(wall),
            peer_known_seconds: None,
            sender: self.sender.used(),
            receiver: self.receiver.used(),
            machine_cpu_seconds: cpu_of_machine() - self.machine,
        }
    }
}

/// Waits for the first data in a thread of its own.
#[derive(Debug)]
struct FirstData {
    stop: Arc<AtomicBool>,
    /// Microseconds from the start; 0 until there is any.
    seen: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl FirstData {
    fn watch(started: Instant) -> Self {
        let (stop, seen) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let before = loopback_bytes();
        let (stopped, tell) = (stop.clone(), seen.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if loopback_bytes() - before >= FIRST_DATA {
                    tell.store(
                        started.elapsed().as_micros().max(1) as u64,
                        Ordering::Relaxed,
                    );
                    return;
                }
                std::thread::sleep(GLANCE);
            }
        });
        Self {
            stop,
            seen,
            thread: Some(thread),
        }
    }

    fn seconds(&self) -> Option<f64> {
        match self.seen.load(Ordering::Relaxed) {
            0 => None,
            micros => Some(micros as f64 / 1e6),
        }
    }
}

impl Drop for FirstData {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // It does nothing that could panic.
        let _ = self.thread.take().map(JoinHandle::join);
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
