//! The stage that brings order into what the workers made: frames out of slabs, the pack and the index out of frames.
//!
//! It runs on the calling thread, and decides by the order of the content alone. It does no heavy work itself but
//! writing the pack and hashing it, and, at the highest effort, where it is nothing beside compressing, finding what frames refer to.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Instant;

use capsule_proto::index::{Codec, Frame, IndexBuilder, Span};
use capsule_proto::{FrameHash, RootHash};
use positioned_io::{ReadAt, WriteAt};

use super::assemble::Assembler;
use super::compress::Encoding;
use super::earlier::Earlier;
use super::encode::EncodeError;
use super::slab::Slab;
use super::stats::EncodeStats;
use super::work::{Event, FrameBytes, HashedPiece, Job};
use crate::bao::TreeHasher;
use crate::content::Progress;

/// A slab that waits for those before it.
type HashedSlab = (Arc<Slab>, Vec<HashedPiece>);

/// Brings the workers' results into order, makes frames, and writes them.
pub(super) struct Coordinator<'a, P> {
    jobs: SyncSender<Job>,
    /// Most frames with the workers or waiting to be written.
    in_flight: usize,
    /// How many there are.
    waiting: usize,
    /// Frames that are compressed, and wait for those before them.
    packed: BTreeMap<u32, PackedFrame>,
    assembler: Assembler<'a>,
    /// Frames that others may refer to, where they may.
    earlier: Option<Earlier<'a>>,
    /// Roots of the parts that lay in one slab each, in no order.
    parts: Vec<(usize, RootHash)>,
    pack: PackWriter<'a, P>,
    stats: EncodeStats,
}

struct PackedFrame {
    packed: Encoding,
    bytes: FrameBytes,
    hash: FrameHash,
    spans: Vec<Span>,
}

/// What comes of it all.
pub(super) struct Made<P> {
    pub parts: Vec<(usize, RootHash)>,
    pub stats: EncodeStats,
    pub index: IndexBuilder,
    pub tree: TreeHasher<P>,
}

impl<'a, P: ReadAt + WriteAt> Coordinator<'a, P> {
    pub fn new(
        jobs: SyncSender<Job>,
        in_flight: usize,
        assembler: Assembler<'a>,
        earlier: Option<Earlier<'a>>,
        pack: PackWriter<'a, P>,
    ) -> Self {
        Self {
            jobs,
            in_flight,
            waiting: 0,
            packed: BTreeMap::new(),
            assembler,
            earlier,
            parts: Vec::new(),
            pack,
            stats: EncodeStats::default(),
        }
    }

    /// Lets the workers end, and gives what was made.
    pub fn into_made(self) -> Made<P> {
        Made {
            parts: self.parts,
            stats: self.stats,
            index: self.pack.index,
            tree: self.pack.tree,
        }
    }

    /// Works until all of the source is in the pack, or something failed.
    pub fn run(&mut self, events: &Receiver<Event>) -> Result<(), EncodeError> {
        let mut slabs: BTreeMap<u64, HashedSlab> = BTreeMap::new();
        let mut next_slab = 0;
        let mut last_slab = None;
        while last_slab != Some(next_slab) || self.waiting > 0 {
            // A stage that ended without a word has panicked, which joining it will tell.
            let Ok(event) = events.recv() else {
                return Err(EncodeError::Cancelled);
            };
            match event {
                Event::Hashed {
                    sequence,
                    slab,
                    pieces,
                    parts,
                    took,
                } => {
                    self.stats.hashing += took;
                    self.parts.extend(parts);
                    slabs.insert(sequence, (slab, pieces));
                }
                Event::Compressed {
                    id,
                    packed,
                    bytes,
                    hash,
                    spans,
                    took,
                } => {
                    self.stats.compressing += took;
                    self.packed.insert(
                        id,
                        PackedFrame {
                            packed,
                            bytes,
                            hash,
                            spans,
                        },
                    );
                    self.write_ready()?;
                }
                Event::End { slabs, read, cut } => {
                    self.stats.reading = read;
                    self.stats.cutting = cut;
                    last_slab = Some(slabs);
                }
                Event::Failed(error) => return Err(error),
                Event::Stopped => return Err(EncodeError::Cancelled),
            }
            if self.pack.progress.cancelled() {
                return Err(EncodeError::Cancelled);
            }
            self.compress_closed();
            while self.assembler.closed.is_empty()
                && let Some((slab, pieces)) = slabs.remove(&next_slab)
            {
                self.assembler.push(&slab, &pieces, &mut self.pack.index)?;
                next_slab += 1;
                self.compress_closed();
            }
            if last_slab == Some(next_slab) {
                self.assembler.finish(&mut self.pack.index)?;
                self.compress_closed();
            }
        }
        self.stats.zero = self.assembler.zero;
        self.stats.repeated = self.assembler.repeated;
        self.stats.inherited = self.assembler.inherited;
        self.stats.copied = self.assembler.copied;
        Ok(())
    }

    /// Gives the workers as many frames as may be in flight.
    fn compress_closed(&mut self) {
        while self.waiting < self.in_flight
            && let Some(frame) = self.assembler.closed.pop_front()
        {
            self.waiting += 1;
            let content = frame.bytes.as_slice();
            let referred = self.earlier.as_mut();
            let referred = referred.map(|earlier| earlier.next(frame.id, content, frame.alike));
            // It fails only when the workers are gone, and then their panic has been told.
            let _ = self.jobs.send(Job::Compress {
                id: frame.id,
                bytes: frame.bytes,
                spans: frame.spans,
                alike: frame.alike,
                referred,
            });
        }
    }

    fn write_ready(&mut self) -> Result<(), EncodeError> {
        let started = Instant::now();
        while let Some(entry) = self.packed.first_entry()
            && u64::from(*entry.key()) == self.pack.index.frame_count()
        {
            let frame = entry.remove();
            self.waiting -= 1;
            self.stats.frames += 1;
            self.stats.framed += frame.bytes.as_slice().len() as u64;
            if !frame.packed.references.is_empty() {
                self.stats.referring += frame.bytes.as_slice().len() as u64;
            }
            self.pack.write(frame)?;
        }
        self.stats.writing += started.elapsed();
        Ok(())
    }
}

/// Writes frames back to back, and hashes them as they go.
pub(super) struct PackWriter<'a, P> {
    out: &'a mut dyn Write,
    tree: TreeHasher<P>,
    index: IndexBuilder,
    progress: &'a dyn Progress,
}

impl<'a, P: ReadAt + WriteAt> PackWriter<'a, P> {
    pub fn new(out: &'a mut dyn Write, tree: TreeHasher<P>, progress: &'a dyn Progress) -> Self {
        Self {
            out,
            tree,
            index: IndexBuilder::new(),
            progress,
        }
    }

    fn write(&mut self, frame: PackedFrame) -> Result<(), EncodeError> {
        let content = frame.bytes.as_slice();
        let Encoding {
            codec,
            bytes,
            references,
            depth,
        } = &frame.packed;
        let packed = if *codec == Codec::Stored {
            content
        } else {
            bytes
        };
        let offset = self.index.pack_len();
        self.out
            .write_all(packed)
            .map_err(|source| EncodeError::Pack { offset, source })?;
        self.tree.push(packed)?;
        self.progress.written(packed.len() as u64);
        self.index.push_frame(Frame {
            pack_offset: offset,
            pack_len: packed.len() as u32,
            len: content.len() as u32,
            codec: *codec,
            hash: frame.hash,
            depth: *depth,
            references: references.clone(),
            spans: frame.spans,
        })?;
        Ok(())
    }
}
