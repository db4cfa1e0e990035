//! The other tools: installs them, and runs each as its users would, from one server or seeder to one client.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::measure::{self, Cost, cpu_of, peak_of, sync_file_system};
use crate::tracker;

/// How long one transfer may take before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(600);

/// Installs Debian packages that are missing; the package `transmission-cli` and its like are known by their programs.
pub fn install(packages: &[&str]) -> Result<()> {
    let lacking: Vec<_> = packages
        .iter()
        .filter(|package| {
            let program = if **package == "aria2" {
                "aria2c"
            } else {
                package
            };
            !Command::new("sh")
                .args(["-c", &format!("command -v {program}")])
                .stdout(Stdio::null())
                .status()
                .is_ok_and(|s| s.success())
        })
        .collect();
    if lacking.is_empty() {
        return Ok(());
    }
    let apt = |args: &[&str]| {
        Command::new("apt-get")
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
    };
    apt(&["update", "-qq"])?;
    let mut args = vec!["install", "-y", "-qq", "--no-install-recommends"];
    args.extend(lacking);
    ensure!(
        apt(&args)?.success(),
        "apt-get install failed: run as root, or install {packages:?}"
    );
    Ok(())
}

/// A background process, ended by its id.
pub struct Server(Child);

impl Server {
    /// Starts it.
    pub fn start(command: &mut Command) -> Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Ok(Self(
            child.with_context(|| format!("starting {command:?}"))?,
        ))
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A plain TCP copy: file to socket to file, then sync; both ends in this process.
pub fn tcp_copy(address: Ipv4Addr, source: &Path, target: &Path) -> Result<Cost> {
    let listener = std::net::TcpListener::bind((address, 0))?;
    let port = listener.local_addr()?.port();
    let me = std::process::id();
    let before = cpu_of(me);
    let started = Instant::now();
    let source = source.to_owned();
    let sender = std::thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        copy(&mut fs::File::open(source)?, &mut stream)
    });
    let mut file = fs::File::create(target)?;
    copy(
        &mut std::net::TcpStream::connect((address, port))?,
        &mut file,
    )?;
    sender.join().expect("the sender does not panic")?;
    file.sync_all()?;
    Ok(Cost {
        wall: started.elapsed().as_secs_f64(),
        cpu: cpu_of(me) - before,
        peak: 2 << 20,
    })
}

/// Through a buffer, as a program would that looks at the bytes; no splice.
fn copy(from: &mut impl std::io::Read, to: &mut impl std::io::Write) -> Result<()> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            len => to.write_all(&buffer[..len])?,
        }
    }
}

/// rsync from a daemon, whole files.
pub fn rsync(address: Ipv4Addr, scratch: &Path, source: &Path, target: &Path) -> Result<Cost> {
    let config = scratch.join("rsyncd.conf");
    let dir = source.parent().context("the source lies in a directory")?;
    fs::write(
        &config,
        format!(
            "use chroot = no\n[data]\npath = {}\nread only = yes\nuid = root\ngid = root\n",
            dir.display()
        ),
    )?;
    let port = free_port(address)?;
    let mut server = Command::new("rsync");
    server.args([
        "--daemon",
        "--no-detach",
        "--address",
        &address.to_string(),
        "--port",
        &port.to_string(),
    ]);
    let server = Server::start(server.arg("--config").arg(&config))?;
    wait_for_port(address, port)?;
    let before = cpu_of(server.pid());
    let name = source
        .file_name()
        .context("the source has a name")?
        .to_string_lossy()
        .into_owned();
    let mut client = Command::new("rsync");
    client
        .args([
            "--whole-file",
            &format!("rsync://{address}:{port}/data/{name}"),
        ])
        .arg(target);
    let mut cost = measure::command(&mut client, target.parent())?;
    // The daemon's child for this transfer has ended by now; its time is in the daemon's account once it is reaped.
    std::thread::sleep(Duration::from_millis(300));
    cost.cpu += cpu_of(server.pid()) - before;
    cost.peak = cost.peak.max(peak_of(server.pid()));
    Ok(cost)
}

/// A torrent of the source, announced to a tracker of ours.
pub fn torrent(address: Ipv4Addr, scratch: &Path, source: &Path) -> Result<std::path::PathBuf> {
    let torrent = scratch.join(format!(
        "{}.torrent",
        source.file_name().context("a name")?.to_string_lossy()
    ));
    let url = tracker::start(address)?;
    let mut create = Command::new("transmission-create");
    let status = create
        .arg("-o")
        .arg(&torrent)
        .args(["-t", &url])
        .arg(source)
        .stdout(Stdio::null())
        .status()?;
    ensure!(status.success(), "transmission-create failed");
    Ok(torrent)
}

/// aria2 from an aria2 seeder.
pub fn aria2(address: Ipv4Addr, torrent: &Path, source: &Path, into: &Path) -> Result<Cost> {
    let common = |dir: &Path, port: u16| {
        let mut aria2 = Command::new("aria2c");
        aria2.args([
            "--enable-dht=false",
            "--bt-enable-lpd=false",
            "--enable-peer-exchange=false",
            "--file-allocation=none",
        ]);
        aria2.args([
            "--bt-max-peers=8",
            "--summary-interval=0",
            "--quiet",
            &format!("--listen-port={port}"),
        ]);
        aria2
            .arg(format!("--interface={address}"))
            .arg("--dir")
            .arg(dir)
            .arg(torrent);
        aria2
    };
    let dir = source.parent().context("the source lies in a directory")?;
    let port = free_port(address)?;
    let mut seeder = common(dir, port);
    seeder.args(["--check-integrity=true", "--seed-ratio=0.0"]);
    let seeder = Server::start(&mut seeder)?;
    wait_for_port(address, port)?;
    wait_until_quiet(seeder.pid());
    fs::create_dir_all(into)?;
    let before = cpu_of(seeder.pid());
    let mut leecher = common(into, free_port(address)?);
    leecher.arg("--seed-time=0");
    let mut cost = measure::command(&mut leecher, Some(into))?;
    cost.cpu += cpu_of(seeder.pid()) - before;
    cost.peak = cost.peak.max(peak_of(seeder.pid()));
    Ok(cost)
}

/// transmission from a transmission seeder.
pub fn transmission(
    address: Ipv4Addr,
    scratch: &Path,
    torrent: &Path,
    source: &Path,
    into: &Path,
) -> Result<Cost> {
    let common = |dir: &Path, config: &str, port: u16| -> Result<Command> {
        let config = scratch.join(config);
        fs::create_dir_all(&config)?;
        fs::write(config.join("settings.json"), settings(address, port))?;
        let mut transmission = Command::new("transmission-cli");
        transmission
            .arg("-g")
            .arg(config)
            .arg("-w")
            .arg(dir)
            .args(["-p", &port.to_string(), "-et"])
            .arg(torrent);
        Ok(transmission)
    };
    let dir = source.parent().context("the source lies in a directory")?;
    let port = free_port(address)?;
    let seeder = Server::start(&mut common(dir, "transmission-seeder", port)?)?;
    wait_for_port(address, port)?;
    wait_until_quiet(seeder.pid());
    fs::create_dir_all(into)?;
    let finished = scratch.join("transmission-finished");
    let _ = fs::remove_file(&finished);
    let script = scratch.join("finish");
    fs::write(
        &script,
        format!("#!/bin/sh\ntouch '{}'\n", finished.display()),
    )?;
    std::os::unix::fs::chown(&script, None, None)?;
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let mut command = common(into, "transmission-leecher", free_port(address)?)?;
    command.arg("-f").arg(&script);
    let before = cpu_of(seeder.pid());
    let started = Instant::now();
    let leecher = Server::start(&mut command)?;
    while !finished.exists() {
        ensure!(
            started.elapsed() < PATIENCE,
            "transmission did not finish within {PATIENCE:?}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    sync_file_system(into)?;
    Ok(Cost {
        wall: started.elapsed().as_secs_f64(),
        cpu: cpu_of(leecher.pid()) + cpu_of(seeder.pid()) - before,
        peak: peak_of(leecher.pid()).max(peak_of(seeder.pid())),
    })
}

/// Settings of transmission that keep it to the namespace, without limits.
fn settings(address: Ipv4Addr, port: u16) -> String {
    serde_json::json!({
        "bind-address-ipv4": address.to_string(),
        "cache-size-mb": 16,
        "dht-enabled": false,
        "encryption": 0,
        "lpd-enabled": false,
        "peer-port": port,
        "pex-enabled": false,
        "port-forwarding-enabled": false,
        "preallocation": 0,
        "ratio-limit-enabled": false,
        "utp-enabled": false,
    })
    .to_string()
}

fn free_port(address: Ipv4Addr) -> Result<u16> {
    Ok(std::net::TcpListener::bind((address, 0))?
        .local_addr()?
        .port())
}

fn wait_for_port(address: Ipv4Addr, port: u16) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while std::net::TcpStream::connect((address, port)).is_err() {
        ensure!(
            Instant::now() < deadline,
            "nothing listens on {address}:{port}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Waits until a seeder has checked its data: until it has used no CPU for a second.
fn wait_until_quiet(pid: u32) {
    let (mut last, mut since) = (cpu_of(pid), Instant::now());
    let deadline = Instant::now() + PATIENCE;
    while since.elapsed() < Duration::from_secs(2) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(100));
        let now = cpu_of(pid);
        if now - last > 0.02 {
            since = Instant::now();
            last = now;
        }
    }
}
