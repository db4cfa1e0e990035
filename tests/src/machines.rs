//! Machines that run in a node's home, driven through the command line, and what is typed on their consoles.
//!
//! A machine's process goes on without the command that started it and without the node: a [`Machine`] that goes away ends it, and its QEMU, by
//! their ids.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use capsule_node::home::Home;
use capsule_node::machine::config::Directory;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::guest::{APPEND, guest};
use crate::node::{Node, PATIENCE};
use crate::short::{run, text};

/// How long something may take to end that is told to.
const ENDING: Duration = Duration::from_secs(20);
/// Before it is looked again.
const PAUSE: Duration = Duration::from_millis(50);
/// How often a guest that may still boot is asked whether it listens.
const AGAIN: Duration = Duration::from_millis(500);
/// Most that a guest says to one command.
const MAX_SAID: usize = 1 << 20;

/// Waits until a question is answered with yes.
///
/// # Panics
/// Where that takes too long.
pub fn wait_until(what: &str, mut question: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !question() {
        assert!(
            Instant::now() < until,
            "waited {PATIENCE:?} in vain until {what}"
        );
        std::thread::sleep(PAUSE);
    }
}

/// An image of a disk with an empty ext4 on it.
pub fn disk(path: &Path, megabytes: u64) {
    let image = fs::File::create_new(path).expect("the file can be made");
    image.set_len(megabytes << 20).expect("it is ours");
    run("mkfs.ext4", &["-q", "-F", text(path)]);
}

/// A machine of a node.
pub struct Machine {
    home: PathBuf,
    name: String,
}

impl Machine {
    /// Makes one that boots the guest of the tests, with these words behind its kernel's command line. Its disks and what else it is to be like are
    /// options.
    pub fn create(node: &Node, name: &str, append: &str, options: &[&str]) -> Self {
        let machine = Self::called(node, name);
        node.ok(&Self::creation(
            name,
            &format!("{APPEND} {append}"),
            options,
        ));
        machine
    }

    /// The command that makes one.
    pub fn creation<'a>(name: &'a str, append: &'a str, options: &[&'a str]) -> Vec<&'a str> {
        let guest = guest();
        let boot = [
            "machine",
            "create",
            name,
            "--no-network",
            "--memory",
            "256M",
        ];
        let kernel = ["--kernel", text(&guest.kernel), "--append", append];
        let initrd = ["--initrd", text(&guest.initrd)];
        [&boot[..], &kernel, &initrd, options].concat()
    }

    /// The machine of that name, which may not be there yet.
    pub fn called(node: &Node, name: &str) -> Self {
        Self {
            home: node.home().to_owned(),
            name: name.to_owned(),
        }
    }

    /// Has a capsule go on as a machine of that name; returns what was said when it ran, too.
    pub fn resume(node: &Node, capsule: &str, name: &str) -> (Self, Value) {
        let machine = Self::called(node, name);
        let ran = node.json(&["machine", "run", capsule, "--as", name]);
        (machine, ran)
    }

    /// Starts it; returns what was said when it ran.
    pub fn run(&self, node: &Node) -> Value {
        node.json(&["machine", "run", &self.name])
    }

    /// Captures it as a version.
    pub fn capture(&self, node: &Node, name: &str, options: &[&str]) -> Value {
        let capture = ["machine", "capture", &self.name, "--name", name];
        node.json(&[&capture[..], options].concat())
    }

    /// How it is, as `machine ls` says.
    pub fn info(&self, node: &Node) -> Value {
        let listed = node.json(&["machine", "ls"]);
        let mut machines = listed["machines"].as_array().expect("a list").iter();
        let found = machines.find(|machine| machine["name"] == self.name.as_str());
        found.cloned().unwrap_or_else(|| panic!("{listed:#}"))
    }

    /// In which state it is.
    pub fn state(&self, node: &Node) -> String {
        let info = self.info(node);
        info["state"].as_str().expect("a word").to_owned()
    }

    /// Its directory.
    pub fn dir(&self) -> PathBuf {
        self.home.join("machines").join(&self.name)
    }

    /// The process that has it, if it runs.
    pub fn host(&self) -> Option<Pid> {
        let host = ["--home", text(&self.home), "machine", "host", &self.name];
        process(|args| args.get(1..).is_some_and(|args| args == host))
    }

    /// Its QEMU, if it runs.
    pub fn qemu(&self) -> Option<Pid> {
        let memory = format!("\"mem-path\":\"{}\"", self.dir().join("ram/ram").display());
        process(|args| args.iter().any(|arg| arg.contains(&memory)))
    }

    /// Its console, once the guest listens.
    pub fn console(&self) -> Console {
        let mut console = self.console_at_once();
        console.wait();
        console
    }

    /// Its console, where the guest listens for sure, as it did when it was captured. It may stand still.
    pub fn console_at_once(&self) -> Console {
        let directory = Directory::of(&Home::new(&self.home), &self.name);
        let directory = directory.expect("its name is one");
        Console::open(&directory.sockets().join("console.sock"))
    }

    /// Ends its process as a crash would, and waits until QEMU has ended too.
    pub fn kill(&self) {
        let host = self.host().expect("it runs");
        kill_process(host, Signal::KILL).expect("it is ours");
        self.is_gone();
    }

    /// Waits until nothing of it runs.
    pub fn is_gone(&self) {
        let until = Instant::now() + ENDING;
        while let Some(left) = self.host().or_else(|| self.qemu()) {
            assert!(Instant::now() < until, "process {left:?} is left behind");
            std::thread::sleep(PAUSE);
        }
        // A process that ends has no arguments any more before it lets go of its files, and so of the machine.
        let directory = Directory::of(&Home::new(&self.home), &self.name);
        let directory = directory.expect("its name is one");
        wait_until("its process has let go of it", || {
            directory.lock().is_ok_and(|lock| lock.is_some())
        });
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let until = Instant::now() + ENDING;
        while let Some(left) = self.host().or_else(|| self.qemu())
            && Instant::now() < until
        {
            // It may just have ended.
            let _ended = kill_process(left, Signal::KILL);
            std::thread::sleep(PAUSE);
        }
        // Who was killed leaves that behind, and the directory could not be removed.
        let mut unmount = Command::new("fusermount3");
        unmount.args(["-u", "-z", "-q"]).arg(self.dir().join("ram"));
        unmount.stdout(Stdio::null()).stderr(Stdio::null());
        let _none = unmount.status();
    }
}

/// A process whose arguments are as asked.
fn process(is_it: impl Fn(&[&str]) -> bool) -> Option<Pid> {
    let numbers = fs::read_dir("/proc").expect("there is /proc").flatten();
    let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let mut found = numbers.filter(|number| {
        let line = fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        let args: Vec<&str> = line.split_terminator('\0').collect();
        is_it(&args)
    });
    found.next().and_then(Pid::from_raw)
}

/// A guest's shell.
pub struct Console {
    stream: UnixStream,
    heard: Vec<u8>,
    asked: u32,
}

impl Console {
    fn open(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("the machine has a console");
        stream
            .set_read_timeout(Some(PAUSE))
            .expect("it is a socket");
        stream
            .set_write_timeout(Some(PATIENCE))
            .expect("it is a socket");
        Self {
            stream,
            heard: Vec::new(),
            // Not what an earlier console asked, which may be answered late.
            asked: rand::random_range(1..1 << 20),
        }
    }

    /// Waits until the guest listens: what is typed before is lost, or half of it.
    fn wait(&mut self) {
        let until = Instant::now() + PATIENCE;
        while self.ask_within("", AGAIN).is_none() {
            assert!(
                Instant::now() < until,
                "the guest does not listen; it said {:?}",
                String::from_utf8_lossy(&self.heard)
            );
        }
        // The answers to all that was asked before come before this one.
        self.ask("");
    }

    /// What the guest says to a command.
    ///
    /// # Panics
    /// Where it does not.
    pub fn ask(&mut self, command: &str) -> String {
        self.ask_within(command, PATIENCE).unwrap_or_else(|| {
            let heard = String::from_utf8_lossy(&self.heard).into_owned();
            panic!("the guest does not answer {command:?}; it said {heard:?}")
        })
    }

    /// What it says to a command, if it is done with it in such a time.
    fn ask_within(&mut self, command: &str, time: Duration) -> Option<String> {
        self.say(command);
        self.hear(time)
    }

    /// Types a command, whose answer [`Self::hear`] waits for.
    ///
    /// # Panics
    /// Where the machine has gone.
    pub fn say(&mut self, command: &str) {
        self.heard.clear();
        self.asked += 1;
        // What is typed may be echoed; what was computed is not.
        let typed = format!("{command}\necho \"<$(({} * 7))>\"\n", self.asked);
        self.stream
            .write_all(typed.as_bytes())
            .expect("the machine has a console");
    }

    /// The answer to what was typed last, if it is there in such a time.
    ///
    /// # Panics
    /// Where the machine has gone.
    pub fn hear(&mut self, time: Duration) -> Option<String> {
        let end = format!("<{}>", self.asked * 7);
        let until = Instant::now() + time;
        let mut piece = [0; 4096];
        loop {
            let heard = String::from_utf8_lossy(&self.heard);
            if let Some((said, _)) = heard.split_once(&end) {
                return Some(said.replace('\r', "").trim().to_owned());
            }
            if Instant::now() > until || heard.len() > MAX_SAID {
                return None;
            }
            match self.stream.read(&mut piece) {
                Ok(0) => panic!("the machine has gone; it said {heard:?}"),
                Ok(len) => self.heard.extend_from_slice(&piece[..len]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => panic!("the console: {error}"),
            }
        }
    }

    /// What a command counts.
    ///
    /// # Panics
    /// Where it says no number.
    pub fn number(&mut self, command: &str) -> u64 {
        let said = self.ask(command);
        said.parse()
            .unwrap_or_else(|error| panic!("{command:?} said {said:?}: {error}"))
    }
}
