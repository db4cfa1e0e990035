//! Driving QEMU: from a manifest's `Machine` to a process that runs, is captured, and goes on elsewhere.
//!
//! [`probe()`] says what the QEMU here can do, [`describe()`] what a new machine is like, [`check()`] whether one can run here, [`arguments()`] how it
//! is started. [`Qemu`] is the running process with its monitor. What crosses from one process to the next is a file of memory, mapped shared
//! and left out of the migration stream, the stream itself (about half a megabyte of CPU and device state), and qcow2 overlays over a
//! read-only base. Not here: where those files come from, and when to do what.

mod agent;
mod arguments;
mod balloon;
mod check;
mod describe;
mod disks;
mod log;
mod monitor;
mod probe;
mod process;
mod state;
mod status;

use std::path::PathBuf;

pub use agent::Clock;
pub use arguments::arguments;
pub use balloon::Shrunk;
pub use check::check;
pub use describe::{Wanted, describe};
pub use disks::create_overlay;
pub use probe::{Probed, probe};
pub use process::{BeforeExec, Qemu};
pub use status::Status;

/// Where the parts of a machine lie while it runs.
#[derive(Debug, Clone)]
pub struct Places {
    /// Directory of this process alone, reachable by its user only, with a short path: the sockets are made in it.
    pub dir: PathBuf,
    /// The file that is the machine's memory. QEMU maps it shared, writes to it, and punches holes where the guest frees memory.
    pub ram: PathBuf,
    /// One for each device of the machine that reads a component, in the same order.
    pub disks: Vec<DiskPlace>,
    /// The kernel, where it is booted directly.
    pub kernel: Option<PathBuf>,
    /// Its initial ramdisk.
    pub initrd: Option<PathBuf>,
    /// Whether a state will be loaded: nothing is booted then, and memory is taken as it lies.
    pub incoming: bool,
    /// Whether QEMU is to be confined by seccomp: [`Probed::sandbox`].
    pub sandbox: bool,
}

/// Where a disk lies.
#[derive(Debug, Clone)]
pub struct DiskPlace {
    /// The component that it shows.
    pub component: String,
    /// What the overlays lie on.
    pub base: DiskBase,
    /// qcow2 files without backing names, the lowest first, at least one: the last is written to, the others are only read.
    pub overlays: Vec<PathBuf>,
}

/// What a disk's overlays lie on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskBase {
    /// An NBD server's Unix socket; its default export, read only.
    Nbd(PathBuf),
    /// An image file, read only.
    File {
        /// The file.
        path: PathBuf,
        /// QEMU's word for its format, such as `raw`.
        format: String,
    },
    /// Nothing: what the overlays do not hold is zero.
    None,
}

impl Places {
    /// The monitor's socket, which speaks QMP. One client at a time: the [`Qemu`] that started it.
    pub fn monitor(&self) -> PathBuf {
        self.dir.join("monitor.sock")
    }

    /// The socket of the first serial port. What the guest prints while nobody is connected is lost.
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.sock")
    }

    /// The socket of the guest agent's port.
    pub fn agent(&self) -> PathBuf {
        self.dir.join("agent.sock")
    }

    /// What QEMU prints, the first MiB of it.
    pub fn log(&self) -> PathBuf {
        self.dir.join("qemu.log")
    }

    /// The socket that a state passes through while it is saved or loaded.
    fn transit(&self) -> PathBuf {
        self.dir.join("state.sock")
    }
}

#[cfg(test)]
mod tests;
