//! A machine as its user has it: made, run, captured and stopped by the command line, and typed to at its console.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use capsule_node::home::Home;
use capsule_node::machine::api::{CapturedMachine, MachineInfo};
use capsule_node::machine::config::Directory;
use capsule_tests::Node;

use super::place::json;
use crate::process::Deadline;

/// How long the console is listened to before the deadline is looked at.
const LISTEN: Duration = Duration::from_millis(100);
/// Of what the console said, so much is kept.
const KEPT: usize = 64 << 10;
/// Where answers begin to be numbered, so that nothing that is typed looks like one.
const FIRST: u32 = 4711;

/// A machine of a node; pulled the plug of when it goes away.
pub struct Guest {
    node: Node,
    name: String,
    console: Option<Console>,
}

impl Guest {
    /// Makes a machine of arguments of `capsule machine create`, and runs it.
    pub fn create(node: &Node, name: &str, args: &[&str], deadline: &Deadline) -> Result<Self> {
        json(
            node,
            &[&["machine", "create", name], args].concat(),
            deadline,
        )?;
        Self::run(node, name, None, deadline).map(|(guest, _)| guest)
    }

    /// Runs a machine that is there, or a capsule as one of that name.
    pub fn run(
        node: &Node,
        name: &str,
        capsule: Option<&str>,
        deadline: &Deadline,
    ) -> Result<(Self, MachineInfo)> {
        let guest = Self {
            // Commands on its home: its daemon is another's.
            node: Node::new(node.home()),
            name: name.to_owned(),
            console: None,
        };
        let info = match capsule {
            Some(capsule) => json(node, &["machine", "run", capsule, "--as", name], deadline)?,
            None => json(node, &["machine", "run", name], deadline)?,
        };
        Ok((guest, serde_json::from_value(info)?))
    }

    /// How it is.
    pub fn info(&self) -> Result<MachineInfo> {
        let directory = self.directory()?;
        Ok(capsule_node::machine::client::info(&directory)?)
    }

    /// Captures it, by options of `capsule machine capture`.
    pub fn capture(
        &self,
        name: &str,
        options: &[&str],
        deadline: &Deadline,
    ) -> Result<CapturedMachine> {
        let args = ["machine", "capture", &self.name, "--name", name];
        let captured = json(&self.node, &[&args, options].concat(), deadline)?;
        Ok(serde_json::from_value(captured)?)
    }

    /// Pulls its plug, and removes it.
    pub fn remove(mut self, deadline: &Deadline) -> Result<()> {
        self.console = None;
        if capsule_node::machine::client::runs(&self.directory()?) {
            json(
                &self.node,
                &["machine", "stop", &self.name, "--force"],
                deadline,
            )?;
        }
        json(
            &self.node,
            &["machine", "rm", &self.name, "--force"],
            deadline,
        )
        .map(drop)
    }

    /// Waits until the shell of a guest that boots answers.
    pub fn boot(&mut self, deadline: &Deadline) -> Result<()> {
        // What is typed before the shell is there is lost, or answered by a login: a line now and then.
        const AGAIN: Duration = Duration::from_secs(10);
        loop {
            let soon = Deadline::after(AGAIN.min(deadline.left()));
            if self.ask("true", &soon).is_ok() {
                break;
            }
            deadline.check("booting the guest")?;
        }
        // Answers of earlier lines may still come.
        std::thread::sleep(LISTEN * 10);
        self.ask("stty cols 500", deadline).map(drop)
    }

    /// Types a line, which must succeed, and waits for what it answers.
    pub fn ask(&mut self, line: &str, deadline: &Deadline) -> Result<String> {
        let path = self.directory()?.sockets().join("console.sock");
        let console = match &mut self.console {
            Some(console) => console,
            console => console.insert(Console::connect(&path, deadline)?),
        };
        console.ask(line, deadline)
    }

    fn directory(&self) -> Result<Directory> {
        Ok(Directory::of(&Home::new(self.node.home()), &self.name)?)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let runs = self
            .directory()
            .is_ok_and(|directory| capsule_node::machine::client::runs(&directory));
        if runs {
            // Nothing else can be done where it does not end: it does with the namespaces.
            let within = Deadline::after(Duration::from_secs(30));
            let _ended = json(
                &self.node,
                &["machine", "stop", &self.name, "--force"],
                &within,
            );
        }
    }
}

/// A machine's serial port, where a shell waits.
pub struct Console {
    stream: UnixStream,
    seen: String,
    asked: u32,
}

impl Console {
    /// Connects, as soon as it can be.
    pub fn connect(path: &Path, deadline: &Deadline) -> Result<Self> {
        let mut stream = None;
        deadline.wait("connecting to the console", || {
            stream = UnixStream::connect(path).ok();
            Ok(stream.is_some())
        })?;
        let stream = stream.context("it is connected")?;
        stream.set_read_timeout(Some(LISTEN))?;
        Ok(Self {
            stream,
            seen: String::new(),
            asked: FIRST,
        })
    }

    /// Types a line, which must succeed, and waits for what it answers.
    pub fn ask(&mut self, line: &str, deadline: &Deadline) -> Result<String> {
        self.asked += 1;
        let number = self.asked;
        self.seen.clear();
        // The shell puts the sign together: what is echoed does not have it.
        let typed = format!("{line}; echo \"<$?:$(({number}+0))>\"\n");
        self.stream.write_all(typed.as_bytes()).context("typing")?;
        let sign = format!(":{number}>");
        let what = format!("the answer to {line:?}");
        while !self.seen.contains(&sign) {
            self.listen()?;
            deadline
                .check(&what)
                .with_context(|| format!("the console said {:?}", self.seen))?;
        }
        let end = self.seen.find(&sign).unwrap_or_default();
        let begin = self.seen[..end].rfind('<').unwrap_or(end);
        let status = self.seen.get(begin + 1..end).unwrap_or_default();
        let answer = self.seen[..begin].trim().to_owned();
        ensure!(status == "0", "{line:?} failed with {status}: {answer}");
        Ok(answer)
    }

    fn listen(&mut self) -> Result<()> {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => bail!("the console is closed"),
            Ok(len) => self.seen += &String::from_utf8_lossy(&buffer[..len]),
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error).context("reading the console"),
        }
        if self.seen.len() > 2 * KEPT {
            let mut from = self.seen.len() - KEPT;
            while !self.seen.is_char_boundary(from) {
                from += 1;
            }
            self.seen.drain(..from);
        }
        Ok(())
    }
}

/// Seconds since then.
pub fn since(then: Instant) -> f64 {
    then.elapsed().as_secs_f64()
}
