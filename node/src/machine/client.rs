//! Machines as commands see them: asked through their process where one runs, and changed in their directories where none does.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command as Process, Stdio};
use std::time::{Duration, Instant};

use super::api::{CaptureMachine, CapturedMachine, MachineInfo, MachineRequest, MachineStatus};
use super::config::{Config, Directory, failed};
use super::host::{capture, stopped_info};
use crate::control::{
    CapsuleRef, Capture, Client, ClientError, Command, Failure, FailureCode, Pin, Progress, Unpin,
};
use crate::home::Home;

/// How long a machine's process may take until it can be asked.
const SPAWNED: Duration = Duration::from_secs(10);
/// How long it may take to end.
const ENDED: Duration = Duration::from_secs(20);
/// Before it is looked again.
const PAUSE: Duration = Duration::from_millis(50);
/// Of a log, what is told where a process ended at once.
const TOLD: usize = 2000;

/// Connects to a machine's process.
fn connect(directory: &Directory) -> std::io::Result<Client> {
    match directory.sockets_are_ours() {
        true => Client::at(&directory.socket()),
        false => Err(std::io::ErrorKind::NotFound.into()),
    }
}

/// How a machine is, whether it runs or not.
///
/// # Errors
/// There is none, or its directory cannot be read.
pub fn info(directory: &Directory) -> Result<MachineInfo, Failure> {
    match connect(directory) {
        Ok(client) => match client.call(MachineStatus {}) {
            Ok(info) => Ok(info),
            Err(ClientError::Failed(failure)) => Err(failure),
            // It has just ended.
            Err(_) => Ok(stopped_info(directory, &directory.load()?)),
        },
        Err(_) => Ok(stopped_info(directory, &directory.load()?)),
    }
}

/// Asks a machine's process, which must run.
///
/// # Errors
/// What it says, or that the machine does not run.
pub fn ask<C: Command<Request = MachineRequest>>(
    directory: &Directory,
    command: C,
    on_progress: impl FnMut(Progress),
    on_notice: impl FnMut(String),
) -> Result<C::Answer, Failure> {
    directory.load()?;
    let client = connect(directory).map_err(|_| {
        let name = directory.name();
        let message = format!("machine {name} does not run");
        Failure::new(FailureCode::Refused, message)
            .hint(format!("start it with `capsule machine run {name}`"))
    })?;
    client
        .run(command, on_progress, on_notice)
        .map_err(|error| match error {
            ClientError::Failed(failure) => failure,
            other => {
                let message = format!("machine {} has ended: {other}", directory.name());
                Failure::new(FailureCode::Io, message).hint(format!(
                    "its log is {}",
                    directory.file("host.log").display()
                ))
            }
        })
}

/// Whether a machine's process runs.
#[must_use]
pub fn runs(directory: &Directory) -> bool {
    connect(directory).is_ok()
}

/// Waits until a machine's process has ended, which was told to.
///
/// # Errors
/// It does not.
pub fn await_end(directory: &Directory) -> Result<(), Failure> {
    let until = Instant::now() + ENDED;
    while directory.lock()?.is_none() {
        if Instant::now() > until {
            let message = format!("the process of machine {} does not end", directory.name());
            return Err(Failure::new(FailureCode::Io, message).hint(format!(
                "its log is {}",
                directory.file("host.log").display()
            )));
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// Starts a machine's process, which goes on by itself. Returns when it can be asked.
///
/// # Errors
/// It ended at once; what it said.
pub fn spawn(home: &Home, directory: &Directory) -> Result<(), Failure> {
    let log = directory.file("host.log");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let opened = options
        .open(&log)
        .and_then(|log| Ok((log.try_clone()?, log)));
    let (out, err) = opened.map_err(|error| failed("opening", &log, &error))?;
    let program = std::env::current_exe()
        .map_err(|error| failed("finding", Path::new("this program"), &error))?;
    let mut process = Process::new(program);
    process
        .arg("--home")
        .arg(home.dir())
        .args(["machine", "host", directory.name()])
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err);
    // SAFETY: setsid only changes this new process, and is async-signal-safe. It is to survive the terminal.
    unsafe {
        process.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
    let mut child = process
        .spawn()
        .map_err(|error| failed("starting", &log, &error))?;
    let until = Instant::now() + SPAWNED;
    loop {
        if runs(directory) {
            return Ok(());
        }
        if let Ok(Some(_)) = child.try_wait() {
            let said = last_of(&log);
            let message = format!("machine {} could not be started: {said}", directory.name());
            return Err(Failure::new(FailureCode::Io, message));
        }
        if Instant::now() > until {
            let message = format!("machine {} does not answer", directory.name());
            return Err(Failure::new(FailureCode::Io, message)
                .hint(format!("its log is {}", log.display())));
        }
        std::thread::sleep(PAUSE);
    }
}

fn last_of(log: &Path) -> String {
    let said = std::fs::read(log).unwrap_or_default();
    let from = said.len().saturating_sub(TOLD);
    String::from_utf8_lossy(&said[from..]).trim().to_owned()
}

/// Captures a machine that does not run: its disks.
///
/// # Errors
/// It runs after all, or what the daemon says.
pub fn capture_stopped(
    home: &Home,
    directory: &Directory,
    request: &CaptureMachine,
    on_progress: impl FnMut(Progress),
    on_notice: impl FnMut(String),
) -> Result<CapturedMachine, Failure> {
    directory.load()?;
    let _lock = lock(directory)?;
    // Its process, which may just have ended, changed it.
    let mut config = directory.load()?;
    if config.resume {
        let message = format!(
            "machine {} is where its capsule stopped: there is nothing to capture",
            directory.name()
        );
        return Err(Failure::new(FailureCode::Refused, message)
            .hint("run it first; or publish nothing: that capsule is what it is"));
    }
    let mut components = super::block_on(capture::disks(directory, &config, true))??;
    components.extend(config.boot_files());
    let before = config.capsules();
    let capture = Capture {
        name: request.name.clone(),
        effort: request.effort,
        expires: request.expires,
        against_disks: request.against_disks,
        machine: Box::new(config.at_rest()),
        components,
    };
    let published = daemon(home)?
        .run(capture, on_progress, on_notice)
        .map_err(said)?;
    let disk_written = directory.written(&config, 0).sum();
    config.stand_upon(&published, |disk| disk.overlays.len());
    pin(home, directory, &config, &before)?;
    directory.save(&config)?;
    Ok(CapturedMachine {
        machine: directory.name().to_owned(),
        pause_seconds: None,
        balloon: false,
        ram_written: 0,
        disk_written,
        published,
    })
}

/// Pins what a machine stands upon, and lets go what it stood upon before.
///
/// # Errors
/// What the daemon says.
pub fn pin(
    home: &Home,
    directory: &Directory,
    config: &Config,
    before: &[CapsuleRef],
) -> Result<(), Failure> {
    let machine = Some(directory.name().to_owned());
    let after = config.capsules();
    for capsule in after.iter().filter(|capsule| !before.contains(capsule)) {
        let (capsule, machine) = (capsule.clone(), machine.clone());
        daemon(home)?.call(Pin { capsule, machine }).map_err(said)?;
    }
    for capsule in before.iter().filter(|capsule| !after.contains(capsule)) {
        let (capsule, machine) = (capsule.clone(), machine.clone());
        daemon(home)?
            .call(Unpin { capsule, machine })
            .map_err(said)?;
    }
    Ok(())
}

/// Removes a machine that does not run, and what was written to it.
///
/// # Errors
/// It runs, or has something that is nowhere else and `force` is not said.
pub fn remove(home: &Home, directory: &Directory, force: bool) -> Result<(), Failure> {
    directory.require()?;
    let lock = lock(directory)?;
    let config = match directory.load() {
        Ok(config) => Some(config),
        // What is damaged can be removed all the same.
        Err(_) if force => None,
        Err(failure) => return Err(failure.hint("`--force` removes it as it is")),
    };
    let changed = |config: &Config| is_changed(directory, config);
    if !force && config.as_ref().is_some_and(changed) {
        let name = directory.name();
        let message = format!("machine {name} has been written to since it was captured");
        return Err(Failure::new(FailureCode::Refused, message).hint(format!(
            "`capsule machine capture {name} --name CHANNEL:VERSION` keeps that; --force throws it away"
        )));
    }
    super::host::take_down(&directory.file("ram"));
    directory.clear()?;
    drop(lock);
    if directory.sockets() != directory.path() {
        let _gone = std::fs::remove_dir_all(directory.sockets());
    }
    // Without a daemon, the next that starts for this home lets go of them.
    for capsule in config.iter().flat_map(Config::capsules) {
        if let Ok(client) = Client::connect(home.dir()) {
            let machine = Some(directory.name().to_owned());
            let _pinned_no_longer = client.call(Unpin { capsule, machine });
        }
    }
    Ok(())
}

/// Whether its disks have anything that no capsule has.
#[must_use]
pub fn is_changed(directory: &Directory, config: &Config) -> bool {
    /// An overlay to which nothing was written.
    const EMPTY: u64 = 256 << 10;
    !config.resume && directory.written(config, 0).any(|size| size > EMPTY)
}

/// Takes a machine that does not run.
///
/// # Errors
/// It runs.
pub fn lock(directory: &Directory) -> Result<super::config::Lock, Failure> {
    directory.lock()?.ok_or_else(|| {
        let name = directory.name();
        let message = format!("machine {name} runs");
        Failure::new(FailureCode::Refused, message)
            .hint(format!("stop it first: `capsule machine stop {name}`"))
    })
}

/// The daemon of a home.
///
/// # Errors
/// None runs.
pub fn daemon(home: &Home) -> Result<Client, Failure> {
    Client::connect(home.dir()).map_err(said)
}

/// What a client heard, as a failure.
#[must_use]
pub fn said(error: ClientError) -> Failure {
    match error {
        ClientError::Failed(failure) => failure,
        other => Failure::new(FailureCode::Io, other.to_string()),
    }
}
