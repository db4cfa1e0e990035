//! Requests: one type a command, each with the type of its answer.

use std::net::SocketAddr;
use std::path::PathBuf;

use capsule_chunker::layer::encode::Effort;
use capsule_proto::RootHash;
use capsule_proto::name::{CapsuleName, Channel};
use capsule_swarm::Schedule;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::answer::*;
use super::machine::{Capture, CheckName, Describe, Described, NameFree, Prefetch, Prefetched};

/// A request type and what it is answered with.
pub trait Command: Serialize {
    /// What comes back on success.
    type Answer: DeserializeOwned + Serialize;
    /// Any request to whoever answers it.
    type Request: Serialize;
    /// The request as it travels.
    fn into_request(self) -> Self::Request;
}

/// A capsule as people write it: `CHANNEL`, `CHANNEL:VERSION`, or an id: 64 hex digits, or a beginning of 8 or more of them
/// that only one known capsule has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CapsuleRef(pub String);

/// How to take the content of the path that is published.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PublishAs {
    /// A directory as a tree, disk images and devices as disks, everything else as a file.
    #[default]
    Auto,
    /// As a disk: images of a known format as their virtual disk.
    Disk,
    /// As a file: the bytes as they lie.
    File,
    /// As a directory tree.
    Tree,
}

/// Publishes a file, device, disk image or directory as a version of a channel.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Publish {
    /// Absolute path.
    #[serde(with = "super::path")]
    pub path: PathBuf,
    /// `CHANNEL:VERSION`; the version must be given.
    #[serde(with = "text")]
    pub name: CapsuleName,
    /// How to take the content.
    #[serde(default, rename = "as")]
    pub read_as: PublishAs,
    /// How hard to compress.
    #[serde(default, with = "effort")]
    pub effort: Effort,
    /// Longest frame in bytes; what suits the content where absent.
    #[serde(default)]
    pub frame_max: Option<u32>,
    /// For a tree: stays on the directory's file system.
    #[serde(default)]
    pub one_file_system: bool,
    /// When the name ends, in seconds since 1970.
    #[serde(default)]
    pub expires: Option<u64>,
    /// The version that it is published against; the channel's newest that is here where absent.
    #[serde(default)]
    pub parent: Option<CapsuleRef>,
    /// Against none: so that nobody needs another version for this one.
    #[serde(default)]
    pub no_parent: bool,
    /// Reads everything: of a tree also files whose length and time are the parent's, of an image also what it says it did not change.
    #[serde(default)]
    pub checksum: bool,
    /// For a qcow2 image: its dirty bitmap that began with the parent. Only what it marks is read.
    #[serde(default)]
    pub bitmap: Option<String>,
    /// For a disk: free space of ext file systems, and what their clean journals still hold, as zeros.
    #[serde(default)]
    pub trim: bool,
}

impl Publish {
    /// Publishes a path in the way that suits it.
    pub fn of(path: impl Into<PathBuf>, name: CapsuleName) -> Self {
        Self {
            path: path.into(),
            name,
            read_as: PublishAs::default(),
            effort: Effort::default(),
            frame_max: None,
            one_file_system: false,
            expires: None,
            parent: None,
            no_parent: false,
            checksum: false,
            bitmap: None,
            trim: false,
        }
    }
}

/// Adds layers from nothing to a capsule that is here, for newcomers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Rebase {
    /// Which.
    pub capsule: CapsuleRef,
    /// How hard to compress.
    #[serde(default, with = "effort")]
    pub effort: Effort,
    /// Longest frame in bytes; what suits the content where absent.
    #[serde(default)]
    pub frame_max: Option<u32>,
}

/// Lists capsules: what this node holds, and what it knows by name.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Ls {
    /// Only this channel.
    #[serde(default)]
    pub channel: Option<Channel>,
    /// Only what is here, complete or not.
    #[serde(default)]
    pub held: bool,
}

/// Shows all about one capsule. Fetches nothing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Show {
    /// Which.
    pub capsule: CapsuleRef,
}

/// Says exactly what a pull would fetch; fetches manifest and indexes only.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// Which.
    pub capsule: CapsuleRef,
    /// How long to wait for the name, and for somebody who has it, in seconds; a default where absent.
    #[serde(default)]
    pub wait: Option<u64>,
    /// Local data in which to look for what is wanted, beside all capsules that are here: an absolute path.
    #[serde(default, with = "super::path::option")]
    pub like_path: Option<PathBuf>,
    /// A capsule that must be here, to be looked at for what is wanted.
    #[serde(default)]
    pub like_capsule: Option<CapsuleRef>,
}

/// Fetches a capsule, checks it, and keeps it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pull {
    /// Which.
    pub capsule: CapsuleRef,
    /// How long to wait for the name, and for somebody who has what lacks while nothing arrives, in seconds; a default
    /// where absent.
    #[serde(default)]
    pub wait: Option<u64>,
    /// Local data in which to look for what is wanted, beside all capsules that are here: an absolute path.
    #[serde(default, with = "super::path::option")]
    pub like_path: Option<PathBuf>,
    /// A capsule that must be here, to be looked at for what is wanted.
    #[serde(default)]
    pub like_capsule: Option<CapsuleRef>,
}

/// Follows a channel: pulls each new version by itself and keeps the newest two pinned.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Follow {
    /// The channel.
    pub channel: Channel,
}

/// Follows a channel no longer; what was pulled stays until `gc`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Unfollow {
    /// The channel.
    pub channel: Channel,
}

/// Writes a component of a held capsule to a file or directory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Export {
    /// Which.
    pub capsule: CapsuleRef,
    /// Absolute path of the file (stream) or directory (tree).
    #[serde(with = "super::path")]
    pub to: PathBuf,
    /// Which component, where the capsule has several.
    #[serde(default)]
    pub component: Option<String>,
    /// Replaces an existing file; makes a directory that is not empty exactly the tree.
    #[serde(default)]
    pub force: bool,
}

/// Serves a disk of a capsule as a network block device, until the client goes away.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Nbd {
    /// Which.
    pub capsule: CapsuleRef,
    /// At which Unix socket, an absolute path; or
    #[serde(default, with = "super::path::option")]
    pub socket: Option<PathBuf>,
    /// at which address and port.
    #[serde(default)]
    pub listen: Option<SocketAddr>,
    /// Which component, where the capsule has several.
    #[serde(default)]
    pub component: Option<String>,
    /// How long to wait for the name, and for somebody who has the manifest, in seconds; a default where absent.
    #[serde(default)]
    pub wait: Option<u64>,
    /// Fetches all of it first, and writes it out to a file of the home, from which it is served: reads are faster then.
    #[serde(default)]
    pub whole: bool,
}

/// Shows a capsule as files in a directory, until the client goes away.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Mount {
    /// Which.
    pub capsule: CapsuleRef,
    /// Absolute path of the directory.
    #[serde(with = "super::path")]
    pub at: PathBuf,
    /// Only this component, where the capsule has several.
    #[serde(default)]
    pub component: Option<String>,
    /// How long to wait for the name, and for somebody who has the manifest, in seconds; a default where absent.
    #[serde(default)]
    pub wait: Option<u64>,
}

/// Reads everything held again and compares it with its hashes.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Verify {
    /// Only this capsule; everything in the store where absent.
    #[serde(default)]
    pub capsule: Option<CapsuleRef>,
    /// Fetches again from peers what was damaged, now or before, and whatever else a capsule that was begun lacks.
    #[serde(default)]
    pub repair: bool,
}

/// Asks how the node is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Status {}

/// Lists connected peers.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Peers {
    /// Only those that announce this blob or component, and how much of it.
    #[serde(default)]
    pub have: Option<RootHash>,
}

/// Lists what this node holds and announces.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Hashes {}

/// Keeps a capsule from being collected.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pin {
    /// Which; it must be known, not necessarily held.
    pub capsule: CapsuleRef,
    /// For this machine, which stands on it; for the user where absent.
    #[serde(default)]
    pub machine: Option<String>,
}

/// Takes the user's pin, and that of having published it, away; or a machine's.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Unpin {
    /// Which.
    pub capsule: CapsuleRef,
    /// Only this machine's.
    #[serde(default)]
    pub machine: Option<String>,
}

/// Removes what no pinned capsule needs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Gc {
    /// Only says what would be removed.
    #[serde(default)]
    pub dry_run: bool,
}

/// Removes a capsule from this node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Rm {
    /// Which.
    pub capsule: CapsuleRef,
    /// Even if it is pinned.
    #[serde(default)]
    pub force: bool,
}

/// Lists the layers known for a capsule's components.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Layers {
    /// Which.
    pub capsule: CapsuleRef,
}

/// Where peers are, as far as rates go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeersWhere {
    /// Within this machine's site.
    Within,
    /// Beyond it.
    Beyond,
}

/// Tells which caps of rates hold and when they change; sets those that are given, which hold from then on and over restarts.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Rates {
    /// What is sent.
    #[serde(default, with = "text::option")]
    pub upload: Option<Schedule>,
    /// What is received.
    #[serde(default, with = "text::option")]
    pub download: Option<Schedule>,
    /// To and from which peers; both where absent.
    #[serde(default)]
    pub peers: Option<PeersWhere>,
}

/// The requests that somebody answers, in one type as they travel, and what each is answered with.
macro_rules! commands {
    ($(#[$doc:meta])* $requests:ident { $($name:ident => $answer:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $requests {
            $(#[doc = concat!("See [`", stringify!($name), "`].")] $name($name),)*
        }

        $(impl $crate::control::Command for $name {
            type Answer = $answer;
            type Request = $requests;
            fn into_request(self) -> $requests {
                $requests::$name(self)
            }
        })*
    };
}
pub(crate) use commands;

commands! {
    /// Any request to the daemon: an object with the command's name as its only key.
    Request {
    Publish => Published,
    Capture => Published,
    Rebase => Rebased,
    Ls => Listed,
    Show => Shown,
    Plan => Planned,
    Pull => Pulled,
    Follow => Followed,
    Unfollow => Unfollowed,
    Export => Exported,
    Nbd => Serving,
    Mount => Mounted,
    Verify => Verified,
    Status => NodeStatus,
    Peers => PeerList,
    Hashes => HashList,
    Pin => Pinned,
    Unpin => Pinned,
    Gc => Collected,
    Rm => Removed,
    Layers => LayerList,
    Rates => RateList,
    CheckName => NameFree,
    Describe => Described,
    Prefetch => Prefetched,
    }
}

/// A value with one text form, as that text.
pub(crate) mod text {
    use std::fmt::Display;
    use std::str::FromStr;

    use super::{Deserialize, Deserializer, Serializer};

    pub fn serialize<T: Display, S: Serializer>(
        value: &T,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }

    /// Where there may be none.
    pub mod option {
        use super::{Deserialize, Deserializer, Display, FromStr, Serializer};

        pub fn serialize<T: Display, S: Serializer>(
            value: &Option<T>,
            serializer: S,
        ) -> Result<S::Ok, S::Error> {
            match value {
                Some(value) => serializer.collect_str(value),
                None => serializer.serialize_none(),
            }
        }

        pub fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(
            deserializer: D,
        ) -> Result<Option<T>, D::Error> {
            let text = Option::<String>::deserialize(deserializer)?;
            text.map(|text| text.parse().map_err(serde::de::Error::custom))
                .transpose()
        }
    }
}

/// The effort's word.
pub(crate) mod effort {
    use super::{Deserialize, Deserializer, Effort, Serializer};

    pub fn serialize<S: Serializer>(effort: &Effort, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match effort {
            Effort::Fast => "fast",
            Effort::Default => "default",
            Effort::Max => "max",
        })
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Effort, D::Error> {
        match &*String::deserialize(deserializer)? {
            "fast" => Ok(Effort::Fast),
            "default" => Ok(Effort::Default),
            "max" => Ok(Effort::Max),
            other => Err(serde::de::Error::custom(format_args!(
                "no such effort as {other:?}: use fast, default or max"
            ))),
        }
    }
}
