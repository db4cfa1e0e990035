//! Hash trees of content that differs from older content in places: made from the older tree, by reading only those places.
//!
//! Publishing an image that tells what changed, and checking an update that was fetched, both cost what changed then.

use std::io;
use std::sync::{Mutex, PoisonError};

use capsule_chunker::bao::{Change, Tree, UpdateError, update};
use capsule_chunker::content::{Content, Progress, ReadError};
use capsule_proto::{GroupRanges, RootHash};
use positioned_io::ReadAt;

use crate::control::{Failure, FailureCode};
use crate::store::{Scratch, Store};
use crate::transfer::check::threads;
use crate::work::Work;

/// Read at a time by one thread.
const PIECE_LEN: usize = 1 << 20;

/// Where content may differ from older content that is here.
pub struct Differing {
    /// The older content's tree.
    pub base: Tree,
    /// Groups that may differ, but for what another length makes so.
    pub changed: GroupRanges,
    /// Groups that are zero now.
    pub zero: GroupRanges,
}

/// Why there is no tree.
pub enum RehashError {
    /// The older content's tree is damaged, or gone: all of the content must be hashed.
    Base,
    /// The content could not be read.
    Read(ReadError),
    /// It was stopped, or the store failed.
    Failed(Failure),
}

/// A component's tree, if it is here with its outboard.
pub fn tree_of(store: &Store, root: RootHash) -> Option<Tree> {
    let size = store.present(&root)?.size;
    store.open_outboard(&root).ok()?;
    Some(Tree { root, size })
}

/// The tree of content, and its outboard.
pub fn rehash(
    store: &Store,
    content: &dyn Content,
    differing: &Differing,
    work: &Work,
) -> Result<(Tree, Scratch), RehashError> {
    let base = &differing.base;
    let old_outboard = store
        .open_outboard(&base.root)
        .map_err(|_| RehashError::Base)?;
    let change = Change {
        size: content.len(),
        dirty: &differing.changed,
        zero: &differing.zero,
        in_place: false,
    };
    let content = Watched::new(content, work);
    let mut outboard = store
        .scratch()
        .map_err(|error| RehashError::Failed(error.into()))?;
    match update(base, &*old_outboard, &change, &content, &mut outboard) {
        Ok(tree) => Ok((tree, outboard)),
        Err(_) if work.cancelled() => Err(RehashError::Failed(Failure::cancelled())),
        Err(UpdateError::Pair { .. } | UpdateError::OldOutboard { .. }) => Err(RehashError::Base),
        Err(error) => Err(match content.into_error() {
            Some(error) => RehashError::Read(error),
            None => {
                let message = format!("hashing what changed: {error}");
                RehashError::Failed(Failure::new(FailureCode::Io, message))
            }
        }),
    }
}

/// Content that is read on all cores, under the eyes of who waits for it.
pub struct Watched<'a> {
    content: &'a dyn Content,
    work: &'a Work,
    /// The first error, which `io::Error` would make a text of.
    error: Mutex<Option<ReadError>>,
}

impl<'a> Watched<'a> {
    pub fn new(content: &'a dyn Content, work: &'a Work) -> Self {
        Self {
            content,
            work,
            error: Mutex::default(),
        }
    }

    /// Why reading failed, if it did.
    pub fn into_error(self) -> Option<ReadError> {
        self.error
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn read_piece(&self, pos: u64, piece: &mut [u8]) -> io::Result<()> {
        if self.work.cancelled() {
            return Err(io::Error::other("cancelled"));
        }
        self.content.read_at(pos, piece).map_err(|error| {
            let failed = io::Error::other(error.to_string());
            self.error
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(error);
            failed
        })?;
        self.work.read(piece.len() as u64);
        Ok(())
    }
}

impl ReadAt for Watched<'_> {
    fn read_at(&self, pos: u64, buf: &mut [u8]) -> io::Result<usize> {
        let len = buf
            .len()
            .min(self.content.len().saturating_sub(pos) as usize);
        let buf = &mut buf[..len];
        let mut pieces = buf.chunks_mut(PIECE_LEN).enumerate();
        if len <= PIECE_LEN {
            return pieces
                .try_for_each(|(_, piece)| self.read_piece(pos, piece))
                .map(|()| len);
        }
        let pieces = Mutex::new(pieces);
        let next = || pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || {
            while let Some((number, piece)) = next() {
                self.read_piece(pos + (number * PIECE_LEN) as u64, piece)?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads().get()).map(|_| scope.spawn(work)).collect();
            let done = workers.into_iter().map(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            done.collect::<io::Result<Vec<()>>>()
        })?;
        Ok(len)
    }
}
