//! The parallel stages of encoding: hashing slabs and compressing frames, on as many threads as there are cores;
//! and hashing the content in order, on one.
//!
//! Workers take jobs in the order given, but finish in any: who needs an order restores it (`encode`). Nothing that a
//! worker returns depends on which worker it was, so output does not depend on the number of threads.

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use capsule_proto::index::Span;
use capsule_proto::{FrameHash, RootHash};
use positioned_io::{ReadAt, WriteAt};

use super::compress::{Encoding, FrameCompressor};
use super::earlier::Referred;
use super::encode::{Against, EncodeError, EncodeOptions};
use super::slab::{Part, Piece, Slab};
use super::update::Updater;
use crate::bao::{HashError, Tree, TreeHasher};

/// What workers do.
pub(super) enum Job {
    /// Says what the pieces of a slab are, and hashes spans and small parts.
    Hash {
        /// The slab's position in the content.
        sequence: u64,
        slab: Arc<Slab>,
    },
    /// Compresses a frame.
    Compress {
        id: u32,
        bytes: FrameBytes,
        /// Lengths and, where they are known, hashes of its spans.
        spans: Vec<(u32, Option<FrameHash>)>,
        /// Whether old content resembles it.
        alike: bool,
        /// What to compress it against, where that was decided.
        referred: Option<Referred>,
    },
}

/// What the coordinator hears.
pub(super) enum Event {
    Hashed {
        sequence: u64,
        slab: Arc<Slab>,
        /// What it consists of, in order.
        pieces: Vec<HashedPiece>,
        /// Hashes of the parts that lie in one piece in the slab.
        parts: Vec<(usize, RootHash)>,
        took: Duration,
    },
    Compressed {
        id: u32,
        packed: Encoding,
        bytes: FrameBytes,
        hash: FrameHash,
        spans: Vec<Span>,
        took: Duration,
    },
    /// The source is read to the end, in so many slabs.
    End {
        slabs: u64,
        read: Duration,
        cut: Duration,
    },
    /// A stage failed, and everything stops.
    Failed(EncodeError),
    /// A stage ended early: joining its thread tells why, or passes its panic on.
    Stopped,
}

/// A piece, and a span's hash.
pub(super) type HashedPiece = (Piece, Option<FrameHash>);

/// A frame's content: where it lies in one piece in a slab, it is not copied.
pub(super) enum FrameBytes {
    InSlab {
        slab: Arc<Slab>,
        range: Range<usize>,
    },
    Owned(Vec<u8>),
}

impl FrameBytes {
    pub fn as_slice(&self) -> &[u8] {
        match self {
            Self::InSlab { slab, range } => slab.bytes(range.start, range.len()),
            Self::Owned(bytes) => bytes,
        }
    }
}

/// Tells the coordinator when a stage panics: it would wait for its results for ever.
pub(super) struct PanicGuard(pub SyncSender<Event>);

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.0.send(Event::Stopped);
        }
    }
}

/// Does jobs until there are no more.
pub(super) fn run_worker(
    jobs: &Mutex<Receiver<Job>>,
    events: SyncSender<Event>,
    options: &EncodeOptions,
    against: Option<&Against<'_>>,
) {
    let guard = PanicGuard(events);
    let mut compressor = FrameCompressor::new(against, options);
    let mut updater = against.map(|against| Updater::new(against, options));
    loop {
        // Held while waiting for a job: the others have nothing to do then either.
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        let started = Instant::now();
        let event = match job {
            Job::Hash { sequence, slab } => match hash_slab(&slab, updater.as_mut()) {
                Ok((pieces, parts)) => Event::Hashed {
                    sequence,
                    slab,
                    pieces,
                    parts,
                    took: started.elapsed(),
                },
                Err(error) => Event::Failed(error),
            },
            Job::Compress {
                id,
                bytes,
                spans,
                alike,
                referred,
            } => {
                let content = bytes.as_slice();
                match compressor.compress(id, content, alike, referred) {
                    Ok(packed) => {
                        let (hash, spans) = hash_frame(content, &spans);
                        Event::Compressed {
                            id,
                            packed,
                            bytes,
                            hash,
                            spans,
                            took: started.elapsed(),
                        }
                    }
                    Err(error) => Event::Failed(error),
                }
            }
        };
        if guard.0.send(event).is_err() {
            return;
        }
    }
}

/// A frame's hash and its spans. One span is the frame: listing it would say nothing.
fn hash_frame(content: &[u8], spans: &[(u32, Option<FrameHash>)]) -> (FrameHash, Vec<Span>) {
    let of_frame = || FrameHash::of(content);
    if let [(_, hash)] = spans {
        return (hash.unwrap_or_else(of_frame), Vec::new());
    }
    let mut start = 0;
    let with_hash = |&(len, hash): &(u32, Option<FrameHash>)| {
        let range = start..start + len as usize;
        start = range.end;
        let hash = hash.unwrap_or_else(|| FrameHash::of(&content[range]));
        Span { len, hash }
    };
    let spans = spans.iter().map(with_hash).collect();
    (of_frame(), spans)
}

type Hashed = (Vec<HashedPiece>, Vec<(usize, RootHash)>);

fn hash_slab(slab: &Slab, updater: Option<&mut Updater<'_>>) -> Result<Hashed, EncodeError> {
    let pieces = match updater {
        Some(updater) => updater.pieces(slab)?,
        None => slab.pieces.clone(),
    };
    let (mut known, mut spans) = (Vec::with_capacity(pieces.len()), Vec::new());
    let mut start = slab.range.start;
    for piece in pieces {
        let hash = match piece {
            Piece::Span { at, len, .. } => {
                let hash = RootHash::of(slab.bytes(at, len));
                spans.push((start..start + len as u64, hash));
                Some(FrameHash::truncate(&hash))
            }
            _ => None,
        };
        start += piece.len();
        known.push((piece, hash));
    }
    let part_hash = |part: &Part| {
        let bytes = if part.range.is_empty() {
            &[]
        } else {
            slab.whole(&part.range)?
        };
        // A part that is one span was hashed already.
        let span = spans
            .binary_search_by_key(&part.range.start, |(range, _)| range.start)
            .ok();
        let known = span
            .map(|i| &spans[i])
            .filter(|(range, _)| *range == part.range);
        Some((
            part.index,
            known.map_or_else(|| RootHash::of(bytes), |(_, hash)| *hash),
        ))
    };
    let parts = slab.parts.iter().filter_map(part_hash).collect();
    Ok((known, parts))
}

/// Hashes the content in order: a stream's tree.
pub(super) fn hash_stream<S: ReadAt + WriteAt>(
    slabs: &Receiver<Arc<Slab>>,
    storage: S,
) -> Result<(Tree, S), HashError> {
    let mut hasher = TreeHasher::with_storage(storage);
    for slab in slabs {
        for region in &slab.regions {
            match region.at {
                Some(at) => hasher.push(slab.bytes(at, region.len as usize))?,
                None => hasher.push_zeros(region.len)?,
            }
        }
    }
    hasher.finish()
}

/// Hashes the content in order: those of a tree's files that do not lie in one piece in a slab.
pub(super) fn hash_parts(slabs: &Receiver<Arc<Slab>>) -> Vec<(usize, RootHash)> {
    let mut hashes = Vec::new();
    let mut hasher = blake3::Hasher::new();
    for slab in slabs {
        for part in slab
            .parts
            .iter()
            .filter(|part| !part.range.is_empty() && slab.whole(&part.range).is_none())
        {
            for region in &slab.regions {
                let start = region.start.max(part.range.start);
                let end = (region.start + region.len).min(part.range.end);
                if start >= end {
                    continue;
                }
                match region.at {
                    Some(at) => {
                        hasher.update(
                            slab.bytes(
                                at + (start - region.start) as usize,
                                (end - start) as usize,
                            ),
                        );
                    }
                    None => update_zeros(&mut hasher, end - start),
                }
            }
            if part.range.end <= slab.range.end {
                hashes.push((
                    part.index,
                    RootHash::from_bytes(*hasher.finalize().as_bytes()),
                ));
                hasher.reset();
            }
        }
    }
    hashes
}

/// Zeros of a hole still have to be hashed, as BLAKE3's chunks depend on their position: on all cores where it pays.
fn update_zeros(hasher: &mut blake3::Hasher, mut len: u64) {
    static ZEROS: [u8; 1 << 20] = [0; 1 << 20];
    while len > 0 {
        let now = len.min(ZEROS.len() as u64) as usize;
        hasher.update_rayon(&ZEROS[..now]);
        len -= now as u64;
    }
}
