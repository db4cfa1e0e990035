//! The engine.
use std::sync::Arc;

use capsule_proto::{CapsuleId, GroupRanges, RootHash};
use tokio::sync::{mpsc, oneshot, watch};

use crate::api::*;

/// What a handle asks of the engine.
#[allow(dead_code)]
#[derive(Debug)]
pub enum Command {
    Announce { root: RootHash, size: u64, ranges: GroupRanges },
    Withdraw { root: RootHash },
    Fetch {
        spec: FetchSpec,
        progress: watch::Sender<FetchProgress>,
        done: oneshot::Sender<Result<FetchProgress, FetchError>>,
    },
    Demand { root: RootHash, groups: GroupRanges },
    PublishRecord { bytes: Vec<u8> },
    SetCapsules { capsules: Vec<(CapsuleId, bool)> },
    AddAddress { address: String },
    Providers { root: RootHash, reply: oneshot::Sender<Vec<Provider>> },
    Peers { reply: oneshot::Sender<Vec<PeerInfo>> },
    Totals { reply: oneshot::Sender<Vec<(RootHash, BlobTotals)>> },
    Shutdown { reply: oneshot::Sender<()> },
}

/// Starts the network.
pub struct Network;

impl Network {
    /// Starts listening, looking for the fleet and serving; returns when the listeners are bound.
    pub async fn start(
        config: NetworkConfig,
        store: Arc<dyn BlobStore>,
        records: Arc<dyn RecordStore>,
    ) -> Result<(NetworkHandle, mpsc::Receiver<Event>), StartError> {
        let _ = (config, store, records);
        todo!()
    }
}
