//! Machines: made from disks or from capsules, run under QEMU, captured and resumed.
//!
//! A machine is a directory of the home (`config`): what it is like, what it stands upon (capsules, files), and what was written since. While it
//! runs, a process of its own has it (`host`), which goes on when the daemon is restarted: it keeps the memory (`ram`), hands QEMU its
//! disks, starts, stops and captures it (`qemu`), and asks the daemon for whatever has to come from peers or is to be published. Commands talk to that
//! process (`api`, `client`).
//!
//! Not here: how capsules are read while they come (`paging`), and how what was captured becomes one (`publish::capture`).

pub mod api;
pub mod client;
pub mod config;
pub mod create;
pub mod host;
pub mod qemu;
pub mod ram;
pub mod touched;

use std::future::Future;

use crate::control::{Failure, FailureCode};

/// Does what waits, for who does not.
///
/// # Errors
/// The system gives no threads.
fn block_on<T>(work: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(FailureCode::Io, error.to_string()))?;
    Ok(runtime.block_on(work))
}
