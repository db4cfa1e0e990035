//! A stream of which some may be here. Reading tries what is here; what that lacks is found by the indexes, demanded from
//! peers, and the read is tried again: so nothing is looked up for reads that need nothing, and one read asks for all that it lacks at once.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use capsule_chunker::content::{Content, ReadError, check_range};
use capsule_chunker::layer::Storage;
use capsule_chunker::layer::reach::Reach;
use capsule_chunker::layer::read::{LayerCache, LayerContent, ReadOptions};
use capsule_proto::manifest::Component;
use capsule_proto::ranges::groups_touching;
use capsule_proto::record::BlobRef;
use capsule_proto::{GroupRanges, RootHash};
use capsule_swarm::{FetchError, FetchSpec, Priority};
use futures::FutureExt;
use futures::future::{BoxFuture, try_join_all};
use positioned_io::ReadAt;

use crate::control::{Failure, FailureCode};
use crate::held::HeldWay;
use crate::layers::{no_pack, open_all};
use crate::nbd::Disk;
use crate::node::Node;
use crate::store::{ComingReader, LayerBlobs};
use crate::transfer::prepare::Prepared;

/// Decoded frames that are kept: what readers come back to, such as a file system's tables.
const CACHE: usize = 64 << 20;
/// Before it is tried again where too many fetches are under way.
const PAUSE: Duration = Duration::from_millis(50);
/// How often a read is tried that fails though nothing seems to be missing: what it lacked may just have come.
const TRIES: u32 = 3;

/// See the module.
pub struct Paged {
    node: Arc<Node>,
    body: Body,
    /// Keeps all of it from removal.
    _prepared: Prepared,
}

enum Body {
    /// Read through layers, the last of which is the component; by each its pack.
    Layers(Vec<(Arc<LayerContent>, Option<BlobRef>)>),
    /// A blob of its own.
    Blob(Arc<ComingReader>, BlobRef),
}

/// What is missing, by blob.
type Missing = Vec<(BlobRef, GroupRanges)>;

impl Paged {
    /// Opens what was planned; the indexes are here. Blocks.
    pub(super) fn open(
        node: &Arc<Node>,
        component: &Component,
        way: &HeldWay,
        blobs: &BTreeMap<RootHash, BlobRef>,
        prepared: Prepared,
    ) -> Result<Self, Failure> {
        let store = &node.store;
        let body = match way {
            HeldWay::Layers(layers) => {
                let cache = LayerCache::new(&ReadOptions { cache_len: CACHE });
                let pack = |layer: &LayerBlobs| match &layer.pack {
                    Some(pack) => Ok(store.open_coming(pack)? as Storage),
                    None => no_pack(layer),
                };
                let as_it_is = |_: &LayerBlobs, content| Ok(content);
                let all = open_all(store, layers, &cache, &pack, &as_it_is)?;
                let packs = layers
                    .iter()
                    .map(|layer| layer.pack.and_then(|pack| blobs.get(&pack).cloned()));
                Body::Layers(all.into_iter().zip(packs).collect())
            }
            _ => {
                let blob = BlobRef {
                    root: component.root,
                    size: component.size,
                };
                Body::Blob(store.open_coming(&blob.root)?, blob)
            }
        };
        let paged = Self {
            node: node.clone(),
            body,
            _prepared: prepared,
        };
        if paged.size() != component.size {
            let message = format!(
                "component {} has {} bytes by its layers, and {} by the manifest",
                component.name,
                paged.size(),
                component.size
            );
            return Err(Failure::new(FailureCode::Damaged, message)
                .hint("its publisher made it wrong: tell them to publish it again"));
        }
        Ok(paged)
    }

    fn size(&self) -> u64 {
        match &self.body {
            Body::Layers(layers) => layers.last().map_or(0, |(top, _)| top.len()),
            Body::Blob(_, blob) => blob.size,
        }
    }

    /// Reads what is here; or tells what is missing. Blocks.
    fn attempt(&self, range: &Range<u64>, into: &mut [u8]) -> Result<Missing, ReadError> {
        let error = match &self.body {
            Body::Layers(layers) => {
                let Some((top, _)) = layers.last() else {
                    return Ok(Missing::new());
                };
                match top.read_at(range.start, into) {
                    Ok(()) => return Ok(Missing::new()),
                    Err(error) => error,
                }
            }
            Body::Blob(reader, blob) => {
                check_range(blob.size, range.start, into.len())?;
                match reader.read_exact_at(range.start, into) {
                    Ok(()) => return Ok(Missing::new()),
                    Err(error) => ReadError::io("a blob of the store", range.start, error),
                }
            }
        };
        let missing = self.missing(range)?;
        match missing.is_empty() {
            true => Err(error),
            false => Ok(missing),
        }
    }

    /// What a range takes that is not here. Blocks.
    fn missing(&self, range: &Range<u64>) -> Result<Missing, ReadError> {
        let lacking = |blob: &BlobRef, groups: &GroupRanges| {
            let here = self.node.store.present(&blob.root);
            let here = here.map(|here| here.ranges).unwrap_or_default();
            let lacking = groups.difference(&here);
            (!lacking.is_empty()).then(|| (*blob, lacking))
        };
        Ok(match &self.body {
            Body::Layers(layers) => {
                let Some((top, _)) = layers.last() else {
                    return Ok(Missing::new());
                };
                let reach = Reach::of_range(top, range.clone(), &());
                let reach = reach.map_err(|error| ReadError::Decode {
                    offset: range.start,
                    source: Box::new(error),
                })?;
                let each = layers.iter();
                each.filter_map(|(layer, pack)| lacking(pack.as_ref()?, &reach.groups(layer)))
                    .collect()
            }
            Body::Blob(_, blob) => lacking(blob, &groups_touching(range).into())
                .into_iter()
                .collect(),
        })
    }

    /// Has what is missing come, before everything else. Takes until a peer has it.
    async fn come(&self, missing: Missing) -> Result<(), FetchError> {
        let fetch = async |(blob, groups): (BlobRef, GroupRanges)| loop {
            let spec = FetchSpec {
                want: Some(groups.clone()),
                priority: Priority::Demand,
                ..FetchSpec::whole(blob.root, Some(blob.size))
            };
            let fetched = match self.node.network.fetch(spec).await {
                Ok(mut fetch) => fetch.done().await,
                Err(_closed) => Err(FetchError::Closed),
            };
            match fetched {
                Err(FetchError::TooMany(_)) => tokio::time::sleep(PAUSE).await,
                Err(error) => return Err(error),
                Ok(_) => return Ok(()),
            }
        };
        try_join_all(missing.into_iter().map(fetch)).await.map(drop)
    }

    async fn read(
        self: Arc<Self>,
        range: Range<u64>,
        mut into: Vec<u8>,
    ) -> Result<Vec<u8>, ReadError> {
        let start = into.len();
        into.resize(start + (range.end - range.start) as usize, 0);
        let failed = |error: String| ReadError::Io {
            path: "the network".into(),
            offset: range.start,
            source: std::io::Error::other(error),
        };
        let mut tries = 0;
        loop {
            let (paged, wanted) = (self.clone(), range.clone());
            let attempt = tokio::task::spawn_blocking(move || {
                let missing = paged.attempt(&wanted, &mut into[start..]);
                (missing, into)
            });
            let (missing, bytes) = attempt.await.map_err(|panic| failed(panic.to_string()))?;
            into = bytes;
            match missing {
                Ok(missing) if missing.is_empty() => return Ok(into),
                Ok(missing) => {
                    let came = self.come(missing).await;
                    came.map_err(|error| failed(error.to_string()))?;
                }
                Err(error) => {
                    tries += 1;
                    if tries == TRIES {
                        return Err(error);
                    }
                }
            }
        }
    }
}

impl Drop for Paged {
    /// Makes what came durable: later it need not come again.
    fn drop(&mut self) {
        let blobs: Vec<RootHash> = match &self.body {
            Body::Layers(layers) => {
                let packs = layers.iter().filter_map(|(_, pack)| pack.as_ref());
                packs.map(|pack| pack.root).collect()
            }
            Body::Blob(_, blob) => vec![blob.root],
        };
        let store = self.node.store.clone();
        let flush = move || {
            for root in blobs {
                if let Err(error) = store.flush(&root) {
                    tracing::warn!(%root, %error, "part of what was fetched will be fetched again");
                }
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(flush)),
            Err(_) => flush(),
        }
    }
}

impl Disk for Paged {
    fn len(&self) -> u64 {
        self.size()
    }

    fn is_zero(&self, range: Range<u64>) -> bool {
        match &self.body {
            Body::Layers(layers) => layers.last().is_some_and(|(top, _)| top.is_zero(range)),
            Body::Blob(..) => false,
        }
    }

    fn read(
        self: Arc<Self>,
        range: Range<u64>,
        into: Vec<u8>,
    ) -> BoxFuture<'static, Result<Vec<u8>, ReadError>> {
        Self::read(self, range, into).boxed()
    }
}
