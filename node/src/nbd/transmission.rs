//! Answering requests, many at once: a read that has to be fetched keeps no other waiting.

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::Arc;

use capsule_chunker::content::ReadError;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;

use super::handshake::{Agreed, CONTEXT};
use super::wire::{HOLE_ZERO, REQUEST, SIMPLE_REPLY, STRUCTURED_REPLY, chunk, command, error};
use super::{Disk, Export};

/// Longest read: what clients assume where nothing is said.
pub const MAX_READ: u32 = 32 << 20;
/// Bytes that requests of one client may hold in memory.
const MEMORY: u32 = 64 << 20;
/// Requests of one client at a time.
const AT_ONCE: usize = 64;
/// What a request takes of the memory in any case.
const LEAST: u32 = 64 << 10;
/// Zeros are told of in pieces of so many bytes, at offsets that are multiples of it.
const PIECE: u64 = 64 << 10;
/// Pieces that one block status looks at: 64 GiB. Clients ask for the rest.
const MAX_PIECES: u64 = 1 << 20;
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
    let write = Arc::new(Mutex::new(write));
    let (memory, places) = (
        Arc::new(Semaphore::new(MEMORY as usize)),
        Arc::new(Semaphore::new(AT_ONCE)),
    );
    // What is being answered ends with the client.
    let mut answers: JoinSet<io::Result<()>> = JoinSet::new();
    loop {
        while let Some(answered) = answers.try_join_next() {
            answered.unwrap_or_else(|panic| Err(io::Error::other(panic)))?;
        }
        let mut bytes = [0; Request::LEN];
        match read.read_exact(&mut bytes).await {
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            came => came?,
        };
        let Some(request) = Request::parse(&bytes) else {
            let why = "the client sends no request where one is due";
            return Err(io::Error::new(ErrorKind::InvalidData, why));
        };
        match request.kind {
            command::DISC => return Ok(()),
            // Its bytes come at once, wanted or not.
            command::WRITE => {
                let mut payload = (&mut read).take(request.len.into());
                tokio::io::copy(&mut payload, &mut tokio::io::sink()).await?;
            }
            _ => {}
        }
        let takes = request.len.clamp(LEAST, MAX_READ);
        let closed = |_| io::Error::from(ErrorKind::BrokenPipe);
        let place = places.clone().acquire_owned().await.map_err(closed)?;
        let room = memory.clone().acquire_many_owned(takes).await;
        let room = room.map_err(closed)?;
        let (export, write) = (export.clone(), write.clone());
        answers.spawn(async move {
            let bytes = answer(&export, agreed, &request).await;
            let mut write = write.lock().await;
            write.write_all(&bytes).await?;
            write.flush().await?;
            drop((place, room));
            Ok(())
        });
    }
}

/// The reply to a request.
async fn answer(export: &Export, agreed: Agreed, request: &Request) -> Vec<u8> {
    let disk = &export.disk;
    let done = match request.kind {
        command::READ => read(disk, agreed, request).await,
        command::CACHE => prefetch(disk, request)
            .await
            .map(|()| nothing(agreed, request)),
        command::FLUSH => Ok(nothing(agreed, request)),
        command::BLOCK_STATUS if agreed.structured && agreed.allocation => {
            let (disk, request) = (disk.clone(), *request);
            let look = tokio::task::spawn_blocking(move || status(&*disk, &request));
            look.await.unwrap_or_else(|panic| {
                Err(Refusal {
                    code: error::EIO,
                    why: panic.to_string(),
                })
            })
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
            code: error::EOVERFLOW,
            why: format!("reads are of {MAX_READ} bytes at most"),
        });
    }
    if agreed.structured && disk.is_zero(request.range()) {
        let mut bytes = head(request, chunk::OFFSET_HOLE, chunk::DONE, 12);
        bytes.extend(request.offset.to_be_bytes());
        bytes.extend(request.len.to_be_bytes());
        return Ok(bytes);
    }
    let mut bytes = Vec::with_capacity(28 + request.len as usize);
    if agreed.structured {
        let len = 8 + request.len;
        bytes.extend(head(request, chunk::OFFSET_DATA, chunk::DONE, len));
        bytes.extend(request.offset.to_be_bytes());
    } else {
        bytes.extend(simple(request, 0));
    }
    let read = disk.clone().read(request.range(), bytes);
    read.await.map_err(unreadable)
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
    for _ in 0..MAX_PIECES {
        if start == end {
            break;
        }
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
