//! The threads that write a tree's small files.
//!
//! They take batches of complete files and work until there are no more. In which order contents come, and what is small, is
//! decided in `writer`.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use capsule_proto::RootHash;
use capsule_proto::listing::{Entry, EntryKind};

use super::meta::Handle;
use super::place::{self, Partial, Target, count};
use super::restore::RestoreError;
use super::root::Parents;

/// More threads only wait for the file system's locks.
const MAX_THREADS: usize = 8;

/// Small files, complete, on the way to a thread.
#[derive(Default)]
pub(super) struct Batch {
    pub bytes: Vec<u8>,
    /// Entry of the listing, and where its bytes lie.
    pub files: Vec<(u32, Range<usize>)>,
}

/// The threads that write small files.
pub(super) struct Workers {
    sender: Option<SyncSender<Batch>>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    pub fn start(target: &Arc<Target>) -> Self {
        let count = std::thread::available_parallelism()
            .map_or(1, |n| n.get())
            .min(MAX_THREADS);
        // One waiting batch a thread: enough that none runs dry.
        let (sender, receiver) = sync_channel(count);
        let receiver = Arc::new(Mutex::new(receiver));
        let threads = (0..count)
            .map(|_| {
                let (target, receiver) = (target.clone(), receiver.clone());
                std::thread::spawn(move || work(&target, &receiver))
            })
            .collect();
        Self {
            sender: Some(sender),
            threads,
        }
    }

    /// Waits for room; false if nobody works any more.
    pub fn send(&self, batch: Batch) -> bool {
        self.sender
            .as_ref()
            .is_some_and(|sender| sender.send(batch).is_ok())
    }

    /// Waits until everything sent is written; false if a thread panicked, which it has printed.
    pub fn join(&mut self) -> bool {
        self.sender = None;
        let panicked = self
            .threads
            .drain(..)
            .filter_map(|thread| thread.join().err());
        panicked.count() == 0
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.join();
    }
}

fn work(target: &Target, receiver: &Mutex<Receiver<Batch>>) {
    let mut parents = Parents::new(&target.root);
    loop {
        // The lock is held while waiting: the others wait for it instead of for the channel.
        let received = receiver
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .recv();
        let Ok(batch) = received else { return };
        for (entry, range) in batch.files {
            if target.has_failed() {
                break;
            }
            let entry = &target.listing.entries()[entry as usize];
            if let Err(error) = write_small(target, &mut parents, entry, &batch.bytes[range]) {
                target.fail(error);
            }
        }
    }
}

fn write_small(
    target: &Target,
    parents: &mut Parents<'_>,
    entry: &Entry,
    data: &[u8],
) -> Result<(), RestoreError> {
    let hash = RootHash::of(data);
    let begin = parents
        .of(&entry.path)
        .and_then(|dir| target.partial_file(&dir));
    let (partial, file) = begin.map_err(target.failed(entry, "making"))?;
    let written = place::write_sparse(&file, 0, data)
        .map_err(|e| RestoreError::io(target.root.display(&entry.path), "writing", e))?;
    finish_file(
        target,
        entry,
        partial,
        &file,
        hash,
        (!written).then_some(data.len() as u64),
    )
}

/// Checks a written file, and gives it its length, metadata and name.
pub(super) fn finish_file(
    target: &Target,
    entry: &Entry,
    partial: Partial,
    file: &File,
    hash: RootHash,
    set_len: Option<u64>,
) -> Result<(), RestoreError> {
    if !matches!(entry.kind, EntryKind::File { root, .. } if root == hash) {
        return Err(RestoreError::Damaged {
            path: target.root.display(&entry.path),
        });
    }
    if let Some(len) = set_len {
        file.set_len(len)
            .map_err(|e| RestoreError::io(target.root.display(&entry.path), "writing", e))?;
    }
    target.apply(entry, Handle::Open(file.as_fd()))?;
    target.place(entry, partial)?;
    count(&target.tally.written);
    Ok(())
}
