//! Processes that the benchmarks start: each has a log, is ended by its id, and never outlives what started it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use capsule_tests::accounts::members;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};

use crate::measure::{Family, Used};

/// How often accounts are looked at: rarely enough to cost nothing, often enough to see a peak.
const LOOK: Duration = Duration::from_millis(20);
/// Lines of a log that an error shows.
const LOG_LINES: usize = 3;

/// When something has to be done.
#[derive(Debug, Clone)]
pub struct Deadline {
    at: Instant,
    span: Duration,
}

impl Deadline {
    /// That long from now.
    pub fn after(span: Duration) -> Self {
        Self {
            at: Instant::now() + span,
            span,
        }
    }

    /// Fails once it has passed.
    pub fn check(&self, what: &str) -> Result<()> {
        ensure!(
            Instant::now() < self.at,
            "{what} took longer than {} s (more with --deadline)",
            self.span.as_secs_f64()
        );
        Ok(())
    }

    /// Time that is left.
    pub fn left(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// Asks again and again until the answer is yes.
    pub fn wait(&self, what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
        while !done()? {
            self.check(what)?;
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// A running process.
#[derive(Debug)]
pub struct Process {
    program: String,
    child: Child,
    log: PathBuf,
    ended: Receiver<Instant>,
}

impl Process {
    /// Starts it; all that it says goes to a log.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let out = fs::File::create(log).with_context(|| format!("creating {}", log.display()))?;
        command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out);
        let child = command
            .spawn()
            .with_context(|| format!("starting {program}"))?;
        let pid = Pid::from_child(&child);
        let (tell, ended) = channel();
        // Sees its end at once, and leaves it to be reaped, so that its accounts can be read first.
        std::thread::spawn(move || {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            while waitid(WaitId::Pid(pid), options).is_err_and(|e| e == Errno::INTR) {}
            let _ = tell.send(Instant::now());
        });
        Ok(Self {
            program,
            child,
            log: log.to_owned(),
            ended,
        })
    }

    /// Its id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end for so long; tells when it was.
    pub fn ended(&mut self, within: Duration) -> Option<Instant> {
        match self.ended.recv_timeout(within) {
            Ok(at) => Some(at),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Instant::now()),
        }
    }

    /// Reaps it after its end, which must have been a good one.
    pub fn succeeded(&mut self) -> Result<()> {
        let status = self.child.wait()?;
        ensure!(
            status.success(),
            "{} ended with {status}{}",
            self.program,
            self.said()
        );
        Ok(())
    }

    /// Fails where it has ended, though it should run.
    pub fn check_runs(&mut self) -> Result<()> {
        if self.ended(Duration::ZERO).is_some() {
            self.succeeded()?;
            bail!("{} ended too early{}", self.program, self.said());
        }
        Ok(())
    }

    /// Waits until it serves a port.
    pub fn wait_for_port(&mut self, port: u16, deadline: &Deadline) -> Result<()> {
        let what = format!("starting {}", self.program);
        deadline.wait(&what, || {
            self.check_runs()?;
            Ok(listens(port))
        })
    }

    /// Whether something stands in its log.
    pub fn has_said(&self, text: &str) -> bool {
        fs::read(&self.log).is_ok_and(|log| String::from_utf8_lossy(&log).contains(text))
    }

    fn said(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
        let last = lines[lines.len().saturating_sub(LOG_LINES)..].join("; ");
        if last.is_empty() {
            last
        } else {
            format!(": {last}")
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Children that it left behind too. Whoever has ended by itself needs nothing.
        if matches!(self.child.try_wait(), Ok(None)) {
            for pid in members(self.child.id()).into_iter().rev() {
                if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
        }
        let _ = self.child.wait();
    }
}

/// What a command cost that ran to its end.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Cost {
    /// From its start to the end of what follows it.
    pub wall_seconds: f64,
    /// What it used.
    #[serde(flatten)]
    pub used: Used,
}

/// Runs a command to its end, and then what belongs to it, such as a sync of its result.
pub fn run(
    command: &mut Command,
    log: &Path,
    deadline: &Deadline,
    then: impl FnOnce() -> Result<()>,
) -> Result<Cost> {
    let started = Instant::now();
    let mut process = Process::start(command, log)?;
    let mut family = Family::new(process.pid());
    loop {
        let ended = process.ended(LOOK);
        family.look();
        if ended.is_some() {
            break;
        }
        deadline.check(&process.program)?;
    }
    process.succeeded()?;
    then()?;
    Ok(Cost {
        wall_seconds: started.elapsed().as_secs_f64(),
        used: family.used(),
    })
}

/// Whether somebody listens on a TCP port, as the kernel tells: no connection disturbs him.
fn listens(port: u16) -> bool {
    let port = format!(":{port:04X}");
    ["tcp", "tcp6"].iter().any(|table| {
        let table =
            fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
        table.lines().any(|line| {
            let mut fields = line.split_whitespace().skip(1);
            // Local address, remote address, state: 0A listens.
            fields.next().is_some_and(|local| local.ends_with(&port)) && fields.nth(1) == Some("0A")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_command_that_fails_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let deadline = Deadline::after(Duration::from_secs(20));
        let mut command = shell("echo no such thing >&2; exit 3");
        let error = run(&mut command, &dir.path().join("log"), &deadline, || Ok(())).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("no such thing") && text.contains('3'),
            "{text}"
        );
    }

    #[test]
    fn a_command_that_hangs_is_ended_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let deadline = Deadline::after(Duration::from_millis(300));
        let file = dir.path().join("pid");
        let mut command = shell(&format!("sleep 100 & echo $! > '{}'; wait", file.display()));
        let error = run(&mut command, &dir.path().join("log"), &deadline, || Ok(())).unwrap_err();
        assert!(error.to_string().contains("longer than 0.3 s"), "{error}");
        let child = fs::read_to_string(file).unwrap();
        let state =
            || fs::read_to_string(format!("/proc/{}/stat", child.trim())).unwrap_or_default();
        let gone = || state().is_empty() || state().contains(") Z ");
        Deadline::after(Duration::from_secs(10))
            .wait("its end", || Ok(gone()))
            .unwrap();
    }

    #[test]
    fn listening_ports_are_seen() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(listens(port));
        drop(listener);
        assert!(!listens(port));
    }
}
