//! Components as content: opening the layers that lead to one, and serving components to peers by decoding them.
//!
//! Which layers lead where is `held`'s and `graph`'s knowledge; decoding is the chunker's.

use std::collections::{HashMap, HashSet, VecDeque};
use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use capsule_chunker::content::{Content, Progress};
use capsule_chunker::layer::Storage;
use capsule_chunker::layer::reach::Reach;
use capsule_chunker::layer::read::{LayerCache, LayerContent, ReadOptions};
use capsule_proto::index::{Directory, Source, Space};
use capsule_proto::{GroupRanges, RootHash};
use positioned_io::ReadAt;
use tokio::sync::Notify;

use crate::control::{Failure, FailureCode};
use crate::held::Holdings;
use crate::store::{Component, ComponentProvider, LayerBlobs, Reached, Store};

/// Components kept open for peers: several ask for one and the same at a time, seldom for more.
const OPEN_COMPONENTS: usize = 4;
/// Decoded frames kept of each: peers ask for pieces in any order, but each piece in order.
const SERVING_CACHE: usize = 4 << 20;
/// A component that nobody asked for in this time is closed, as an open one keeps its blobs from being collected.
pub const IDLE: Duration = Duration::from_secs(10);

/// Opens a component through its layers, the one that starts from nothing first. They share one cache.
pub fn open(
    store: &Store,
    layers: &[LayerBlobs],
    options: &ReadOptions,
) -> Result<Arc<LayerContent>, Failure> {
    let pack = |layer: &LayerBlobs| open_pack(store, layer);
    let cache = LayerCache::new(options);
    let mut all = open_all(store, layers, &cache, &pack, &|_, content| Ok(content))?;
    all.pop().ok_or_else(|| {
        Failure::new(
            FailureCode::Internal,
            "a component without layers cannot be read",
        )
    })
}

/// Opens an index, of which only what is read need be here.
pub fn open_index(store: &Store, index: &RootHash) -> Result<Storage, Failure> {
    let is_complete = store.durable(index).is_some_and(|here| here.complete);
    Ok(match is_complete {
        true => store.open_blob(index)?,
        false => store.open_coming(index)?,
    })
}

/// Opens a layer's pack, of which only what is read need be here; one without is read as an empty one.
pub fn open_pack(store: &Store, layer: &LayerBlobs) -> Result<Storage, Failure> {
    Ok(match &layer.pack {
        Some(pack) if store.durable(pack).is_some() => store.open_partial(pack)?,
        Some(_) | None => Arc::new(Vec::<u8>::new()),
    })
}

/// What of its packs a way takes, by the indexes of its layers, which must all be here. Its last pack was made for it: all of that.
pub fn reached(
    store: &Store,
    layers: &[LayerBlobs],
    progress: &dyn Progress,
) -> Result<Reached, Failure> {
    let cache = LayerCache::new(&ReadOptions { cache_len: 0 });
    let all = open_all(store, layers, &cache, &no_pack, &|_, content| Ok(content))?;
    let (Some(top), Some(last)) = (all.last(), layers.last()) else {
        return Ok(Reached::new());
    };
    let (reach, mut reached) = (Reach::of(top, progress)?, Reached::new());
    for (layer, blobs) in all.iter().zip(layers) {
        if let Some(pack) = blobs.pack.filter(|pack| last.pack != Some(*pack)) {
            let groups: &mut GroupRanges = reached.entry(pack).or_default();
            groups.union_with(&reach.groups(layer));
        }
    }
    Ok(reached)
}

/// No pack: for who reads indexes only.
pub fn no_pack(_: &LayerBlobs) -> Result<Storage, Failure> {
    Ok(Arc::new(Vec::<u8>::new()))
}

/// Opens all of a component's layers, each of which reads nothing but components that those before it make: `pack` opens their packs, and
/// `finish` may give them more to read.
pub fn open_all(
    store: &Store,
    layers: &[LayerBlobs],
    cache: &LayerCache,
    pack: &dyn Fn(&LayerBlobs) -> Result<Storage, Failure>,
    finish: &dyn Fn(&LayerBlobs, LayerContent) -> Result<LayerContent, Failure>,
) -> Result<Vec<Arc<LayerContent>>, Failure> {
    let index = |index: &RootHash| open_index(store, index);
    open_all_by(&index, layers, cache, pack, finish)
}

/// The same; `index` opens their indexes.
pub fn open_all_by(
    index: &dyn Fn(&RootHash) -> Result<Storage, Failure>,
    layers: &[LayerBlobs],
    cache: &LayerCache,
    pack: &dyn Fn(&LayerBlobs) -> Result<Storage, Failure>,
    finish: &dyn Fn(&LayerBlobs, LayerContent) -> Result<LayerContent, Failure>,
) -> Result<Vec<Arc<LayerContent>>, Failure> {
    let mut all: Vec<Arc<LayerContent>> = Vec::with_capacity(layers.len());
    let mut made = Made::new();
    for layer in layers {
        let content = open_one(layer, index(&layer.index)?, pack(layer)?, &made, cache)?;
        let content = Arc::new(finish(layer, content)?);
        let header = content.header();
        made.insert((header.space as u8, header.target), content.clone());
        all.push(content);
    }
    Ok(all)
}

/// What layers make, by space and root.
type Made = HashMap<(u8, RootHash), Arc<LayerContent>>;

fn open_one(
    layer: &LayerBlobs,
    index: Storage,
    pack: Storage,
    made: &Made,
    cache: &LayerCache,
) -> Result<LayerContent, Failure> {
    let directory = read_directory(&*index)?;
    let mut sources = Vec::new();
    for source in &directory.header().sources {
        let found = made.get(&(source.space as u8, source.root));
        let found = found.filter(|found| found.len() == source.size);
        let found = found.cloned().ok_or_else(|| {
            let message = format!(
                "layer {} reads component {}, which is not among what it is read through",
                layer.index, source.root
            );
            Failure::new(FailureCode::Damaged, message)
        })?;
        sources.push(found as Arc<dyn Content>);
    }
    Ok(LayerContent::open(index, pack, sources, cache)?)
}

/// A component that layers read beside what they make themselves; and the layer that does.
pub struct Beside {
    /// Its space.
    pub space: Space,
    /// Its root.
    pub root: RootHash,
    /// The layer, by its place.
    pub reader: usize,
}

/// The first component that layers read, but none before them makes; the directories of their indexes are here.
pub fn beside(store: &Store, layers: &[LayerBlobs]) -> Result<Option<Beside>, Failure> {
    let mut made = HashSet::new();
    for (reader, layer) in layers.iter().enumerate() {
        let directory = read_directory(&*open_index(store, &layer.index)?)?;
        let header = directory.header();
        let is_made = |source: &&Source| made.contains(&(source.space as u8, source.root));
        if let Some(source) = header.sources.iter().find(|source| !is_made(source)) {
            return Ok(Some(Beside {
                space: source.space,
                root: source.root,
                reader,
            }));
        }
        made.insert((header.space as u8, header.target));
    }
    Ok(None)
}

/// The places of the layers that lead to the last one's component: the last, that of its parent, and so on to the first. The others make what these
/// read beside that. The directories of their indexes are here.
pub fn lineage(store: &Store, layers: &[LayerBlobs]) -> Result<Vec<usize>, Failure> {
    let (mut places, mut wanted) = (Vec::new(), None);
    for (place, layer) in layers.iter().enumerate().rev() {
        let directory = read_directory(&*open_index(store, &layer.index)?)?;
        let header = directory.header();
        if wanted.is_none_or(|wanted| wanted == (header.space as u8, header.target)) {
            places.push(place);
            match header.parent {
                Some(parent) => wanted = Some((header.space as u8, parent)),
                None => break,
            }
        }
    }
    places.reverse();
    Ok(places)
}

/// Reads the directory of an index that lies in the store.
pub fn read_directory(index: &dyn ReadAt) -> Result<Directory, Failure> {
    let damaged = |e: &dyn std::fmt::Display| {
        Failure::new(
            FailureCode::Damaged,
            format!("a layer's index cannot be read: {e}"),
        )
    };
    let mut head = [0; Directory::HEAD_LEN];
    let len = read_up_to(index, &mut head).map_err(|e| damaged(&e))?;
    let needed = Directory::needed(&head[..len]).map_err(|e| damaged(&e))?;
    let mut bytes = vec![0; needed];
    let len = read_up_to(index, &mut bytes).map_err(|e| damaged(&e))?;
    Directory::decode(&bytes[..len]).map_err(|e| damaged(&e))
}

/// Reads from the start on, until there is no more.
pub fn read_up_to(from: &dyn ReadAt, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match from.read_at(done as u64, &mut buffer[done..])? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}

/// Produces components for the store, which serves them to peers.
pub struct Components {
    store: Store,
    open: Mutex<VecDeque<Open>>,
    /// Told when the first component is opened: somebody must close it again.
    opened: Notify,
}

struct Open {
    root: RootHash,
    content: Arc<LayerContent>,
    used: Instant,
}

impl Components {
    /// Nothing open.
    pub fn new(store: Store) -> Self {
        Self {
            store,
            open: Mutex::default(),
            opened: Notify::new(),
        }
    }

    /// Closes what nobody asked for lately, as long as anything is open. Runs for ever.
    pub async fn close_idle(&self) {
        loop {
            self.opened.notified().await;
            while !self.open().is_empty() {
                tokio::time::sleep(IDLE).await;
                self.open().retain(|open| open.used.elapsed() < IDLE);
            }
        }
    }

    /// Closes everything: what is open cannot be collected, and does not see what came since.
    pub fn close_all(&self) {
        self.open().clear();
    }

    fn open(&self) -> MutexGuard<'_, VecDeque<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ComponentProvider for Components {
    fn open(
        &self,
        root: &RootHash,
        component: &Component,
    ) -> Result<Arc<dyn Content>, Box<dyn Error + Send + Sync>> {
        if let Some(open) = Components::open(self)
            .iter_mut()
            .find(|open| open.root == *root)
        {
            open.used = Instant::now();
            return Ok(open.content.clone());
        }
        let options = ReadOptions {
            cache_len: SERVING_CACHE,
        };
        let (holdings, told) = (
            Holdings::new(self.store.clone()),
            component.recipe.layers.clone(),
        );
        // Kept open in part, it would go on lacking what a repair fetches.
        let layers = holdings.shortest(Space::Stream, root, told)?;
        let layers = layers.ok_or_else(|| {
            let message = format!("not all that component {root} is read through is here");
            let hint = "`capsule verify --repair` fetches what is missing";
            Failure::new(FailureCode::Damaged, message).hint(hint)
        })?;
        let content = open(&self.store, &layers, &options)?;
        let mut kept = Components::open(self);
        if kept.len() == OPEN_COMPONENTS {
            kept.pop_front();
        }
        kept.push_back(Open {
            root: *root,
            content: content.clone(),
            used: Instant::now(),
        });
        self.opened.notify_one();
        Ok(content)
    }
}
