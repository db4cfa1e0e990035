//! A plain TCP copy: file to socket, socket to file, each end a process of this program.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::Job;
use crate::process::Process;
use crate::transfer::{Done, Meter, Transfer};

/// Both ends' buffer.
const BUFFER: usize = 256 << 10;

/// Sends a file to whoever connects first.
pub fn send(listen: SocketAddr, file: &Path) -> Result<()> {
    let listener = TcpListener::bind(listen)?;
    let (mut stream, _) = listener.accept()?;
    copy(&mut File::open(file)?, &mut stream)
}

/// Receives a file.
pub fn receive(from: SocketAddr, file: &Path) -> Result<()> {
    copy(&mut TcpStream::connect(from)?, &mut File::create(file)?)
}

/// Through a buffer, as a program would that looks at the bytes; no splice.
fn copy(from: &mut impl Read, to: &mut impl Write) -> Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            len => to.write_all(&buffer[..len])?,
        }
    }
}

/// Measures it.
pub fn measure(job: &Job<'_>) -> Result<Transfer> {
    let me = std::env::current_exe()?;
    let at = SocketAddr::from((job.address, job.free_port()?)).to_string();
    let target = job.path(job.name()?);
    let mut sender = Command::new(&me);
    sender.args(["tcp-send", &at]).arg(job.source);
    let mut sender = Process::start(&mut sender, &job.path("sender.log"))?;
    let port = at.rsplit(':').next().and_then(|port| port.parse().ok());
    sender.wait_for_port(port.context("the address has a port")?, &job.deadline)?;
    let mut receiver = Command::new(&me);
    receiver.args(["tcp-receive", &at]).arg(&target);
    let log = job.path("receiver.log");
    let (meter, mut receiver) = Meter::start_with(job.bytes()?, sender.pid(), || {
        Process::start(&mut receiver, &log)
    })?;
    meter.finish(&mut receiver, Done::Ends, &target, &job.deadline)
}
