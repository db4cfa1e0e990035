//! BitTorrent clients: a seeder that has checked its data and told the tracker so, then a leecher that is started with
//! the torrent and tells, by the hook that each client has, when it has everything.
//!
//! Settings are those of a user who wants speed on his own network: no limits, plain TCP (uTP is for slow lines, and its CPU
//! cost many times that of TCP), nothing that goes to machines elsewhere (DHT, port forwarding), files allocated as they grow. Where there are
//! more than two, they find each other by local discovery and from one another too, and who has everything goes on serving.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};

use super::tracker::{Held, Tracker};
use super::{Job, script};
use crate::process::Process;
use crate::transfer::{Done, Meter, Transfer};

/// A client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// aria2.
    Aria2,
    /// transmission, by its command-line client.
    Transmission,
    /// qBittorrent without a window: libtorrent.
    QBittorrent,
}

/// Who else is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Company {
    /// The other end.
    One,
    /// Many others.
    Many,
}

/// Which end of a transfer a client is.
#[derive(Debug)]
pub struct End<'a> {
    /// Its address.
    pub address: Ipv4Addr,
    /// Where it listens.
    pub port: u16,
    /// For a web interface, where the client has one: two on one machine would quarrel about its usual port.
    pub web: u16,
    /// What it is about.
    pub torrent: &'a Path,
    /// Where the content is, or goes.
    pub data: &'a Path,
    /// Where its configuration goes.
    pub home: PathBuf,
    /// A leecher's: what to run when everything is there.
    pub hook: Option<&'a Path>,
    /// Who else is there.
    pub company: Company,
}

/// Makes a torrent of a file, announced to a tracker, and tells where it lies.
pub fn torrent(tracker: &Tracker, source: &Path, torrent: &Path) -> Result<()> {
    let mut create = Command::new("transmission-create");
    create.arg("-o").arg(torrent).args(["-t", tracker.url()]);
    let status = create
        .arg(source)
        .stdout(Stdio::null())
        .stdin(Stdio::null())
        .status()?;
    ensure!(status.success(), "transmission-create failed");
    Ok(())
}

/// Measures a client.
pub fn measure(
    client: Client,
    job: &Job<'_>,
    tracker: &Tracker,
    torrent: &Path,
) -> Result<Transfer> {
    tracker.forget();
    let end = |name: &str| -> Result<End<'_>> {
        let home = job.path(name);
        fs::create_dir(&home)?;
        Ok(End {
            address: job.address,
            port: job.free_port()?,
            web: job.free_port()?,
            torrent,
            data: job.dir,
            home,
            hook: None,
            company: Company::One,
        })
    };
    let seeder_end = End {
        data: job.source_dir()?,
        ..end("seeder")?
    };
    let mut seeder = Process::start(&mut client.command(&seeder_end)?, &job.path("seeder.log"))?;
    job.deadline
        .wait("the seeder's check of its own data", || {
            seeder.check_runs()?;
            Ok(client.is_ready(&seeder, tracker.told(seeder_end.port)))
        })?;
    seeder.wait_for_port(seeder_end.port, &job.deadline)?;
    let (told, hook) = (job.path("told"), job.path("hook"));
    script(&hook, &format!("#!/bin/sh\n: > '{}'\n", told.display()))?;
    let into = job.path("into");
    fs::create_dir(&into)?;
    let leecher_end = End {
        data: &into,
        hook: Some(&hook),
        ..end("leecher")?
    };
    let mut command = client.command(&leecher_end)?;
    let log = job.path("leecher.log");
    let (meter, mut leecher) = Meter::start_with(job.bytes()?, seeder.pid(), || {
        Process::start(&mut command, &log)
    })?;
    let started = meter.started();
    let target = into.join(job.name()?);
    let transfer = meter.finish(&mut leecher, Done::Makes(&told), &target, &job.deadline)?;
    let known = tracker.introduced(leecher_end.port);
    Ok(Transfer {
        peer_known_seconds: known.map(|at| at.duration_since(started).as_secs_f64()),
        ..transfer
    })
}

impl Client {
    /// Whether a seeder has checked its data and can be found, by what it told the tracker it has.
    pub fn is_ready(self, seeder: &Process, told: Option<Held>) -> bool {
        match (self, told) {
            (_, None) => false,
            // It announces itself while it still checks what takes it over a second, and then no more for half an hour.
            (Self::Transmission, Some(_)) => seeder.has_said("Verification is done"),
            (_, Some(held)) => held == Held::All,
        }
    }

    /// How it is started.
    pub fn command(self, end: &End<'_>) -> Result<Command> {
        match self {
            Self::Aria2 => Ok(aria2(end)),
            Self::Transmission => transmission(end),
            Self::QBittorrent => qbittorrent(end),
        }
    }
}

fn aria2(end: &End<'_>) -> Command {
    let mut aria2 = Command::new("aria2c");
    aria2.args([
        "--no-conf",
        "--enable-dht=false",
        "--enable-dht6=false",
        "--file-allocation=none",
        "--summary-interval=0",
        "--show-console-readout=false",
    ]);
    let many = end.company == Company::Many;
    aria2.arg(format!("--bt-enable-lpd={many}"));
    aria2.arg(format!("--enable-peer-exchange={many}"));
    if many {
        // No limit; 55 otherwise.
        aria2.arg("--bt-max-peers=0");
        aria2.arg(format!("--bt-lpd-interface={}", end.address));
    }
    aria2.arg(format!("--listen-port={}", end.port));
    aria2.arg(format!("--interface={}", end.address));
    match end.hook {
        Some(hook) => aria2.arg(format!("--on-bt-download-complete={}", hook.display())),
        None => aria2.arg("--check-integrity=true"),
    };
    aria2.arg(match end.hook {
        Some(_) if !many => "--seed-time=0",
        _ => "--seed-ratio=0.0",
    });
    aria2.arg("--dir").arg(end.data).arg(end.torrent);
    aria2
}

fn transmission(end: &End<'_>) -> Result<Command> {
    let many = end.company == Company::Many;
    let settings = serde_json::json!({
        "bind-address-ipv4": end.address.to_string(),
        "cache-size-mb": 16,
        "dht-enabled": false,
        "encryption": 0,
        "lpd-enabled": many,
        // With 3 it says when it has checked its data; a few lines more.
        "message-level": if end.hook.is_none() { 3 } else { 2 },
        "peer-port": end.port,
        "pex-enabled": many,
        "port-forwarding-enabled": false,
        "preallocation": 0,
        "ratio-limit-enabled": false,
        "speed-limit-down-enabled": false,
        "speed-limit-up-enabled": false,
        "utp-enabled": false,
    });
    fs::write(end.home.join("settings.json"), settings.to_string())?;
    let mut transmission = Command::new("transmission-cli");
    transmission
        .arg("-g")
        .arg(&end.home)
        .arg("-w")
        .arg(end.data);
    // -et: encryption only if the other insists; -M: no port mapping; -D, -U: no limits.
    transmission.args(["-p", &end.port.to_string(), "-et", "-M", "-D", "-U"]);
    if let Some(hook) = end.hook {
        transmission.arg("-f").arg(hook);
    }
    transmission.arg(end.torrent);
    Ok(transmission)
}

fn qbittorrent(end: &End<'_>) -> Result<Command> {
    let dir = end.home.join("qBittorrent/config");
    fs::create_dir_all(&dir)?;
    let hook = end
        .hook
        .map_or(String::new(), |hook| hook.display().to_string());
    // It looks at its transfers every 1.5 s by default, so that it would tell of their end that much later.
    let config = format!(
        "[LegalNotice]\nAccepted=true\n\n\
         [AutoRun]\nenabled={hooked}\nprogram={hook}\n\n\
         [BitTorrent]\nSession\\Port={port}\nSession\\Interface=lo\nSession\\InterfaceName=lo\n\
         Session\\InterfaceAddress={address}\nSession\\BTProtocol=TCP\nSession\\DHTEnabled=false\n\
         Session\\LSDEnabled=false\nSession\\PeXEnabled=false\nSession\\MultiConnectionsPerIp=true\n\
         Session\\Preallocation=false\nSession\\RefreshInterval=100\n\n\
         [Network]\nPortForwardingEnabled=false\n\n\
         [Preferences]\nWebUI\\Address=127.0.0.1\nWebUI\\Port={web}\nWebUI\\UseUPnP=false\n",
        hooked = end.hook.is_some(),
        port = end.port,
        address = end.address,
        web = end.web,
    );
    fs::write(dir.join("qBittorrent.conf"), config)?;
    let mut qbittorrent = Command::new("qbittorrent-nox");
    qbittorrent.arg(format!("--profile={}", end.home.display()));
    qbittorrent.arg(format!("--save-path={}", end.data.display()));
    qbittorrent.args(["--skip-dialog=true", "--add-paused=false"]);
    qbittorrent.arg(end.torrent);
    Ok(qbittorrent)
}
