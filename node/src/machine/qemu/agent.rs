//! The guest agent (`qemu-ga`), where there is one: it sets the clock of a guest that slept.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::MutexGuard;
use tokio::time::timeout;

use super::monitor::line;
use super::{Qemu, Status};
use crate::control::Failure;

/// So long it may take to answer; there may be none.
const ANSWER: Duration = Duration::from_secs(1);
/// So long it may take to do what it is asked.
const WORK: Duration = Duration::from_secs(5);
/// Most bytes of old answers that are passed over.
const MAX_STALE: u64 = 1 << 20;
/// QEMU's end of its port, as `arguments` calls it.
const AGENT: &str = "agent-host";
/// It begins a synchronised answer with this, which is in no JSON.
const MARK: u8 = 0xff;

/// What came of setting a guest's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// The agent did what it could.
    Asked,
    /// The agent does not answer: it may not have come yet, or the guest stands still.
    Unanswered,
    /// Nobody in the guest listens.
    NoAgent,
}

impl Qemu {
    /// Sets the guest's clock to this machine's, if the guest's agent answers within a second.
    pub async fn set_time(&self) -> Clock {
        let _alone = self.agent_port.lock().await;
        if !matches!(self.status().await, Ok(Status::Running)) {
            return Clock::Unanswered;
        }
        match self.has_agent().await {
            Ok(true) => {}
            Ok(false) => return Clock::NoAgent,
            Err(_silent) => return Clock::Unanswered,
        }
        let Some(mut agent) = self.agent().await else {
            return Clock::Unanswered;
        };
        match timeout(WORK, agent.set_time()).await {
            Ok(Ok(answer)) => {
                // It has set the time also where it fails afterwards, for want of `hwclock`, say.
                if let Some(error) = answer.get("error") {
                    tracing::info!(%error, "what the guest's agent says to the time");
                }
                Clock::Asked
            }
            Ok(Err(_)) | Err(_) => Clock::Unanswered,
        }
    }

    /// Keeps the agent from being asked while a guest is frozen: what is written to its port, or opens and closes it, is written to the guest's
    /// memory, which then would be newer than the state of its devices.
    pub async fn leave_agent_alone(&self) -> MutexGuard<'_, ()> {
        self.agent_port.lock().await
    }

    /// The tools seen in the running guest: `balloon`, `qemu-ga`. Whoever asks leaves the agent alone otherwise.
    ///
    /// # Errors
    /// QEMU has gone.
    pub async fn agent_tools(&self) -> Result<Vec<String>, Failure> {
        let mut tools = Vec::new();
        if self.status().await? != Status::Running {
            return Ok(tools);
        }
        if self.has_balloon().await? {
            tools.push("balloon".to_owned());
        }
        if self.has_agent().await.unwrap_or_default() && self.agent().await.is_some() {
            tools.push("qemu-ga".to_owned());
        }
        Ok(tools)
    }

    /// Whether somebody in the guest listens. Where nobody does, what is written would wait in the socket.
    async fn has_agent(&self) -> Result<bool, Failure> {
        let ports = self.execute("query-chardev", json!({})).await?;
        let is_open = |port: &Value| port["label"] == AGENT && port["frontend-open"] == true;
        Ok(ports
            .as_array()
            .is_some_and(|ports| ports.iter().any(is_open)))
    }

    /// The agent of a guest that has one, if it answers. One may be asked at a time.
    async fn agent(&self) -> Option<Agent> {
        let connect = async {
            let stream = UnixStream::connect(self.places.agent()).await?;
            let mut agent = Agent(BufReader::new(stream));
            agent.synchronise().await?;
            io::Result::Ok(agent)
        };
        timeout(ANSWER, connect).await.ok()?.ok()
    }
}

struct Agent(BufReader<UnixStream>);

impl Agent {
    /// Passes over what was said to others before.
    async fn synchronise(&mut self) -> io::Result<()> {
        // Nor is an answer that comes late to who asked before taken for this one.
        static ASKED: AtomicU64 = AtomicU64::new(0);
        let id = u64::from(std::process::id()) << 20 | ASKED.fetch_add(1, Ordering::Relaxed);
        // The mark makes the agent forget what was half said.
        self.0.write_all(&[MARK]).await?;
        self.say("guest-sync-delimited", &json!({ "id": id }))
            .await?;
        loop {
            let mut stale = Vec::new();
            let count = (&mut self.0)
                .take(MAX_STALE)
                .read_until(MARK, &mut stale)
                .await?;
            if count == 0 || stale.last() != Some(&MARK) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let answer = line(&mut self.0).await?.unwrap_or_default();
            if answer["return"] == id {
                return Ok(());
            }
        }
    }

    async fn set_time(&mut self) -> io::Result<Value> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_err(io::Error::other)?.as_nanos();
        let nanoseconds = u64::try_from(now).map_err(io::Error::other)?;
        self.ask("guest-set-time", json!({ "time": nanoseconds }))
            .await
    }

    async fn ask(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        self.say(command, &arguments).await?;
        line(&mut self.0)
            .await?
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    async fn say(&mut self, command: &str, arguments: &Value) -> io::Result<()> {
        let mut text = json!({ "execute": command, "arguments": arguments }).to_string();
        text.push('\n');
        self.0.write_all(text.as_bytes()).await
    }
}
