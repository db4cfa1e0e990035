//! What state QEMU says that a machine is in.

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
