//! Answers to what decides what stays: `follow`, `unfollow`, `pin`, `unpin`, `gc`, `rm`.

use capsule_proto::CapsuleId;
use serde::{Deserialize, Serialize};

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
    /// Blobs that stay, of which parts that nothing is read from were freed.
    pub punched: u64,
    /// Bytes of these parts.
    pub punched_bytes: u64,
    /// Bytes freed, in all.
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
    /// Blobs that other capsules need, of which parts that nothing is read from were freed.
    pub punched: u64,
    /// Bytes of these parts.
    pub punched_bytes: u64,
    /// Bytes freed, in all; what other capsules need stays.
    pub bytes: u64,
    /// Blobs that a transfer or export uses, so that they stayed.
    pub busy: u64,
}
