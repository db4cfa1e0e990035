//! What a machine's process is asked, and what it answers: over a socket of its own, in the same manner as the daemon.

use capsule_chunker::layer::encode::Effort;
use capsule_proto::CapsuleId;
use capsule_proto::name::CapsuleName;
use serde::{Deserialize, Serialize};

use super::config::Origin;
use crate::control::{Published, commands, effort, text};

/// How a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MachineState {
    /// It does not run.
    Stopped,
    /// It is being started: what it reads first comes.
    Starting,
    /// It runs.
    Running,
    /// It is stopped for a moment, or by an error of a disk.
    Paused,
    /// It would run, but reads something that no peer has sent for a while.
    Waiting,
}

/// Asks how a machine is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct MachineStatus {}

/// Answers when a machine runs; tells progress until then.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct AwaitRunning {}

/// How a machine is: in lists, and when it runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineInfo {
    /// Its name.
    pub name: String,
    /// How it is.
    pub state: MachineState,
    /// The capsule that it was made from or last captured as.
    pub origin: Option<Origin>,
    /// Whether it went on, or will go on, where that capsule stopped.
    pub resume: bool,
    /// Bytes of memory.
    pub memory: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Bytes of its disks.
    pub disks: u64,
    /// Bytes written to disks and memory since it was last captured.
    pub written: u64,
    /// Bytes of memory and disks that were read from its capsules since it started.
    pub read: u64,
    /// Seconds from the start of its process until the guest ran; none before that.
    pub started_seconds: Option<f64>,
    /// Since when something is waited for that no peer sends, in seconds.
    pub waiting_seconds: Option<f64>,
}

/// Captures a machine, which goes on at once.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CaptureMachine {
    /// What to publish it as: `CHANNEL:VERSION`.
    #[serde(with = "text")]
    pub name: CapsuleName,
    /// How hard to compress.
    #[serde(default, with = "effort")]
    pub effort: Effort,
    /// When the name ends, in seconds since 1970.
    #[serde(default)]
    pub expires: Option<u64>,
    /// Compares memory that was never captured with the disks: less in all, but who resumes it without having them fetches more of them first.
    #[serde(default)]
    pub against_disks: bool,
    /// Leaves the guest's memory as large as it is.
    #[serde(default)]
    pub no_balloon: bool,
    /// Does not go on: the machine is then where its capsule is, and nowhere else.
    #[serde(default)]
    pub stop: bool,
}

/// Answer to a capture.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CapturedMachine {
    /// The machine.
    pub machine: String,
    /// Seconds for which the guest stood still; none where it did not run, or does not go on.
    pub pause_seconds: Option<f64>,
    /// Whether the guest gave memory back before.
    pub balloon: bool,
    /// Bytes written to memory since the last capture, or since it was resumed.
    pub ram_written: u64,
    /// Bytes written to its disks.
    pub disk_written: u64,
    /// What was published.
    #[serde(flatten)]
    pub published: Published,
}

/// Stops a machine.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct StopMachine {
    /// At once, as if its plug was pulled.
    #[serde(default)]
    pub force: bool,
    /// How long its guest may take to shut down, in seconds; a default where absent.
    #[serde(default)]
    pub wait: Option<u64>,
}

/// Answer to a stop.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StoppedMachine {
    /// The machine.
    pub machine: String,
    /// Whether its guest shut down by itself.
    pub orderly: bool,
    /// The capsule that it was last captured as; what was written since lies in its overlays.
    pub capsule: Option<CapsuleId>,
}

/// All machines of a home, by name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineList {
    /// How each is.
    pub machines: Vec<MachineInfo>,
}

/// What removing a machine removed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RemovedMachine {
    /// The machine.
    pub machine: String,
}

commands! {
    /// Any request to a machine's process.
    MachineRequest {
        MachineStatus => MachineInfo,
        AwaitRunning => MachineInfo,
        CaptureMachine => CapturedMachine,
        StopMachine => StoppedMachine,
    }
}
