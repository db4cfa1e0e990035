//! What machines need of the daemon: what a capsule is, publishing a machine that was stopped, and what resuming one reads first.

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
    /// Compares memory that no older memory lies below with the disks: less in all, but who resumes it without having them fetches more of them first.
    #[serde(default)]
    pub against_disks: bool,
    /// What resuming it takes. It names components.
    #[serde(with = "hex")]
    pub machine: Box<Machine>,
    /// All of its components, from the same stop.
    pub components: Vec<Captured>,
}

/// Asks whether this machine may publish under a name that nothing has yet, before work is done that would be in vain.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CheckName {
    /// `CHANNEL:VERSION`; the version must be given.
    #[serde(with = "text")]
    pub name: CapsuleName,
    /// When the name is to end, in seconds since 1970.
    #[serde(default)]
    pub expires: Option<u64>,
}

/// Answer to `check-name`: it may.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NameFree {
    /// The name.
    pub name: String,
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
#[serde(try_from = "FlatBase", into = "FlatBase")]
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
        path: PathBuf,
    },
}

/// A base as it travels: the first two, or the third.
#[derive(Serialize, Deserialize)]
struct FlatBase {
    #[serde(default)]
    capsule: Option<CapsuleRef>,
    #[serde(default)]
    component: Option<String>,
    #[serde(default, with = "super::path::option")]
    file: Option<PathBuf>,
}

impl From<Base> for FlatBase {
    fn from(base: Base) -> Self {
        let (capsule, component, file) = match base {
            Base::Capsule { capsule, component } => (Some(capsule), Some(component), None),
            Base::File { path } => (None, None, Some(path)),
        };
        Self {
            capsule,
            component,
            file,
        }
    }
}

impl TryFrom<FlatBase> for Base {
    type Error = &'static str;

    fn try_from(flat: FlatBase) -> Result<Self, Self::Error> {
        match (flat.capsule, flat.component, flat.file) {
            (Some(capsule), Some(component), None) => Ok(Self::Capsule { capsule, component }),
            (None, None, Some(path)) => Ok(Self::File { path }),
            _ => Err("a base is a component of a capsule, or a file"),
        }
    }
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
    #[serde(with = "hex::option")]
    pub machine: Option<Machine>,
    /// What who resumed it before read first, of components of which that is known.
    pub prefetch: Vec<ReadFirst>,
}

/// What is read first of a component.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadFirst {
    /// The component's name.
    pub component: String,
    /// Which ranges, in order of use.
    pub ranges: Vec<ByteRange>,
}

/// A range of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByteRange {
    /// Its first byte.
    pub start: u64,
    /// Its length.
    pub length: u64,
}

/// Publishes what was read of a component first, so that the next who resumes it fetches exactly that; unless somebody did, or in the place of what they said, eight
/// times in all.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Prefetch {
    /// The component.
    pub component: RootHash,
    /// Which ranges, in order of use; at most 8,192.
    pub ranges: Vec<ByteRange>,
    /// Whether that is to be told in the place of what is known already, as that misses much.
    #[serde(default)]
    pub renews: bool,
}

/// Answer to `prefetch`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Prefetched {
    /// The component.
    pub component: RootHash,
    /// How many ranges were published.
    pub ranges: usize,
}

/// A machine, as in a manifest, in hexadecimal digits.
mod hex {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Machine;

    pub fn serialize<S: Serializer>(machine: &Machine, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&machine.to_text())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Box<Machine>, D::Error> {
        let machine = Machine::from_text(&String::deserialize(deserializer)?);
        machine.map(Box::new).map_err(D::Error::custom)
    }

    /// Where there may be none.
    pub mod option {
        use super::{Deserialize, Deserializer, Error, Machine, Serializer};

        pub fn serialize<S: Serializer>(
            machine: &Option<Machine>,
            serializer: S,
        ) -> Result<S::Ok, S::Error> {
            match machine {
                Some(machine) => serializer.serialize_str(&machine.to_text()),
                None => serializer.serialize_none(),
            }
        }

        pub fn deserialize<'de, D: Deserializer<'de>>(
            deserializer: D,
        ) -> Result<Option<Machine>, D::Error> {
            let text = Option::<String>::deserialize(deserializer)?;
            text.map(|text| Machine::from_text(&text).map_err(D::Error::custom))
                .transpose()
        }
    }
}
