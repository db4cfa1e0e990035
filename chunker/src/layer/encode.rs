//! Encoding a component from nothing: one pass over a source, through stages with bounded queues between them.
//!
//! ```text
//! reader: read, cut --slabs--> workers: hash spans --> coordinator: assemble frames --> workers: compress
//!        \--slabs--> hasher: content tree                  coordinator: write pack and its tree <--/
//! ```
//!
//! Memory: slabs (`SLAB_COUNT` + one for two workers, 8 MiB each), frames in flight (2 a worker + 4, content and result),
//! zstd's tables a worker, and the index, which is about 20 bytes a frame and 18 a span. At 2 cores, 1 MiB frames and any
//! size up to a few TiB this is under 300 MiB at the default effort. Deltas against a parent are not made here.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use capsule_proto::index::{BuildError, Codec, Frame, IndexBuilder, IndexHeader, MAX_FRAME_LEN, Space, Span};
use capsule_proto::manifest::ComponentKind;
use capsule_proto::{FrameHash, RootHash};
use positioned_io::{ReadAt, WriteAt};
use thiserror::Error;

use super::assemble::Assembler;
use super::codec::{FrameFault, Packed};
use super::cut::{Cutter, Cuts};
use super::slab::{SLAB_LEN, Slab, SlabReader};
use super::stats::EncodeStats;
use super::work::{self, Event, FrameBytes, Job, PanicGuard};
use crate::bao::{HashError, Tree, TreeHasher};
use crate::content::{Progress, ReadError, Source};

/// Slabs beside those that the workers keep busy: one being read, one being hashed in order, two waiting.
const SLAB_COUNT: usize = 4;

/// How hard to compress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Effort {
    /// zstd level 1.
    Fast,
    /// zstd level 3.
    #[default]
    Default,
    /// zstd level 19: a hundred times the work, for what many will fetch.
    Max,
}

impl Effort {
    /// The zstd level.
    pub const fn level(self) -> i32 {
        match self {
            Self::Fast => 1,
            Self::Default => 3,
            Self::Max => 19,
        }
    }
}

/// How to encode.
#[derive(Clone, Debug)]
pub struct EncodeOptions {
    /// How hard to compress.
    pub effort: Effort,
    /// Longest frame, in bytes: what a reader of any one byte decodes. Brought within 4 KiB and 16 MiB.
    pub frame_max: u32,
    /// Where cuts may fall.
    pub cuts: Cuts,
    /// How many frames are compressed at a time. Does not change the result.
    pub threads: NonZeroUsize,
}

impl EncodeOptions {
    /// Longest frame of disks and memory, which are read at random.
    pub const PAGED_FRAME_MAX: u32 = 256 << 10;
    /// Longest frame of files and trees, which are mostly restored whole.
    pub const FILE_FRAME_MAX: u32 = 1 << 20;

    /// What suits a kind of component, on all cores.
    pub fn new(kind: ComponentKind, effort: Effort) -> Self {
        let (cuts, frame_max) = match kind {
            ComponentKind::Disk | ComponentKind::Ram => (Cuts::Pages, Self::PAGED_FRAME_MAX),
            ComponentKind::DeviceState | ComponentKind::File | ComponentKind::Tree => (Cuts::Bytes, Self::FILE_FRAME_MAX),
        };
        Self { effort, frame_max, cuts, threads: thread::available_parallelism().unwrap_or(NonZeroUsize::MIN) }
    }
}

/// Where the results go.
pub struct Outputs<'a, C, P> {
    /// Takes the pack, in order, in pieces of a frame.
    pub pack: &'a mut dyn Write,
    /// Empty storage for the pack's outboard.
    pub pack_outboard: P,
    /// Empty storage for the content's outboard; not used for the contents of a tree.
    pub content_outboard: C,
}

/// A component, encoded.
pub struct Encoded<C, P> {
    /// The hashes of the content.
    pub content: ContentHashes<C>,
    /// Length of the content.
    pub size: u64,
    /// The pack's tree.
    pub pack: Tree,
    /// The storage with the pack's outboard.
    pub pack_outboard: P,
    /// What was done.
    pub stats: EncodeStats,
    index: IndexBuilder,
}

/// The hashes of encoded content.
pub enum ContentHashes<C> {
    /// Of a stream: its tree, and the storage with the outboard.
    Stream(Tree, C),
    /// Of each part of a source with parts: a tree's files.
    Parts(Vec<RootHash>),
}

impl<C, P> Encoded<C, P> {
    /// Writes the index: of a stream for its own root, of a tree's contents for the root of its listing.
    pub fn into_index(self, target: RootHash) -> Vec<u8> {
        let space = match self.content {
            ContentHashes::Stream(..) => Space::Stream,
            ContentHashes::Parts(_) => Space::Contents,
        };
        self.index.finish(&IndexHeader { space, parent: None, target, target_size: self.size, sources: Vec::new() })
    }
}

/// Why a source could not be encoded. Nothing was published.
#[derive(Debug, Error)]
pub enum EncodeError {
    /// The source could not be read, or changed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The source's extents do not cover it: a fault of the program, or a damaged image.
    #[error("the source does not say what lies at byte {offset}: check the image, or publish it `--as file`")]
    Extents {
        /// Where the fault is.
        offset: u64,
    },
    /// The source's parts do not add up.
    #[error("the source's files do not add up to its {len} bytes: they changed while they were read; publish again")]
    Parts {
        /// Length of the source.
        len: u64,
    },
    /// The pack could not be written.
    #[error("writing the pack at byte {offset}: {source}")]
    Pack {
        /// Offset in the pack.
        offset: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// A tree could not be made.
    #[error("hashing: {0}")]
    Hash(#[from] HashError),
    /// zstd failed: out of memory.
    #[error("compressing frame {frame}: {why}")]
    Compress {
        /// The frame's id.
        frame: u32,
        /// What zstd said.
        why: FrameFault,
    },
    /// The index refuses what was made.
    #[error("writing the index: {0}")]
    Index(#[from] BuildError),
    /// The work was stopped.
    #[error("cancelled; nothing was published")]
    Cancelled,
}

/// Encodes a source: writes its pack, and returns what its index and manifest need.
///
/// The pack is complete only when this succeeds; what was written before an error is to be thrown away.
pub fn encode<C, P>(
    source: &dyn Source,
    options: &EncodeOptions,
    outputs: Outputs<'_, C, P>,
    progress: &dyn Progress,
) -> Result<Encoded<C, P>, EncodeError>
where
    C: ReadAt + WriteAt + Send,
    P: ReadAt + WriteAt,
{
    let threads = options.threads.get();
    let frame_max = u64::from(options.frame_max).clamp(4 << 10, MAX_FRAME_LEN) as usize;
    let slabs = SLAB_COUNT + threads.div_ceil(2);
    let in_flight = 2 * threads + 4;
    let stop = AtomicBool::new(false);
    let cutter = Cutter::new(options.cuts, source.len(), frame_max);
    let reader = SlabReader::new(source, cutter, frame_max, progress, &stop);

    // Every queue has room for all that can be in it, so that only the lack of free buffers ever holds up a stage.
    let (home, free) = sync_channel(slabs);
    (0..slabs).for_each(|_| home.try_send(Vec::new()).expect("there is room for every slab"));
    let (jobs, job_queue) = sync_channel(slabs + in_flight);
    let job_queue = Mutex::new(job_queue);
    let (events, event_queue) = sync_channel(slabs + in_flight + 4);
    let (to_hasher, hasher_queue) = sync_channel(slabs);

    thread::scope(|scope| {
        for _ in 0..threads {
            let (events, job_queue) = (events.clone(), &job_queue);
            scope.spawn(move || work::run_worker(job_queue, events, options.effort));
        }
        let has_parts = source.parts().is_some();
        let hasher = scope.spawn({
            let events = events.clone();
            move || run_hasher(has_parts, &hasher_queue, outputs.content_outboard, events)
        });
        scope.spawn({
            let jobs = jobs.clone();
            move || run_reader(reader, Buffers { home, free }, &jobs, &to_hasher, events)
        });
        let mut coordinator = Coordinator {
            jobs,
            in_flight,
            waiting: 0,
            frames: BTreeMap::new(),
            packed: BTreeMap::new(),
            assembler: Assembler::new(frame_max),
            parts: Vec::new(),
            pack: PackWriter {
                out: outputs.pack,
                tree: TreeHasher::with_storage(outputs.pack_outboard),
                index: IndexBuilder::new(),
                progress,
            },
            stats: EncodeStats { content: source.len(), ..Default::default() },
        };
        let done = coordinator.run(&event_queue);
        // Whatever the other stages wait for, they now get an error for it, and end.
        stop.store(true, Ordering::Relaxed);
        drop(event_queue);
        let Coordinator { jobs, pack, mut parts, mut stats, .. } = coordinator;
        drop(jobs);
        let hashed = hasher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        done?;
        let content = match hashed? {
            Hashed::Stream(tree, storage) => ContentHashes::Stream(tree, storage),
            Hashed::Parts(others) => {
                others.into_iter().for_each(|(i, hash)| put_part(&mut parts, i, hash));
                ContentHashes::Parts(parts)
            }
        };
        source.check_unchanged()?;
        stats.pack = pack.tree.size();
        let (tree, pack_outboard) = pack.tree.finish()?;
        Ok(Encoded { content, size: source.len(), pack: tree, pack_outboard, stats, index: pack.index })
    })
}

/// Buffers that go round between the reader and those who drop slabs.
struct Buffers {
    home: SyncSender<Vec<u8>>,
    free: Receiver<Vec<u8>>,
}

fn run_reader(
    mut reader: SlabReader<'_>,
    buffers: Buffers,
    jobs: &SyncSender<Job>,
    to_hasher: &SyncSender<Arc<Slab>>,
    events: SyncSender<Event>,
) {
    let guard = PanicGuard(events);
    let mut sequence = 0;
    let end = loop {
        let Ok(mut buffer) = buffers.free.recv() else { return };
        // Buffers are made when they are first needed: small sources need one.
        buffer.resize(SLAB_LEN, 0);
        let slab = match reader.next(buffer, &buffers.home) {
            Ok(Some(slab)) => Arc::new(slab),
            Ok(None) => break Event::End { slabs: sequence, read: reader.times.0, cut: reader.times.1 },
            Err(error) => break Event::Failed(error),
        };
        if to_hasher.send(slab.clone()).is_err() || jobs.send(Job::Hash { sequence, slab }).is_err() {
            return;
        }
        sequence += 1;
    };
    let _ = guard.0.send(end);
}

enum Hashed<C> {
    Stream(Tree, C),
    Parts(Vec<(usize, RootHash)>),
}

fn run_hasher<C: ReadAt + WriteAt>(
    has_parts: bool,
    slabs: &Receiver<Arc<Slab>>,
    storage: C,
    events: SyncSender<Event>,
) -> Result<Hashed<C>, HashError> {
    let _guard = PanicGuard(events);
    if has_parts {
        return Ok(Hashed::Parts(work::hash_parts(slabs)));
    }
    work::hash_stream(slabs, storage).map(|(tree, storage)| Hashed::Stream(tree, storage))
}

fn put_part(parts: &mut Vec<RootHash>, index: usize, hash: RootHash) {
    if parts.len() <= index {
        parts.resize(index + 1, RootHash::from_bytes([0; 32]));
    }
    parts[index] = hash;
}

/// A slab that waits for those before it.
type HashedSlab = (Arc<Slab>, Vec<FrameHash>);

/// Brings the workers' results into order, makes frames, and writes them.
struct Coordinator<'a, P> {
    jobs: SyncSender<Job>,
    /// Most frames with the workers or waiting to be written.
    in_flight: usize,
    /// How many there are.
    waiting: usize,
    /// Spans of the frames that are with the workers.
    frames: BTreeMap<u32, Vec<Span>>,
    /// Frames that are compressed, and wait for those before them.
    packed: BTreeMap<u32, PackedFrame>,
    assembler: Assembler,
    parts: Vec<RootHash>,
    pack: PackWriter<'a, P>,
    stats: EncodeStats,
}

struct PackedFrame {
    packed: Packed,
    bytes: FrameBytes,
    hash: FrameHash,
}

impl<P: ReadAt + WriteAt> Coordinator<'_, P> {
    fn run(&mut self, events: &Receiver<Event>) -> Result<(), EncodeError> {
        let mut slabs: BTreeMap<u64, HashedSlab> = BTreeMap::new();
        let mut next_slab = 0;
        let mut last_slab = None;
        while last_slab != Some(next_slab) || self.waiting > 0 {
            // A stage that ended without a word has panicked, which joining it will tell.
            let Ok(event) = events.recv() else { return Err(EncodeError::Cancelled) };
            match event {
                Event::Hashed { sequence, slab, spans, parts, took } => {
                    self.stats.hashing += took;
                    parts.into_iter().for_each(|(i, hash)| put_part(&mut self.parts, i, hash));
                    slabs.insert(sequence, (slab, spans));
                }
                Event::Compressed { id, packed, bytes, hash, took } => {
                    self.stats.compressing += took;
                    self.packed.insert(id, PackedFrame { packed, bytes, hash });
                    self.write_ready()?;
                }
                Event::End { slabs, read, cut } => {
                    self.stats.reading = read;
                    self.stats.cutting = cut;
                    last_slab = Some(slabs);
                }
                Event::Failed(error) => return Err(error),
                Event::Panicked => return Err(EncodeError::Cancelled),
            }
            if self.pack.progress.cancelled() {
                return Err(EncodeError::Cancelled);
            }
            self.compress_closed();
            while self.assembler.closed.is_empty()
                && let Some((slab, spans)) = slabs.remove(&next_slab)
            {
                self.assembler.push(&slab, &spans, &mut self.pack.index)?;
                next_slab += 1;
                self.compress_closed();
            }
            if last_slab == Some(next_slab) {
                self.assembler.finish();
                self.compress_closed();
            }
        }
        self.stats.zero = self.assembler.zero;
        self.stats.repeated = self.assembler.repeated;
        Ok(())
    }

    /// Gives the workers as many frames as may be in flight.
    fn compress_closed(&mut self) {
        while self.waiting < self.in_flight
            && let Some(frame) = self.assembler.closed.pop_front()
        {
            // One span is the frame: its hash is known, and listing it would say nothing.
            let (hash, spans) = match frame.spans[..] {
                [span] => (Some(span.hash), Vec::new()),
                _ => (None, frame.spans),
            };
            self.waiting += 1;
            self.frames.insert(frame.id, spans);
            // It fails only when the workers are gone, and then their panic has been told.
            let _ = self.jobs.send(Job::Compress { id: frame.id, bytes: frame.bytes, hash });
        }
    }

    fn write_ready(&mut self) -> Result<(), EncodeError> {
        let started = Instant::now();
        while let Some(entry) = self.packed.first_entry()
            && u64::from(*entry.key()) == self.pack.index.frame_count()
        {
            let (id, frame) = entry.remove_entry();
            let spans = self.frames.remove(&id).unwrap_or_default();
            self.waiting -= 1;
            self.stats.frames += 1;
            self.stats.framed += frame.bytes.as_slice().len() as u64;
            self.pack.write(frame, spans)?;
        }
        self.stats.writing += started.elapsed();
        Ok(())
    }
}

/// Writes frames back to back, and hashes them as they go.
struct PackWriter<'a, P> {
    out: &'a mut dyn Write,
    tree: TreeHasher<P>,
    index: IndexBuilder,
    progress: &'a dyn Progress,
}

impl<P: ReadAt + WriteAt> PackWriter<'_, P> {
    fn write(&mut self, frame: PackedFrame, spans: Vec<Span>) -> Result<(), EncodeError> {
        let content = frame.bytes.as_slice();
        let (codec, packed) = match &frame.packed {
            Packed::Stored => (Codec::Stored, content),
            Packed::Zstd(packed) => (Codec::Zstd, packed.as_slice()),
        };
        let offset = self.index.pack_len();
        self.out.write_all(packed).map_err(|source| EncodeError::Pack { offset, source })?;
        self.tree.push(packed)?;
        self.progress.written(packed.len() as u64);
        self.index.push_frame(Frame {
            pack_offset: offset,
            pack_len: packed.len() as u32,
            len: content.len() as u32,
            codec,
            hash: frame.hash,
            depth: 0,
            references: Vec::new(),
            spans,
        })?;
        Ok(())
    }
}
