//! The demo's nodes: child processes of this same program, which end with it whatever happens.
//!
//! Each child leads a process group of its own, so that a terminal's Ctrl-C reaches the demo only, which then stops
//! them in order; whatever a child started is in its group and goes with it. Should the demo be killed outright, the
//! kernel stops them (the parent-death signal). Children are signalled by id while they are not yet waited for, so
//! that an id is never somebody else's.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group, set_parent_process_death_signal};

/// A node that is not up after this long never will be.
const START: Duration = Duration::from_secs(30);
/// What a node may take to end in order before it is killed.
const STOP: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(10);
/// Lines that wait to be read from a node's start: it prints one for each of its addresses.
const LINES: usize = 64;
/// Of a failed node's log, this much is shown.
const LOG_TAIL: u64 = 2048;

/// The children that run, to be stopped from any thread.
#[derive(Debug, Clone, Default)]
pub struct Children(Arc<Mutex<Vec<Child>>>);

/// Stops the children when it goes out of scope: on return, error and panic.
#[derive(Debug)]
pub struct StopOnDrop(pub Children);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl Children {
    /// Stops all: asks, waits, and kills what has not ended. Does nothing the second time.
    pub fn stop(&self) {
        // A thread that panicked while it held the list is no reason to leave children behind.
        let mut children = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        signal(&mut children, Signal::TERM);
        let deadline = Instant::now() + STOP;
        while children.iter_mut().any(running) && Instant::now() < deadline {
            thread::sleep(POLL);
        }
        signal(&mut children, Signal::KILL);
        for mut child in children.drain(..) {
            // Only fails for a child that was already waited for.
            let _ = child.wait();
        }
    }
}

fn running(child: &mut Child) -> bool {
    matches!(child.try_wait(), Ok(None))
}

fn signal(children: &mut [Child], signal: Signal) {
    for child in children.iter_mut() {
        if running(child)
            && let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw)
        {
            // Fails only where it has ended meanwhile.
            let _ = kill_process_group(group, signal);
        }
    }
}

/// A node that was started, perhaps not ready yet.
#[derive(Debug)]
pub struct Starting {
    home: PathBuf,
    lines: Receiver<String>,
}

/// Runs a command of this program to its end, and gives what it printed.
///
/// # Errors
/// It failed: with what it said.
pub fn capsule(program: &Path, home: &Path, args: &[&str]) -> Result<String> {
    let output = command(program, home, args).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot start {}", program.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        // Without its arguments: one may be a token.
        bail!(
            "`capsule {}` failed:\n{}",
            args.first().unwrap_or(&""),
            said.trim_end()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Starts a node on a free port of the loopback interface. Call from a thread that lives as long as the node: the
/// parent-death signal is sent when the *thread* ends.
///
/// # Errors
/// The program cannot be started.
pub fn start_node(program: &Path, home: &Path, children: &Children) -> Result<Starting> {
    let log = File::create(log_path(home))
        .with_context(|| format!("cannot make {}", log_path(home).display()))?;
    let mut command = command(program, home, &["node", "--listen", "127.0.0.1:0"]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .process_group(0);
    // SAFETY: the closure runs between fork and exec and makes one system call (prctl); it neither allocates nor locks.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::TERM))?));
    }
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let stdout = child.stdout.take();
    children
        .0
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(child);
    let (sender, lines) = sync_channel(LINES);
    let read = move || {
        for line in stdout
            .into_iter()
            .flat_map(|out| BufReader::new(out).lines())
            .map_while(Result::ok)
        {
            // Nobody listens once it is up; the pipe is still read, so that the node can go on printing.
            let _ = sender.try_send(line);
        }
    };
    thread::Builder::new()
        .name("node output".into())
        .spawn(read)
        .context("cannot start a thread")?;
    Ok(Starting {
        home: home.to_owned(),
        lines,
    })
}

impl Starting {
    /// Waits until the node is ready, and gives the address that it listens on.
    ///
    /// # Errors
    /// It ended, or is not ready after 30 s; with the end of its log.
    pub fn ready(self) -> Result<String> {
        let deadline = Instant::now() + START;
        loop {
            match self
                .lines
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(line) => match line.strip_prefix("listening ") {
                    Some(address) => return Ok(address.to_owned()),
                    None => continue,
                },
                Err(RecvTimeoutError::Timeout) => bail!(
                    "a node is not ready after {START:?}:\n{}",
                    log_tail(&self.home)
                ),
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("a node ended at once:\n{}", log_tail(&self.home))
                }
            }
        }
    }
}

fn command(program: &Path, home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command
        .env_remove("CAPSULE_HOME")
        .arg("--home")
        .arg(home)
        .args(args);
    command
}

fn log_path(home: &Path) -> PathBuf {
    home.with_extension("log")
}

/// The end of what a node wrote to its log.
pub fn log_tail(home: &Path) -> String {
    let read = || -> io::Result<String> {
        let mut log = File::open(log_path(home))?;
        let len = log.metadata()?.len();
        log.seek(SeekFrom::Start(len.saturating_sub(LOG_TAIL)))?;
        let mut text = Vec::new();
        log.read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).trim().to_owned())
    };
    match read() {
        Ok(text) if text.is_empty() => "(it is empty)".to_owned(),
        Ok(text) => text,
        Err(error) => format!("(it cannot be read: {error})"),
    }
}
