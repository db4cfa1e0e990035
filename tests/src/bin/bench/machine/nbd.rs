//! A client of network block devices, the same for all servers: pipelined reads over a Unix socket, and nothing else.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::process::Deadline;

/// Sequential reads, and what of a disk counts as data together.
const PART: u64 = 1 << 20;
/// Random ones.
const PAGE: u64 = 4096;
/// Random reads of one measurement.
const READS: usize = 8192;
/// Reads that are on their way at a time.
const DEPTH: usize = 16;
/// Longest text that a server may send while it introduces itself.
const MAX_INTRODUCTION: u32 = 1 << 16;

const MAGIC: &[u8; 16] = b"NBDMAGICIHAVEOPT";
const OPTION: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
const GO: u32 = 7;
const ACK: u32 = 1;

/// A connection to a server, to its default export.
pub struct Server {
    stream: UnixStream,
}

impl Server {
    /// Connects, as soon as it can be.
    pub fn connect(socket: &Path, deadline: &Deadline) -> Result<Self> {
        let mut stream = None;
        deadline.wait("connecting to a network block device", || {
            stream = UnixStream::connect(socket).ok();
            Ok(stream.is_some())
        })?;
        let mut server = Self {
            stream: stream.context("it is connected")?,
        };
        server.stream.set_read_timeout(Some(deadline.left()))?;
        server.introduce().context("a server's introduction")?;
        Ok(server)
    }

    /// Bytes a second of reading data in order.
    pub fn sequential(&mut self, data: &[u64]) -> Result<f64> {
        self.measure(data, PART)
    }

    /// Bytes a second of reading 4 KiB each at random places in data.
    pub fn random(&mut self, data: &[u64], seed: u64) -> Result<f64> {
        let mut chance = StdRng::seed_from_u64(seed);
        let place = |_| {
            let part = data[chance.random_range(0..data.len())];
            part + chance.random_range(0..PART / PAGE) * PAGE
        };
        let places: Vec<u64> = (0..READS).map(place).collect();
        self.measure(&places, PAGE)
    }

    fn measure(&mut self, places: &[u64], len: u64) -> Result<f64> {
        let began = Instant::now();
        let mut to = self.stream.try_clone()?;
        let mut buffer = vec![0; usize::try_from(len)?];
        let mut asked = places.iter();
        for place in asked.by_ref().take(DEPTH) {
            ask(&mut to, *place, len)?;
        }
        for _ in places {
            let mut head = [0; 16];
            self.stream.read_exact(&mut head)?;
            let magic = u32::from_be_bytes(head[..4].try_into()?);
            let error = u32::from_be_bytes(head[4..8].try_into()?);
            ensure!(magic == REPLY && error == 0, "a read failed with {error}");
            self.stream.read_exact(&mut buffer)?;
            if let Some(place) = asked.next() {
                ask(&mut to, *place, len)?;
            }
        }
        Ok((places.len() as u64 * len) as f64 / began.elapsed().as_secs_f64())
    }

    fn introduce(&mut self) -> Result<()> {
        let stream = &mut self.stream;
        let mut magic = [0; 16];
        stream.read_exact(&mut magic)?;
        ensure!(&magic == MAGIC, "it speaks another protocol");
        let mut flags = [0; 2];
        stream.read_exact(&mut flags)?;
        // Fixed newstyle, without the zeros after the export's length.
        stream.write_all(&3_u32.to_be_bytes())?;
        let mut go = OPTION.to_vec();
        go.extend(GO.to_be_bytes());
        // An empty name, and no questions.
        go.extend(6_u32.to_be_bytes());
        go.extend([0; 6]);
        stream.write_all(&go)?;
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head)?;
            ensure!(
                u64::from_be_bytes(head[..8].try_into()?) == OPTION_REPLY,
                "it answers something else"
            );
            let kind = u32::from_be_bytes(head[12..16].try_into()?);
            let len = u32::from_be_bytes(head[16..].try_into()?);
            ensure!(len <= MAX_INTRODUCTION && kind >> 31 == 0, "it refuses");
            let mut text = vec![0; usize::try_from(len)?];
            stream.read_exact(&mut text)?;
            if kind == ACK {
                return Ok(());
            }
        }
    }
}

fn ask(to: &mut UnixStream, place: u64, len: u64) -> Result<()> {
    let mut request = [0; 28];
    request[..4].copy_from_slice(&REQUEST.to_be_bytes());
    request[16..24].copy_from_slice(&place.to_be_bytes());
    request[24..].copy_from_slice(&u32::try_from(len)?.to_be_bytes());
    Ok(to.write_all(&request)?)
}

/// Where a raw disk has data: the begins of its MiB that are not all zeros.
pub fn data_of(raw: &Path) -> Result<Vec<u64>> {
    let file = File::open(raw)?;
    let len = file.metadata()?.len();
    let mut buffer = vec![0; usize::try_from(PART)?];
    let mut data = Vec::new();
    for at in (0..len / PART).map(|part| part * PART) {
        file.read_exact_at(&mut buffer, at)?;
        if buffer.iter().any(|byte| *byte != 0) {
            data.push(at);
        }
    }
    ensure!(!data.is_empty(), "{} is empty", raw.display());
    Ok(data)
}
