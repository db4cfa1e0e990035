//! What machines need of the daemon: what a capsule is, publishing a machine that was stopped, and what resuming one reads first.

use std::collections::BTreeMap;
use std::path::PathBuf;

use capsule_chunker::layer::encode::Effort;
use capsule_proto::manifest::{ComponentKind, Machine};
use capsule_proto::name::CapsuleName;
use capsule_proto::{CapsuleId, RootHash};
use serde::{Deserialize, Serialize};

use super::answer::ComponentInfo;
use super::request::{CapsuleRef, effort, text};

/// Publishes what a machine was at one stop, as a version of a channel.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Capture {
    /// `CHANNEL:VERSION`; the version must be given.
    #[serde(with = "text")]
    pub name: CapsuleName,
    /// How hard to compress.
    #[serde(default, with = "effort")]
    pub effort: Effort,
    /// When the name ends, in seconds since 1970.
    #[serde(default)]
    pub expires: Option<u64>,
    /// What resuming it takes. It names components.
    pub machine: Machine,
    /// All of its components, from the same stop.
    pub components: Vec<Captured>,
}

/// A component of a machine that was stopped.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Captured {
    /// Its name in the capsule.
    pub name: String,
    /// What it is; no tree.
    pub kind: ComponentKind,
    /// Its length in bytes; that of what lies below it where absent.
    #[serde(default)]
    pub size: Option<u64>,
    /// What lies under all patches; zeros where absent, and behind its end.
    #[serde(default)]
    pub base: Option<Base>,
    /// What was written upon that, the lowest first.
    #[serde(default)]
    pub patches: Vec<Patch>,
}

/// What a component was before.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Base {
    /// A component of a capsule. All of it is fetched where it is not here.
    Capsule {
        /// The capsule.
        capsule: CapsuleRef,
        /// The component's name in it.
        component: String,
    },
    /// A disk image, or a file, that nobody changes meanwhile.
    File {
        /// Absolute path.
        #[serde(with = "super::path")]
        path: PathBuf,
    },
}

/// What was written, and where.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Patch {
    /// Absolute path of the file that has the bytes.
    #[serde(with = "super::path")]
    pub data: PathBuf,
    /// Absolute path of the list of what was written, as `qemu-img map --output=json` tells it: of each run `start`, `length`, whether
    /// it is `present` (else it is what lies below), whether it is `zero`, and its `offset` in the file of bytes. All of the file where absent.
    #[serde(default, with = "super::path::option")]
    pub runs: Option<PathBuf>,
}

/// Tells what a capsule is; its manifest and indexes are fetched, and nothing else.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Describe {
    /// Which.
    pub capsule: CapsuleRef,
    /// How long to wait for the name, and for somebody who has the manifest, in seconds; a default where absent.
    #[serde(default)]
    pub wait: Option<u64>,
}

/// Answer to `describe`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Described {
    /// The capsule.
    pub capsule: CapsuleId,
    /// Its name, if it was asked for by one.
    pub name: Option<String>,
    /// Its components.
    pub components: Vec<ComponentInfo>,
    /// What resuming it takes, where it is a machine.
    pub machine: Option<Machine>,
    /// By component, what who resumed it before read of it first: start and length of each range, in order.
    pub prefetch: BTreeMap<String, Vec<(u64, u64)>>,
}

/// Publishes what was read of a component first, so that the next who resumes it fetches exactly that.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Prefetch {
    /// The component.
    pub component: RootHash,
    /// Start and length of each range, in order of use.
    pub ranges: Vec<(u64, u64)>,
}

/// Answer to `prefetch`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Prefetched {
    /// The component.
    pub component: RootHash,
    /// How many ranges were published.
    pub ranges: usize,
}
