//! Hashing a source, and nothing else: the first pass of an update, which tells what has to be looked at in the second.

use std::sync::mpsc::sync_channel;
use std::thread;

use positioned_io::{ReadAt, WriteAt};

use super::encode::EncodeError;
use crate::bao::{Tree, TreeHasher};
use crate::content::{Progress, Source};

/// Read at a time; hashing such a piece uses all cores.
const READ_LEN: u64 = 4 << 20;
/// Pieces read ahead of the hashing.
const AHEAD: usize = 2;

/// Hashes a source's content while the next of it is read; its outboard is made in the storage, which must be empty.
pub fn hash_source<S: ReadAt + WriteAt>(
    source: &dyn Source,
    storage: S,
    progress: &dyn Progress,
) -> Result<(Tree, S), EncodeError> {
    let mut hasher = TreeHasher::with_storage(storage);
    let (pieces, queue) = sync_channel(AHEAD);
    // One buffer is filled and one hashed, beside those that wait.
    let (home, free) = sync_channel(AHEAD + 2);
    (0..AHEAD + 2).for_each(|_| home.try_send(Vec::new()).expect("there is room for each"));
    thread::scope(|scope| {
        let reader = scope.spawn(move || {
            for extent in source.extents() {
                let extent = extent?;
                let mut at = extent.range.start;
                while at < extent.range.end {
                    if progress.cancelled() {
                        return Err(EncodeError::Cancelled);
                    }
                    let left = extent.range.end - at;
                    let (len, piece) = if extent.zero {
                        (left, Piece::Zeros(left))
                    } else {
                        let len = left.min(READ_LEN);
                        let Ok(mut buffer) = free.recv() else {
                            return Ok(());
                        };
                        buffer.resize(len as usize, 0);
                        source.read_at(at, &mut buffer)?;
                        (len, Piece::Data(buffer))
                    };
                    // It fails when hashing has, which tells why.
                    if pieces.send(piece).is_err() {
                        return Ok(());
                    }
                    progress.read(len);
                    at += len;
                }
            }
            Ok(())
        });
        let mut hashed = Ok(());
        for piece in queue.iter() {
            hashed = match piece {
                Piece::Zeros(len) => hasher.push_zeros(len),
                Piece::Data(buffer) => {
                    let pushed = hasher.push(&buffer);
                    // There is room for every buffer.
                    let _ = home.try_send(buffer);
                    pushed
                }
            };
            if hashed.is_err() {
                break;
            }
        }
        drop((home, queue));
        let read = reader
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        hashed?;
        read
    })?;
    let (tree, storage) = hasher.finish()?;
    if tree.size != source.len() {
        return Err(EncodeError::Extents { offset: tree.size });
    }
    Ok((tree, storage))
}

enum Piece {
    Zeros(u64),
    Data(Vec<u8>),
}
