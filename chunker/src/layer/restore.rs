//! Restoring a whole component in one ordered pass: decoding on all cores, delivering in order.
//!
//! The calling thread splits the component into jobs, gives them to workers, and hands what they made to the sink in
//! order; another thread hashes it, where asked. Memory: at most two jobs a worker and two more are under way, each of
//! about 1 MiB or one frame, beside the content's cache. Writing what differs only, or in parallel, is the sink's choice.

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use capsule_proto::index::RunFrom;
use thiserror::Error;

use super::pages::{IndexFault, Part, PartFrom, Parts};
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
/// A frame is decoded once, but for repeats that lie further apart than the content's cache reaches. The hasher computes
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
    thread::scope(|scope| {
        for _ in 0..threads {
            let (events, job_queue) = (events.clone(), &job_queue);
            scope.spawn(move || run_worker(content, job_queue, events));
        }
        drop(events);
        let (to_hasher, hashing) = hasher
            .map(|hasher| {
                let (to_hasher, queue) = sync_channel(under_way);
                (to_hasher, scope.spawn(move || run_hasher(hasher, &queue)))
            })
            .unzip();
        let jobs_left = Jobs {
            parts: content.parts(0..content.len()),
            pending: None,
        };
        let done = Delivery {
            sink,
            to_hasher,
            progress,
        }
        .run(jobs_left, jobs, &event_queue, under_way);
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
    parts: Parts<'a>,
    /// What was split off or belongs to the next job.
    pending: Option<Part>,
}

impl Jobs<'_> {
    /// What no job has.
    fn rest(&self) -> Range<u64> {
        self.parts.left()
    }

    /// The next parts: about [`JOB_LEN`] bytes. Neighbours from one frame stay together; zeros count for nothing.
    fn next(&mut self) -> Result<Vec<Part>, IndexFault> {
        let mut parts: Vec<Part> = Vec::new();
        let mut len = 0;
        while parts.len() < JOB_PARTS
            && let Some(mut next) = self
                .pending
                .take()
                .map(Ok)
                .or_else(|| self.parts.next())
                .transpose()?
        {
            let frame = frame_of(&next);
            if len >= JOB_LEN && (frame.is_none() || parts.last().and_then(frame_of) != frame) {
                self.pending = Some(next);
                break;
            }
            if next.from != PartFrom::Mentioned(RunFrom::Zero) {
                // Frames are short enough; copies may be of any length.
                if frame.is_none() && next.len() > JOB_LEN {
                    let front = next.split_off_front(JOB_LEN);
                    self.pending = Some(std::mem::replace(&mut next, front));
                }
                len += next.len();
            }
            parts.push(next);
        }
        Ok(parts)
    }
}

fn frame_of(part: &Part) -> Option<u32> {
    match part.from {
        PartFrom::Mentioned(RunFrom::Frame { id, .. }) => Some(id),
        _ => None,
    }
}

fn run_worker(content: &LayerContent, jobs: &Mutex<Receiver<Job>>, events: SyncSender<Event>) {
    let guard = PanicGuard(events);
    loop {
        // Held while waiting for a job: the others have nothing to do then either.
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { sequence, parts }) = job else {
            return;
        };
        let made = parts
            .into_iter()
            .map(|part| make(content, &part))
            .collect::<Result<Vec<_>, _>>();
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

fn make(content: &LayerContent, part: &Part) -> Result<Made, RestoreError> {
    let len = part.len();
    let bytes = match part.from {
        PartFrom::Mentioned(RunFrom::Zero) => Ok(Bytes::Zeros(len)),
        PartFrom::Mentioned(RunFrom::Frame { id, offset }) => {
            let range = offset as usize..offset as usize + len as usize;
            content.frame_for(part, id, offset).map(|frame| {
                // A small piece must not keep a large frame in memory.
                if range.len() < frame.len() / 4 {
                    Bytes::Own(frame[range].to_vec())
                } else {
                    Bytes::Frame(frame, range)
                }
            })
        }
        PartFrom::Mentioned(RunFrom::Copy { .. }) | PartFrom::Inherited => {
            let mut bytes = vec![0; len as usize];
            content
                .read_part(part, &mut bytes)
                .map(|()| Bytes::Own(bytes))
        }
    };
    match bytes {
        Ok(bytes) => Ok(Made {
            offset: part.range.start,
            bytes,
        }),
        Err(source) => Err(RestoreError::Layer {
            range: part.range.clone(),
            source,
        }),
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
                let parts = left.next().map_err(|fault| RestoreError::Layer {
                    range: left.rest(),
                    source: fault.into(),
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
