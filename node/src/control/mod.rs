//! The control API: how the command line (and anything else on this machine) talks to the daemon.
//!
//! One Unix socket a home, mode 0600. A connection carries one request and its replies, each a line of JSON:
//!
//! ```text
//! -> {"status":{}}
//! <- {"progress":{"phase":"fetching","done":4096,"total":8192,"rate":100,"peers":2,"written":0,"what":"disk0"}}   any number
//! <- {"notice":"..."}                                                                                          any number
//! <- {"done":{...}}   or   {"failed":{"code":"not-found","message":"...","hint":"..."}}                        once, last
//! ```
//!
//! Closing the connection cancels the request; what a transfer verified stays. Each request type is a [`Command`] with
//! its answer's type: the field names in `request`, `answer` and `event` are the documented, stable keys of `--json`.
//! Sizes are bytes, times seconds since 1970, durations seconds.
//!
//! All keys: `node/docs/control.md`.
//!
//! Not here: what a request does (`publish`, `pull` ...), and how answers are shown (`cli`).

mod answer;
mod client;
mod error;
mod event;
mod machine;
mod path;
mod request;
mod server;

pub use answer::*;
pub use client::{Canceller, Client, ClientError};
pub use error::{Failure, FailureCode};
pub use event::{Phase, Progress, Reply};
pub use machine::{
    Base, ByteRange, Capture, Captured, CheckName, Describe, Described, NameFree, Patch, Prefetch,
    Prefetched, ReadFirst,
};
pub use request::*;
pub(crate) use request::{commands, effort, text};
pub use server::{Handler, MAX_CLIENTS, Reporter, ServerError, listen, serve};

/// Longest request line in bytes: the longest holds two paths and a name.
pub const MAX_REQUEST_LEN: usize = 1 << 20;
/// Longest reply line in bytes: `hashes` of a hundred thousand blobs.
pub const MAX_REPLY_LEN: usize = 16 << 20;
