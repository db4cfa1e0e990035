//! The other end: a disk that a server of this protocol has, read through a Unix socket.
//!
//! One task holds the connection. It sends requests as they come, and hands answers to whoever asked, in whatever order they arrive. When the server
//! goes away, requests stay; the task connects again when there is a server again, and sends what was not answered once more. Content never
//! changes, so that nobody notices but by the time it takes. Which ranges are zeros is asked once, at first.

mod session;

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capsule_chunker::content::{ReadError, check_range};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::wire::{command, flag};
use crate::disk::Disk;
use session::Session;

/// Bytes of one request; what is longer is asked for in parts.
const PART: u64 = 2 << 20;
/// Parts of one read that are asked for at a time.
const PARTS: usize = 8;
/// Bytes that all requests may hold in memory, and what each takes of that in any case.
const MEMORY: u64 = 32 << 20;
const LEAST: u64 = 64 << 10;
/// Requests that have the server fetch something, at a time: so that it has places left for reads.
const CACHES: usize = 4;
/// Before it is tried again to reach the server.
const AGAIN: Duration = Duration::from_millis(200);
/// How often something is asked for that the server cannot read, and how long is waited in between.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);
/// Ranges of zeros that are remembered (16 MiB); what is beyond them is read.
const MAX_ZEROS: usize = 1 << 20;

/// See the module.
pub struct NbdDisk {
    path: PathBuf,
    len: u64,
    /// By what the server said it can do.
    flags: u16,
    /// What is known to be zeros: begin and end, in order, apart from each other.
    zeros: Vec<(u64, u64)>,
    requests: mpsc::Sender<Request>,
    memory: Arc<Semaphore>,
    caches: Arc<Semaphore>,
    task: JoinHandle<()>,
}

/// What somebody waits for.
struct Request {
    kind: u16,
    range: Range<u64>,
    answer: oneshot::Sender<Result<Vec<u8>, Refusal>>,
    /// Until it is answered, whether or not anybody still waits.
    _memory: OwnedSemaphorePermit,
    /// Of a read, what has come; and how much that is.
    bytes: Vec<u8>,
    came: u64,
    refusal: Option<Refusal>,
}

/// What the server says instead of an answer.
#[derive(Debug, thiserror::Error)]
#[error("the server refuses with error {code}: {why}")]
struct Refusal {
    code: u32,
    why: String,
}

/// Requests that are sent or about to be, by their cookies. `MEMORY` bounds how many.
#[derive(Default)]
struct Open {
    requests: Mutex<HashMap<u64, Request>>,
}

impl Open {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Request>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NbdDisk {
    /// The disk that a server shows at a socket. Waits until there is a server.
    ///
    /// # Errors
    /// The server does not speak the protocol, or refuses.
    pub async fn connect(path: &Path) -> io::Result<Arc<Self>> {
        let (first, zeros) = loop {
            match Session::start(path).await {
                Ok(mut session) => match session.zeros(MAX_ZEROS).await {
                    Ok(zeros) => break (session, zeros),
                    Err(error) if is_permanent(&error) => return Err(error),
                    Err(error) => tracing::debug!(%error, "the server went away"),
                },
                Err(error) if is_permanent(&error) => return Err(error),
                Err(error) => tracing::debug!(%error, "the server is not reached"),
            }
            tokio::time::sleep(AGAIN).await;
        };
        let (len, flags) = (first.len, first.flags);
        let (requests, coming) = mpsc::channel(PARTS);
        let task = tokio::spawn(work(path.to_owned(), first, coming));
        Ok(Arc::new(Self {
            path: path.to_owned(),
            len,
            flags,
            zeros,
            requests,
            memory: Arc::new(Semaphore::new((MEMORY / LEAST) as usize)),
            caches: Arc::new(Semaphore::new(CACHES)),
            task,
        }))
    }

    /// Has the server fetch a range, so that reads find it there; nothing where it does not offer that. Waits until it is.
    ///
    /// # Errors
    /// A range beyond the end; or what the server said, several times.
    pub async fn cache(&self, range: Range<u64>) -> Result<(), ReadError> {
        check_range(
            self.len,
            range.start,
            range.end.saturating_sub(range.start) as usize,
        )?;
        if self.flags & flag::SEND_CACHE == 0 {
            return Ok(());
        }
        let parts = stream::iter(parts(range)).map(|part| async move {
            let _place = self.caches.acquire().await;
            self.ask(command::CACHE, part).await.map(drop)
        });
        parts.buffered(CACHES).try_collect().await
    }

    /// Asks for a part, again where the server cannot read it.
    async fn ask(&self, kind: u16, range: Range<u64>) -> Result<Vec<u8>, ReadError> {
        let failed = |error| ReadError::io(&self.path, range.start, error);
        let closed = || failed(io::ErrorKind::BrokenPipe.into());
        for last in (0..TRIES).rev() {
            let takes = match kind {
                command::READ => (range.end - range.start).div_ceil(LEAST),
                _ => 1,
            };
            let memory = self.memory.clone().acquire_many_owned(takes as u32).await;
            let (answer, answered) = oneshot::channel();
            let request = Request {
                kind,
                range: range.clone(),
                answer,
                _memory: memory.map_err(|_| closed())?,
                bytes: Vec::new(),
                came: 0,
                refusal: None,
            };
            self.requests.send(request).await.map_err(|_| closed())?;
            match answered.await.map_err(|_| closed())? {
                Ok(bytes) => return Ok(bytes),
                Err(refusal) if last == 0 => return Err(failed(io::Error::other(refusal))),
                Err(refusal) => {
                    tracing::debug!(%refusal, path = %self.path.display(), "asked again")
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
        Err(closed())
    }

    async fn fill(
        self: Arc<Self>,
        range: Range<u64>,
        mut into: Vec<u8>,
    ) -> Result<Vec<u8>, ReadError> {
        let len = range.end.saturating_sub(range.start) as usize;
        check_range(self.len, range.start, len)?;
        into.reserve(len);
        let parts = stream::iter(parts(range)).map(|part| self.ask(command::READ, part));
        let mut parts = parts.buffered(PARTS);
        while let Some(bytes) = parts.next().await {
            into.extend_from_slice(&bytes?);
        }
        Ok(into)
    }
}

impl Drop for NbdDisk {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Disk for NbdDisk {
    fn len(&self) -> u64 {
        self.len
    }

    fn is_zero(&self, range: Range<u64>) -> bool {
        let behind = self
            .zeros
            .partition_point(|(start, _)| *start <= range.start);
        let found = behind.checked_sub(1).map(|at| self.zeros[at]);
        range.is_empty() || found.is_some_and(|(_, end)| range.end <= end)
    }

    fn read(
        self: Arc<Self>,
        range: Range<u64>,
        into: Vec<u8>,
    ) -> BoxFuture<'static, Result<Vec<u8>, ReadError>> {
        self.fill(range, into).boxed()
    }
}

/// A range in parts that one request may ask for.
fn parts(range: Range<u64>) -> impl Iterator<Item = Range<u64>> + Send {
    let starts = range.clone().step_by(PART as usize);
    starts.map(move |start| start..(start + PART).min(range.end))
}

/// Whether a server that says so would say so again.
fn is_permanent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::InvalidData | io::ErrorKind::Unsupported
    )
}

/// Holds the connection, for as long as the disk is there.
async fn work(path: PathBuf, first: Session, mut coming: mpsc::Receiver<Request>) {
    let (len, open) = (first.len, Open::default());
    let (mut next, mut cookie) = (Some(first), 0);
    loop {
        let started = match next.take() {
            Some(session) => Ok(session),
            None => Session::start(&path).await,
        };
        match started {
            Ok(session) if session.len != len => {
                tracing::warn!(path = %path.display(), "another disk is served there than before");
            }
            Ok(session) => {
                let error = session.run(&open, &mut coming, &mut cookie).await;
                tracing::debug!(%error, path = %path.display(), "the server went away");
            }
            Err(error) => {
                tracing::debug!(%error, path = %path.display(), "the server is not reached")
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}

#[cfg(test)]
mod tests;
