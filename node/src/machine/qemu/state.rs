//! CPU and device state, between a machine and a file.
//!
//! It passes through a Unix socket that QEMU connects to or listens at: unlike `exec:` this starts no program and quotes no path, and unlike
//! `file:` it is in every version.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{sleep, timeout};

use super::Qemu;
use super::arguments::text;
use crate::control::{Failure, FailureCode};

/// So long saving may take: memory is not in it.
const SAVE: Duration = Duration::from_secs(120);
/// So long loading may take: devices look into memory, which may lie far away.
const LOAD: Duration = Duration::from_secs(600);
/// So often it is looked how it goes.
const LOOK: Duration = Duration::from_millis(5);
/// Largest state; without a screen it is about half a megabyte.
const MAX_STATE: u64 = 1 << 30;

impl Qemu {
    /// Writes the state of CPUs and devices into a file of its own, durably; one that is there is replaced. The machine must be stopped; memory is in its own file, which is made
    /// durable too. It can be saved again only after [`Qemu::cont`].
    ///
    /// # Errors
    /// The file cannot be written, or QEMU refuses; the machine is as it was.
    pub async fn save(&self, state: &Path) -> Result<(), Failure> {
        let socket = self.places.transit();
        let listener = clear(&socket)
            .and_then(|()| UnixListener::bind(&socket))
            .map_err(|error| broken(&socket, &error))?;
        // Not written over: somebody may still read it.
        clear(state).map_err(|error| broken(state, &error))?;
        let file = File::create_new(state).await;
        let file = file.map_err(|error| broken(state, &error))?;
        let saved = async {
            self.leave_out_memory().await?;
            self.execute("migrate", json!({ "uri": uri(&socket)? }))
                .await?;
            let written = async {
                let write = receive(&listener, file);
                write.await.map_err(|error| broken(state, &error))
            };
            tokio::try_join!(written, self.migrated("saved"))
        };
        let saved = timeout(SAVE, saved)
            .await
            .unwrap_or_else(|_elapsed| Err(late("saved", SAVE)));
        // Nothing is to be done about a socket that cannot be removed; the next one clears it.
        let _stays = std::fs::remove_file(&socket);
        if let Err(failure) = saved {
            let _not_running = self.execute("migrate_cancel", json!({})).await;
            let _stays = std::fs::remove_file(state);
            return Err(failure);
        }
        let ram = &self.places.ram;
        let synced = async { File::open(ram).await?.sync_all().await };
        synced.await.map_err(|error| broken(ram, &error))
    }

    /// Gives a machine that was started with [`super::Places::incoming`] its state; it stands still after it.
    ///
    /// # Errors
    /// The file cannot be read, or the state is not one of this machine, in QEMU's words. The machine is of no use then.
    pub async fn load(&self, state: &Path) -> Result<(), Failure> {
        let socket = self.places.transit();
        clear(&socket).map_err(|error| broken(&socket, &error))?;
        let file = File::open(state)
            .await
            .map_err(|error| broken(state, &error))?;
        let loaded = async {
            self.leave_out_memory().await?;
            self.execute("migrate-incoming", json!({ "uri": uri(&socket)? }))
                .await?;
            let read = async {
                let sent = send(&socket, file).await;
                // That QEMU hung up is less than what it says about it.
                Ok(sent.err())
            };
            tokio::try_join!(read, self.migrated("loaded"))
        };
        let loaded = timeout(LOAD, loaded)
            .await
            .unwrap_or_else(|_elapsed| Err(late("loaded", LOAD)));
        let _stays = std::fs::remove_file(&socket);
        match loaded? {
            (Some(error), ()) => Err(broken(state, &error)),
            (None, ()) => Ok(()),
        }
    }

    async fn leave_out_memory(&self) -> Result<(), Failure> {
        let capabilities = json!([{ "capability": "x-ignore-shared", "state": true }]);
        let arguments = json!({ "capabilities": capabilities });
        self.execute("migrate-set-capabilities", arguments)
            .await
            .map(drop)
    }

    /// Returns when QEMU has done all of it.
    async fn migrated(&self, what: &str) -> Result<(), Failure> {
        loop {
            let answer = self.execute("query-migrate", json!({})).await?;
            match answer["status"].as_str().unwrap_or_default() {
                "completed" => return Ok(()),
                "failed" | "cancelled" | "cancelling" => {
                    let reason = answer.get("error-desc").and_then(Value::as_str);
                    let message = format!(
                        "the machine's state cannot be {what}: {}",
                        reason.unwrap_or("QEMU does not say why")
                    );
                    return Err(Failure::new(FailureCode::Refused, message));
                }
                _ => sleep(LOOK).await,
            }
        }
    }
}

async fn receive(listener: &UnixListener, mut file: File) -> io::Result<()> {
    let (stream, _) = listener.accept().await?;
    let mut stream = stream.take(MAX_STATE);
    let count = tokio::io::copy(&mut stream, &mut file).await?;
    if count == MAX_STATE {
        return Err(io::Error::other("the state is larger than 1 GiB"));
    }
    file.flush().await?;
    file.sync_all().await
}

async fn send(socket: &Path, mut file: File) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket).await?;
    tokio::io::copy(&mut file, &mut stream).await?;
    stream.shutdown().await
}

fn uri(socket: &Path) -> Result<String, Failure> {
    Ok(format!("unix:{}", text(socket)?))
}

fn clear(socket: &Path) -> io::Result<()> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn broken(path: &Path, error: &io::Error) -> Failure {
    let code = match error.kind() {
        io::ErrorKind::NotFound => FailureCode::NotFound,
        io::ErrorKind::AlreadyExists => FailureCode::Exists,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FailureCode::Full,
        _ => FailureCode::Io,
    };
    Failure::new(code, format!("{}: {error}", path.display()))
}

fn late(what: &str, limit: Duration) -> Failure {
    let message = format!(
        "the machine's state was not {what} within {} s",
        limit.as_secs()
    );
    Failure::new(FailureCode::Io, message)
}
