//! A connection to QEMU's monitor: commands with their answers. Events are passed over: what a machine does is asked.
//!
//! QMP is one JSON object a line. Written out here, as what there is of it in libraries ends the connection at an event that it does not know
//! (those of a newer QEMU) or at the answer to a command that nobody waits for any more.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{MutexGuard, oneshot};
use tokio::task::JoinHandle;
use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout, timeout_at};

/// So long QEMU may take to answer. It does so in its main loop, which stands still where a command waits for reads that are under way.
pub(super) const ANSWER: Duration = Duration::from_secs(30);
/// Longest line that is read.
const MAX_LINE: u64 = 4 << 20;
/// Most commands without an answer: one is on its way at a time, others were given up on.
const MAX_PENDING: usize = 16;

/// Why a command had no result.
#[derive(Debug, Error)]
pub(super) enum CommandError {
    /// QEMU refused it, in its words.
    #[error("{0}")]
    Refused(String),
    /// The connection is gone, which is to say QEMU.
    #[error("QEMU has gone away")]
    Gone,
    /// It does not answer.
    #[error("QEMU does not answer")]
    Silent,
}

type Answer = Result<Value, CommandError>;

/// A monitor; the connection ends with it.
pub(super) struct Monitor {
    writer: tokio::sync::Mutex<Writer>,
    shared: Arc<Shared>,
    reader: JoinHandle<()>,
}

struct Writer {
    half: OwnedWriteHalf,
    next: u64,
    /// A command is half written: nothing can follow it.
    torn: bool,
}

struct Shared {
    /// Who waits for which answer; none once the connection is gone.
    pending: Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>,
}

impl Monitor {
    /// Connects and negotiates.
    pub async fn connect(path: &Path) -> std::io::Result<Self> {
        let (read, half) = UnixStream::connect(path).await?.into_split();
        let mut read = BufReader::new(read);
        // The greeting comes first; what it says is known from the probe.
        let greeting = timeout(ANSWER, line(&mut read)).await??;
        let is_greeting = |greeting: &Value| greeting.get("QMP").is_some();
        if !greeting.as_ref().is_some_and(is_greeting) {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        let shared = Arc::new(Shared {
            pending: Mutex::new(Some(HashMap::new())),
        });
        let monitor = Self {
            writer: tokio::sync::Mutex::new(Writer {
                half,
                next: 0,
                torn: false,
            }),
            reader: tokio::spawn(listen(read, shared.clone())),
            shared,
        };
        let negotiated = monitor.execute("qmp_capabilities", json!({})).await;
        negotiated.map_err(std::io::Error::other)?;
        Ok(monitor)
    }

    /// Runs a command. One at a time, as QEMU does.
    pub async fn execute(&self, command: &str, arguments: Value) -> Answer {
        self.execute_within(command, arguments, ANSWER).await
    }

    /// Runs a command that may take longer.
    pub async fn execute_within(&self, command: &str, arguments: Value, limit: Duration) -> Answer {
        let deadline = Instant::now() + limit;
        let mut writer = lock(&self.writer, deadline).await?;
        let id = writer.next;
        let answer = self.shared.expect(id)?;
        writer.say(command, arguments, deadline).await?;
        match timeout_at(deadline, answer).await.map_err(late)? {
            Ok(answer) => answer,
            Err(_gone) => Err(CommandError::Gone),
        }
    }

    /// Has a command run after those that are under way, whatever comes of it.
    pub async fn tell(&self, command: &str, arguments: Value) -> Result<(), CommandError> {
        let deadline = Instant::now() + ANSWER;
        let mut writer = lock(&self.writer, deadline).await?;
        writer.say(command, arguments, deadline).await
    }
}

async fn lock(
    writer: &tokio::sync::Mutex<Writer>,
    deadline: Instant,
) -> Result<MutexGuard<'_, Writer>, CommandError> {
    timeout_at(deadline, writer.lock()).await.map_err(late)
}

fn late(_elapsed: Elapsed) -> CommandError {
    CommandError::Silent
}

impl Writer {
    async fn say(
        &mut self,
        command: &str,
        arguments: Value,
        deadline: Instant,
    ) -> Result<(), CommandError> {
        if self.torn {
            return Err(CommandError::Gone);
        }
        let id = self.next;
        self.next += 1;
        let mut text = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        text.push('\n');
        self.torn = true;
        let written = timeout_at(deadline, self.half.write_all(text.as_bytes())).await;
        written
            .map_err(late)?
            .map_err(|_closed| CommandError::Gone)?;
        self.torn = false;
        Ok(())
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Shared {
    fn expect(&self, id: u64) -> Result<oneshot::Receiver<Answer>, CommandError> {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let pending = pending.as_mut().ok_or(CommandError::Gone)?;
        pending.retain(|_, waiting| !waiting.is_closed());
        if pending.len() >= MAX_PENDING {
            return Err(CommandError::Silent);
        }
        let (sender, receiver) = oneshot::channel();
        pending.insert(id, sender);
        Ok(receiver)
    }

    fn answered(&self, id: u64, answer: Answer) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waiting) = pending.as_mut().and_then(|pending| pending.remove(&id)) {
            // Who waited may have given up.
            let _given_up = waiting.send(answer);
        }
    }
}

/// Reads until the connection ends.
async fn listen(mut read: BufReader<OwnedReadHalf>, shared: Arc<Shared>) {
    loop {
        let message = match line(&mut read).await {
            Ok(Some(message)) => message,
            Ok(None) => break,
            Err(error) => {
                tracing::debug!(%error, "the monitor's connection broke");
                break;
            }
        };
        if let Some(event) = message.get("event").and_then(Value::as_str) {
            tracing::debug!(event, data = %message["data"], "QEMU");
            continue;
        }
        let Some(id) = message.get("id").and_then(Value::as_u64) else {
            continue;
        };
        let answer = match (message.get("return"), message.pointer("/error/desc")) {
            (Some(value), _) => Ok(value.clone()),
            (None, reason) => {
                let reason = reason.and_then(Value::as_str);
                Err(CommandError::Refused(
                    reason.unwrap_or("no reason given").to_owned(),
                ))
            }
        };
        shared.answered(id, answer);
    }
    let mut pending = shared
        .pending
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    *pending = None;
}

/// The next line of JSON; none at the end.
pub(super) async fn line<R>(read: &mut BufReader<R>) -> std::io::Result<Option<Value>>
where
    R: AsyncRead + Unpin,
{
    let mut line = Vec::new();
    let count = read.take(MAX_LINE).read_until(b'\n', &mut line).await?;
    if count == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&line)?))
}
