//! Answers about the node and its network: `status`, `peers`, `hashes`, `rates`.

use std::path::PathBuf;

use capsule_proto::RootHash;
use serde::{Deserialize, Serialize};

use super::Holding;
use crate::control::{PeersWhere, Progress};

/// Answer to `status`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeStatus {
    /// The program's version.
    pub version: String,
    /// The home directory.
    #[serde(with = "crate::control::path")]
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
    /// The latest of these.
    pub bans: Vec<BanInfo>,
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
    /// Caps of rates that hold now.
    pub caps: Vec<RateInfo>,
    /// Recent troubles a person should know: refused connections, bans, damage. Newest last.
    pub troubles: Vec<String>,
}

/// A peer that sent wrong content, and is refused until its ban ends.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BanInfo {
    /// Its network id.
    pub peer: String,
    /// Its machine's name, where it was connected since the start.
    pub name: Option<String>,
    /// What it did.
    pub reason: String,
    /// When the ban ends.
    pub until: Option<u64>,
}

/// A pull under way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TransferInfo {
    /// What was asked for.
    pub capsule: String,
    /// How far it has come.
    pub progress: Progress,
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
    /// Label of its site, where it has one.
    pub site: Option<String>,
    /// Whether it is in another site.
    pub beyond: bool,
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

/// Answer to `rates`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RateList {
    /// By direction, and by where the peers are.
    pub rates: Vec<RateInfo>,
}

/// The rate of one direction, to or from some of the peers, all together.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RateInfo {
    /// `upload` or `download`.
    pub direction: String,
    /// Which peers.
    pub peers: PeersWhere,
    /// What was set.
    pub schedule: String,
    /// The cap now, in bits a second, where there is one.
    pub cap: Option<u64>,
    /// When it changes next, where it does.
    pub next_change: Option<u64>,
    /// The cap from then on, in bits a second, where there is one.
    pub next_cap: Option<u64>,
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
