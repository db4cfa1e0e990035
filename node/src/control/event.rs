//! What the daemon sends while it works, and last.

use serde::{Deserialize, Serialize};

use super::error::Failure;

/// One line from the daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply<A> {
    /// How far the work has come; a few times a second.
    Progress(Progress),
    /// Something a person should know, such as that a device is mounted.
    Notice(String),
    /// It runs from now on, until the client goes away: the answer, ahead of the end.
    Ready(A),
    /// It succeeded. The last line.
    Done(A),
    /// It failed. The last line.
    Failed(Failure),
}

/// How far the work has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Bytes done in this phase.
    pub done: u64,
    /// Bytes in all in this phase, once known.
    pub total: Option<u64>,
    /// Bytes a second.
    pub rate: u64,
    /// Connected peers that take part, while fetching.
    pub peers: usize,
    /// Bytes of result so far, while publishing: of packs.
    pub written: u64,
    /// Which component or blob, where there are several.
    pub what: Option<String>,
}

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Waiting for a name's record, or for somebody who has the content.
    Waiting,
    /// Examining the directory that is published.
    Scanning,
    /// Reading, hashing and compressing what is published.
    Publishing,
    /// Fetching manifest and indexes.
    Planning,
    /// Fetching packs.
    Fetching,
    /// Checking components against their roots.
    Checking,
    /// Writing an export.
    Exporting,
    /// Reading the store again.
    Verifying,
    /// Fetching what was found damaged.
    Repairing,
}
