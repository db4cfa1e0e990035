//! The other tools: each makes what a machine with the older content would fetch, and applies it there.
//!
//! Bytes are those of files, indexes included, where a tool leaves the fetching to others, who would add to them; rsync's crossed the network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Found;
use super::image;
use super::ours::{remove, same};
use crate::measure::{Family, Used, loopback_bytes, sync_file_system, sync_result};
use crate::process::{self, Cost, Deadline, Process};
use crate::tools::empty_dir;

/// The longest window that zstd and xdelta3 can look back on.
const WINDOW: u64 = 2 << 30;

/// How often accounts are looked at.
const LOOK: Duration = Duration::from_millis(20);

/// A tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Peer {
    /// casync: chunks and an index.
    Casync,
    /// rsync from a daemon, compressed.
    Rsync,
    /// xdelta3.
    Xdelta3,
    /// zstd against the older file, level 3.
    Zstd3,
    /// zstd against the older file, level 19.
    Zstd19,
    /// zchunk.
    Zchunk,
    /// OSTree's static deltas with bsdiff.
    Ostree,
}

/// Programs that measure and build, and their Debian packages.
pub const NEEDS: [(&str, &str); 9] = [
    ("casync", "casync"),
    ("rsync", "rsync"),
    ("xdelta3", "xdelta3"),
    ("zstd", "zstd"),
    ("zck", "zchunk"),
    ("ostree", "ostree"),
    ("debootstrap", "debootstrap"),
    ("eatmydata", "eatmydata"),
    ("mkfs.ext4", "e2fsprogs"),
];

/// What a tool is given.
#[derive(Debug)]
pub struct Job<'a> {
    /// What the machine has.
    pub old: &'a Path,
    /// What it is to have.
    pub new: &'a Path,
    /// A directory of this leg alone, empty.
    pub dir: &'a Path,
    /// When it has to be done.
    pub deadline: Deadline,
}

impl Peer {
    /// All.
    pub const ALL: [Self; 7] = [
        Self::Casync,
        Self::Rsync,
        Self::Xdelta3,
        Self::Zstd3,
        Self::Zstd19,
        Self::Zchunk,
        Self::Ostree,
    ];

    /// All but the one that takes longest by far.
    pub const ALL_BUT_SLOWEST: [Self; 6] = [
        Self::Casync,
        Self::Rsync,
        Self::Xdelta3,
        Self::Zstd3,
        Self::Zchunk,
        Self::Ostree,
    ];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Casync => "casync",
            Self::Rsync => "rsync -z",
            Self::Xdelta3 => "xdelta3",
            Self::Zstd3 => "zstd -3 --patch-from",
            Self::Zstd19 => "zstd -19 --patch-from",
            Self::Zchunk => "zchunk",
            Self::Ostree => "OSTree static delta",
        }
    }

    /// Whether it can do directories; else it can do files.
    pub fn takes(self, directory: bool) -> bool {
        match self {
            Self::Casync | Self::Rsync => true,
            Self::Ostree => directory,
            Self::Xdelta3 | Self::Zstd3 | Self::Zstd19 | Self::Zchunk => !directory,
        }
    }

    /// Whether what is new must come to 0.55 of its bytes.
    pub fn must_be_far_behind(self) -> bool {
        matches!(self, Self::Casync | Self::Rsync | Self::Zchunk)
    }

    /// Measures it.
    pub fn measure(self, job: &Job<'_>) -> Result<Found> {
        match self {
            Self::Casync => casync(job),
            Self::Rsync => rsync(job),
            Self::Xdelta3 => xdelta3(job),
            Self::Zstd3 => zstd(job, "-3"),
            Self::Zstd19 => zstd(job, "-19"),
            Self::Zchunk => zchunk(job),
            Self::Ostree => ostree(job),
        }
    }
}

impl Job<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn run(&self, command: &mut Command) -> Result<Cost> {
        process::run(command, &self.path("log"), &self.deadline, || Ok(()))
    }

    /// Runs what makes a result, which must be the new content, and on the disk.
    fn apply(&self, command: &mut Command, result: &Path) -> Result<Cost> {
        let cost = process::run(command, &self.path("log"), &self.deadline, || {
            settle(result)
        })?;
        same(self.new, result)?;
        remove(result)?;
        Ok(cost)
    }
}

/// Waits until a result is on the disk.
fn settle(result: &Path) -> Result<()> {
    if result.is_dir() {
        sync_file_system(result)
    } else {
        sync_result(result)
    }
}

/// What is made is one file.
fn found(file: &Path, make: Cost, apply: Cost) -> Result<Found> {
    Ok(Found::of_peer(fs::metadata(file)?.len(), make, Some(apply)))
}

fn casync(job: &Job<'_>) -> Result<Found> {
    let kind = if job.new.is_dir() { "caidx" } else { "caibx" };
    let (store, old, new) = (
        job.path("store"),
        job.path(&format!("old.{kind}")),
        job.path(&format!("new.{kind}")),
    );
    let command = |verb: &str| {
        let mut command = Command::new("casync");
        command.arg(verb).arg("--store").arg(&store);
        command
    };
    job.run(command("make").args([&old, job.old]))?;
    let before = bytes_below(&store)?;
    let make = job.run(command("make").args([&new, job.new]))?;
    let bytes = bytes_below(&store)? - before + fs::metadata(&new)?.len();
    let result = job.path("result");
    let apply = job.apply(
        command("extract")
            .arg("--seed")
            .args([job.old, &new, &result]),
        &result,
    )?;
    Ok(Found::of_peer(bytes, make, Some(apply)))
}

fn bytes_below(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry?;
        bytes += if entry.file_type()?.is_dir() {
            bytes_below(&entry.path())?
        } else {
            entry.metadata()?.len()
        };
    }
    Ok(bytes)
}

fn rsync(job: &Job<'_>) -> Result<Found> {
    let (config, target) = (job.path("rsyncd.conf"), job.path("result"));
    let directory = job.new.is_dir();
    image::tell(
        Command::new("cp")
            .args(["-a", "--sparse=always"])
            .args([job.old, &target]),
    )?;
    let from = if directory {
        job.new
    } else {
        job.new.parent().context("a file lies in a directory")?
    };
    let text = format!(
        "use chroot = no\n[data]\npath = {}\nread only = yes\nuid = root\ngid = root\n",
        from.display()
    );
    fs::write(&config, text)?;
    let port = std::net::TcpListener::bind(("127.0.0.1", 0))?
        .local_addr()?
        .port();
    let mut server = Command::new("rsync");
    server.args([
        "--daemon",
        "--no-detach",
        "--address",
        "127.0.0.1",
        "--port",
        &port.to_string(),
    ]);
    let mut server = Process::start(server.arg("--config").arg(&config), &job.path("server.log"))?;
    server.wait_for_port(port, &job.deadline)?;
    let mut client = Command::new("rsync");
    client.args(["-aHAXz", "--delete", "--no-whole-file"]);
    let name = if directory {
        ""
    } else {
        job.new
            .file_name()
            .and_then(|name| name.to_str())
            .context("images have names")?
    };
    client.arg(format!("rsync://127.0.0.1:{port}/data/{name}"));
    // A directory's contents go into the target, a file takes its name.
    client.arg(&target);
    let mut sender = Family::watch(server.pid());
    let (before, started) = (loopback_bytes(), Instant::now());
    let mut client = Process::start(&mut client, &job.path("client.log"))?;
    let mut receiver = Family::new(client.pid());
    loop {
        let ended = client.ended(LOOK);
        sender.look();
        receiver.look();
        if ended.is_some() {
            break;
        }
        job.deadline.check("rsync")?;
    }
    client.succeeded()?;
    let bytes = loopback_bytes() - before;
    let wall_seconds = started.elapsed().as_secs_f64();
    let (sender, receiver) = (sender.used(), receiver.used());
    let used = Used {
        cpu_seconds: sender.cpu_seconds + receiver.cpu_seconds,
        peak_bytes: sender.peak_bytes.max(receiver.peak_bytes),
    };
    settle(&target)?;
    same(job.new, &target)?;
    remove(&target)?;
    Ok(Found {
        bytes,
        make: None,
        apply: Some(Cost { wall_seconds, used }),
        ours: None,
    })
}

fn xdelta3(job: &Job<'_>) -> Result<Found> {
    let (delta, result) = (job.path("delta"), job.path("result"));
    let window = fs::metadata(job.old)?.len().min(WINDOW).to_string();
    let command = |verb: &str| {
        let mut command = Command::new("xdelta3");
        command
            .args([verb, "-q", "-f", "-B", &window, "-s"])
            .arg(job.old);
        command
    };
    let make = job.run(command("-e").args([job.new, &delta]))?;
    let apply = job.apply(command("-d").args([&delta, &result]), &result)?;
    found(&delta, make, apply)
}

fn zstd(job: &Job<'_>, level: &str) -> Result<Found> {
    let (delta, result) = (job.path("delta"), job.path("result"));
    let command = |verb: &[&str]| {
        let mut command = Command::new("zstd");
        let mut from = std::ffi::OsString::from("--patch-from=");
        from.push(job.old);
        command.args(["-q", "-f", "--long=31"]).args(verb).arg(from);
        command
    };
    let make = job.run(command(&[level]).arg(job.new).arg("-o").arg(&delta))?;
    let apply = job.apply(command(&["-d"]).arg(&delta).arg("-o").arg(&result), &result)?;
    found(&delta, make, apply)
}

fn zchunk(job: &Job<'_>) -> Result<Found> {
    let (old, new) = (job.path("old.zck"), job.path("new.zck"));
    job.run(Command::new("zck").arg("-o").args([&old, job.old]))?;
    let make = job.run(Command::new("zck").arg("-o").args([&new, job.new]))?;
    let said = image::said(Command::new("zck_delta_size").args([&old, &new]))?;
    let bytes = delta_size(&said).with_context(|| format!("zck_delta_size said {said:?}"))?;
    // Putting the parts together is the downloader's work, and that takes a web server.
    Ok(Found::of_peer(bytes, make, None))
}

/// "Would download N of M bytes", the header included.
fn delta_size(said: &str) -> Option<u64> {
    let rest = said.split_once("Would download ")?.1;
    rest.split_whitespace().next()?.parse().ok()
}

fn ostree(job: &Job<'_>) -> Result<Found> {
    let (repo, machine, delta) = (job.path("repo"), job.path("machine"), job.path("delta"));
    let command = |repo: &Path, args: &[&str]| {
        let mut command = Command::new("ostree");
        command.args(args).arg("--repo").arg(repo);
        command
    };
    let mut revisions = vec![];
    for (branch, tree) in [("old", job.old), ("new", job.new)] {
        if revisions.is_empty() {
            empty_dir(&repo)?;
            job.run(&mut command(&repo, &["init", "--mode=bare"]))?;
        }
        let mut commit = command(&repo, &["commit", "-b", branch]);
        job.run(commit.arg(format!("--tree=dir={}", tree.display())))?;
        revisions.push(
            image::said(&mut command(&repo, &["rev-parse", branch]))?
                .trim()
                .to_owned(),
        );
    }
    let [old, new] = &revisions[..] else {
        unreachable!("two were made")
    };
    let mut generate = command(
        &repo,
        &[
            "static-delta",
            "generate",
            "--inline",
            "--min-fallback-size=0",
            "--max-bsdiff-size=4096",
        ],
    );
    generate.args([format!("--from={old}"), format!("--to={new}")]);
    let make = job.run(generate.arg(format!("--filename={}", delta.display())))?;
    empty_dir(&machine)?;
    job.run(&mut command(&machine, &["init", "--mode=bare"]))?;
    job.run(command(&machine, &["pull-local"]).arg(&repo).arg(old))?;
    let apply = job.run(command(&machine, &["static-delta", "apply-offline"]).arg(&delta))?;
    // It checks what it makes itself; a commit that came over whole can be listed.
    let listed = image::said(&mut command(&machine, &["ls", "-R", new]))?;
    ensure!(!listed.is_empty(), "the new commit did not arrive");
    found(&delta, make, apply)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_zchunk_says_is_understood() {
        let said = "Would download 3235082 of 33580074 bytes\nMatched 724 of 800 chunks\n";
        assert_eq!(delta_size(said), Some(3_235_082));
        assert_eq!(delta_size("no such file"), None);
    }
}
