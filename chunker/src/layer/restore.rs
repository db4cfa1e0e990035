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
use super::follow::{Place, follow};
use super::making::{Bytes, LEAST_ZEROS, Made, ZERO, make};
use super::pages::{Part, PartFrom, Parts};
use super::read::{LayerContent, LayerError};
use crate::bao::{ContentHasher, HashError};
use crate::content::{Content, Progress};

/// Bytes in a job, where frames are shorter: enough that handing it over costs nothing.
const JOB_LEN: u64 = 1 << 20;
/// Most parts in a job, however short they are.
const JOB_PARTS: usize = 1024;

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
/// A frame is decoded once, but for repeats that lie further apart than the content's cache reaches. What the indexes know to be
/// zero is not read, but handed on as zeros. The hasher computes the root while the sink writes; comparing it with the
/// component's is the caller's.
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
