//! Moves over the thin link.

use std::io::{Seek, Write};
use std::net::{Shutdown, TcpListener};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use super::found::{Arrival, Hop, Layer, Update};
use super::guest::{Guest, since};
use super::place::{HOME, LAN, WORK, json};
use super::{Bench, FIRST_COMMAND, IDLE, MOVE, STEP};
use crate::process::Deadline;

/// The larger application: an interpreter, with libraries that are many files and large.
const LARGE: &str = "python3 -c 'import json, ssl; print(json.dumps(ssl.OPENSSL_VERSION))'";
/// The machine after the upgrade, and after work at home and at work.
pub const UPDATED: &str = "me:updated";
const EVENING: &str = "me:evening";
const MORNING: &str = "me:morning";
/// What is done before each hop: how many documents are edited, and how many MiB of memory filled.
const WORKED: &str = "24 64";

impl Bench<'_> {
    /// The receiver has nothing.
    pub(super) fn first(&mut self) -> Result<()> {
        self.recorded(IDLE)?;
        self.place.quiet(WORK)?;
        let (guest, arrival) = self.arrive(WORK, IDLE, "me", true)?;
        self.found.first = Some(arrival);
        guest.remove(&Deadline::after(STEP))
    }

    /// Packages are upgraded at home; the receiver has the capture from before.
    pub(super) fn update(&mut self, home: &mut Guest) -> Result<()> {
        let deadline = Deadline::after(MOVE);
        let began = Instant::now();
        self.upgrade(home, &deadline)?;
        let upgrade_seconds = since(began);
        eprintln!("upgraded in {upgrade_seconds:.0} s; capturing ...");
        let captured = home.capture(UPDATED, &[], &deadline)?;
        let layers = self.layers(HOME, UPDATED)?;
        let of = |component: &str| {
            let before = |layer: &&Layer| {
                let mut idle = self.found.idle_layers.iter();
                layer.component == component
                    && idle.any(|idle| Some(&idle.target) == layer.parent.as_ref())
            };
            let found = layers.iter().find(before);
            let found = found.with_context(|| format!("{component} has no layer from before"));
            found.map(Layer::bytes)
        };
        let (disk_bytes, ram_bytes) = (of("disk0")?, of("ram")?);
        self.recorded(UPDATED)?;
        self.has_all(WORK, IDLE)?;
        let (guest, arrival) = self.arrive(WORK, UPDATED, "me", false)?;
        self.found.update = Some(Update {
            arrival,
            upgrade_seconds,
            disk_bytes,
            ram_bytes,
            deb_bytes: self.system.facts.deb_bytes,
            written_bytes: captured.disk_written,
        });
        guest.remove(&deadline)
    }

    /// From home to work and back.
    pub(super) fn commute(&mut self, home: &mut Guest) -> Result<()> {
        let before = if self.found.update.is_some() {
            UPDATED
        } else {
            IDLE
        };
        // Somebody resumed it before, as its user does each day.
        if self.found.first.is_none() && self.found.update.is_none() {
            self.recorded(before)?;
        }
        self.has_all(WORK, before)?;
        self.worked(home, 1)?;
        let (mut there, hop) = self.hop(home, EVENING, WORK, "work")?;
        self.found.hops.push(hop);
        let arrived = Instant::now();
        self.worked(&mut there, 2)?;
        // The script does an hour's work in minutes. Within that hour all of the machine comes behind it, which a capture would wait for.
        let within = Deadline::after(MOVE);
        json(self.place.node(WORK), &["pull", EVENING], &within)?;
        let whole_seconds = since(arrived);
        eprintln!("all of {EVENING} has come after {whole_seconds:.0} s");
        let (back, mut hop) = self.hop(&there, MORNING, HOME, "home")?;
        hop.whole_seconds = Some(whole_seconds);
        self.found.hops.push(hop);
        back.remove(&Deadline::after(STEP))
    }

    fn worked(&self, guest: &mut Guest, seed: u32) -> Result<()> {
        let line = format!("work {seed} {WORKED}");
        guest.ask(&line, &Deadline::after(MOVE)).map(drop)
    }

    /// Captures a machine, which stops, and goes on elsewhere.
    fn hop(
        &mut self,
        from: &Guest,
        name: &str,
        to: usize,
        to_name: &'static str,
    ) -> Result<(Guest, Hop)> {
        let deadline = Deadline::after(MOVE);
        let began = Instant::now();
        let captured = from.capture(name, &["--stop"], &deadline)?;
        let capture_seconds = since(began);
        // By a name of its own: at home lies the machine that left.
        let (guest, arrival) = self.arrive(to, name, "came", false)?;
        let hop = Hop {
            to: to_name,
            seconds: capture_seconds + arrival.first_seconds,
            capture_seconds,
            whole_seconds: None,
            arrival,
            ram_written: captured.ram_written,
            disk_written: captured.disk_written,
            published_bytes: captured.published.pack_bytes + captured.published.index_bytes,
        };
        Ok((guest, hop))
    }

    /// Runs a capsule on a node as its user does, and types the first command, and the second.
    fn arrive(
        &self,
        number: usize,
        capsule: &str,
        name: &str,
        large: bool,
    ) -> Result<(Guest, Arrival)> {
        let deadline = Deadline::after(MOVE);
        let before = self.place.carried(number)?;
        let began = Instant::now();
        let (mut guest, _) = Guest::run(self.place.node(number), name, Some(capsule), &deadline)?;
        let mut arrival = Arrival {
            runs_seconds: since(began),
            ..Arrival::default()
        };
        let runs = self.place.carried(number)?.since(before);
        eprintln!(
            "{capsule} runs after {:.1} s and {} bytes",
            arrival.runs_seconds, runs.down
        );
        guest.ask(FIRST_COMMAND, &deadline)?;
        let carried = self.place.carried(number)?.since(before);
        arrival.first_seconds = since(began);
        (arrival.first_bytes, arrival.first_sent_bytes) = (carried.down, carried.up);
        eprintln!(
            "it answers after {:.1} s and {} bytes",
            arrival.first_seconds, carried.down
        );
        if large {
            let answer = guest.ask(LARGE, &deadline)?;
            ensure!(answer.contains("OpenSSL"), "python3 answered {answer:?}");
            arrival.large_seconds = Some(since(began));
            arrival.large_bytes = Some(self.place.carried(number)?.since(before).down);
        }
        arrival.read_bytes = guest.info()?.read;
        eprintln!("{}", serde_json::to_string(&arrival)?);
        Ok((guest, arrival))
    }

    /// Has a node hold all of a capsule, brought over a fast link; then its link is thin again.
    fn has_all(&mut self, number: usize, capsule: &str) -> Result<()> {
        let deadline = Deadline::after(STEP);
        self.place.link(number, LAN)?;
        json(self.place.node(number), &["pull", capsule], &deadline)?;
        self.place.quiet(number)?;
        self.place.link(number, self.place.thin)
    }

    /// Has the guest upgrade its packages, whose files it fetches from here.
    fn upgrade(&self, guest: &mut Guest, deadline: &Deadline) -> Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let mut tar = std::fs::File::open(self.system.upgrade())?;
        listener.set_nonblocking(true)?;
        let until = deadline.clone();
        let sending = std::thread::spawn(move || -> Result<()> {
            let mut to = None;
            until.wait("the guest's fetching packages", || {
                match listener.accept() {
                    Ok((stream, _)) => to = Some(stream),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(error) => bail!(error),
                }
                Ok(to.is_some())
            })?;
            let mut to = to.context("it was accepted")?;
            to.set_nonblocking(false)?;
            tar.rewind()?;
            std::io::copy(&mut tar, &mut to)?;
            to.flush()?;
            Ok(to.shutdown(Shutdown::Write)?)
        });
        let upgraded = guest.ask(&format!("upgrade {port}"), deadline);
        if upgraded.is_ok() {
            let sent = sending.join();
            sent.map_err(|_| anyhow::anyhow!("sending packages panicked"))??;
        }
        upgraded.map(drop)
    }
}
