//! Why a request failed, in a form for programs and for people.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct Failure {
    /// For programs.
    pub code: FailureCode,
    /// What happened, naming the thing.
    pub message: String,
    /// The way out, where there is one that the message does not tell.
    pub hint: Option<String>,
}

/// Kinds of failures, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureCode {
    /// A name, capsule, component or path that does not exist, or is not held.
    NotFound,
    /// A name or beginning of an id that means several capsules.
    Ambiguous,
    /// A request that cannot be right, whatever the state.
    Invalid,
    /// Something is in the way: a version that has other content, a file that exists.
    Exists,
    /// The state forbids it: pinned, not held.
    Refused,
    /// This machine's credential does not allow it.
    NotPermitted,
    /// Nobody who is connected has it, or nobody is connected.
    Unreachable,
    /// The content is not what its hash says: the publisher's or the disk's fault.
    Damaged,
    /// The source changed while it was read.
    Changed,
    /// No room: disk or quota.
    Full,
    /// The client went away, or the node is stopping.
    Cancelled,
    /// Too many requests at once.
    Busy,
    /// The operating system refused something.
    Io,
    /// A fault of the program.
    Internal,
}

impl Failure {
    /// A failure without a hint.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: None,
        }
    }

    /// Adds the way out.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The request was stopped.
    pub fn cancelled() -> Self {
        Self::new(FailureCode::Cancelled, "stopped; what was verified is kept")
    }
}
