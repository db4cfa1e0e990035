//! Answering requests, many at once: a read that has to be fetched keeps no other waiting.

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use capsule_chunker::content::ReadError;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Export;
use super::handshake::{Agreed, CONTEXT};
use super::wire::{HOLE_ZERO, REQUEST, SIMPLE_REPLY, STRUCTURED_REPLY, chunk, command, error};
use crate::disk::Disk;

/// Longest read: what clients assume where nothing is said.
pub const MAX_READ: u32 = 32 << 20;
/// Bytes that requests of one client may hold in memory.
const MEMORY: u32 = 32 << 20;
/// Requests of one client that are worked on at a time, and that wait for that.
const AT_ONCE: usize = 64;
const MAX_OPEN: usize = 1024;
/// How long who has left is still answered.
const LEAVING: Duration = Duration::from_secs(5);
/// What a request takes of the memory in any case.
const LEAST: u32 = 64 << 10;
/// Zeros are told of in pieces of so many bytes, at offsets that are multiples of it.
const PIECE: u64 = 64 << 10;
/// Extents in one block status.
const MAX_EXTENTS: usize = 4096;
/// Bytes that are prefetched at once.
const CACHED_AT_ONCE: u64 = 1 << 20;
/// Most bytes of a message for people.
const MAX_MESSAGE: usize = 1024;

/// One request.
#[derive(Clone, Copy, Debug)]
struct Request {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    len: u32,
}

impl Request {
    const LEN: usize = 28;

    fn parse(bytes: &[u8; Self::LEN]) -> Option<Self> {
        fn field<const N: usize>(bytes: &[u8; Request::LEN], at: usize) -> [u8; N] {
            let mut field = [0; N];
            field.copy_from_slice(&bytes[at..at + N]);
            field
        }
        (u32::from_be_bytes(field(bytes, 0)) == REQUEST).then(|| Self {
            flags: u16::from_be_bytes(field(bytes, 4)),
            kind: u16::from_be_bytes(field(bytes, 6)),
            cookie: u64::from_be_bytes(field(bytes, 8)),
            offset: u64::from_be_bytes(field(bytes, 16)),
            len: u32::from_be_bytes(field(bytes, 24)),
        })
    }

    const fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.len as u64)
    }
}

/// Why a request is not answered as it was meant.
struct Refusal {
    code: u32,
    why: String,
}

/// Answers until the client leaves.
pub async fn run<R, W>(
    mut read: R,
    write: W,
    export: &Arc<Export>,
    agreed: Agreed,
) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let shared = Arc::new(Shared {
        export: export.clone(),
        agreed,
        write: Mutex::new(write),
        memory: Semaphore::new(MEMORY as usize),
        places: Semaphore::new(AT_ONCE),
    });
    // What is being answered ends with the client: so it is read from without waiting for anything else, and its end is seen.
    let mut answers: JoinSet<io::Result<()>> = JoinSet::new();
    while let Some(request) = next(&mut read).await? {
        while let Some(answered) = answers.try_join_next() {
            answered.unwrap_or_else(|panic| Err(io::Error::other(panic)))?;
        }
        if answers.len() >= MAX_OPEN {
            let why = "the client does not wait for answers";
            return Err(io::Error::new(ErrorKind::InvalidData, why));
        }
        answers.spawn(reply(shared.clone(), request));
    }
    // Who has said all it wanted hears what is left, unless that takes too long.
    let rest = async { while answers.join_next().await.is_some() {} };
    let _rest = timeout(LEAVING, rest).await;
    Ok(())
}

/// What all answers to one client share.
struct Shared<W> {
    export: Arc<Export>,
    agreed: Agreed,
    write: Mutex<W>,
    memory: Semaphore,
    places: Semaphore,
}

/// The next request; none where the client leaves.
async fn next(read: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Request>> {
    let mut bytes = [0; Request::LEN];
    match read.read_exact(&mut bytes).await {
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        came => came?,
    };
    let Some(request) = Request::parse(&bytes) else {
        let why = "the client sends no request where one is due";
        return Err(io::Error::new(ErrorKind::InvalidData, why));
    };
    if request.kind == command::WRITE {
        // Its bytes come at once, wanted or not.
        let mut payload = read.take(request.len.into());
        tokio::io::copy(&mut payload, &mut tokio::io::sink()).await?;
    }
    Ok((request.kind != command::DISC).then_some(request))
}

async fn reply<W: AsyncWrite + Unpin>(shared: Arc<Shared<W>>, request: Request) -> io::Result<()> {
    let takes = match request.kind {
        command::READ => request.len.clamp(LEAST, MAX_READ),
        _ => CACHED_AT_ONCE as u32,
    };
    let closed = |_| io::Error::from(ErrorKind::BrokenPipe);
    let _place = shared.places.acquire().await.map_err(closed)?;
    let _room = shared.memory.acquire_many(takes).await.map_err(closed)?;
    let bytes = answer(&shared.export, shared.agreed, &request).await;
    let mut write = shared.write.lock().await;
    write.write_all(&bytes).await?;
    write.flush().await
}

/// The reply to a request.
async fn answer(export: &Export, agreed: Agreed, request: &Request) -> Vec<u8> {
    let disk = &export.disk;
    let known = match request.kind {
        command::READ => command::DF,
        command::BLOCK_STATUS => command::REQ_ONE,
        _ => 0,
    };
    let done = match request.kind {
        _ if request.flags & !known != 0 => Err(Refusal {
            code: error::EINVAL,
            why: "this server does not know the request's flags".to_owned(),
        }),
        command::READ => read(disk, agreed, request).await,
        command::CACHE => prefetch(disk, request)
            .await
            .map(|()| nothing(agreed, request)),
        command::FLUSH => Ok(nothing(agreed, request)),
        command::BLOCK_STATUS if agreed.structured && agreed.allocation => {
            let (disk, request) = (disk.clone(), *request);
            let look = blocking(move || status(&*disk, &request));
            look.await.and_then(|status| status)
        }
        command::WRITE | command::TRIM | command::WRITE_ZEROES => Err(Refusal {
            code: error::EPERM,
            why: "a capsule is never written to".to_owned(),
        }),
        _ => Err(Refusal {
            code: error::EINVAL,
            why: "this server does not know the request".to_owned(),
        }),
    };
    done.unwrap_or_else(|refusal| refused(agreed, request, &refusal))
}

/// Looks into what lies on the disk.
async fn blocking<T: Send + 'static>(
    look: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Refusal> {
    let looked = tokio::task::spawn_blocking(look).await;
    looked.map_err(|panic| Refusal {
        code: error::EIO,
        why: panic.to_string(),
    })
}

fn check(disk: &dyn Disk, request: &Request) -> Result<(), Refusal> {
    let refusal = |code, why: &str| {
        Err(Refusal {
            code,
            why: why.to_owned(),
        })
    };
    match request.range().end {
        _ if request.len == 0 => refusal(error::EINVAL, "nothing is asked for"),
        end if end > disk.len() => refusal(error::EINVAL, "it lies beyond the end"),
        _ => Ok(()),
    }
}

async fn read(disk: &Arc<dyn Disk>, agreed: Agreed, request: &Request) -> Result<Vec<u8>, Refusal> {
    check(&**disk, request)?;
    if request.len > MAX_READ {
        return Err(Refusal {
            code: error::EINVAL,
            why: format!("reads are of {MAX_READ} bytes at most"),
        });
    }
    let mut bytes = Vec::with_capacity(28 + request.len as usize);
    begin(agreed, request, &mut bytes);
    if disk.read_at_hand(request.range(), &mut bytes) {
        return Ok(bytes);
    }
    let (looked, range) = (disk.clone(), request.range());
    let is_zero = move || looked.is_zero(range);
    if agreed.structured && blocking(is_zero).await? {
        let mut bytes = head(request, chunk::OFFSET_HOLE, chunk::DONE, 12);
        bytes.extend(request.offset.to_be_bytes());
        bytes.extend(request.len.to_be_bytes());
        return Ok(bytes);
    }
    let read = disk.clone().read(request.range(), bytes);
    read.await.map_err(unreadable)
}

/// The beginning of a reply that has all of a read's bytes.
fn begin(agreed: Agreed, request: &Request, bytes: &mut Vec<u8>) {
    if agreed.structured {
        let len = 8 + request.len;
        bytes.extend(head(request, chunk::OFFSET_DATA, chunk::DONE, len));
        bytes.extend(request.offset.to_be_bytes());
    } else {
        bytes.extend(simple(request, 0));
    }
}

fn unreadable(error: ReadError) -> Refusal {
    Refusal {
        code: error::EIO,
        why: error.to_string(),
    }
}

/// Has a range come, so that later reads find it here.
async fn prefetch(disk: &Arc<dyn Disk>, request: &Request) -> Result<(), Refusal> {
    check(&**disk, request)?;
    let Range { mut start, end } = request.range();
    let mut bytes = Vec::new();
    while start < end {
        let next = (start + CACHED_AT_ONCE).min(end);
        bytes.clear();
        let read = disk.clone().read(start..next, bytes);
        bytes = read.await.map_err(unreadable)?;
        start = next;
    }
    Ok(())
}

/// Which of a range is zero.
fn status(disk: &dyn Disk, request: &Request) -> Result<Vec<u8>, Refusal> {
    check(disk, request)?;
    let most = match request.flags & command::REQ_ONE {
        0 => MAX_EXTENTS,
        _ => 1,
    };
    let mut extents: Vec<(u32, u32)> = Vec::new();
    let Range { mut start, end } = request.range();
    while start < end {
        let next = ((start / PIECE + 1) * PIECE).min(end);
        let flags = if disk.is_zero(start..next) {
            HOLE_ZERO
        } else {
            0
        };
        let len = (next - start) as u32;
        let full = extents.len() == most;
        match extents.last_mut() {
            Some((sum, same)) if *same == flags => *sum += len,
            _ if full => break,
            _ => extents.push((len, flags)),
        }
        start = next;
    }
    let len = 4 + 8 * extents.len() as u32;
    let mut bytes = head(request, chunk::BLOCK_STATUS, chunk::DONE, len);
    bytes.extend(CONTEXT.to_be_bytes());
    for (len, flags) in extents {
        bytes.extend(len.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
    }
    Ok(bytes)
}

/// The head of a chunk with so many bytes.
fn head(request: &Request, kind: u16, flags: u16, len: u32) -> Vec<u8> {
    let mut bytes = STRUCTURED_REPLY.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(request.cookie.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

/// A simple reply's head.
fn simple(request: &Request, code: u32) -> Vec<u8> {
    let mut bytes = SIMPLE_REPLY.to_be_bytes().to_vec();
    bytes.extend(code.to_be_bytes());
    bytes.extend(request.cookie.to_be_bytes());
    bytes
}

/// That it is done, with nothing to say.
fn nothing(agreed: Agreed, request: &Request) -> Vec<u8> {
    match agreed.structured {
        true => head(request, chunk::NONE, chunk::DONE, 0),
        false => simple(request, 0),
    }
}

fn refused(agreed: Agreed, request: &Request, refusal: &Refusal) -> Vec<u8> {
    if !agreed.structured {
        return simple(request, refusal.code);
    }
    let mut end = refusal.why.len().min(MAX_MESSAGE);
    while !refusal.why.is_char_boundary(end) {
        end -= 1;
    }
    let message = &refusal.why.as_bytes()[..end];
    let len = 6 + message.len() as u32;
    let mut bytes = head(request, chunk::ERROR, chunk::DONE, len);
    bytes.extend(refusal.code.to_be_bytes());
    bytes.extend((message.len() as u16).to_be_bytes());
    bytes.extend(message);
    bytes
}
