//! What QEMU tells unasked, and what state it says it is in.

use serde_json::Value;

/// Something that happened to a running machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A disk could not be read or written; a `Stopped` follows where the machine stands still for it. [`super::Qemu::cont`] tries again.
    DiskError {
        /// Which of the machine's disks, as it is numbered in `Places`; none where QEMU does not say.
        disk: Option<usize>,
        /// Whether it was a read.
        is_read: bool,
        /// Whether there is no room for a write.
        is_full: bool,
        /// In the operating system's words.
        reason: String,
    },
    /// It stands still.
    Stopped,
    /// It goes on.
    Resumed,
    /// It was reset, and boots again.
    Reset,
    /// It shuts down; the process ends.
    ShutDown {
        /// The guest did it.
        by_guest: bool,
    },
    /// The guest's kernel reported that it cannot go on.
    Panicked,
    /// The guest opened or closed its end of the agent's port.
    Agent {
        /// Something listens there now.
        is_there: bool,
    },
    /// The monitor's connection ended, so QEMU has ended or is about to.
    Gone,
}

impl Event {
    /// The event, if it is one of those that matter here.
    pub(super) fn parse(name: &str, data: &Value) -> Option<Self> {
        let is = |key: &str| data[key].as_bool().unwrap_or_default();
        Some(match name {
            "BLOCK_IO_ERROR" => Self::DiskError {
                disk: data["node-name"].as_str().and_then(super::disks::number_of),
                is_read: data["operation"] == "read",
                is_full: is("nospace"),
                reason: data["reason"].as_str().unwrap_or("unknown").to_owned(),
            },
            "STOP" => Self::Stopped,
            "RESUME" => Self::Resumed,
            "RESET" => Self::Reset,
            "SHUTDOWN" => Self::ShutDown {
                by_guest: is("guest"),
            },
            "GUEST_PANICKED" => Self::Panicked,
            "VSERPORT_CHANGE" => Self::Agent {
                is_there: is("open"),
            },
            _ => return None,
        })
    }
}

/// What a machine does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// It runs.
    Running,
    /// It was stopped, or has not begun.
    Paused,
    /// It stands still as a disk cannot be read or written.
    DiskError,
    /// It waits for its state, or is taking it.
    Incoming,
    /// Its state was saved; it goes on with `cont`.
    Saved,
    /// The guest has shut down, and QEMU has not ended yet.
    ShutDown,
    /// The guest's kernel cannot go on.
    Panicked,
    /// Another one, in QEMU's words.
    Other(String),
}

impl Status {
    pub(super) fn parse(word: &str) -> Self {
        match word {
            "running" => Self::Running,
            "paused" | "prelaunch" => Self::Paused,
            "io-error" => Self::DiskError,
            "inmigrate" => Self::Incoming,
            "postmigrate" | "finish-migrate" => Self::Saved,
            "shutdown" => Self::ShutDown,
            "guest-panicked" => Self::Panicked,
            other => Self::Other(other.to_owned()),
        }
    }
}
