//! Answers about capsules: `ls`, `show`, `layers`.

use capsule_proto::{CapsuleId, RootHash};
use serde::{Deserialize, Serialize};

/// A component of a capsule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComponentInfo {
    /// Its name in the capsule.
    pub name: String,
    /// `disk`, `file`, `tree`, `ram` or `device-state`.
    pub kind: String,
    /// BLAKE3 hash of the stream, or of the tree's listing.
    pub root: RootHash,
    /// Bytes of what the root names.
    pub size: u64,
    /// Bytes of content: of a tree, its regular files'.
    pub content_size: u64,
}

/// How much of a capsule is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Holding {
    /// All of it, checked.
    Complete,
    /// Some of it: a pull was begun.
    Partial,
    /// Nothing: it is known by name only.
    Absent,
}

/// Answer to `ls`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Listed {
    /// By name, those without a name last.
    pub capsules: Vec<ListedCapsule>,
}

/// A capsule in `ls`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ListedCapsule {
    /// The capsule.
    pub capsule: CapsuleId,
    /// Its names, newest first.
    pub names: Vec<String>,
    /// How much of it is here.
    pub holding: Holding,
    /// Bytes of content, where the manifest is here.
    pub content_bytes: Option<u64>,
    /// Bytes of manifest, indexes and packs that are here.
    pub stored_bytes: u64,
    /// Kinds of its components, where the manifest is here.
    pub kinds: Vec<String>,
    /// Who pins it: `user`, `publication`, `follow:CHANNEL`.
    pub pins: Vec<String>,
    /// Some other capsule is named the same with an equal sequence.
    pub conflict: bool,
    /// When its newest name was signed.
    pub issued: Option<u64>,
    /// When it came here.
    pub added: Option<u64>,
}

/// Answer to `show`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Shown {
    /// The capsule.
    pub capsule: CapsuleId,
    /// Records that name it, newest first.
    pub names: Vec<NameInfo>,
    /// How much of it is here.
    pub holding: Holding,
    /// Bytes of the manifest, where known.
    pub manifest_bytes: Option<u64>,
    /// Its components, where the manifest is here; empty else.
    pub components: Vec<ComponentInfo>,
    /// Bytes of content, where the manifest is here.
    pub content_bytes: Option<u64>,
    /// Layers known for its components.
    pub layers: Vec<LayerInfo>,
    /// Bytes of manifest, indexes and packs that are here.
    pub stored_bytes: u64,
    /// Who pins it.
    pub pins: Vec<String>,
    /// When it came here.
    pub added: Option<u64>,
    /// Other members that said to hold it, and whether complete; by machine id.
    pub holders: Vec<HolderInfo>,
}

/// A member that holds a capsule.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HolderInfo {
    /// Its network id.
    pub peer: String,
    /// Its name, where it is connected.
    pub name: Option<String>,
    /// Whether it holds all of it.
    pub complete: bool,
}

/// A record that names a capsule.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NameInfo {
    /// `CHANNEL:VERSION`.
    pub name: String,
    /// The capsule that it names.
    pub capsule: CapsuleId,
    /// Orders the channel's records.
    pub sequence: u64,
    /// When it was signed.
    pub issued: u64,
    /// When it ends.
    pub expires: Option<u64>,
    /// The machine that signed it.
    pub signer: String,
    /// Whether it is the newest of its channel.
    pub newest: bool,
    /// Whether another record says otherwise with equal right.
    pub conflict: bool,
}

/// A layer known by record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayerInfo {
    /// Name of the component that it makes.
    pub component: String,
    /// The component that it starts from; none: from nothing.
    pub parent: Option<RootHash>,
    /// The component that it makes.
    pub target: RootHash,
    /// `stream` or `contents`.
    pub space: String,
    /// Bytes of the target in that space.
    pub target_size: u64,
    /// Its index.
    pub index: BlobStatus,
    /// Its pack; none where it has no frames.
    pub pack: Option<BlobStatus>,
    /// Of a layer whose frames are told of in several orders, which: from the second on, what is read first is in front.
    pub order: u64,
    /// The machine that signed the record.
    pub signer: String,
    /// When it was signed.
    pub issued: u64,
}

/// A blob and how much of it is here.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BlobStatus {
    /// Its hash.
    pub root: RootHash,
    /// Its bytes.
    pub size: u64,
    /// Bytes that are here.
    pub have: u64,
}

/// Answer to `layers`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayerList {
    /// The capsule.
    pub capsule: CapsuleId,
    /// Those that lead to its components, then those that lead to their parents, and so on. At most about 4,096.
    pub layers: Vec<LayerInfo>,
    /// Through which of them, and of others, its components are read here, as far as they are here.
    pub reads: Vec<ReadInfo>,
}

/// How a component is read on this node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReadInfo {
    /// The component's name.
    pub component: String,
    /// Which of its bytes: `stream` or `contents`.
    pub space: String,
    /// Through how many layers.
    pub layers: usize,
    /// How many of these only this node has: it made them, and tells nobody of them.
    pub own: usize,
}
