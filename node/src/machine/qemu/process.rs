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
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};

use super::disks::Chain;
use super::log::Log;
use super::monitor::{CommandError, Monitor};
use super::status::Status;
use super::{Places, arguments, probe};
use crate::control::{Failure, FailureCode};

/// So long QEMU may take until its monitor answers: longer than it waits for a base.
const START: Duration = Duration::from_secs(60);
/// So often it is looked whether it does.
const LOOK: Duration = Duration::from_millis(10);
/// So long it may take to end when it is told to.
const QUIT: Duration = Duration::from_secs(10);
/// So long a saving that was given up may take to end.
const SETTLE: Duration = Duration::from_secs(5);
/// So long a process whose monitor has gone may take to end, and say why.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Called in the new process before it becomes QEMU, between fork and exec: it may only make system calls. (A signal at the parent's death goes
/// by the *thread* that started it.)
pub type BeforeExec = fn() -> io::Result<()>;

/// A machine in a QEMU of its own, which is killed when this is dropped.
pub struct Qemu {
    child: Mutex<Child>,
    /// The process's.
    id: u32,
    process: OwnedFd,
    monitor: Monitor,
    log: Log,
    pub(super) disks: Mutex<Vec<Chain>>,
    pub(super) places: Places,
    pub(super) ram_size: u64,
    /// Id of the balloon, where there is one.
    pub(super) balloon: Option<String>,
    /// Held by who asks the guest's agent.
    pub(super) agent_port: tokio::sync::Mutex<()>,
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
        let mut command = Command::new(&program);
        command
            .args(&arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
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
        let log = Log::keep(child.stderr.take(), &places.log());
        let log = log.map_err(|error| io_failure(&places.log(), error))?;
        let monitor = connect(&mut child, places, &log).await?;
        let balloon = machine
            .devices
            .iter()
            .find(|device| device.driver == "virtio-balloon-pci");
        let chains = places.disks.iter().map(|disk| Chain {
            component: disk.component.clone(),
            base: disk.base.clone(),
            overlays: disk.overlays.clone(),
            is_known: true,
        });
        Ok(Self {
            child: Mutex::new(child),
            id,
            process,
            monitor,
            log,
            disks: Mutex::new(chains.collect()),
            places: places.clone(),
            ram_size: machine.ram_size,
            balloon: balloon.map(|device| device.id.clone()),
            agent_port: tokio::sync::Mutex::default(),
        })
    }

    /// Processor time that it has taken so far, as far as it is told.
    pub(super) fn cpu_time(&self) -> Duration {
        let told = std::fs::read_to_string(format!("/proc/{}/stat", self.id));
        // proc(5): behind the program's name, which may have anything, the 12th and 13th field.
        let fields = told.as_deref().ok().and_then(|told| told.rsplit_once(')'));
        let fields = fields.map_or("", |(_, fields)| fields).split_whitespace();
        let ticks = fields
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<u64>().ok());
        let millis = ticks.sum::<u64>() * 1000 / rustix::param::clock_ticks_per_second().max(1);
        Duration::from_millis(millis)
    }

    /// Runs a command of the monitor.
    pub(super) async fn execute(&self, command: &str, arguments: Value) -> Result<Value, Failure> {
        let answer = self.monitor.execute(command, arguments).await;
        self.said(command, answer).await
    }

    /// Runs a command that may wait for what the guest reads.
    pub(super) async fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, Failure> {
        let answer = self.monitor.execute_within(command, arguments, limit).await;
        self.said(command, answer).await
    }

    async fn said(
        &self,
        command: &str,
        answer: Result<Value, CommandError>,
    ) -> Result<Value, Failure> {
        match answer {
            Ok(value) => Ok(value),
            Err(CommandError::Gone) => Err(self.gone().await),
            Err(error @ CommandError::Silent) => {
                let message = format!("{error} to {command}");
                Err(Failure::new(FailureCode::Unreachable, message).hint(
                    "the guest may be reading what no peer sends: try again when they are back",
                ))
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
        ended(status.ok().and_then(Result::ok), &self.log).await
    }

    /// Lets the machine run.
    ///
    /// # Errors
    /// QEMU refuses.
    pub async fn cont(&self) -> Result<(), Failure> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let Err(failure) = self.execute("cont", json!({})).await else {
                return Ok(());
            };
            // A saving that was given up ends by itself, and only then can the machine go on.
            let answer = self.execute("query-status", json!({})).await?;
            if answer["status"] != "finish-migrate" || Instant::now() >= deadline {
                return Err(failure);
            }
            sleep(LOOK).await;
        }
    }

    /// Stops the machine where it is, and brings what it has written to its disks' files. It waits for reads that are under way: where a base
    /// does not answer, this fails after half a minute, and the machine goes on as soon as it can. Wait for it to end: where the future is
    /// dropped, the machine may stop later.
    ///
    /// # Errors
    /// QEMU refuses, or does not answer.
    pub async fn stop(&self) -> Result<(), Failure> {
        let stopped = self.execute("stop", json!({})).await.map(drop);
        if is_silent(&stopped) {
            // It will be stopped when nobody expects it any more.
            let _gone = self.monitor.tell("cont", json!({})).await;
        }
        stopped
    }

    /// Presses the power button: a guest that listens shuts down, and QEMU ends.
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

/// Whether QEMU has not said whether it did what it was told.
pub(super) fn is_silent(answer: &Result<(), Failure>) -> bool {
    let code = answer.as_ref().err().map(|failure| failure.code);
    code == Some(FailureCode::Unreachable)
}

async fn connect(child: &mut Child, places: &Places, log: &Log) -> Result<Monitor, Failure> {
    let deadline = Instant::now() + START;
    loop {
        match Monitor::connect(&places.monitor()).await {
            Ok(monitor) => return Ok(monitor),
            Err(error) if Instant::now() >= deadline => {
                let message = format!(
                    "QEMU's monitor does not answer within {} s: {error}{}",
                    START.as_secs(),
                    log.tail()
                );
                return Err(Failure::new(FailureCode::Io, message));
            }
            Err(_not_yet) => {}
        }
        if let Ok(Some(status)) = child.try_wait() {
            return Err(ended(Some(status), log).await);
        }
        sleep(LOOK).await;
    }
}

async fn ended(status: Option<ExitStatus>, log: &Log) -> Failure {
    let how = match status {
        Some(status) => format!("QEMU has ended ({status})"),
        None => "QEMU's monitor has gone away".to_owned(),
    };
    log.ended().await;
    let message = how + &log.tail();
    let hint = format!("what it printed is in {}", log.path().display());
    Failure::new(FailureCode::Refused, message).hint(hint)
}
