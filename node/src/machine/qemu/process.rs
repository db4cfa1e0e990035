//! The process: started, told what to do, and ended, never left behind.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use capsule_proto::manifest::Machine;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, setsid};
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio::sync::{Mutex, broadcast};
use tokio::time::{Instant, sleep, timeout};

use super::disks::Chain;
use super::events::{Event, Status};
use super::monitor::{CommandError, Monitor};
use super::{Places, arguments, probe};
use crate::control::{Failure, FailureCode};

/// So long QEMU may take until its monitor answers: longer than it waits for a base.
const START: Duration = Duration::from_secs(60);
/// So often it is looked whether it does.
const LOOK: Duration = Duration::from_millis(10);
/// So long it may take to end when it is told to.
const QUIT: Duration = Duration::from_secs(10);
/// So long a process whose monitor has gone may take to end, and say why.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Of what it printed, so much is quoted.
const MAX_TAIL: u64 = 2048;

/// Called in the new process before it becomes QEMU, between fork and exec: it may only make system calls. (A signal at the parent's death goes
/// by the *thread* that started it.)
pub type BeforeExec = fn() -> io::Result<()>;

/// A machine in a QEMU of its own, which is killed when this is dropped.
pub struct Qemu {
    child: Mutex<Child>,
    process: OwnedFd,
    id: u32,
    monitor: Monitor,
    pub(super) disks: Mutex<Vec<Chain>>,
    pub(super) places: Places,
    pub(super) ram_size: u64,
    /// Id of the balloon, where there is one.
    pub(super) balloon: Option<String>,
}

impl Qemu {
    /// Starts a machine, which stands still: [`Qemu::cont`] boots it, or [`Qemu::load`] gives it its state first.
    ///
    /// # Errors
    /// QEMU is missing, or refuses, with what it said.
    pub async fn start(
        machine: &Machine,
        places: &Places,
        before_exec: Option<BeforeExec>,
    ) -> Result<Self, Failure> {
        let arguments = arguments(machine, places)?;
        let program = probe::program();
        let io_failure = |what: &Path, error: io::Error| {
            Failure::new(FailureCode::Io, format!("{}: {error}", what.display()))
        };
        // Of an earlier process: nobody is to connect to it.
        for socket in [places.monitor(), places.console(), places.agent()] {
            match std::fs::remove_file(&socket) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(io_failure(&socket, error));
                }
                _ => {}
            }
        }
        let log = std::fs::File::create(places.log());
        let log = log.map_err(|error| io_failure(&places.log(), error))?;
        let mut command = Command::new(&program);
        command
            .args(&arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true);
        // SAFETY: the closure runs between fork and exec and makes system calls only; it neither allocates nor locks.
        unsafe {
            command.pre_exec(move || {
                // A terminal's signals are not for it.
                setsid()?;
                before_exec.map_or(Ok(()), |before| before())
            });
        }
        let mut child = command.spawn().map_err(|error| {
            let message = format!("cannot start {}: {error}", program.display());
            Failure::new(FailureCode::NotFound, message)
                .hint("install QEMU (package qemu-system-x86), or name the program in CAPSULE_QEMU")
        })?;
        let id = child.id().unwrap_or_default();
        let process = i32::try_from(id).ok().and_then(Pid::from_raw);
        let process = process.ok_or(rustix::io::Errno::SRCH);
        let process = process.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
        let process =
            process.map_err(|error| io_failure(Path::new("QEMU's process"), error.into()))?;
        let monitor = connect(&mut child, places).await?;
        let balloon = machine
            .devices
            .iter()
            .find(|device| device.driver == "virtio-balloon-pci");
        let chains = places.disks.iter().map(|disk| Chain {
            component: disk.component.clone(),
            base: disk.base.clone(),
            overlays: disk.overlays.clone(),
        });
        Ok(Self {
            child: Mutex::new(child),
            process,
            id,
            monitor,
            disks: Mutex::new(chains.collect()),
            places: places.clone(),
            ram_size: machine.ram_size,
            balloon: balloon.map(|device| device.id.clone()),
        })
    }

    /// The process's id, while it is not known to have ended.
    pub const fn id(&self) -> u32 {
        self.id
    }

    /// Runs a command of the monitor.
    pub(super) async fn execute(&self, command: &str, arguments: Value) -> Result<Value, Failure> {
        match self.monitor.execute(command, arguments).await {
            Ok(value) => Ok(value),
            Err(CommandError::Gone) => Err(self.gone().await),
            Err(error @ CommandError::Silent) => {
                Err(Failure::new(FailureCode::Io, error.to_string()))
            }
            Err(error @ CommandError::Refused(_)) => {
                let message = format!("QEMU refuses {command}: {error}");
                Err(Failure::new(FailureCode::Refused, message))
            }
        }
    }

    /// Why QEMU is not there any more.
    async fn gone(&self) -> Failure {
        let status = timeout(LAST_WORDS, self.wait()).await;
        ended(status.ok().and_then(Result::ok), &self.places)
    }

    /// Lets the machine run.
    ///
    /// # Errors
    /// QEMU refuses.
    pub async fn cont(&self) -> Result<(), Failure> {
        self.execute("cont", json!({})).await.map(drop)
    }

    /// Stops the machine where it is, and brings what it has written to its disks' files.
    ///
    /// # Errors
    /// QEMU refuses.
    pub async fn stop(&self) -> Result<(), Failure> {
        self.execute("stop", json!({})).await.map(drop)
    }

    /// Presses the power button: a guest that listens shuts down, and [`Event::ShutDown`] comes.
    ///
    /// # Errors
    /// QEMU refuses.
    pub async fn powerdown(&self) -> Result<(), Failure> {
        self.execute("system_powerdown", json!({})).await.map(drop)
    }

    /// What the machine does.
    ///
    /// # Errors
    /// QEMU refuses.
    pub async fn status(&self) -> Result<Status, Failure> {
        let answer = self.execute("query-status", json!({})).await?;
        Ok(Status::parse(answer["status"].as_str().unwrap_or_default()))
    }

    /// What happens from now on. Who is slow misses the oldest.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.monitor.events()
    }

    /// Ends QEMU, by force if it does not do so itself; the guest is not asked.
    ///
    /// # Errors
    /// The operating system cannot say how it ended.
    pub async fn quit(&self) -> Result<ExitStatus, Failure> {
        let told = async {
            // That it is gone by the time of the answer is what was wanted.
            let _gone = self.monitor.execute("quit", json!({})).await;
            self.wait().await
        };
        match timeout(QUIT, told).await {
            Ok(status) => status,
            Err(_elapsed) => {
                // It may just have ended.
                let _ended = pidfd_send_signal(&self.process, Signal::KILL);
                self.wait().await
            }
        }
    }

    /// Returns when the process has ended. A future that is dropped loses nothing.
    ///
    /// # Errors
    /// The operating system cannot say.
    pub async fn wait(&self) -> Result<ExitStatus, Failure> {
        let status = self.child.lock().await.wait().await;
        status.map_err(|error| Failure::new(FailureCode::Io, format!("QEMU's process: {error}")))
    }
}

async fn connect(child: &mut Child, places: &Places) -> Result<Monitor, Failure> {
    let deadline = Instant::now() + START;
    loop {
        match Monitor::connect(&places.monitor()).await {
            Ok(monitor) => return Ok(monitor),
            Err(error) if Instant::now() >= deadline => {
                let message = format!(
                    "QEMU's monitor does not answer within {} s: {error}{}",
                    START.as_secs(),
                    tail(&places.log())
                );
                return Err(Failure::new(FailureCode::Io, message));
            }
            Err(_not_yet) => {}
        }
        if let Ok(Some(status)) = child.try_wait() {
            return Err(ended(Some(status), places));
        }
        sleep(LOOK).await;
    }
}

fn ended(status: Option<ExitStatus>, places: &Places) -> Failure {
    let how = match status {
        Some(status) => format!("QEMU has ended ({status})"),
        None => "QEMU's monitor has gone away".to_owned(),
    };
    let message = how + &tail(&places.log());
    let hint = format!("all that it printed is in {}", places.log().display());
    Failure::new(FailureCode::Refused, message).hint(hint)
}

/// The end of what QEMU printed, to be put behind a message.
fn tail(log: &Path) -> String {
    use std::os::unix::fs::FileExt;
    let read = || {
        let file = std::fs::File::open(log)?;
        let start = file.metadata()?.len().saturating_sub(MAX_TAIL);
        let mut bytes = vec![0; MAX_TAIL as usize];
        let count = file.read_at(&mut bytes, start)?;
        bytes.truncate(count);
        io::Result::Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let mut last: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let lines = last.split_off(last.len().saturating_sub(5));
    match lines.is_empty() {
        true => String::new(),
        false => format!(": {}", lines.join("; ")),
    }
}
