//! Answers to what moves or reads content: `publish`, `plan`, `pull`, `export`, `verify`.

use std::path::PathBuf;

use capsule_proto::{CapsuleId, RootHash};
use serde::{Deserialize, Serialize};

use super::ComponentInfo;

/// Answer to `publish`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Published {
    /// The capsule.
    pub capsule: CapsuleId,
    /// `CHANNEL:VERSION`.
    pub name: String,
    /// Whether this content was already published under this name, so that nothing was done.
    pub unchanged: bool,
    /// Its components.
    pub components: Vec<ComponentInfo>,
    /// Bytes of content.
    pub content_bytes: u64,
    /// Of these, bytes that were zero.
    pub zero_bytes: u64,
    /// With `trim`: bytes of free space and of clean journals that were left out.
    pub trimmed_bytes: u64,
    /// Without it: about how many bytes of old data it would leave out, where that is known and worth it.
    pub trimmable_bytes: Option<u64>,
    /// Of these, bytes that repeat earlier ones.
    pub repeated_bytes: u64,
    /// The version that it was published against, if any.
    pub parent: Option<String>,
    /// Bytes of content that the parent has in the same place.
    pub inherited_bytes: u64,
    /// Bytes of content that it has in another place.
    pub copied_bytes: u64,
    /// Bytes of new content that were compressed against its content.
    pub referring_bytes: u64,
    /// Bytes of content that were not read: the path itself told that the parent has them.
    pub unread_bytes: u64,
    /// Bytes of packs made.
    pub pack_bytes: u64,
    /// Bytes of indexes made.
    pub index_bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// Answer to `rebase`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Rebased {
    /// The capsule.
    pub capsule: CapsuleId,
    /// Its name, or its id where it has none.
    pub name: String,
    /// Whether the layers were known already, so that nothing was added.
    pub unchanged: bool,
    /// Bytes of packs made.
    pub pack_bytes: u64,
    /// Bytes of indexes made.
    pub index_bytes: u64,
    /// How long it took.
    pub seconds: f64,
}

/// Answer to `plan`. All figures are distinct verified blob bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Planned {
    /// The capsule.
    pub capsule: CapsuleId,
    /// Its name, as resolved; none where it was given by id and has none.
    pub name: Option<String>,
    /// By component.
    pub components: Vec<PlannedComponent>,
    /// Bytes of manifest, indexes and packs that are here already, those fetched for this plan included.
    pub have_bytes: u64,
    /// Bytes that a pull fetches from now on.
    pub fetch_bytes: u64,
    /// Bytes of manifest and indexes that were fetched for this plan; a pull does not fetch them again.
    pub planning_bytes: u64,
    /// Bytes of content that the capsule comes to.
    pub content_bytes: u64,
    /// How long planning took.
    pub seconds: f64,
}

/// What a pull fetches for a component.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PlannedComponent {
    /// The component.
    #[serde(flatten)]
    pub component: ComponentInfo,
    /// By which way: `layers` or `blob`.
    pub way: String,
    /// How many layers it goes through.
    pub layers: usize,
    /// Bytes that are here.
    pub have: u64,
    /// Of its new layers: bytes of content that what is here has in the same place.
    pub inherited: u64,
    /// Bytes of content that are copied from other places.
    pub copied: u64,
    /// Bytes of packs that are compressed against older content.
    pub referring: u64,
    /// Bytes of packs that are not.
    pub new: u64,
    /// Bytes of packs that need not be fetched, as this machine has their content otherwise.
    pub found: u64,
    /// Bytes to be fetched.
    pub fetch: u64,
}

/// Answer to `pull`. Byte figures are distinct verified blob bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pulled {
    /// The capsule.
    pub capsule: CapsuleId,
    /// Its name, as resolved.
    pub name: Option<String>,
    /// Whether it was already complete, so that nothing was done.
    pub unchanged: bool,
    /// Its components, and what each cost.
    pub components: Vec<PlannedComponent>,
    /// Bytes fetched: manifest, indexes and packs.
    pub fetched_bytes: u64,
    /// Bytes of these blobs that were here before.
    pub had_bytes: u64,
    /// Of the fetched bytes, those of manifest and indexes.
    pub planning_bytes: u64,
    /// Bytes of content.
    pub content_bytes: u64,
    /// Fetched bytes by the peer that sent them, most first.
    pub by_peer: Vec<PeerBytes>,
    /// From the request to the first pack byte's request: finding the name, manifest and indexes.
    pub planning_seconds: f64,
    /// From the first request for packs to packs verified and durable.
    pub fetch_seconds: f64,
    /// CPU seconds of this node's process in that time, whatever else it did.
    pub fetch_cpu_seconds: f64,
    /// Checking the components against their roots.
    pub check_seconds: f64,
    /// All together.
    pub seconds: f64,
}

/// Bytes from a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerBytes {
    /// Its network id.
    pub peer: String,
    /// Its machine's name, where known.
    pub name: Option<String>,
    /// Its machine's id, where known.
    pub machine: Option<String>,
    /// Verified bytes.
    pub bytes: u64,
}

/// Answer to `export`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Exported {
    /// The capsule.
    pub capsule: CapsuleId,
    /// The component written.
    pub component: ComponentInfo,
    /// Where to.
    #[serde(with = "crate::control::path")]
    pub to: PathBuf,
    /// Bytes of content.
    pub bytes: u64,
    /// Of a tree: files written and checked.
    pub files: Option<u64>,
    /// How long it took.
    pub seconds: f64,
    /// What is missing: owners, device nodes ... for lack of rights.
    pub warnings: Vec<String>,
}

/// Answer to `nbd`, as soon as clients can come.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Serving {
    /// The capsule.
    pub capsule: CapsuleId,
    /// Its name, if it was asked for by one.
    pub name: Option<String>,
    /// The component.
    pub component: ComponentInfo,
    /// Where clients find it.
    pub uri: String,
    /// Where all of it was written out before: bytes that this takes on the disk.
    pub whole_bytes: Option<u64>,
    /// And how long it took, after all of it was here.
    pub whole_seconds: Option<f64>,
}

/// Answer to `mount`, as soon as the files are there.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Mounted {
    /// The capsule.
    pub capsule: CapsuleId,
    /// Its name, if it was asked for by one.
    pub name: Option<String>,
    /// The components that are shown.
    pub components: Vec<ComponentInfo>,
    /// Where.
    #[serde(with = "crate::control::path")]
    pub at: PathBuf,
}

/// Answer to `verify`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Verified {
    /// Blobs and components read.
    pub checked: u64,
    /// Bytes of these.
    pub checked_bytes: u64,
    /// What was damaged.
    pub damaged: Vec<DamageInfo>,
    /// Bytes that were damaged.
    pub damaged_bytes: u64,
    /// Of these, bytes fetched again.
    pub repaired_bytes: u64,
    /// How long it took.
    pub seconds: f64,
}

/// Damage found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DamageInfo {
    /// The blob or component.
    pub root: RootHash,
    /// `manifest`, `listing`, `index`, `pack`, `component` or `other`.
    pub kind: String,
    /// Bytes that did not verify.
    pub bytes: u64,
    /// Of these, bytes fetched again.
    pub repaired: u64,
}
