//! The client's half: one connection a request, blocking.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::MAX_REPLY_LEN;
use super::error::Failure;
use super::event::{Progress, Reply};
use super::request::Command;
use crate::home::socket;

/// A connection to a home's daemon, good for one request.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
}

/// Stops a client's request from another thread.
#[derive(Debug)]
pub struct Canceller(UnixStream);

/// Why a request was not answered.
#[derive(Debug, Error)]
pub enum ClientError {
    /// No daemon serves this home.
    #[error("no node is running for {}: start one with `capsule node`{}", .home.display(), home_option(.home))]
    NoDaemon {
        /// The home.
        home: PathBuf,
    },
    /// The socket could not be used.
    #[error("the node's socket {}: {source}", .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The connection ended early: the daemon was stopped.
    #[error(
        "the node ended before it answered; what it verified is kept: start it again with `capsule node`"
    )]
    Lost,
    /// The daemon speaks another version.
    #[error(
        "the node's answer cannot be read ({0}): it runs another version of capsule; restart it"
    )]
    Protocol(String),
    /// The daemon refused or failed.
    #[error(transparent)]
    Failed(#[from] Failure),
}

fn home_option(home: &Path) -> String {
    if std::env::var_os("CAPSULE_HOME").is_some() {
        String::new()
    } else {
        format!(" --home {}", home.display())
    }
}

impl Client {
    /// Connects to the daemon of a home.
    pub fn connect(home: &Path) -> Result<Self, ClientError> {
        let path = socket::find(home);
        match UnixStream::connect(&path) {
            Ok(stream) => Ok(Self { stream }),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                Err(ClientError::NoDaemon { home: home.into() })
            }
            Err(source) => Err(ClientError::Connect { path, source }),
        }
    }

    /// Connects to whoever listens at a path.
    pub fn at(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        Ok(Self { stream })
    }

    /// What stops the request: for a signal handler's thread.
    pub fn canceller(&self) -> io::Result<Canceller> {
        self.stream.try_clone().map(Canceller)
    }

    /// Sends a request and waits for its answer; tells progress and notices meanwhile.
    pub fn run<C: Command>(
        self,
        command: C,
        on_progress: impl FnMut(Progress),
        on_notice: impl FnMut(String),
    ) -> Result<C::Answer, ClientError> {
        self.serve(command, on_progress, on_notice, drop)
    }

    /// The same for a request that goes on until the client goes away: `on_ready` hears when it runs.
    pub fn serve<C: Command>(
        self,
        command: C,
        mut on_progress: impl FnMut(Progress),
        mut on_notice: impl FnMut(String),
        mut on_ready: impl FnMut(C::Answer),
    ) -> Result<C::Answer, ClientError> {
        let mut line = serde_json::to_vec(&command.into_request())
            .map_err(|e| ClientError::Protocol(e.to_string()))?;
        line.push(b'\n');
        (&self.stream)
            .write_all(&line)
            .map_err(|_| ClientError::Lost)?;
        let mut lines = BufReader::new(&self.stream);
        loop {
            match read_reply::<C::Answer>(&mut lines)? {
                Reply::Progress(progress) => on_progress(progress),
                Reply::Notice(text) => on_notice(text),
                Reply::Ready(answer) => on_ready(answer),
                Reply::Done(answer) => return Ok(answer),
                Reply::Failed(failure) => return Err(failure.into()),
            }
        }
    }

    /// Sends a request and waits for its answer in silence.
    pub fn call<C: Command>(self, command: C) -> Result<C::Answer, ClientError> {
        self.run(command, |_| {}, |_| {})
    }
}

impl Canceller {
    /// Stops the request; its caller gets [`ClientError::Lost`].
    pub fn cancel(&self) {
        // Fails only where the connection has ended by itself.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

fn read_reply<A: serde::de::DeserializeOwned>(
    lines: &mut impl BufRead,
) -> Result<Reply<A>, ClientError> {
    let mut line = Vec::new();
    lines
        .take(MAX_REPLY_LEN as u64 + 1)
        .read_until(b'\n', &mut line)
        .map_err(|_| ClientError::Lost)?;
    if line.last() != Some(&b'\n') {
        return Err(if line.len() > MAX_REPLY_LEN {
            ClientError::Protocol("too long".into())
        } else {
            ClientError::Lost
        });
    }
    serde_json::from_slice(&line).map_err(|e| ClientError::Protocol(e.to_string()))
}
