//! A stream of which some may be here. Reading tries what is here; what that lacks is found by the indexes, which may be here in part themselves, demanded from
//! peers, and the read is tried again: so nothing is looked up for reads that need nothing, and one read asks for all that it lacks at once.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use capsule_chunker::bao::{Tree, decode_range};
use capsule_chunker::content::{Content, ReadError, check_range};
use capsule_chunker::layer::reach::Reach;
use capsule_chunker::layer::read::{LayerCache, LayerContent, LayerError, ReadOptions};
use capsule_chunker::layer::{IndexFault, Storage};
use capsule_proto::ranges::{Height, groups_touching};
use capsule_proto::record::BlobRef;
use capsule_proto::{GroupRanges, RootHash};
use capsule_swarm::{FetchError, FetchSpec, Priority};
use futures::FutureExt;
use futures::future::{BoxFuture, try_join_all};
use tokio::sync::Semaphore;

use crate::control::{Failure, FailureCode};
use crate::disk::Disk;
use crate::layers::{no_pack, open_all_by};
use crate::node::Node;
use crate::store::LayerBlobs;
use crate::transfer::prepare::Prepared;
use crate::verify::note_whole;

/// Decoded frames that are kept of all that is read so: what readers come back to, such as a file system's tables.
const CACHE: usize = 64 << 20;
/// Before it is tried again where too many fetches are under way.
const PAUSE: Duration = Duration::from_millis(50);
/// How often a read fetches what it lacks before it pauses: through a few layers, a page of each index, and then what they tell.
const IN_TURN: u32 = 16;
/// How often a read is tried that fails though nothing seems to be missing: what it lacked may just have come.
const TRIES: u32 = 3;
/// After how many of these it is looked whether the disk has damaged something, and how often.
const LOOKS_AFTER: u32 = 1;
const LOOKS: u32 = 2;

/// Chunk groups of a blob that are verified at a time.
const VERIFIED_AT_ONCE: u64 = 16;
/// Attempts at a time, of all that is read: each decodes on a thread of those that all of the node shares.
static ATTEMPTS: Semaphore = Semaphore::const_new(6);

/// What is kept of all content that is read so, together, for as long as anything is: however many disks are served, they take no more memory.
#[derive(Default)]
pub struct ReadCache(Mutex<Weak<LayerCache>>);

impl ReadCache {
    fn get(&self) -> Arc<LayerCache> {
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let cache = Arc::new(LayerCache::new(&ReadOptions { cache_len: CACHE }));
            *shared = Arc::downgrade(&cache);
            cache
        })
    }
}

/// See the module.
pub struct Paged {
    node: Arc<Node>,
    body: Body,
    /// Of which capsule it is; keeps all of it from removal.
    prepared: Arc<Prepared>,
}

enum Body {
    /// Read through layers, the top one of which is the component.
    Layers {
        top: Arc<LayerContent>,
        all: Vec<Layer>,
        /// Blobs that only this node has: of a way that it made itself.
        own: BTreeSet<RootHash>,
        /// Which others share for as long as this is read.
        cache: Arc<LayerCache>,
    },
    /// A blob of its own, kept from removal with the rest.
    Blob(BlobRef),
}

/// A layer, and the blobs that it is read from.
struct Layer {
    content: Arc<LayerContent>,
    index: BlobRef,
    pack: Option<BlobRef>,
}

/// Parts of blobs, which a read takes or lacks.
type Parts = Vec<(BlobRef, GroupRanges)>;

impl Paged {
    /// Content that is read through layers, of whose indexes the directories are here. Blocks.
    pub(super) fn of_layers(
        node: &Arc<Node>,
        layers: &[LayerBlobs],
        packs: &BTreeMap<RootHash, BlobRef>,
        own: BTreeSet<RootHash>,
        prepared: Arc<Prepared>,
    ) -> Result<Self, Failure> {
        let store = &node.store;
        let cache = node.read_cache.get();
        let known = |pack: &RootHash| packs.contains_key(pack);
        let pack = |layer: &LayerBlobs| match layer.pack.filter(known) {
            Some(pack) => Ok(store.open_coming(&pack)? as Storage),
            None => no_pack(layer),
        };
        let as_it_is = |_: &LayerBlobs, content| Ok(content);
        // Also one that is whole: what the disk damages of it may come again.
        let index = |index: &RootHash| Ok(store.open_coming(index)? as Storage);
        let all = open_all_by(&index, layers, &cache, &pack, &as_it_is)?;
        let top = all.last().cloned().ok_or_else(|| {
            let message = "a component without layers cannot be read";
            Failure::new(FailureCode::Internal, message)
        })?;
        let layer = |(content, blobs): (Arc<LayerContent>, &LayerBlobs)| Layer {
            index: BlobRef {
                root: blobs.index,
                size: content.index_len(),
            },
            pack: blobs.pack.and_then(|pack| packs.get(&pack).copied()),
            content,
        };
        Ok(Self {
            node: node.clone(),
            body: Body::Layers {
                top,
                all: all.into_iter().zip(layers).map(layer).collect(),
                own,
                cache,
            },
            prepared,
        })
    }

    /// Content that is a blob of its own.
    pub(super) fn of_blob(node: &Arc<Node>, blob: BlobRef, prepared: Arc<Prepared>) -> Self {
        Self {
            node: node.clone(),
            body: Body::Blob(blob),
            prepared,
        }
    }

    /// Reads what is here; or tells what is missing. Where that fails though nothing is, it may be looked for damage. Blocks.
    fn attempt(
        &self,
        range: &Range<u64>,
        into: &mut [u8],
        look_for_damage: bool,
    ) -> Result<Parts, ReadError> {
        let error = match &self.body {
            Body::Layers { top, .. } => match top.read_at(range.start, into) {
                Ok(()) => return Ok(Parts::new()),
                Err(error) => error,
            },
            Body::Blob(blob) => {
                check_range(blob.size, range.start, into.len())?;
                match self.read_blob(blob, range, into) {
                    Ok(()) => return Ok(Parts::new()),
                    Err(error) => ReadError::io("a blob of the store", range.start, error),
                }
            }
        };
        let mut missing = self.missing(range);
        if look_for_damage && missing.as_ref().map_or(true, Parts::is_empty) {
            let lost = self.condemn(range)?;
            missing = match lost.is_empty() {
                // Another reader may have found it.
                true => self.missing(range),
                false => Ok(lost),
            };
        }
        let missing = missing?;
        match missing.is_empty() || missing.iter().any(|(blob, _)| self.is_own(blob)) {
            true => Err(error),
            false => Ok(missing),
        }
    }

    /// Whether only this node has a blob: nobody sends it.
    fn is_own(&self, blob: &BlobRef) -> bool {
        matches!(&self.body, Body::Layers { own, .. } if own.contains(&blob.root))
    }

    /// Looks whether the disk has damaged what a range is read from; that is no longer here then, and can come again. Returns what was lost of indexes, which
    /// has to come before they tell what else it is. Blocks.
    fn condemn(&self, range: &Range<u64>) -> Result<Parts, ReadError> {
        // What is a blob of its own was compared with its hash as it was read.
        let Body::Layers { all, cache, .. } = &self.body else {
            return Ok(Parts::new());
        };
        // Whoever finds the damage, pages that were read before may be of it.
        cache.forget_pages();
        let store = &self.node.store;
        let of_store =
            |error| ReadError::io("a blob of the store", range.start, io::Error::other(error));
        let mut lost = Parts::new();
        for layer in all {
            let bad = store.verify(&layer.index.root).map_err(of_store)?;
            if !bad.is_empty() {
                lost.push((layer.index, bad));
            }
        }
        for (pack, groups) in self.takes(range).unwrap_or_default() {
            for run in groups.runs() {
                let checked = store.verify_part(&pack.root, run.clone());
                checked.map_err(of_store)?;
            }
        }
        Ok(lost)
    }

    /// Reads from a blob, and compares with its hash: nothing else would tell that the disk has damaged it. Blocks.
    fn read_blob(&self, blob: &BlobRef, range: &Range<u64>, into: &mut [u8]) -> io::Result<()> {
        let tree = Tree {
            root: blob.root,
            size: blob.size,
        };
        let touched = groups_touching(range);
        let mut encoded = Vec::new();
        for first in touched.clone().step_by(VERIFIED_AT_ONCE as usize) {
            let run = first..(first + VERIFIED_AT_ONCE).min(touched.end);
            encoded.clear();
            let (store, height) = (&self.node.store, Height::ROOT);
            let read = store.read_encoded(&blob.root, run.clone(), height, &mut encoded);
            read.map_err(io::Error::other)?;
            let leaf = |offset: u64, leaf: &[u8]| {
                let (from, to) = (
                    offset.max(range.start),
                    range.end.min(offset + leaf.len() as u64),
                );
                if from < to {
                    let bytes = &leaf[(from - offset) as usize..(to - offset) as usize];
                    let at = (from - range.start) as usize;
                    into[at..at + bytes.len()].copy_from_slice(bytes);
                }
            };
            decode_range(&tree, run, height, &Vec::new(), &encoded, |_, _| {}, leaf)
                .map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// What a range takes that is not here; of an index first, where that does not tell. Blocks.
    fn missing(&self, range: &Range<u64>) -> Result<Parts, ReadError> {
        let mut missing = match self.takes(range) {
            Ok(takes) => takes,
            Err(error) => match self.unread(&error) {
                Some(parts) => parts,
                None => return Err(of_layers(range, error)),
            },
        };
        missing.retain_mut(|(blob, groups)| {
            let here = self.node.store.present(&blob.root);
            let here = here.map(|here| here.ranges).unwrap_or_default();
            *groups = groups.difference(&here);
            !groups.is_empty()
        });
        Ok(missing)
    }

    /// What a range is read from. Blocks.
    fn takes(&self, range: &Range<u64>) -> Result<Parts, LayerError> {
        Ok(match &self.body {
            Body::Layers { top, all, .. } => {
                let reach = Reach::of_range(top, range.clone(), &())?;
                let part = |layer: &Layer| Some((layer.pack?, reach.groups(&layer.content)));
                all.iter().filter_map(part).collect()
            }
            Body::Blob(blob) => vec![(*blob, groups_touching(range).into())],
        })
    }

    /// The part of an index that could not be read, where that is what an error says.
    fn unread(&self, error: &LayerError) -> Option<Parts> {
        let Body::Layers { top, all, .. } = &self.body else {
            return None;
        };
        let (mut at, mut target) = (error, top.header().target);
        while let LayerError::Below { target: of, source } = at {
            (at, target) = (source, *of);
        }
        let LayerError::Index(IndexFault::Read { at, len, .. }) = at else {
            return None;
        };
        let part = *at..*at + *len as u64;
        // Layers that make the same are asked for the same: what is here of them is left out.
        let of_it = all.iter().filter(|layer| {
            layer.content.header().target == target && part.end <= layer.index.size
        });
        let part = |layer: &Layer| (layer.index, groups_touching(&part).into());
        Some(of_it.map(part).collect())
    }

    /// Has what is missing come, before everything else. Takes until a peer has it.
    async fn come(&self, missing: Parts) -> Result<(), FetchError> {
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

    async fn fill(
        self: Arc<Self>,
        range: Range<u64>,
        mut into: Vec<u8>,
    ) -> Result<Vec<u8>, ReadError> {
        let (start, len) = (into.len(), (range.end - range.start) as usize);
        let failed = |error: String| ReadError::Io {
            path: "the network".into(),
            offset: range.start,
            source: io::Error::other(error),
        };
        let (mut tries, mut fetched, mut looked) = (0, 0_u32, 0);
        loop {
            let place = ATTEMPTS.acquire().await;
            let place = place.map_err(|closed| failed(closed.to_string()))?;
            let (paged, wanted) = (self.clone(), range.clone());
            // For indexes, and by them for packs: a disk that damages it again is not a reason to fetch without end.
            let look = tries == LOOKS_AFTER && looked < LOOKS;
            looked += u32::from(look);
            let attempt = tokio::task::spawn_blocking(move || {
                into.resize(start + len, 0);
                let missing = paged.attempt(&wanted, &mut into[start..], look);
                (missing, into)
            });
            let (missing, bytes) = attempt.await.map_err(|panic| failed(panic.to_string()))?;
            drop(place);
            into = bytes;
            match missing {
                Ok(missing) if missing.is_empty() => return Ok(into),
                Ok(missing) => {
                    // Any number of reads may wait, for as long as nobody has what they lack.
                    into.truncate(start);
                    into.shrink_to_fit();
                    // What came may be gone again, damaged or collected: not as fast as it can be tried. Of indexes it takes a page after the other.
                    fetched += 1;
                    if fetched > IN_TURN {
                        tokio::time::sleep(PAUSE).await;
                    }
                    let came = self.come(missing).await;
                    came.map_err(|error| failed(error.to_string()))?;
                    tries = 0;
                    if looked > 0 {
                        note_whole(&self.node, self.prepared.manifest.id()).await;
                    }
                }
                Err(error) => {
                    tries += 1;
                    if tries == TRIES {
                        return Err(error);
                    }
                    into.truncate(start);
                    into.shrink_to_fit();
                }
            }
        }
    }
}

impl Drop for Paged {
    /// Makes what came durable: later it need not come again.
    fn drop(&mut self) {
        let blobs: Vec<RootHash> = match &self.body {
            Body::Layers { all, .. } => {
                let blobs = |layer: &Layer| [Some(layer.index), layer.pack];
                let blobs = all.iter().flat_map(blobs).flatten();
                blobs.map(|blob| blob.root).collect()
            }
            Body::Blob(blob) => vec![blob.root],
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
        match &self.body {
            Body::Layers { top, .. } => top.len(),
            Body::Blob(blob) => blob.size,
        }
    }

    fn is_zero(&self, range: Range<u64>) -> bool {
        match &self.body {
            Body::Layers { top, .. } => top.is_zero(range),
            Body::Blob(_) => false,
        }
    }

    fn read(
        self: Arc<Self>,
        range: Range<u64>,
        into: Vec<u8>,
    ) -> BoxFuture<'static, Result<Vec<u8>, ReadError>> {
        self.fill(range, into).boxed()
    }
}

fn of_layers(range: &Range<u64>, error: LayerError) -> ReadError {
    ReadError::Decode {
        offset: range.start,
        source: Box::new(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_read_shares_one_cache_which_ends_with_the_last() {
        let cache = ReadCache::default();
        let (one, other) = (cache.get(), cache.get());
        assert!(Arc::ptr_eq(&one, &other));
        drop((one, other));
        assert_eq!(cache.0.lock().unwrap().strong_count(), 0);
    }
}
