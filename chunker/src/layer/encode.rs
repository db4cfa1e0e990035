//! Encoding a component from nothing: one pass over a source, through stages with bounded queues between them.
//!
//! ```text
//! reader: read, cut --slabs--> workers: hash spans --> coordinator: assemble frames --> workers: compress
//!        \--slabs--> hasher: content tree                  coordinator: write pack and its tree <--/
//! ```
//!
//! Memory is bounded by the number of slabs (4, and one for two workers; 8 MiB each), of frames in flight (2 a worker and 4),
//! of spans remembered (100 MiB at most), zstd's tables, the index (20 bytes a frame, 18 a span, of which there are at
//! most some millions), and at the highest effort earlier frames (150 MiB with their seeds). At 2 cores and less effort:
//! about 70 MiB for a few GiB, under 400 MiB for 1 TiB. Of an update, `update` tells what the parent has, and `reread`
//! whether what is read is what was hashed. Figures behind the defaults: `chunker/docs/layer.md`.

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;

use capsule_proto::RootHash;
use capsule_proto::index::{
    BuildError, IndexBuilder, IndexHeader, MAX_FRAME_LEN, Source as SourceName, Space,
};
use capsule_proto::manifest::ComponentKind;
use positioned_io::{ReadAt, WriteAt};
use thiserror::Error;

use super::assemble::Assembler;
use super::codec::FrameFault;
use super::coordinate::{Coordinator, PackWriter};
use super::cut::{Cuts, Cutter};
use super::earlier::Earlier;
pub use super::effort::Effort;
use super::reread::Reread;
use super::slab::{SLAB_LEN, Slab, SlabReader};
use super::stats::EncodeStats;
use super::work::{self, Event, Job, PanicGuard};
use crate::bao::{HashError, Tree, TreeHasher};
use crate::content::{Progress, ReadError, Source};
use crate::delta::{OldError, OldSource, Outline, Similar, UnknownSource};

/// Slabs beside those that the workers keep busy: one being read, one being hashed in order, two waiting.
const SLAB_COUNT: usize = 4;

/// New content that was hashed before it is encoded.
pub struct Hashed<'a> {
    /// Its hash.
    pub tree: Tree,
    /// Its outboard.
    pub outboard: &'a (dyn ReadAt + Sync),
}

/// What an update is made against.
pub struct Against<'a> {
    /// The new content's tree, where it has one already: what is read must agree with it.
    pub hashed: Option<Hashed<'a>>,
    /// What is known of the new content without reading it.
    pub outline: &'a Outline,
    /// The old contents. Where `in_place`, the first is the parent.
    pub sources: &'a [OldSource],
    /// Their index.
    pub similar: &'a Similar,
    /// Whether bytes of the parent may be inherited: it is a stream, and lies in the same space.
    pub in_place: bool,
}

/// How to encode.
#[derive(Clone, Debug)]
pub struct EncodeOptions {
    /// How hard to compress.
    pub effort: Effort,
    /// Longest frame, in bytes: what a reader of any one byte decodes, beside what the frame refers to. Brought within 4 KiB and 16 MiB.
    pub frame_max: u32,
    /// Where cuts may fall.
    pub cuts: Cuts,
    /// Whether frames may refer to earlier ones of the same layer: what is read of a frame then takes those too.
    pub earlier: bool,
    /// How many frames are compressed at a time. Does not change the result.
    pub threads: NonZeroUsize,
}

impl EncodeOptions {
    /// Longest frame of disks, which are read at random; not at [`Effort::Max`], which is for what many fetch.
    pub const PAGED_FRAME_MAX: u32 = 256 << 10;
    /// Longest frame of memory, of which a resumed machine reads a page here and there: about what two chunk groups hold compressed, less of
    /// which cannot be asked for anyway.
    pub const RAM_FRAME_MAX: u32 = 32 << 10;
    /// Longest frame of a machine's disks, which its guest reads at random while they come over a thin link: of a longer one most would be
    /// fetched in vain. Indexes, which come before anything, grow with the number of frames, so that they are not as short as those of memory.
    pub const MACHINE_DISK_FRAME_MAX: u32 = 64 << 10;
    /// Longest frame of files and trees, which are mostly restored whole: as small as `zstd -T0` without frames.
    pub const FILE_FRAME_MAX: u32 = 1 << 20;
    /// The same at [`Effort::Max`], where longer frames save 5 %, and less at the lower levels.
    pub const FILE_FRAME_MAX_AT_MAX: u32 = 4 << 20;

    /// What suits a kind of component, on all cores.
    pub fn new(kind: ComponentKind, effort: Effort) -> Self {
        let file_frame_max = match effort {
            Effort::Fast | Effort::Default => Self::FILE_FRAME_MAX,
            Effort::Max => Self::FILE_FRAME_MAX_AT_MAX,
        };
        let (cuts, frame_max) = match kind {
            ComponentKind::Disk if effort == Effort::Max => (Cuts::Pages, file_frame_max),
            ComponentKind::Disk => (Cuts::Pages, Self::PAGED_FRAME_MAX),
            ComponentKind::Ram => (Cuts::Pages, Self::RAM_FRAME_MAX),
            ComponentKind::DeviceState | ComponentKind::File | ComponentKind::Tree => {
                (Cuts::Bytes, file_frame_max)
            }
        };
        Self {
            effort,
            frame_max,
            cuts,
            // Memory is read a page at a time.
            earlier: effort.earlier() && kind != ComponentKind::Ram,
            threads: thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
        }
    }

    /// The same for a machine's component of this kind, which its guest reads while it comes.
    pub fn of_machine(self, kind: ComponentKind) -> Self {
        let frame_max = self.frame_max.min(Self::MACHINE_DISK_FRAME_MAX);
        self.bounded((kind == ComponentKind::Disk).then_some(frame_max))
    }

    /// With a bound, where there is one, to what a reader of any one byte decodes of the layer: frames then refer to no others
    /// of it.
    pub fn bounded(self, frame_max: Option<u32>) -> Self {
        match frame_max {
            None => self,
            Some(frame_max) => Self {
                frame_max,
                earlier: false,
                ..self
            },
        }
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
    /// Of each part of a source with parts: a tree's files. Of an update, of those that were read.
    Parts(Vec<RootHash>),
    /// Of an update of a stream: whoever outlined it knows them.
    Known,
}

impl<C, P> Encoded<C, P> {
    /// Writes the index: of a stream for its own root, of a tree's contents for the root of its listing.
    pub fn into_index(self, target: RootHash) -> Vec<u8> {
        self.into_update_index(target, None, Vec::new())
    }

    /// Writes the index of an update, with its sources. `parent` is the component whose bytes are inherited, where there
    /// is one; then it is the first source.
    pub fn into_update_index(
        self,
        target: RootHash,
        parent: Option<RootHash>,
        sources: Vec<SourceName>,
    ) -> Vec<u8> {
        let space = match self.content {
            ContentHashes::Stream(..) | ContentHashes::Known => Space::Stream,
            ContentHashes::Parts(_) => Space::Contents,
        };
        self.index.finish(&IndexHeader {
            space,
            parent,
            target,
            target_size: self.size,
            sources,
        })
    }
}

/// Why a source could not be encoded. Nothing was published.
#[derive(Debug, Error)]
pub enum EncodeError {
    /// The source could not be read, or changed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Old content could not be read.
    #[error(transparent)]
    Old(#[from] OldError),
    /// The source's extents do not cover it: a fault of the program, or a damaged image.
    #[error(
        "the source does not say what lies at byte {offset}: check the image, or publish it `--as file`"
    )]
    Extents {
        /// Where the fault is.
        offset: u64,
    },
    /// The source's parts do not add up.
    #[error(
        "the source's files do not add up to its {len} bytes: they changed while they were read; publish again"
    )]
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
    /// The content is not what it was when it was hashed.
    #[error(
        "the content at byte {offset} changed while it was read: nothing was published; stop what writes to it, or publish a snapshot"
    )]
    Changed {
        /// First byte of the chunk group.
        offset: u64,
    },
    /// The tree made of the content before could not be read.
    #[error("reading the content's hash tree at byte {offset}: {source}")]
    Hashed {
        /// Offset in the outboard.
        offset: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// Compression failed: out of memory.
    #[error("compressing frame {frame}: {why}")]
    Compress {
        /// The frame's id.
        frame: u32,
        /// What it said.
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
    let hashing = match source.parts() {
        Some(_) => Hashing::Parts,
        None => Hashing::Stream,
    };
    let outline = Outline::unknown(source.len());
    run(source, hashing, &outline, None, options, outputs, progress)
}

/// Encodes what old content does not have: reads only what the outline does not know.
pub fn encode_update<C, P>(
    source: &dyn Source,
    against: &Against<'_>,
    options: &EncodeOptions,
    outputs: Outputs<'_, C, P>,
    progress: &dyn Progress,
) -> Result<Encoded<C, P>, EncodeError>
where
    C: ReadAt + WriteAt + Send,
    P: ReadAt + WriteAt,
{
    let hashing = match source.parts() {
        Some(_) => Hashing::Parts,
        None => Hashing::Known,
    };
    let unknown = UnknownSource::new(source, against.outline);
    run(
        &unknown,
        hashing,
        against.outline,
        Some(against),
        options,
        outputs,
        progress,
    )
}

/// What is hashed beside the pack.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hashing {
    Stream,
    Parts,
    /// Nothing: the content's hash is known.
    Known,
}

/// The stages. `source` is what of the content the outline does not know.
fn run<C, P>(
    source: &dyn Source,
    hashing: Hashing,
    outline: &Outline,
    against: Option<&Against<'_>>,
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
    (0..slabs).for_each(|_| {
        home.try_send(Vec::new())
            .expect("there is room for every slab")
    });
    let (jobs, job_queue) = sync_channel(slabs + in_flight);
    let job_queue = Mutex::new(job_queue);
    let (events, event_queue) = sync_channel(slabs + in_flight + 4);
    let (to_hasher, hasher_queue) = sync_channel(slabs);

    let nothing = Similar::nothing();
    thread::scope(|scope| {
        for _ in 0..threads {
            let (events, job_queue) = (events.clone(), &job_queue);
            scope.spawn(move || work::run_worker(job_queue, events, options, against));
        }
        let hasher = scope.spawn({
            let events = events.clone();
            move || {
                let reread = against
                    .and_then(|against| against.hashed.as_ref())
                    .map(|hashed| Reread::new(hashed, outline));
                let storage = outputs.content_outboard;
                run_hasher(hashing, reread, &hasher_queue, storage, events)
            }
        });
        scope.spawn({
            let jobs = jobs.clone();
            move || run_reader(reader, Buffers { home, free }, &jobs, &to_hasher, events)
        });
        let tree = TreeHasher::with_storage(outputs.pack_outboard);
        let pack = PackWriter::new(outputs.pack, tree, progress);
        let similar = against.map_or(&nothing, |against| against.similar);
        let limits = options.effort.references();
        let earlier = options
            .earlier
            .then(|| Earlier::new(against, similar, limits));
        let assembler = Assembler::new(frame_max, outline);
        let mut coordinator = Coordinator::new(jobs, in_flight, assembler, earlier, pack);
        let done = coordinator.run(&event_queue);
        // Whatever the other stages wait for, they now get an error for it, and end.
        stop.store(true, Ordering::Relaxed);
        drop(event_queue);
        let made = coordinator.into_made();
        let hashed = hasher
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // Where hashing failed, that is why the others stopped.
        let hashed = hashed?;
        done?;
        let content = match hashed {
            InOrder::Stream(tree, storage) => ContentHashes::Stream(tree, storage),
            InOrder::Parts(mut parts) => {
                parts.extend(made.parts);
                parts.sort_unstable_by_key(|(index, _)| *index);
                ContentHashes::Parts(parts.into_iter().map(|(_, root)| root).collect())
            }
            InOrder::Known => ContentHashes::Known,
        };
        source.check_unchanged()?;
        let (pack, pack_outboard) = made.tree.finish()?;
        let (size, index) = (outline.len(), made.index);
        let stats = EncodeStats {
            content: size,
            pack: pack.size,
            ..made.stats
        };
        Ok(Encoded {
            content,
            size,
            pack,
            pack_outboard,
            stats,
            index,
        })
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
        let Ok(mut buffer) = buffers.free.recv() else {
            return;
        };
        // Buffers are made when they are first needed: small sources need one.
        buffer.resize(SLAB_LEN, 0);
        let slab = match reader.next(buffer, &buffers.home) {
            Ok(Some(slab)) => Arc::new(slab),
            Ok(None) => {
                break Event::End {
                    slabs: sequence,
                    read: reader.times.0,
                    cut: reader.times.1,
                };
            }
            Err(error) => break Event::Failed(error),
        };
        if to_hasher.send(slab.clone()).is_err() || jobs.send(Job::Hash { sequence, slab }).is_err()
        {
            return;
        }
        sequence += 1;
    };
    let _ = guard.0.send(end);
}

/// What hashing in order made.
enum InOrder<C> {
    Stream(Tree, C),
    Parts(Vec<(usize, RootHash)>),
    Known,
}

fn run_hasher<C: ReadAt + WriteAt>(
    hashing: Hashing,
    reread: Option<Reread<'_>>,
    slabs: &Receiver<Arc<Slab>>,
    storage: C,
    events: SyncSender<Event>,
) -> Result<InOrder<C>, EncodeError> {
    let guard = PanicGuard(events);
    let hashed = match hashing {
        Hashing::Parts => Ok(InOrder::Parts(work::hash_parts(slabs))),
        Hashing::Known => check_known(reread, slabs).map(|()| InOrder::Known),
        Hashing::Stream => work::hash_stream(slabs, storage)
            .map(|(tree, storage)| InOrder::Stream(tree, storage))
            .map_err(EncodeError::from),
    };
    hashed.inspect_err(|_| drop(guard.0.send(Event::Stopped)))
}

fn check_known(
    mut reread: Option<Reread<'_>>,
    slabs: &Receiver<Arc<Slab>>,
) -> Result<(), EncodeError> {
    for slab in slabs {
        if let Some(reread) = &mut reread {
            reread.push(&slab)?;
        }
    }
    reread.map_or(Ok(()), Reread::finish)
}
