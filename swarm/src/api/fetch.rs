//! Fetches: what is wanted, how far it has come, how it ended.

use std::sync::Arc;

use capsule_proto::{GroupRanges, RootHash};
use libp2p::PeerId;
use thiserror::Error;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::{NetworkClosed, StoreError, send};
use crate::engine::{Command, FetchCommand};

/// How urgent a fetch is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Nobody waits (a headless node's prefetch).
    Background,
    /// A person or a pull waits for the whole.
    #[default]
    Normal,
    /// A reader waits for these very bytes.
    Demand,
}

/// What to fetch.
#[derive(Clone, Debug)]
pub struct FetchSpec {
    /// The blob.
    pub root: RootHash,
    /// Its size in bytes; `None` takes it from a provider, bounded by [`Limits::unsized_blob_max`](super::Limits::unsized_blob_max) and proved by the hash.
    pub size: Option<u64>,
    /// Groups already held; asked of the store at the start where `None`.
    pub have: Option<GroupRanges>,
    /// Groups wanted; `None` is all.
    pub want: Option<GroupRanges>,
    /// How urgent it is.
    pub priority: Priority,
}

impl FetchSpec {
    /// The whole blob at normal priority.
    pub fn whole(root: RootHash, size: Option<u64>) -> Self {
        Self {
            root,
            size,
            have: None,
            want: None,
            priority: Priority::Normal,
        }
    }
}

/// How far a fetch has come.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FetchProgress {
    /// Size of the blob, once known.
    pub size: Option<u64>,
    /// Bytes of content wanted that were lacking at the start.
    pub bytes_total: u64,
    /// Of these, bytes verified and stored.
    pub bytes_done: u64,
    /// Bytes a second, smoothed over the last few seconds.
    pub rate: u64,
    /// Connected peers that hold something we still lack.
    pub providers: usize,
    /// Verified content bytes by the peer that sent them.
    pub by_peer: Vec<(PeerId, u64)>,
}

/// Why a fetch ended without all of it.
#[derive(Debug, Error)]
pub enum FetchError {
    /// The store could not take more.
    #[error("storing {root}: {source}")]
    Store {
        /// The blob.
        root: RootHash,
        /// What the store said.
        source: StoreError,
    },
    /// Two fetches of one blob disagree on its size.
    #[error("{root} is being fetched as {known} bytes, not {asked}: one of the two sizes is wrong")]
    SizeConflict {
        /// The blob.
        root: RootHash,
        /// Size of the fetch under way.
        known: u64,
        /// Size in the refused one.
        asked: u64,
    },
    /// Larger than any blob may be.
    #[error("{root}: {size} bytes are more than a blob may have")]
    TooLarge {
        /// The blob.
        root: RootHash,
        /// Its alleged size.
        size: u64,
    },
    /// More fetches at once than the network schedules.
    #[error("{0} fetches are under way: wait for some of them")]
    TooMany(usize),
    /// The network has been shut down.
    #[error("the network has been shut down")]
    Closed,
}

/// A fetch under way. Dropping it cancels; what is verified stays in the store.
#[derive(Debug)]
pub struct Fetch {
    root: RootHash,
    progress: watch::Receiver<FetchProgress>,
    done: oneshot::Receiver<Result<FetchProgress, FetchError>>,
    demand: mpsc::Sender<Command>,
    /// Told when the receiver of `done` goes, so that the engine looks for abandoned fetches at once.
    dropped: Arc<Notify>,
}

impl Fetch {
    /// A fetch for the caller, and the command that starts it.
    pub(super) fn new(
        spec: FetchSpec,
        commands: mpsc::Sender<Command>,
        dropped: Arc<Notify>,
    ) -> (Self, FetchCommand) {
        let (progress_sender, progress) = watch::channel(FetchProgress::default());
        let (done_sender, done) = oneshot::channel();
        let fetch = Self {
            root: spec.root,
            progress,
            done,
            demand: commands,
            dropped,
        };
        (
            fetch,
            FetchCommand {
                spec,
                progress: progress_sender,
                done: done_sender,
            },
        )
    }

    /// Progress, renewed a few times a second.
    pub fn progress(&self) -> watch::Receiver<FetchProgress> {
        self.progress.clone()
    }

    /// Waits for the end. Cancel-safe; not to be called again after it returned.
    pub async fn done(&mut self) -> Result<FetchProgress, FetchError> {
        (&mut self.done).await.unwrap_or(Err(FetchError::Closed))
    }

    /// Asks for some groups before everything else: a reader waits for them.
    pub async fn demand(&self, groups: GroupRanges) -> Result<(), NetworkClosed> {
        send(
            &self.demand,
            Command::Demand {
                root: self.root,
                groups,
            },
        )
        .await
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        self.done.close();
        self.dropped.notify_one();
    }
}
