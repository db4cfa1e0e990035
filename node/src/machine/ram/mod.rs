//! A machine's memory as a file that is written to without being copied first.
//!
//! A page is what the machine wrote since it last stopped; or else what it wrote before an earlier stop, newest first, that is not published
//! yet (`generation`); or else what lies below all of them: what is published since the machine started, and what was read from the base, so that it
//! is decoded once; or else the base's. `read` and `write` are about bytes, `files` shows them to QEMU as the file `ram` of a file system, and
//! `small_pages` has QEMU ask for single pages of it.
//!
//! The memory outlives the program only by what stops left. Few locks order it: `stack` is held shared for each access to files, so that a
//! stop excludes them, but never while the base is waited for; and a lock per stripe of windows, which is taken before it, orders changes of
//! one page. A page that is no longer inherited never becomes so again.

mod files;
mod generation;
mod pages;
mod read;
pub mod small_pages;
mod write;

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use tokio::sync::Semaphore;

use crate::disk::Disk;
pub use files::Mounted;
use generation::Generation;
use pages::PAGE;
pub use pages::{Page, Run};
use read::Fetch;

/// What is changed under one lock, in pages.
const PAGES_IN_WINDOW: u64 = 16;
/// Pages that are fetched from the base at a time. More than a page at once would be fetched over thin links than is known to be read first; frames, which
/// are longer, are kept decoded by the daemon.
const FETCHES: usize = 64;
/// Stops of which the memory is not absorbed: each makes looking for a page a little longer.
const MAX_FROZEN: usize = 256;
/// Locks that windows share.
const STRIPES: usize = 64;

/// The name of the file.
pub const FILE: &str = "ram";

/// See the module.
pub struct Ram {
    dir: PathBuf,
    len: u64,
    base: Option<Arc<dyn Disk>>,
    stack: RwLock<Stack>,
    below: Generation,
    stripes: [Mutex<()>; STRIPES],
    /// Only one stops or absorbs.
    changing: Mutex<()>,
    /// What is being fetched, by page.
    fetches: Mutex<HashMap<u64, Fetch>>,
    places: Arc<Semaphore>,
    fetched: Arc<AtomicU64>,
}

/// What lies above.
struct Stack {
    current: Arc<Generation>,
    /// Oldest first.
    frozen: Vec<Arc<Generation>>,
}

/// What a machine wrote before it stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frozen {
    /// Where its data are, at the memory's offsets. It does not change, and goes when it is absorbed.
    pub file: PathBuf,
    /// What was written, in order; what lies between was not.
    pub runs: Vec<Run>,
}

/// How much there is, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Data that the machine wrote since it last stopped.
    pub written: u64,
    /// Data that it wrote before, and that are not absorbed.
    pub frozen: u64,
    /// Read from the base.
    pub fetched: u64,
}

impl Ram {
    /// Memory of `len` bytes, a multiple of 4,096: what is frozen in `dir`, which is there and this memory's alone, above the pages of `base`,
    /// or zeros where it has none. Blocks.
    ///
    /// What was absorbed is no longer in `dir`: so the base of a next start has it.
    ///
    /// # Errors
    /// A length that does not fit the base or what is in the directory; or what the operating system said.
    pub fn new(dir: &Path, len: u64, base: Option<Arc<dyn Disk>>) -> io::Result<Self> {
        let invalid = |why: &str| Err(io::Error::new(ErrorKind::InvalidInput, why.to_owned()));
        if len == 0 || !len.is_multiple_of(PAGE) || i64::try_from(len).is_err() {
            return invalid("a memory is some pages of 4,096 bytes");
        }
        if base.as_ref().is_some_and(|base| base.len() > len) {
            return invalid("the base is longer than the memory");
        }
        let count = len / PAGE;
        let frozen = Generation::load_all(dir, count)?;
        let newest = frozen.last().map_or(0, |newest| newest.number);
        let below = Generation::create(dir, newest + 1, count)?;
        // It goes with the memory.
        std::fs::remove_file(&below.path)?;
        let current = Generation::create(dir, newest + 2, count)?;
        Ok(Self {
            dir: dir.to_owned(),
            len,
            base,
            stack: RwLock::new(Stack {
                current: Arc::new(current),
                frozen: frozen.into_iter().map(Arc::new).collect(),
            }),
            below,
            stripes: [const { Mutex::new(()) }; STRIPES],
            changing: Mutex::new(()),
            fetches: Mutex::new(HashMap::new()),
            places: Arc::new(Semaphore::new(FETCHES)),
            fetched: Arc::default(),
        })
    }

    /// Its bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: there is no memory without a page.
    pub fn is_empty(&self) -> bool {
        false
    }

    fn pages(&self) -> u64 {
        self.len / PAGE
    }

    /// What was written since the last time becomes immutable and is kept in the directory; what is written from now on goes elsewhere.
    /// Whoever calls has stopped the machine and synced the file (once before it stopped too, so that little is left to sync while it stands
    /// still). Copies nothing. Blocks.
    ///
    /// # Errors
    /// Too much is frozen already; or what the operating system said. Then it is as if nothing had been tried.
    pub fn freeze(&self) -> io::Result<()> {
        let _changing = lock(&self.changing);
        let (number, frozen) = {
            let stack = self.stack();
            (stack.current.number + 1, stack.frozen.len())
        };
        if frozen >= MAX_FROZEN {
            let why = "the memory of too many stops is not published yet";
            return Err(io::Error::new(ErrorKind::QuotaExceeded, why));
        }
        let next = Arc::new(Generation::create(&self.dir, number, self.pages())?);
        let mut stack = self.stack_mut();
        if let Err(error) = stack.current.seal(&self.dir, self.pages()) {
            let _left_over = next.remove(&self.dir);
            return Err(error);
        }
        let last = std::mem::replace(&mut stack.current, next);
        stack.frozen.push(last);
        Ok(())
    }

    /// Writes what there was no room for when the machine wrote it. Blocks.
    ///
    /// # Errors
    /// There still is none: what the operating system said. Nothing is lost.
    pub fn settle(&self) -> io::Result<()> {
        let current = self.stack().current.clone();
        current.settle()
    }

    /// All that is frozen and not absorbed, oldest first.
    pub fn frozen(&self) -> Vec<Frozen> {
        let frozen = self.stack().frozen.clone();
        let told = frozen.iter().map(|generation| Frozen {
            file: generation.path.clone(),
            runs: generation.pages.runs(),
        });
        told.collect()
    }

    /// All that is frozen becomes one, as if the machine had stopped once. Copies them, while the memory is used. Blocks.
    ///
    /// # Errors
    /// What the operating system said; then some are left, and it can be tried again.
    pub fn merge(&self) -> io::Result<()> {
        let _changing = lock(&self.changing);
        let frozen = self.stack().frozen.clone();
        let Some((oldest, newer)) = frozen.split_first() else {
            return Ok(());
        };
        for generation in newer {
            self.put_upon(oldest, generation)?;
            self.stack_mut().frozen.remove(1);
            generation.remove(&self.dir)?;
        }
        oldest.seal(&self.dir, self.pages())
    }

    /// Copies a generation into one below it, which is not seen where the upper one has something.
    fn put_upon(&self, below: &Generation, generation: &Generation) -> io::Result<()> {
        for run in generation.pages.runs() {
            for pages in windows(run.start / PAGE..(run.start + run.len) / PAGE) {
                let _stripe = self.stripe(pages.start / PAGES_IN_WINDOW);
                match run.data {
                    true => below.copy(generation, pages.start, pages.end)?,
                    false => below.zero(pages.start, pages.end)?,
                }
            }
        }
        Ok(())
    }

    /// The oldest `n` of what is frozen are published: they go, one by one, into what lies below. Copies them, while the memory is used. Blocks.
    ///
    /// # Errors
    /// More than there are; or what the operating system said: then some may be left, and it can be tried again.
    pub fn absorb(&self, n: usize) -> io::Result<()> {
        let _changing = lock(&self.changing);
        let oldest: Vec<_> = self.stack().frozen.iter().take(n).cloned().collect();
        if oldest.len() < n {
            let why = "so many are not frozen";
            return Err(io::Error::new(ErrorKind::InvalidInput, why));
        }
        for generation in oldest {
            self.put_upon(&self.below, &generation)?;
            self.stack_mut().frozen.remove(0);
            generation.remove(&self.dir)?;
        }
        Ok(())
    }

    /// How much there is.
    pub fn stats(&self) -> Stats {
        let stack = self.stack();
        let frozen = stack.frozen.iter().map(|generation| generation.written());
        Stats {
            written: stack.current.written(),
            frozen: frozen.sum(),
            fetched: self.fetched.load(Ordering::Relaxed),
        }
    }

    fn stack(&self) -> RwLockReadGuard<'_, Stack> {
        self.stack.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn stack_mut(&self) -> RwLockWriteGuard<'_, Stack> {
        self.stack.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock under which pages of a window are changed.
    fn stripe(&self, window: u64) -> MutexGuard<'_, ()> {
        lock(&self.stripes[(window % STRIPES as u64) as usize])
    }
}

impl Drop for Ram {
    /// What is not frozen means nothing without the machine.
    fn drop(&mut self) {
        let current = self.stack().current.clone();
        if let Err(error) = current.remove(&self.dir) {
            tracing::warn!(%error, path = %current.path.display(), "a memory's file is left over");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Parts of a range of pages, each within a window.
fn windows(pages: std::ops::Range<u64>) -> impl Iterator<Item = std::ops::Range<u64>> {
    let mut next = pages.start;
    std::iter::from_fn(move || {
        let start = next;
        next = ((start / PAGES_IN_WINDOW + 1) * PAGES_IN_WINDOW).min(pages.end);
        (start < pages.end).then_some(start..next)
    })
}

#[cfg(test)]
mod tests;
