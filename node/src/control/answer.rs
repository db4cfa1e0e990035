//! Answers: the last line of a successful request, and what `--json` prints.

use std::path::PathBuf;

use capsule_proto::{CapsuleId, RootHash};
use serde::{Deserialize, Serialize};

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
    /// Of these, bytes that repeat earlier ones.
    pub repeated_bytes: u64,
    /// Bytes of packs made.
    pub pack_bytes: u64,
    /// Bytes of indexes made.
    pub index_bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// What a person should know.
    pub warnings: Vec<String>,
}

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
    /// Layers known for its components.
    pub layers: Vec<LayerInfo>,
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

/// Answer to `follow`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Followed {
    /// The channel.
    pub channel: String,
    /// Whether it was not followed before.
    pub new: bool,
    /// Its newest version now, if one is known; it is being pulled.
    pub newest: Option<String>,
}

/// Answer to `unfollow`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Unfollowed {
    /// The channel.
    pub channel: String,
    /// Whether it was followed.
    pub followed: bool,
}

/// Answer to `export`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Exported {
    /// The capsule.
    pub capsule: CapsuleId,
    /// The component written.
    pub component: ComponentInfo,
    /// Where to.
    #[serde(with = "super::path")]
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

/// Answer to `status`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeStatus {
    /// The program's version.
    pub version: String,
    /// The home directory.
    #[serde(with = "super::path")]
    pub home: PathBuf,
    /// The fleet's id.
    pub fleet: String,
    /// This machine's id.
    pub machine: String,
    /// This machine's name.
    pub machine_name: String,
    /// This node's network id.
    pub peer: String,
    /// `publisher`, `admin`; every machine is a member.
    pub roles: Vec<String>,
    /// Channels that it may publish to; none: all (if it is a publisher).
    pub channels: Option<Vec<String>>,
    /// When its credential ends.
    pub credential_expires: u64,
    /// The site's label, where set.
    pub site: Option<String>,
    /// Addresses that it listens on.
    pub listening: Vec<String>,
    /// Seconds since it started.
    pub uptime: u64,
    /// Connected peers.
    pub peers: usize,
    /// Peers that are banned.
    pub banned: usize,
    /// Records known.
    pub records: usize,
    /// Capsules held completely.
    pub capsules: usize,
    /// Capsules held in part.
    pub partial: usize,
    /// Bytes in the store.
    pub store_bytes: u64,
    /// The store's quota, where set.
    pub quota: Option<u64>,
    /// Bytes free on the store's file system.
    pub free_bytes: u64,
    /// Content bytes sent since the start.
    pub sent_bytes: u64,
    /// Verified content bytes received since the start.
    pub received_bytes: u64,
    /// Pulls under way.
    pub transfers: Vec<TransferInfo>,
    /// Channels that are followed.
    pub follows: Vec<FollowInfo>,
    /// Recent troubles a person should know: refused connections, bans, damage. Newest last.
    pub troubles: Vec<String>,
}

/// A pull under way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TransferInfo {
    /// What was asked for.
    pub capsule: String,
    /// How far it has come.
    pub progress: super::Progress,
}

/// A channel that is followed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FollowInfo {
    /// The channel.
    pub channel: String,
    /// Its newest version known.
    pub newest: Option<String>,
    /// How much of that is here.
    pub holding: Holding,
    /// Since when.
    pub since: u64,
    /// Why the last try failed, where it did; it is tried again.
    pub trouble: Option<String>,
}

/// Answer to `peers`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PeerList {
    /// By name.
    pub peers: Vec<ConnectedPeer>,
}

/// A connected peer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ConnectedPeer {
    /// Its network id.
    pub peer: String,
    /// Its machine's name.
    pub name: String,
    /// Its machine's id.
    pub machine: String,
    /// `publisher`, `admin`.
    pub roles: Vec<String>,
    /// The address at the other end.
    pub address: String,
    /// Whether we dialled.
    pub dialled: bool,
    /// Round trip in seconds, once known.
    pub rtt: Option<f64>,
    /// Bytes a second received.
    pub rate_in: u64,
    /// Bytes a second sent.
    pub rate_out: u64,
    /// Content bytes received over this connection.
    pub bytes_in: u64,
    /// Content bytes sent over this connection.
    pub bytes_out: u64,
    /// How many blobs it announces.
    pub blobs: usize,
    /// Seconds since it connected.
    pub connected: u64,
    /// With `--have`: bytes of the blob that it announces.
    pub have: Option<u64>,
    /// With `--have`: the blob's size as it claims.
    pub have_of: Option<u64>,
}

/// Answer to `hashes`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HashList {
    /// By hash.
    pub hashes: Vec<HeldHash>,
}

/// A blob or component that this node holds and announces.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HeldHash {
    /// The hash.
    pub root: RootHash,
    /// `manifest`, `listing`, `index`, `pack`, `component` or `other`.
    pub kind: String,
    /// Its bytes.
    pub size: u64,
    /// Bytes that are here.
    pub have: u64,
    /// Content bytes of it sent since the start.
    pub sent: u64,
    /// Verified content bytes of it received since the start.
    pub received: u64,
}

/// Answer to `pin` and `unpin`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pinned {
    /// The capsule.
    pub capsule: CapsuleId,
    /// Whether that changed anything.
    pub changed: bool,
    /// Who pins it now.
    pub pins: Vec<String>,
}

/// Answer to `gc`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Collected {
    /// Whether nothing was really removed.
    pub dry_run: bool,
    /// Capsules removed (or that would be).
    pub capsules: Vec<CapsuleId>,
    /// Blobs and components removed.
    pub blobs: u64,
    /// Bytes freed.
    pub bytes: u64,
    /// Blobs that a transfer or export uses, so that they stayed.
    pub busy: u64,
}

/// Answer to `rm`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Removed {
    /// The capsule.
    pub capsule: CapsuleId,
    /// Blobs and components removed.
    pub blobs: u64,
    /// Bytes freed; what other capsules need stays.
    pub bytes: u64,
    /// Blobs that a transfer or export uses, so that they stayed.
    pub busy: u64,
}
