//! One home directory with its daemon, driven through the command line as a person would.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::accounts::{cpu_of, peak_of, resident_of};
use crate::binary;
use crate::lab::namespace::Namespace;

/// How long anything in a test may take before it counts as hung.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// A home, and the daemon that runs in it, if one does.
pub struct Node {
    home: PathBuf,
    /// Where the daemon has its network, if not where we have ours.
    namespace: Option<Arc<Namespace>>,
    daemon: Option<Child>,
    address: Option<String>,
}

/// What a finished command printed.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code; none where a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Node {
    /// A home that does not exist yet.
    pub fn new(home: impl Into<PathBuf>) -> Self {
        Self {
            home: home.into(),
            namespace: None,
            daemon: None,
            address: None,
        }
    }

    /// The same with its daemon in a network namespace.
    pub fn in_namespace(self, namespace: Arc<Namespace>) -> Self {
        Self {
            namespace: Some(namespace),
            home: self.home.clone(),
            daemon: None,
            address: None,
        }
    }

    /// The home directory.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Where the bytes of a blob lie that its store has as a file of its own.
    pub fn blob_file(&self, root: &str) -> PathBuf {
        let blobs = self.home.join("store/blobs").join(&root[..2]);
        blobs.join(format!("{root}.data"))
    }

    /// Where the daemon listens: `HOST:PORT`.
    pub fn address(&self) -> &str {
        self.address.as_deref().expect("the node was started")
    }

    /// Whether it was started, and neither stopped nor killed since.
    pub const fn is_started(&self) -> bool {
        self.daemon.is_some()
    }

    /// Process id of the daemon.
    pub fn pid(&self) -> Pid {
        Pid::from_child(self.daemon.as_ref().expect("the daemon runs"))
    }

    /// How many files and sockets the daemon has open.
    pub fn open_files(&self) -> usize {
        let dir = format!("/proc/{}/fd", self.pid().as_raw_nonzero());
        std::fs::read_dir(dir).expect("the daemon runs").count()
    }

    /// Bytes of memory that the daemon has resident.
    pub fn resident_bytes(&self) -> u64 {
        resident_of(self.number())
    }

    /// The most that it had.
    pub fn peak_bytes(&self) -> u64 {
        peak_of(self.number())
    }

    /// CPU seconds that it has used.
    pub fn cpu_seconds(&self) -> f64 {
        cpu_of(self.number())
    }

    fn number(&self) -> u32 {
        self.pid().as_raw_nonzero().get().unsigned_abs()
    }

    /// A command on this home, not yet run.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary::capsule());
        command
            .arg("--home")
            .arg(&self.home)
            .args(args)
            .stdin(Stdio::null());
        command
    }

    /// Runs a command to its end, which must come within [`PATIENCE`].
    pub fn run(&self, args: &[&str]) -> Outcome {
        Outcome::of(self.command(args))
    }

    /// Runs a command that must succeed; returns its standard output.
    pub fn ok(&self, args: &[&str]) -> String {
        let outcome = self.run(args);
        assert_eq!(
            outcome.code,
            Some(0),
            "capsule {args:?} failed: {outcome:#?}"
        );
        outcome.stdout
    }

    /// Runs a command with `--json` that must succeed; returns what it printed.
    pub fn json(&self, args: &[&str]) -> Value {
        let stdout = self.ok(&[args, &["--json"]].concat());
        serde_json::from_str(&stdout)
            .unwrap_or_else(|error| panic!("capsule {args:?} --json: {error} in {stdout}"))
    }

    /// Runs a command that must fail with the code; returns what it said.
    pub fn fails(&self, code: i32, args: &[&str]) -> String {
        let outcome = self.run(args);
        assert_eq!(
            outcome.code,
            Some(code),
            "capsule {args:?} should have failed with {code}: {outcome:#?}"
        );
        outcome.stderr
    }

    /// Makes this home the first of a fleet.
    pub fn init(&self) {
        self.ok(&["fleet", "init"]);
    }

    /// Starts the daemon on a free port and waits until it is ready.
    pub fn start(&mut self) {
        self.start_on("127.0.0.1:0");
    }

    /// Starts the daemon on an address and waits until it is ready.
    pub fn start_on(&mut self, listen: &str) {
        self.start_with(&["--listen", listen]);
    }

    /// Starts the daemon with options and waits until it is ready.
    pub fn start_with(&mut self, options: &[&str]) {
        assert!(self.daemon.is_none(), "the daemon runs already");
        let log =
            std::fs::File::create(self.home.with_extension("log")).expect("the log can be written");
        let mut command = self.command(&[&["node"], options].concat());
        command.stdout(Stdio::piped()).stderr(log);
        let child = match &self.namespace {
            Some(namespace) => namespace.run(|| Ok(command.spawn()?)),
            None => command.spawn().map_err(Into::into),
        };
        let mut child = child.expect("the program runs");
        let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        self.daemon = Some(child);
        let ready = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| line.strip_prefix("listening ").map(str::to_owned));
        self.address =
            Some(ready.unwrap_or_else(|| panic!("the daemon did not start: {}", self.log())));
        // What else it prints is drained, so that it never waits for us; the thread ends with the daemon.
        std::thread::spawn(move || lines.for_each(drop));
    }

    /// What the daemon said on standard error.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.home.with_extension("log")).unwrap_or_default()
    }

    /// Asks the daemon to end, and waits until it has.
    pub fn stop(&mut self) {
        let code = self.end(Signal::TERM);
        assert_eq!(code, Some(0), "the daemon did not end well: {}", self.log());
    }

    /// Ends the daemon at once, as a power cut would.
    pub fn kill(&mut self) {
        self.end(Signal::KILL);
    }

    fn end(&mut self, signal: Signal) -> Option<i32> {
        let mut child = self.daemon.take()?;
        kill_process(Pid::from_child(&child), signal).expect("the daemon is ours");
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait().expect("the daemon is ours") {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        child
            .kill()
            .and_then(|()| child.wait())
            .expect("the daemon is ours");
        panic!(
            "the daemon did not end within {PATIENCE:?} of {signal:?}: {}",
            self.log()
        );
    }

    /// Waits until a question is answered with yes.
    pub fn wait_until(&self, what: &str, mut question: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !question(self) {
            assert!(
                Instant::now() < deadline,
                "waited {PATIENCE:?} in vain until {what}; log of {:?}:\n{}",
                self.home,
                self.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until the daemon is connected to that many peers.
    pub fn wait_for_peers(&self, count: usize) {
        self.wait_until(&format!("{count} peers are connected"), |node| {
            node.json(&["peers"])["peers"]
                .as_array()
                .is_some_and(|peers| peers.len() >= count)
        });
    }

    /// Publishes a path; returns the answer.
    pub fn publish(&self, path: &Path, name: &str) -> Value {
        self.json(&[
            "publish",
            path.to_str().expect("test paths are UTF-8"),
            "--name",
            name,
        ])
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.daemon.take() {
            // It may have ended by itself; nothing else can be done here.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Outcome {
    /// Of a command, which must end within [`PATIENCE`].
    ///
    /// # Panics
    /// Where there is no such program.
    pub fn of(mut command: Command) -> Self {
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let child = child.expect("the program runs");
        let pid = Pid::from_child(&child);
        let (done, waiting) = std::sync::mpsc::channel::<()>();
        let watchdog = std::thread::spawn(move || {
            if waiting.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                // Still ours: it is reaped only after the channel closes.
                let _ = kill_process(pid, Signal::KILL);
            }
        });
        let output = child.wait_with_output().expect("the program is ours");
        drop(done);
        watchdog.join().expect("the watchdog does not panic");
        output.into()
    }
}

impl From<Output> for Outcome {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}
