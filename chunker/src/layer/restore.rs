//! Restoring a whole component in one ordered pass: decoding on all cores, delivering in order.
//!
//! The calling thread splits the component into jobs, gives them to workers, and hands what they made to the sink in
//! order; another thread hashes it, where asked. Memory: at most two jobs a worker and two more are under way, each of
//! about 1 MiB or one frame, beside the content's cache. Writing what differs only, or in parallel, is the sink's choice.

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use capsule_proto::index::RunFrom;
use thiserror::Error;

use super::budget::{Budget, Spent};
use super::follow::{FramePlace, Piece, Place, follow};
use super::pages::{Part, PartFrom, Parts};
use super::plan::Plan;
use super::read::{LayerContent, LayerError};
use crate::bao::{ContentHasher, HashError};
use crate::content::{Content, Progress};

/// Bytes in a job, where frames are shorter: enough that handing it over costs nothing.
const JOB_LEN: u64 = 1 << 20;
/// Most parts in a job, however short they are.
const JOB_PARTS: usize = 1024;
/// Zeros in what comes from sources are handed on as such from this length on.
const LEAST_ZEROS: u64 = 16 << 10;

/// Takes restored content, in order from 0 to the end, without gaps.
pub trait Sink {
    /// Takes the next bytes.
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Takes a run of zero bytes.
    fn zeros(&mut self, offset: u64, len: u64) -> io::Result<()>;
}

/// Why a component could not be restored. The sink has what comes before the place of the fault.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// A range could not be decoded.
    #[error("restoring bytes {}..{}: {source}", .range.start, .range.end)]
    Layer {
        /// Where in the component.
        range: Range<u64>,
        /// What failed.
        source: LayerError,
    },
    /// The target could not be written.
    #[error("writing at byte {offset} of the target: {source}")]
    Sink {
        /// Where in the component.
        offset: u64,
        /// What the sink said.
        source: io::Error,
    },
    /// The outboard could not be written.
    #[error("hashing: {0}")]
    Hash(#[from] HashError),
    /// The work was stopped.
    #[error("cancelled")]
    Cancelled,
}

/// Gives all of a component to a sink, in order, and to a hasher, where there is one.
///
/// Holes stay holes: what the index, or that of a source, knows to be zero is not read. A frame is decoded once, but for repeats that lie further apart than the content's cache reaches. The hasher computes
/// the root while the sink writes; comparing it with the component's is the caller's.
pub fn restore(
    content: &LayerContent,
    threads: NonZeroUsize,
    sink: &mut dyn Sink,
    hasher: Option<&mut dyn ContentHasher>,
    progress: &dyn Progress,
) -> Result<(), RestoreError> {
    let threads = threads.get();
    let under_way = 2 * threads + 2;
    // Every queue has room for all that can be in it: only the results' order holds anything up.
    let (jobs, job_queue) = sync_channel(under_way);
    let job_queue = Mutex::new(job_queue);
    let (events, event_queue) = sync_channel(under_way + threads);
    // What is under way when delivery ends is not wanted any more either.
    let ended = AtomicBool::new(false);
    let cancelled: &(dyn Fn() -> bool + Sync) =
        &|| ended.load(Ordering::Relaxed) || progress.cancelled();
    thread::scope(|scope| {
        for _ in 0..threads {
            let (events, job_queue) = (events.clone(), &job_queue);
            scope.spawn(move || run_worker(content, job_queue, events, cancelled));
        }
        drop(events);
        let (to_hasher, hashing) = hasher
            .map(|hasher| {
                let (to_hasher, queue) = sync_channel(under_way);
                (to_hasher, scope.spawn(move || run_hasher(hasher, &queue)))
            })
            .unzip();
        let jobs_left = Jobs {
            content,
            parts: content.parts(0..content.len()),
            pending: None,
            cancelled,
        };
        let done = Delivery {
            sink,
            to_hasher,
            progress,
        }
        .run(jobs_left, jobs, &event_queue, under_way);
        ended.store(true, Ordering::Relaxed);
        // Workers that wait to tell a result find nobody, and end.
        drop(event_queue);
        // Its queue is closed by now: it ends when all is hashed.
        let hashed = hashing.map_or(Ok(()), |hashing| {
            hashing
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        // Where hashing failed, that is why delivery stopped.
        hashed?;
        done
    })
}

/// Parts of the component that are decoded together.
struct Job {
    sequence: u64,
    parts: Vec<Part>,
}

/// What a worker tells.
enum Event {
    /// What a job made, or why not.
    Done {
        sequence: u64,
        made: Result<Arc<Vec<Made>>, RestoreError>,
    },
    /// It panicked, which joining it passes on.
    Panicked,
}

/// Tells when a worker panics: its result would be waited for for ever.
struct PanicGuard(SyncSender<Event>);

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if thread::panicking() {
            let _ = self.0.send(Event::Panicked);
        }
    }
}

/// A piece of restored content.
struct Made {
    offset: u64,
    bytes: Bytes,
}

enum Bytes {
    Zeros(u64),
    /// All that a buffer holds.
    Own(Vec<u8>),
    /// Bytes of a decoded frame, not copied.
    Frame(Arc<Vec<u8>>, Range<usize>),
}

impl Bytes {
    fn len(&self) -> u64 {
        match self {
            Self::Zeros(len) => *len,
            Self::Own(bytes) => bytes.len() as u64,
            Self::Frame(_, range) => range.len() as u64,
        }
    }
}

/// Splits a component into jobs.
struct Jobs<'a> {
    content: &'a LayerContent,
    parts: Parts<'a>,
    /// What was split off or belongs to the next job.
    pending: Option<Part>,
    cancelled: &'a (dyn Fn() -> bool + Sync),
}

impl Jobs<'_> {
    /// What no job has.
    fn rest(&self) -> Range<u64> {
        self.parts.left()
    }

    /// The next parts: about [`JOB_LEN`] bytes. Neighbours from one frame stay together; zeros count for nothing.
    fn next(&mut self) -> Result<Vec<Part>, LayerError> {
        let mut walking = Budget::until(JOB_LEN, self.cancelled);
        let mut asking = Budget::question(self.cancelled);
        let mut parts: Vec<Part> = Vec::new();
        let mut len = 0;
        while parts.len() < JOB_PARTS
            && let Some(mut next) = self.next_part(&mut walking)?
        {
            let frame = frame_of(&next);
            if len >= JOB_LEN && (frame.is_none() || parts.last().and_then(frame_of) != frame) {
                self.pending = Some(next);
                break;
            }
            // Frames are short enough; what comes from sources may be of any length, and much of it zeros.
            if is_of_source(&next) && next.len() > JOB_LEN {
                let zeros = self.zeros_at(&next, &mut asking);
                let front = next.split_off_front(zeros.unwrap_or(JOB_LEN));
                let rest = std::mem::replace(&mut next, front);
                self.pending = (rest.len() > 0).then_some(rest);
                if zeros.is_some() {
                    next.from = ZERO;
                }
            }
            if next.from != ZERO {
                len += next.len();
            }
            parts.push(next);
        }
        Ok(parts)
    }

    fn next_part(&mut self, budget: &mut Budget<'_>) -> Result<Option<Part>, LayerError> {
        match self.pending.take() {
            Some(part) => Ok(Some(part)),
            None => self.parts.next(budget),
        }
    }

    /// How many of the first bytes of a part are known to be zeros, if they are; also none where it cannot be told, as
    /// whoever reads it will say why.
    fn zeros_at(&self, part: &Part, budget: &mut Budget<'_>) -> Option<u64> {
        let piece = follow(self.content, part.range.clone(), budget).ok()?;
        (matches!(piece.place, Place::Zeros) && piece.len >= LEAST_ZEROS).then_some(piece.len)
    }
}

const ZERO: PartFrom = PartFrom::Mentioned(RunFrom::Zero);

fn is_of_source(part: &Part) -> bool {
    matches!(
        part.from,
        PartFrom::Inherited | PartFrom::Mentioned(RunFrom::Copy { .. })
    )
}

fn frame_of(part: &Part) -> Option<u32> {
    match part.from {
        PartFrom::Mentioned(RunFrom::Frame { id, .. }) => Some(id),
        _ => None,
    }
}

fn run_worker(
    content: &LayerContent,
    jobs: &Mutex<Receiver<Job>>,
    events: SyncSender<Event>,
    cancelled: &(dyn Fn() -> bool + Sync),
) {
    let guard = PanicGuard(events);
    loop {
        // Held while waiting for a job: the others have nothing to do then either.
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { sequence, parts }) = job else {
            return;
        };
        let made = make(content, &parts, cancelled);
        if guard
            .0
            .send(Event::Done {
                sequence,
                made: made.map(Arc::new),
            })
            .is_err()
        {
            return;
        }
    }
}

/// Decodes a job's parts, as one read.
fn make(
    content: &LayerContent,
    parts: &[Part],
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Vec<Made>, RestoreError> {
    let decoded = parts.iter().filter(|part| part.from != ZERO);
    let mut budget = Budget::until(decoded.map(Part::len).sum(), cancelled);
    let mut making = Making {
        content,
        made: Vec::with_capacity(parts.len()),
        plan: Plan::new(content),
        wanted: Vec::new(),
    };
    let noted = parts
        .iter()
        .try_for_each(|part| making.note(part, &mut budget));
    noted
        .and_then(|()| making.run(&mut budget))
        .map_err(|error| match (error, parts) {
            (LayerError::Spent(Spent::Cancelled), _) | (_, []) => RestoreError::Cancelled,
            (source, [first, .., last] | [first @ last]) => RestoreError::Layer {
                range: first.range.start..last.range.end,
                source,
            },
        })
}

/// A job's pieces, of which some wait for frames.
struct Making<'a> {
    content: &'a LayerContent,
    made: Vec<Made>,
    plan: Plan<'a>,
    wanted: Vec<Wanted>,
}

/// What a piece wants of a frame.
struct Wanted {
    /// Which piece.
    made: usize,
    /// Where in it.
    at: usize,
    len: usize,
    /// Where in the frame.
    offset: usize,
}

impl<'a> Making<'a> {
    fn note(&mut self, part: &Part, budget: &mut Budget<'_>) -> Result<(), LayerError> {
        let Range { start, end } = part.range;
        match part.from {
            PartFrom::Mentioned(RunFrom::Zero) => self.push(start, Bytes::Zeros(part.len())),
            PartFrom::Mentioned(RunFrom::Frame { id, offset }) => {
                self.push(start, Bytes::Own(Vec::new()));
                let place = FramePlace {
                    layer: self.content,
                    id,
                    offset,
                    start,
                };
                self.want(place, 0, part.len(), budget)?;
            }
            PartFrom::Mentioned(RunFrom::Copy { .. }) | PartFrom::Inherited => {
                return self.note_of_source(start..end, budget);
            }
        }
        Ok(())
    }

    /// What comes from sources, where what these know to be zeros, and is long enough, is a piece of its own.
    fn note_of_source(
        &mut self,
        range: Range<u64>,
        budget: &mut Budget<'_>,
    ) -> Result<(), LayerError> {
        let mut at = range.start;
        // Whether the last piece is one that can be added to.
        let mut open = false;
        while at < range.end {
            let Piece { len, place } = follow(self.content, at..range.end, budget)?;
            if matches!(place, Place::Zeros) && len >= LEAST_ZEROS {
                self.push(at, Bytes::Zeros(len));
                open = false;
            } else {
                if !open {
                    self.push(at, Bytes::Own(Vec::new()));
                    open = true;
                }
                self.add(place, len, budget)?;
            }
            at += len;
        }
        Ok(())
    }

    /// Adds bytes to the last piece.
    fn add(
        &mut self,
        place: Place<'a>,
        len: u64,
        budget: &mut Budget<'_>,
    ) -> Result<(), LayerError> {
        let Some(Made {
            bytes: Bytes::Own(bytes),
            ..
        }) = self.made.last_mut()
        else {
            unreachable!("it was just pushed");
        };
        let at = bytes.len();
        bytes.resize(at + len as usize, 0);
        match place {
            Place::Frame(place) => self.want(place, at, len, budget),
            other => other.read(&mut bytes[at..]),
        }
    }

    fn push(&mut self, offset: u64, bytes: Bytes) {
        self.made.push(Made { offset, bytes });
    }

    /// The last piece wants part of a frame.
    fn want(
        &mut self,
        place: FramePlace<'a>,
        at: usize,
        len: u64,
        budget: &mut Budget<'_>,
    ) -> Result<(), LayerError> {
        self.plan.want(self.wanted.len(), place, len, budget)?;
        self.wanted.push(Wanted {
            made: self.made.len() - 1,
            at,
            len: len as usize,
            offset: place.offset as usize,
        });
        Ok(())
    }

    fn run(self, budget: &mut Budget<'_>) -> Result<Vec<Made>, LayerError> {
        let (mut made, wanted) = (self.made, self.wanted);
        self.plan.run(budget, |position, frame| {
            let wanted = &wanted[position];
            let range = wanted.offset..wanted.offset + wanted.len;
            let bytes = &mut made[wanted.made].bytes;
            match bytes {
                Bytes::Own(own) if !own.is_empty() => {
                    own[wanted.at..wanted.at + wanted.len].copy_from_slice(&frame[range]);
                }
                // A small piece must not keep a large frame in memory.
                _ if range.len() < frame.len() / 4 => *bytes = Bytes::Own(frame[range].to_vec()),
                _ => *bytes = Bytes::Frame(frame.clone(), range),
            }
        })?;
        Ok(made)
    }
}

fn run_hasher(
    hasher: &mut dyn ContentHasher,
    queue: &Receiver<Arc<Vec<Made>>>,
) -> Result<(), HashError> {
    for made in queue {
        for Made { bytes, .. } in made.iter() {
            match bytes {
                Bytes::Zeros(len) => hasher.push_zeros(*len)?,
                Bytes::Own(bytes) => hasher.push(bytes)?,
                Bytes::Frame(frame, range) => hasher.push(&frame[range.clone()])?,
            }
        }
    }
    Ok(())
}

/// Gives out jobs, and delivers what comes of them in order.
struct Delivery<'a> {
    sink: &'a mut dyn Sink,
    to_hasher: Option<SyncSender<Arc<Vec<Made>>>>,
    progress: &'a dyn Progress,
}

impl Delivery<'_> {
    fn run(
        mut self,
        mut left: Jobs<'_>,
        jobs: SyncSender<Job>,
        events: &Receiver<Event>,
        under_way: usize,
    ) -> Result<(), RestoreError> {
        let mut waiting = BTreeMap::new();
        let (mut given, mut delivered) = (0, 0);
        loop {
            while given - delivered < under_way as u64 {
                let parts = left.next().map_err(|error| match error {
                    LayerError::Spent(Spent::Cancelled) => RestoreError::Cancelled,
                    source => RestoreError::Layer {
                        range: left.rest(),
                        source,
                    },
                })?;
                if parts.is_empty() {
                    break;
                }
                // It fails only when the workers are gone, which receiving tells.
                let _ = jobs.send(Job {
                    sequence: given,
                    parts,
                });
                given += 1;
            }
            if given == delivered {
                return Ok(());
            }
            let Ok(Event::Done { sequence, made }) = events.recv() else {
                return Err(RestoreError::Cancelled);
            };
            waiting.insert(sequence, made);
            while let Some(made) = waiting.remove(&delivered) {
                self.deliver(made?)?;
                delivered += 1;
            }
        }
    }

    fn deliver(&mut self, made: Arc<Vec<Made>>) -> Result<(), RestoreError> {
        if self.progress.cancelled() {
            return Err(RestoreError::Cancelled);
        }
        // It fails only when hashing did, which joining tells.
        if self
            .to_hasher
            .as_ref()
            .is_some_and(|to_hasher| to_hasher.send(made.clone()).is_err())
        {
            return Err(RestoreError::Cancelled);
        }
        for Made { offset, bytes } in made.iter() {
            let (offset, len) = (*offset, bytes.len());
            let written = match bytes {
                Bytes::Zeros(len) => self.sink.zeros(offset, *len),
                Bytes::Own(bytes) => self.sink.data(offset, bytes),
                Bytes::Frame(frame, range) => self.sink.data(offset, &frame[range.clone()]),
            };
            written.map_err(|source| RestoreError::Sink { offset, source })?;
            self.progress.written(len);
        }
        Ok(())
    }
}
