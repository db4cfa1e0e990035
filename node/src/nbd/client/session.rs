//! One connection to a server: shaking hands, asking what is zero, sending requests and hearing answers.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::super::wire::{
    ALLOCATION, IHAVEOPT, NBDMAGIC, OPTION_REPLY, REQUEST, SIMPLE_REPLY, STRUCTURED_REPLY, chunk,
    command, flag, info, option, reply,
};
use super::{Open, Refusal, Request};

/// So long a server may take until it serves.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest reply to an option.
const MAX_REPLY: u32 = 64 << 10;
/// Replies to one option.
const MAX_REPLIES: usize = 1024;
/// Bytes of which one request asks what is zero.
const STATUS: u64 = 1 << 30;
/// Extents that tell of it, at most.
const MAX_EXTENTS: usize = 1 << 18;
/// Longest message of an error.
const MAX_MESSAGE: u32 = 64 << 10;
/// Of an extent: it reads as zeros.
const ZERO: u32 = 2;

/// Replies to an option: kinds and data.
type Replies = Vec<(u32, Vec<u8>)>;

/// See the module.
pub struct Session {
    /// Bytes of the disk.
    pub len: u64,
    /// What the server can do.
    pub flags: u16,
    read: BufReader<OwnedReadHalf>,
    write: OwnedWriteHalf,
    structured: bool,
    /// By which number block status tells of zeros, where it does.
    context: Option<u32>,
}

impl Session {
    /// Connects and shakes hands.
    pub async fn start(path: &Path) -> io::Result<Self> {
        let (read, write) = UnixStream::connect(path).await?.into_split();
        let mut session = Self {
            len: 0,
            flags: 0,
            read: BufReader::with_capacity(64 << 10, read),
            write,
            structured: false,
            context: None,
        };
        timeout(PATIENCE, session.negotiate()).await??;
        Ok(session)
    }

    async fn negotiate(&mut self) -> io::Result<()> {
        let hello = (self.read.read_u64().await?, self.read.read_u64().await?);
        let flags = self.read.read_u16().await?;
        if hello != (NBDMAGIC, IHAVEOPT) || flags & flag::FIXED_NEWSTYLE == 0 {
            return Err(wrong(
                "the server does not speak the fixed newstyle protocol",
            ));
        }
        let flags = flags & (flag::FIXED_NEWSTYLE | flag::NO_ZEROES);
        self.write.write_u32(flags.into()).await?;
        self.structured = self.wish(option::STRUCTURED_REPLY, &[]).await?.is_some();
        if self.structured {
            // The empty name, and one context.
            let mut query = 0u32.to_be_bytes().to_vec();
            query.extend(1u32.to_be_bytes());
            query.extend((ALLOCATION.len() as u32).to_be_bytes());
            query.extend(ALLOCATION.as_bytes());
            let replies = self.wish(option::SET_META_CONTEXT, &query).await?;
            let replies = replies.unwrap_or_default();
            let context = replies.iter().find_map(|(kind, data)| {
                let (number, name) = data.split_first_chunk()?;
                let found = *kind == reply::META_CONTEXT && name == ALLOCATION.as_bytes();
                found.then_some(u32::from_be_bytes(*number))
            });
            self.context = context;
        }
        // The empty name, and no wishes.
        let replies = self.option(option::GO, &[0; 6]).await?;
        let export = replies.iter().find_map(|(kind, data)| {
            let data = <&[u8; 12]>::try_from(&data[..]).ok()?;
            let found = *kind == reply::INFO && data[..2] == info::EXPORT.to_be_bytes();
            let (len, flags) = data[2..].split_first_chunk::<8>()?;
            found.then(|| {
                (
                    u64::from_be_bytes(*len),
                    u16::from_be_bytes([flags[0], flags[1]]),
                )
            })
        });
        (self.len, self.flags) =
            export.ok_or_else(|| wrong("the server does not say how long it is"))?;
        match i64::try_from(self.len) {
            Ok(_) => Ok(()),
            Err(_) => Err(wrong("the server has more than there can be")),
        }
    }

    /// Sends an option that the server need not know; the replies to it, where it does.
    async fn wish(&mut self, number: u32, data: &[u8]) -> io::Result<Option<Replies>> {
        match self.option(number, data).await {
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(None),
            replies => replies.map(Some),
        }
    }

    /// Sends an option; the replies to it.
    async fn option(&mut self, number: u32, data: &[u8]) -> io::Result<Replies> {
        let mut bytes = IHAVEOPT.to_be_bytes().to_vec();
        bytes.extend(number.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        self.write.write_all(&bytes).await?;
        let mut replies = Vec::new();
        while replies.len() < MAX_REPLIES {
            let head = (self.read.read_u64().await?, self.read.read_u32().await?);
            let (kind, len) = (self.read.read_u32().await?, self.read.read_u32().await?);
            if head != (OPTION_REPLY, number) || len > MAX_REPLY {
                return Err(wrong("the server sends no reply where one is due"));
            }
            let mut data = vec![0; len as usize];
            self.read.read_exact(&mut data).await?;
            match kind {
                reply::ACK => return Ok(replies),
                _ if kind >> 31 == 0 => replies.push((kind, data)),
                _ => {
                    let why = String::from_utf8_lossy(&data);
                    let message = format!("the server refuses option {number}: {kind:#x} {why}");
                    return Err(io::Error::new(ErrorKind::Unsupported, message));
                }
            }
        }
        Err(wrong("the server sends replies without end"))
    }

    /// Which ranges are zeros, `most` of them: begin and end.
    pub async fn zeros(&mut self, most: usize) -> io::Result<Vec<(u64, u64)>> {
        let mut zeros: Vec<(u64, u64)> = Vec::new();
        let Some(context) = self.context else {
            return Ok(zeros);
        };
        let mut at = 0;
        while at < self.len && zeros.len() < most {
            let len = STATUS.min(self.len - at) as u32;
            self.write
                .write_all(&head(command::BLOCK_STATUS, at, at, len))
                .await?;
            let told = timeout(PATIENCE, self.status(context, at)).await??;
            let end = at + u64::from(len);
            for (len, flags) in told {
                let next = at.saturating_add(len.into()).min(end);
                match zeros.last_mut() {
                    _ if flags & ZERO == 0 || at == next => {}
                    Some((_, last)) if *last == at => *last = next,
                    _ => zeros.push((at, next)),
                }
                at = next;
            }
        }
        zeros.truncate(most);
        Ok(zeros)
    }

    /// The reply to a block status: lengths and flags, not nothing. None where the server cannot tell: then the whole range may be anything.
    async fn status(&mut self, context: u32, cookie: u64) -> io::Result<Vec<(u32, u32)>> {
        let mut extents = Vec::new();
        loop {
            let magic = self.read.read_u32().await?;
            let head = Chunk::read(&mut self.read).await?;
            if magic != STRUCTURED_REPLY || head.cookie != cookie {
                return Err(wrong("the server does not answer what it is asked"));
            }
            match head.kind {
                chunk::NONE if head.len == 0 => {}
                chunk::BLOCK_STATUS
                    if head.len % 8 == 4
                        && head.len as usize / 8 + extents.len() <= MAX_EXTENTS =>
                {
                    let told = self.read.read_u32().await?;
                    let mut bytes = vec![0; head.len as usize - 4];
                    self.read.read_exact(&mut bytes).await?;
                    if told == context {
                        let (fields, _) = bytes.as_chunks::<4>();
                        let number = |at: usize| u32::from_be_bytes(fields[at]);
                        let pairs =
                            (0..fields.len() / 2).map(|at| (number(2 * at), number(2 * at + 1)));
                        extents.extend(pairs.filter(|(len, _)| *len > 0));
                    }
                }
                kind if kind >> 15 == 1 => {
                    let refusal = refusal(&mut self.read, head.len).await?;
                    tracing::debug!(%refusal, "the server does not tell what is zero");
                    extents.push((u32::MAX, 0));
                }
                _ => return Err(wrong("the server tells of zeros in an unknown way")),
            }
            if head.is_last {
                break;
            }
        }
        match extents.is_empty() {
            true => Err(wrong("the server tells nothing of zeros")),
            false => Ok(extents),
        }
    }

    /// Sends what is open and what comes, and hears answers, until the connection ends: why it did.
    pub async fn run(
        mut self,
        open: &Open,
        coming: &mut mpsc::Receiver<Request>,
        cookie: &mut u64,
    ) -> io::Error {
        let ended = {
            let send = send(&mut self.write, open, coming, cookie);
            let hear = hear(&mut self.read, open, self.structured);
            tokio::select! {
                sent = send => sent,
                heard = hear => heard,
            }
        };
        ended.err().unwrap_or_else(|| ErrorKind::BrokenPipe.into())
    }
}

/// Sends what was not answered, then what comes. Whoever drops this in between loses nothing: what it took is open.
async fn send(
    write: &mut OwnedWriteHalf,
    open: &Open,
    coming: &mut mpsc::Receiver<Request>,
    cookie: &mut u64,
) -> io::Result<()> {
    let mut bytes = Vec::new();
    for (cookie, request) in &mut *open.lock() {
        request.came = 0;
        request.refusal = None;
        bytes.extend(request.head(*cookie));
    }
    write.write_all(&bytes).await?;
    while let Some(request) = coming.recv().await {
        *cookie += 1;
        let bytes = request.head(*cookie);
        open.lock().insert(*cookie, request);
        write.write_all(&bytes).await?;
    }
    // Nobody is left who could ask; the task is about to end.
    std::future::pending().await
}

/// Hears answers.
async fn hear(
    read: &mut BufReader<OwnedReadHalf>,
    open: &Open,
    structured: bool,
) -> io::Result<()> {
    loop {
        let answered = match read.read_u32().await? {
            SIMPLE_REPLY => hear_simple(read, open, structured).await?,
            STRUCTURED_REPLY if structured => {
                let head = Chunk::read(read).await?;
                hear_chunk(read, open, &head).await?;
                head.is_last.then_some(head.cookie)
            }
            _ => return Err(wrong("the server sends no answer where one is due")),
        };
        if let Some(cookie) = answered {
            let request = open.lock().remove(&cookie);
            let request = request.ok_or_else(|| wrong("the server answers what nobody asked"))?;
            request.end();
        }
    }
}

async fn hear_simple(
    read: &mut BufReader<OwnedReadHalf>,
    open: &Open,
    structured: bool,
) -> io::Result<Option<u64>> {
    let (code, cookie) = (read.read_u32().await?, read.read_u64().await?);
    let asked = |request: &mut Request| (request.kind, request.range.clone());
    let (kind, range) = look(open, cookie, asked)?;
    if code != 0 {
        let why = "it does not say why".to_owned();
        look(open, cookie, |request| {
            request.refusal = Some(Refusal { code, why })
        })?;
    } else if kind == command::READ {
        if structured {
            return Err(wrong("the server sends data without structure"));
        }
        let len = (range.end - range.start) as u32;
        hear_data(read, open, cookie, range.start, len).await?;
    }
    Ok(Some(cookie))
}

async fn hear_chunk(
    read: &mut BufReader<OwnedReadHalf>,
    open: &Open,
    head: &Chunk,
) -> io::Result<()> {
    match head.kind {
        chunk::NONE if head.len == 0 => Ok(()),
        chunk::OFFSET_DATA if head.len > 8 => {
            let offset = read.read_u64().await?;
            hear_data(read, open, head.cookie, offset, head.len - 8).await
        }
        chunk::OFFSET_HOLE if head.len == 12 => {
            let (offset, len) = (read.read_u64().await?, read.read_u32().await?);
            look(open, head.cookie, |request| {
                request.part(offset, len).map(|part| part.fill(0))
            })?
        }
        kind if kind >> 15 == 1 => {
            let refusal = refusal(read, head.len).await?;
            look(open, head.cookie, |request| request.refusal = Some(refusal))
        }
        _ => Err(wrong("the server answers in an unknown way")),
    }
}

/// Hears bytes of a read, into what it has.
async fn hear_data(
    read: &mut BufReader<OwnedReadHalf>,
    open: &Open,
    cookie: u64,
    offset: u64,
    len: u32,
) -> io::Result<()> {
    // The lock is not held while they come.
    let (mut bytes, at) = look(open, cookie, |request| {
        request.part(offset, len)?;
        let at = (offset - request.range.start) as usize;
        Ok::<_, io::Error>((std::mem::take(&mut request.bytes), at))
    })??;
    read.read_exact(&mut bytes[at..at + len as usize]).await?;
    look(open, cookie, |request| request.bytes = bytes)
}

/// Looks at an open request.
fn look<T>(open: &Open, cookie: u64, what: impl FnOnce(&mut Request) -> T) -> io::Result<T> {
    let mut open = open.lock();
    let request = open.get_mut(&cookie);
    request
        .map(what)
        .ok_or_else(|| wrong("the server answers what nobody asked"))
}

impl Request {
    fn head(&self, cookie: u64) -> Vec<u8> {
        let len = (self.range.end - self.range.start) as u32;
        head(self.kind, cookie, self.range.start, len)
    }

    /// The place of a part that comes.
    fn part(&mut self, offset: u64, len: u32) -> io::Result<&mut [u8]> {
        let end = offset.checked_add(len.into());
        let within = offset >= self.range.start && end.is_some_and(|end| end <= self.range.end);
        if self.kind != command::READ || !within {
            return Err(wrong("the server answers with what was not asked for"));
        }
        self.came += u64::from(len);
        self.bytes
            .resize((self.range.end - self.range.start) as usize, 0);
        let at = (offset - self.range.start) as usize;
        Ok(&mut self.bytes[at..at + len as usize])
    }

    /// Tells who asked.
    fn end(self) {
        let whole = self.range.end - self.range.start;
        let refusal = match self.refusal {
            None if self.kind == command::READ && self.came != whole => Some(Refusal {
                code: 0,
                why: "the server left something out".to_owned(),
            }),
            refusal => refusal,
        };
        // It may have gone.
        let _gone = self.answer.send(refusal.map_or(Ok(self.bytes), Err));
    }
}

/// The head of a chunk of a structured reply.
struct Chunk {
    is_last: bool,
    kind: u16,
    cookie: u64,
    len: u32,
}

impl Chunk {
    /// Reads one, behind its magic.
    async fn read(read: &mut BufReader<OwnedReadHalf>) -> io::Result<Self> {
        let flags = read.read_u16().await?;
        Ok(Self {
            is_last: flags & chunk::DONE != 0,
            kind: read.read_u16().await?,
            cookie: read.read_u64().await?,
            len: read.read_u32().await?,
        })
    }
}

/// Reads what an error chunk says.
async fn refusal(read: &mut BufReader<OwnedReadHalf>, len: u32) -> io::Result<Refusal> {
    if !(6..=MAX_MESSAGE).contains(&len) {
        return Err(wrong("the server says at length that it cannot"));
    }
    let (code, said) = (read.read_u32().await?, read.read_u16().await?);
    let mut rest = vec![0; len as usize - 6];
    read.read_exact(&mut rest).await?;
    let said = &rest[..rest.len().min(said.into())];
    let why = String::from_utf8_lossy(said).into_owned();
    Ok(Refusal { code, why })
}

/// A request.
fn head(kind: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = REQUEST.to_be_bytes().to_vec();
    bytes.extend(0u16.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

fn wrong(why: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}
