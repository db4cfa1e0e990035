//! What is measured on one computer, and on the LAN beside it.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use capsule_node::control::{CapsuleRef, Client, Describe};
use capsule_node::machine::qemu::{self, DiskBase, DiskPlace, Places, Qemu};
use capsule_node::machine::ram::small_pages::deny_huge_pages;
use capsule_proto::manifest::Machine;
use capsule_tests::serving::Serving;

use super::found::{Lan, Nbd, Pause};
use super::guest::{Console, Guest, since};
use super::nbd::{Server, data_of};
use super::place::{HOME, LAN, OTHER, json};
use super::{Bench, FIRST_COMMAND, IDLE, STEP, prefetch};
use crate::process::{Deadline, Process};
use crate::tools::empty_dir;

/// How often at least what is quick is measured.
const OFTEN: u32 = 3;
/// The memory that is dirtied before a capture, beside an edited document.
const DIRTIED: &str = "1 64";

impl Bench<'_> {
    /// A machine is captured again and again, each time after it wrote 64 MiB.
    pub(super) fn pause(&mut self) -> Result<()> {
        let deadline = Deadline::after(STEP);
        let (mut guest, _) = Guest::run(self.place.node(HOME), "pause", Some(IDLE), &deadline)?;
        guest.ask(FIRST_COMMAND, &deadline)?;
        guest.capture("pause:0", &[], &deadline)?;
        for number in 1..=self.often() {
            let deadline = Deadline::after(STEP);
            guest.ask(&format!("work {number} {DIRTIED}"), &deadline)?;
            let captured = guest.capture(&format!("pause:{number}"), &[], &deadline)?;
            self.found.pauses.push(Pause {
                seconds: captured.pause_seconds.context("it went on")?,
                ram_written: captured.ram_written,
            });
        }
        guest.remove(&deadline)
    }

    /// The idle guest's memory, which was captured before.
    pub(super) fn memory(&mut self) -> Result<()> {
        let whole = self.found.whole("ram");
        whole
            .map(drop)
            .context("the memory has no layer from nothing")
    }

    /// The same resume over 1 Gbit/s, from what is here, and by QEMU alone.
    pub(super) fn lan(&mut self) -> Result<()> {
        let mut found = Lan::default();
        let home = self.place.node(HOME).home().to_owned();
        if !prefetch(&home, IDLE)?.contains_key("ram") {
            self.place.anew(OTHER)?;
            found.without_record.push(self.recorded(IDLE)?);
        }
        let files = Files::export(self, &self.setting.scratch.join("files"))?;
        for _ in 0..self.often() {
            self.place.anew(OTHER)?;
            self.place.link(OTHER, LAN)?;
            found.lan.push(self.answers(OTHER)?);
            self.place.has(OTHER, false)?;
            found.here.push(self.answers(HOME)?);
            found.files.push(files.answers()?);
        }
        self.found.lan = Some(found);
        Ok(())
    }

    /// Seconds from a machine's start to its first command's answer.
    fn answers(&self, number: usize) -> Result<f64> {
        let deadline = Deadline::after(STEP);
        let began = Instant::now();
        let (mut guest, _) = Guest::run(self.place.node(number), "resumed", Some(IDLE), &deadline)?;
        guest.ask(FIRST_COMMAND, &deadline)?;
        let seconds = since(began);
        guest.remove(&deadline)?;
        Ok(seconds)
    }

    /// The disk of the idle machine, served by us and by qemu-nbd.
    pub(super) fn nbd(&mut self) -> Result<()> {
        let dir = self.setting.scratch.join("nbd");
        empty_dir(&dir)?;
        let raw = dir.join("disk.raw");
        export(self, "disk0", &raw)?;
        let data = data_of(&raw)?;
        let [ours, whole, theirs] =
            ["ours.sock", "whole.sock", "theirs.sock"].map(|name| dir.join(name));
        let serve = |at: &Path, options: &[&str]| {
            let at = at.to_str();
            let at = at.context("the scratch directory's path is UTF-8")?;
            let args = ["nbd", IDLE, "--component", "disk0", "--socket", at];
            let args = [&args, options].concat();
            Ok::<_, anyhow::Error>(Serving::start(self.place.node(HOME), &args))
        };
        let (_serving, written_out) = (serve(&ours, &[])?, serve(&whole, &["--whole"])?);
        let mut qemu = std::process::Command::new("qemu-nbd");
        qemu.args([
            "--read-only",
            "--format=raw",
            "--persistent",
            "--shared=8",
            "--socket",
        ]);
        let _qemu = Process::start(qemu.arg(&theirs).arg(&raw), &dir.join("log"))?;
        let deadline = Deadline::after(STEP);
        let told = |key: &str| written_out.answer[key].as_f64().unwrap_or_default();
        let mut found = Nbd {
            whole_bytes: told("whole_bytes"),
            whole_seconds: told("whole_seconds"),
            ..Nbd::default()
        };
        for run in 0..self.often() {
            for (socket, sequential, random) in [
                (&ours, &mut found.sequential, &mut found.random),
                (&whole, &mut found.whole_sequential, &mut found.whole_random),
                (&theirs, &mut found.qemu_sequential, &mut found.qemu_random),
            ] {
                sequential.push(Server::connect(socket, &deadline)?.sequential(&data)?);
                random.push(Server::connect(socket, &deadline)?.random(&data, run.into())?);
            }
        }
        self.found.nbd = Some(found);
        Ok(())
    }

    fn often(&self) -> u32 {
        self.setting.runs.max(OFTEN)
    }
}

/// Writes a component of the idle machine to a file.
pub fn export(bench: &Bench<'_>, component: &str, to: &Path) -> Result<()> {
    let at = to
        .to_str()
        .context("the scratch directory's path is UTF-8")?;
    let args = [
        "export",
        IDLE,
        "--component",
        component,
        "--to",
        at,
        "--force",
    ];
    json(bench.place.node(HOME), &args, &Deadline::after(STEP)).map(drop)
}

/// A captured machine as files, run by QEMU without anything of ours between.
struct Files {
    dir: PathBuf,
    machine: Machine,
}

impl Files {
    fn export(bench: &Bench<'_>, dir: &Path) -> Result<Self> {
        empty_dir(dir)?;
        for component in ["disk0", "ram", "state"] {
            export(bench, component, &dir.join(component))?;
        }
        let described = Client::connect(bench.place.node(HOME).home())?.call(Describe {
            capsule: CapsuleRef(IDLE.to_owned()),
            wait: None,
        })?;
        let machine = described.machine.context("it is a machine")?;
        Ok(Self {
            dir: dir.to_owned(),
            machine: Machine {
                ram: None,
                state: None,
                ..machine
            },
        })
    }

    /// Seconds from QEMU's start to the first command's answer.
    fn answers(&self) -> Result<f64> {
        let run = self.dir.join("run");
        empty_dir(&run)?;
        // Memory is written to: a copy, which is there before.
        let ram = run.join("ram");
        crate::delta::image::copy(&self.dir.join("ram"), &ram)?;
        let overlay = run.join("overlay.qcow2");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let places = Places {
            dir: run.clone(),
            ram,
            disks: vec![DiskPlace {
                component: "disk0".to_owned(),
                base: DiskBase::File {
                    path: self.dir.join("disk0"),
                    format: "raw".to_owned(),
                },
                overlays: vec![overlay.clone()],
            }],
            kernel: None,
            initrd: None,
            incoming: true,
            sandbox: false,
        };
        let size = std::fs::metadata(self.dir.join("disk0"))?.len();
        runtime.block_on(qemu::create_overlay(&overlay, size))?;
        let began = Instant::now();
        let started = Qemu::start(&self.machine, &places, Some(deny_huge_pages));
        let qemu = runtime.block_on(started)?;
        runtime.block_on(qemu.load(&self.dir.join("state")))?;
        runtime.block_on(qemu.cont())?;
        let deadline = Deadline::after(STEP);
        let answer = Console::connect(&places.console(), &deadline)
            .and_then(|mut console| console.ask(FIRST_COMMAND, &deadline));
        let seconds = since(began);
        runtime.block_on(qemu.quit())?;
        ensure!(!answer?.is_empty(), "the guest answered nothing");
        Ok(seconds)
    }
}
