//! Agreeing on what is served, and how replies look.

use std::io::{self, ErrorKind};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::Export;
use super::transmission::MAX_READ;
use super::wire::{ALLOCATION, IHAVEOPT, NBDMAGIC, OPTION_REPLY, flag, info, option, reply};

/// Longest option: names have 4,096 bytes at most.
const MAX_OPTION: u32 = 64 << 10;
/// Options that a client may send before it begins.
const MAX_OPTIONS: u32 = 1024;
/// Blocks that are read best: what a frame of a disk that is paged decodes to.
const PREFERRED: u32 = 64 << 10;
/// Number by which block status tells of the context.
pub const CONTEXT: u32 = 1;

/// What both sides agreed on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Agreed {
    /// Replies are structured.
    pub structured: bool,
    /// The client may ask which blocks are zero.
    pub allocation: bool,
}

/// What both agree on; nothing where the client leaves instead.
pub async fn negotiate(
    read: &mut (impl AsyncRead + Unpin),
    write: &mut (impl AsyncWrite + Unpin),
    export: &Export,
) -> io::Result<Option<Agreed>> {
    let mut hello = Vec::new();
    hello.extend(NBDMAGIC.to_be_bytes());
    hello.extend(IHAVEOPT.to_be_bytes());
    hello.extend((flag::FIXED_NEWSTYLE | flag::NO_ZEROES).to_be_bytes());
    write.write_all(&hello).await?;
    write.flush().await?;
    let known = u32::from(flag::FIXED_NEWSTYLE | flag::NO_ZEROES);
    let flags = read.read_u32().await?;
    if flags & !known != 0 || flags & u32::from(flag::FIXED_NEWSTYLE) == 0 {
        return Err(wrong(
            "the client does not speak the fixed newstyle protocol",
        ));
    }
    let no_zeroes = flags & u32::from(flag::NO_ZEROES) != 0;
    let mut agreed = Agreed::default();
    for _ in 0..MAX_OPTIONS {
        if read.read_u64().await? != IHAVEOPT {
            return Err(wrong("the client sends no option where one is due"));
        }
        let (number, len) = (read.read_u32().await?, read.read_u32().await?);
        if len > MAX_OPTION {
            // What follows cannot be found without reading it.
            return Err(wrong("the client sends an option that is too long"));
        }
        let mut data = vec![0; len as usize];
        read.read_exact(&mut data).await?;
        let mut replies = Replies {
            option: number,
            bytes: Vec::new(),
        };
        let ends = match number {
            option::EXPORT_NAME => {
                write.write_all(&begin(export, no_zeroes)).await?;
                write.flush().await?;
                return Ok(Some(agreed));
            }
            option::ABORT => {
                replies.ack();
                Some(None)
            }
            option::LIST => {
                replies.list(export, &data);
                None
            }
            option::INFO | option::GO => {
                let began = replies.describe(export, &data);
                (number == option::GO && began).then_some(Some(agreed))
            }
            option::STRUCTURED_REPLY => {
                agreed.structured |= replies.structured(&data);
                None
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                let chosen = replies.contexts(&data, agreed.structured);
                if number == option::SET_META_CONTEXT {
                    agreed.allocation = chosen;
                }
                None
            }
            _ => {
                replies.error(reply::ERR_UNSUP, "this server does not know the option");
                None
            }
        };
        write.write_all(&replies.bytes).await?;
        write.flush().await?;
        if let Some(end) = ends {
            return Ok(end);
        }
    }
    Err(wrong("the client sends options without end"))
}

fn wrong(why: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}

fn transmission_flags() -> u16 {
    flag::HAS_FLAGS
        | flag::READ_ONLY
        | flag::SEND_FLUSH
        | flag::SEND_DF
        | flag::CAN_MULTI_CONN
        | flag::SEND_CACHE
}

/// The answer to who asks by name alone, as old clients do.
fn begin(export: &Export, no_zeroes: bool) -> Vec<u8> {
    let mut bytes = export.disk.len().to_be_bytes().to_vec();
    bytes.extend(transmission_flags().to_be_bytes());
    if !no_zeroes {
        bytes.extend([0; 124]);
    }
    bytes
}

/// Replies to an option.
struct Replies {
    option: u32,
    bytes: Vec<u8>,
}

impl Replies {
    fn push(&mut self, kind: u32, data: &[u8]) {
        self.bytes.extend(OPTION_REPLY.to_be_bytes());
        self.bytes.extend(self.option.to_be_bytes());
        self.bytes.extend(kind.to_be_bytes());
        self.bytes.extend((data.len() as u32).to_be_bytes());
        self.bytes.extend(data);
    }

    fn ack(&mut self) {
        self.push(reply::ACK, &[]);
    }

    fn error(&mut self, kind: u32, why: &str) {
        self.push(kind, why.as_bytes());
    }

    fn list(&mut self, export: &Export, data: &[u8]) {
        if !data.is_empty() {
            return self.error(reply::ERR_INVALID, "the option has no data");
        }
        let mut entry = (export.name.len() as u32).to_be_bytes().to_vec();
        entry.extend(export.name.as_bytes());
        entry.extend(export.description.as_bytes());
        self.push(reply::SERVER, &entry);
        self.ack();
    }

    /// What the export is; whether the option was well-formed.
    fn describe(&mut self, export: &Export, data: &[u8]) -> bool {
        // Its name, and the kinds of information that the client asks for.
        let Some(wanted) = name_and_rest(data).and_then(|(_, rest)| requests(rest)) else {
            self.error(reply::ERR_INVALID, "the option is not well-formed");
            return false;
        };
        let with = |kind: u16, data: &[u8]| [&kind.to_be_bytes()[..], data].concat();
        let mut first = export.disk.len().to_be_bytes().to_vec();
        first.extend(transmission_flags().to_be_bytes());
        self.push(reply::INFO, &with(info::EXPORT, &first));
        if wanted.contains(&info::NAME) {
            self.push(reply::INFO, &with(info::NAME, export.name.as_bytes()));
        }
        if wanted.contains(&info::DESCRIPTION) {
            let description = with(info::DESCRIPTION, export.description.as_bytes());
            self.push(reply::INFO, &description);
        }
        let sizes = [1, PREFERRED, MAX_READ].map(u32::to_be_bytes).concat();
        self.push(reply::INFO, &with(info::BLOCK_SIZE, &sizes));
        self.ack();
        true
    }

    fn structured(&mut self, data: &[u8]) -> bool {
        if !data.is_empty() {
            self.error(reply::ERR_INVALID, "the option has no data");
            return false;
        }
        self.ack();
        true
    }

    /// The contexts that the client asks for, of those that there are; whether there are any.
    fn contexts(&mut self, data: &[u8], structured: bool) -> bool {
        let queries = name_and_rest(data).and_then(|(_, rest)| queries(rest));
        let Some(queries) = queries else {
            self.error(reply::ERR_INVALID, "the option is not well-formed");
            return false;
        };
        if !structured && self.option == option::SET_META_CONTEXT {
            self.error(reply::ERR_INVALID, "structured replies come first");
            return false;
        }
        // Who lists may ask for all, or for all of a namespace.
        let listed = self.option == option::LIST_META_CONTEXT;
        let asked = |query: &&[u8]| {
            *query == ALLOCATION.as_bytes() || listed && *query == b"base:".as_slice()
        };
        let chosen = listed && queries.is_empty() || queries.iter().any(asked);
        if chosen {
            let number = if listed { 0 } else { CONTEXT };
            let context = [&number.to_be_bytes()[..], ALLOCATION.as_bytes()].concat();
            self.push(reply::META_CONTEXT, &context);
        }
        self.ack();
        chosen
    }
}

/// A name with its length before it, and what follows.
fn name_and_rest(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_be_bytes(*len) as usize)
}

/// Kinds of information, with their number before them.
fn requests(data: &[u8]) -> Option<Vec<u16>> {
    let (count, rest) = data.split_first_chunk::<2>()?;
    let (kinds, []) = rest.as_chunks::<2>() else {
        return None;
    };
    let kinds: Vec<u16> = kinds.iter().map(|kind| u16::from_be_bytes(*kind)).collect();
    (kinds.len() == usize::from(u16::from_be_bytes(*count))).then_some(kinds)
}

/// Queries, with their number before them.
fn queries(data: &[u8]) -> Option<Vec<&[u8]>> {
    let (count, mut rest) = data.split_first_chunk::<4>()?;
    let mut queries = Vec::new();
    while !rest.is_empty() {
        let (query, left) = name_and_rest(rest)?;
        queries.push(query);
        rest = left;
    }
    (queries.len() as u64 == u64::from(u32::from_be_bytes(*count))).then_some(queries)
}
