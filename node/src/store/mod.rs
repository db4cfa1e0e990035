//! The store: blobs as files that are served as they lie, and a database of what is present.
//!
//! A blob is bytes named by their BLAKE3 root; the store does not know what is in it. It is either made
//! here whole ([`Store::begin_import`], [`Store::put_small`]) or fetched in verified ranges
//! ([`Store::write_encoded`]). Invariants, at every instant and after every crash:
//!
//! - what counts as present was verified against its root;
//! - what counts as durable is on the disk: data, sync, then the commit;
//! - what is removed stops counting before its bytes go;
//! - what an [`ActiveGuard`] names is not removed.
//!
//! Layout on disk, order of operations and what a crash leaves: `node/docs/store.md`. Deliberately not
//! here: the network, layers and their decoding, the decision what to keep, the clock.
//!
//! | file | what lives there |
//! |---|---|
//! | `disk`, `lock` | the file system as a trait; the lock against a second daemon |
//! | `meta`, `rows`, `tables` | the database, its values, the daemon's tables |
//! | `blob` | a blob in memory: states, locks, open files |
//! | `partial`, `import` | writing: verified ranges and flush; whole blobs |
//! | `serve`, `damage`, `component` | reading; what no longer verifies; components by decoding |
//! | `gc`, `reached` | removal; what of packs is needed, where that is not all of them |
//! | `space`, `recover` | quota; opening after whatever happened |

mod blob;
mod component;
mod damage;
mod disk;
mod error;
mod gc;
mod images;
mod import;
mod lock;
mod meta;
mod partial;
mod reached;
mod recover;
mod rows;
mod serve;
mod space;
mod tables;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::time::Duration;

use capsule_proto::RootHash;

pub use component::ComponentProvider;
pub use damage::{Checked, Damage, DamageHandler};
pub use disk::{Disk, DiskFile, FileEntry, OpenMode, RealDisk};
pub use error::{DatabaseError, Full, IoFault, OpenError, ReadError, RemoveError, WriteError};
pub use gc::{ActiveGuard, GcMode, GcReport};
pub use import::{Import, Outboard, Scratch};
pub use reached::Reached;
pub use recover::Recovery;
pub use rows::{
    Ban, BlobKind, Component, ComponentRecipe, Follow, HeldCapsule, LayerBlobs, MAX_LAYERS,
    MAX_REASON_LEN, PinOrigin, read_layers, write_layers,
};
pub use serve::{BlobReader, ComingReader, Presence};
pub use space::Usage;
pub use tables::{MAX_BANS, MAX_PEER_LEN, MAX_RECORDS, MAX_VALUE_LEN};

use blob::{Blob, Handles, lock as hold};
use component::ComponentEntry;
use gc::Active;
use lock::HomeLock;
use meta::{META_FILE, Meta};
use space::Space;

/// How a store is opened.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Most bytes of blobs; `None`: only the file system limits.
    pub quota: Option<u64>,
    /// Bytes of a blob that are written before a flush of their own. A crash loses at most this much a
    /// blob; a sync costs about as long as 64 MiB take to write on the disks of lab machines.
    pub flush_bytes: u64,
    /// What was written waits for a flush no longer than this, while more is being written: over a thin link 64 MiB take minutes,
    /// which a crash is not to cost.
    pub flush_after: Duration,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            quota: None,
            flush_bytes: 64 << 20,
            flush_after: Duration::from_secs(5),
        }
    }
}

/// The store of one home. Clones are handles to the same store; all methods may be called from many
/// threads, and block.
///
/// Dropping the last handle flushes what it can; [`flush_all`](Store::flush_all) first says whether it could.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

/// A blob in a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobInfo {
    /// Its root hash.
    pub root: RootHash,
    /// What it is.
    pub kind: BlobKind,
    /// What is here of it.
    pub presence: Presence,
}

struct Inner {
    disk: Arc<dyn Disk>,
    meta: Meta,
    blobs: RwLock<BTreeMap<RootHash, Arc<Blob>>>,
    components: RwLock<BTreeMap<RootHash, Arc<ComponentEntry>>>,
    /// The right to change components' rows.
    component_turn: Mutex<()>,
    handles: Handles,
    /// Blobs with unsynced data in files, the longest first.
    dirty: Mutex<VecDeque<RootHash>>,
    active: Mutex<Active>,
    /// One removal at a time: it holds several blobs' turns.
    gc_turn: Mutex<()>,
    space: Space,
    flush_bytes: u64,
    flush_after: Duration,
    next_tmp: AtomicU64,
    provider: RwLock<Option<Weak<dyn ComponentProvider>>>,
    damage_handler: RwLock<Option<DamageHandler>>,
    recovery: Recovery,
    _lock: Option<HomeLock>,
}

impl Store {
    /// Opens the store in a directory, which is made if it is missing, and brings it to order.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Self, OpenError> {
        make_durably(dir)?;
        let lock = HomeLock::take(dir)?;
        Self::open_locked(Arc::new(RealDisk::new(dir)), options, Some(lock))
    }

    /// Opens the store on a disk that the caller provides, and keeps others away from.
    pub fn open_with(disk: Arc<dyn Disk>, options: StoreOptions) -> Result<Self, OpenError> {
        Self::open_locked(disk, options, None)
    }

    fn open_locked(
        disk: Arc<dyn Disk>,
        options: StoreOptions,
        lock: Option<HomeLock>,
    ) -> Result<Self, OpenError> {
        recover::make_directories(&*disk)?;
        let meta = Meta::open(Arc::clone(&disk))?;
        let found = recover::recover(&*disk, &meta)?;
        let space = Space::new(options.quota);
        let blobs = found
            .blobs
            .into_iter()
            .map(|(root, row)| (root, Arc::new(Blob::from_row(root, row))));
        let blobs: BTreeMap<_, _> = blobs
            .inspect(|(_, blob)| space.count(blob.cost(&blob.state().present)))
            .collect();
        let components = found
            .components
            .into_iter()
            .map(|(root, row)| (root, Arc::new(ComponentEntry::from_row(row))));
        let components: BTreeMap<_, _> = components
            .inspect(|(_, entry)| space.count(entry.cost()))
            .collect();
        let inner = Inner {
            disk,
            meta,
            blobs: RwLock::new(blobs),
            components: RwLock::new(components),
            component_turn: Mutex::default(),
            handles: Handles::default(),
            dirty: Mutex::default(),
            active: Mutex::default(),
            gc_turn: Mutex::default(),
            space,
            flush_bytes: options.flush_bytes,
            flush_after: options.flush_after,
            next_tmp: AtomicU64::new(0),
            provider: RwLock::default(),
            damage_handler: RwLock::default(),
            recovery: found.recovery,
            _lock: lock,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// What opening found and put right.
    pub fn recovery(&self) -> &Recovery {
        &self.inner.recovery
    }

    /// All blobs, by root.
    pub fn blobs(&self) -> Vec<BlobInfo> {
        let info = |blob: Arc<Blob>| {
            let presence = Presence::new(blob.size, blob.state().present.clone());
            BlobInfo {
                root: blob.root,
                kind: blob.kind,
                presence,
            }
        };
        self.inner.all_blobs().into_iter().map(info).collect()
    }

    /// How full the store is.
    pub fn usage(&self) -> Usage {
        self.inner.space.usage()
    }

    /// Changes the quota. A store that is over it keeps what it has and takes no more.
    pub fn set_quota(&self, quota: Option<u64>) {
        self.inner.space.set_quota(quota);
    }
}

/// Makes the store's directory, and its name durable: a commit in it is worth no more than that.
fn make_durably(dir: &Path) -> Result<(), IoFault> {
    if dir.is_dir() {
        return Ok(());
    }
    // Outermost first; the last of the ancestors of a relative path is the empty one: the current directory.
    let parent = dir
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    make_durably(parent)?;
    match fs::create_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(IoFault::new("create", dir, e));
        }
        _ => {}
    }
    fs::File::open(parent)
        .and_then(|parent| parent.sync_all())
        .map_err(|e| IoFault::new("sync", parent, e))
}

impl Inner {
    fn blobs_mut(&self) -> RwLockWriteGuard<'_, BTreeMap<RootHash, Arc<Blob>>> {
        self.blobs.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A blob that is here and stays.
    fn blob(&self, root: &RootHash) -> Option<Arc<Blob>> {
        let blob = self
            .blobs
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(root)
            .cloned();
        blob.filter(|blob| !blob.state().gone)
    }

    fn all_blobs(&self) -> Vec<Arc<Blob>> {
        let blobs = self.blobs.read().unwrap_or_else(PoisonError::into_inner);
        blobs
            .values()
            .filter(|blob| !blob.state().gone)
            .cloned()
            .collect()
    }

    fn components(&self) -> RwLockReadGuard<'_, BTreeMap<RootHash, Arc<ComponentEntry>>> {
        self.components
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn components_mut(&self) -> RwLockWriteGuard<'_, BTreeMap<RootHash, Arc<ComponentEntry>>> {
        self.components
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for blob in self.all_blobs() {
            if let Err(error) = self.flush(&blob) {
                tracing::warn!(root = %blob.root, %error, "not flushed: it will be fetched again");
            }
        }
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("usage", &self.space.usage())
            .field("dirty", &hold(&self.dirty).len())
            .finish()
    }
}
