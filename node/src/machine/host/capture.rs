//! Capturing a machine: what it does not use of its memory becomes zeros, it stands still while the state of its devices is written and its disks and memory are
//! frozen, and goes on; what was frozen is then hashed and published.
//!
//! What is frozen is what was written since the last capture, so both the pause and the work follow that. Where publishing fails,
//! the frozen parts stay, and the next capture has them too.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use capsule_proto::manifest::{ComponentKind, Machine};
use serde_json::json;
use tokio::process::Command;

use super::{Host, Running, prefetch, waiting};
use crate::control::{
    CapsuleRef, Capture, Captured, CheckName, Failure, FailureCode, Patch, Pin, Published, Reporter,
};
use crate::machine::api::{CaptureMachine, CapturedMachine};
use crate::machine::config::{Config, Directory, failed};
use crate::machine::qemu::{Qemu, Shrunk, create_overlay};
use crate::machine::ram::{Frozen, Ram};
use crate::work::blocking;

/// Frozen generations of memory of which nothing could be published; more are not made.
const MAX_FROZEN: usize = 8;
/// Overlays of a disk of a machine that runs: all of them are read through.
const MAX_OVERLAYS: usize = 200;

/// Names of components.
const RAM: &str = "ram";
const STATE: &str = "state";

/// What a machine was when it stood still.
struct Stopped {
    state: PathBuf,
    ram: Vec<Frozen>,
    tools: Vec<String>,
    balloon: bool,
    /// Bytes that the balloon had then.
    inflated: u64,
    pause: Duration,
    at: u64,
}

impl Host {
    /// Captures the machine, which runs.
    pub(super) async fn capture(
        &self,
        request: CaptureMachine,
        reporter: &Reporter,
    ) -> Result<CapturedMachine, Failure> {
        let _alone = self.alone()?;
        let running = self.running()?;
        self.check_room(&running, &request).await?;
        // Whoever may not publish it need not stop it.
        let check = CheckName {
            name: request.name.clone(),
            expires: request.expires,
        };
        self.daemon.ask(check, |_| {}).await?;
        // What resuming read first belongs to the capsule that it comes from.
        prefetch::publish(self, &running).await;
        // It is hashed upon that; and what does not come is noticed before anything is frozen.
        let teller = reporter.clone();
        self.pull_all(move |progress| teller.progress(progress))
            .await?;
        reporter.progress(waiting("the guest"));
        let stopped = self.freeze(&running, &request).await?;
        // Memory of before the guest was started anew lay elsewhere.
        let before = match running.is_of_origin.load(Ordering::Relaxed) {
            true => self.config().origin.as_ref().map(|origin| origin.capsule),
            false => None,
        };
        let captured = self.keep(&running, &request, &stopped, reporter).await;
        let qemu = &running.qemu;
        match (&captured, request.stop) {
            (Ok(_), true) => drop(qemu.quit().await?),
            (Ok(_), false) => {}
            // Nothing is lost: it goes on, and what was frozen is captured with the next.
            (Err(_), _) => go_on(qemu, true).await,
        }
        let (mut published, disk_written) = captured?;
        if stopped.inflated > 0 {
            let left = stopped.inflated.div_ceil(1 << 20);
            published.warnings.push(format!("the guest had not taken back {left} MiB of its memory: whoever resumes this reads more of it first"));
        }
        prefetch::hand_on(self, &running, before, &published.components).await;
        Ok(CapturedMachine {
            machine: self.directory.name().to_owned(),
            pause_seconds: (!request.stop).then_some(stopped.pause.as_secs_f64()),
            balloon: stopped.balloon,
            ram_written: stopped
                .ram
                .iter()
                .flat_map(|frozen| &frozen.runs)
                .map(|run| run.len)
                .sum(),
            disk_written,
            published,
        })
    }

    /// Publishes what was frozen, and has the machine stand upon that.
    async fn keep(
        &self,
        running: &Running,
        request: &CaptureMachine,
        stopped: &Stopped,
        reporter: &Reporter,
    ) -> Result<(Published, u64), Failure> {
        let published = self.publish(running, request, stopped, reporter).await?;
        let settled = self.settle(running, request, &published, stopped.ram.len());
        match settled.await {
            Ok(written) => Ok((published, written)),
            Err(failure) => {
                let message = format!(
                    "{} is published, but the machine could not be put upon it: {}",
                    published.name, failure.message
                );
                Err(Failure { message, ..failure })
            }
        }
    }

    /// Makes room for what is to be frozen; refuses what would be more than can be kept.
    async fn check_room(&self, running: &Running, request: &CaptureMachine) -> Result<(), Failure> {
        if running.parts.ram.frozen().len() >= MAX_FROZEN {
            self.with_ram(running, "merging", |ram| ram.merge()).await?;
        }
        let disks = &self.config().disks;
        let overlays = disks.iter().map(|disk| disk.overlays.len()).max();
        // The last may be put upon all others, as it goes with them.
        match overlays {
            Some(overlays) if overlays >= MAX_OVERLAYS && !request.stop => {
                let message = format!(
                    "{} was captured {overlays} times since it was started",
                    self.directory.name()
                );
                Err(Failure::new(FailureCode::Refused, message)
                    .hint("capture it with --stop, and run it again: it then stands upon its last capture"))
            }
            _ => Ok(()),
        }
    }

    /// Has the guest stand still for as long as it takes to freeze its parts. Where that fails, the guest goes on as it was.
    async fn freeze(
        &self,
        running: &Running,
        request: &CaptureMachine,
    ) -> Result<Stopped, Failure> {
        let qemu = &running.qemu;
        let shrunk = match request.no_balloon {
            true => Ok(Shrunk::NoBalloon),
            false => squeeze(qemu).await,
        };
        let stopped = match shrunk {
            Ok(shrunk) => {
                let balloon = matches!(shrunk, Shrunk::Shrunk { .. });
                self.freeze_shrunk(running, request, balloon).await
            }
            Err(failure) => Err(failure),
        };
        if stopped.is_err() || !request.stop {
            go_on(qemu, stopped.is_err()).await;
        }
        stopped
    }

    async fn freeze_shrunk(
        &self,
        running: &Running,
        request: &CaptureMachine,
        balloon: bool,
    ) -> Result<Stopped, Failure> {
        let qemu = &running.qemu;
        let _alone = qemu.leave_agent_alone().await;
        let tools = qemu.agent_tools().await?;
        // What is written now need not be while the guest stands still.
        self.sync_memory(running).await?;
        let overlays = self.next_overlays().await?;
        let state = self.directory.file("state.new");
        let _last = std::fs::remove_file(&state);
        let inflated = inflated(qemu).await;
        let began = Instant::now();
        qemu.stop().await?;
        self.freeze_still(qemu, running, &state, &overlays).await?;
        let at = SystemTime::now().duration_since(UNIX_EPOCH);
        let at = at.map_or(0, |since| since.as_secs());
        if !request.stop {
            qemu.cont().await?;
        }
        Ok(Stopped {
            state,
            ram: running.parts.ram.frozen(),
            tools,
            balloon,
            inflated,
            pause: began.elapsed(),
            at,
        })
    }

    /// What happens while the guest stands still.
    async fn freeze_still(
        &self,
        qemu: &Qemu,
        running: &Running,
        state: &Path,
        overlays: &[(String, String)],
    ) -> Result<(), Failure> {
        let paths: Vec<(String, PathBuf)> = overlays
            .iter()
            .map(|(disk, file)| (disk.clone(), self.directory.file(file)))
            .collect();
        // Known before they are used: one to which the guest writes is never taken for another's.
        self.note_overlays(overlays, true)?;
        // Before the state is saved, with which QEMU lets go of its disks.
        if let Err(failure) = qemu.overlay(&paths).await {
            // Where QEMU did not answer they may be in use.
            if failure.code != FailureCode::Unreachable {
                self.note_overlays(overlays, false)?;
            }
            return Err(failure);
        }
        qemu.save(state).await?;
        self.sync_memory(running).await?;
        self.with_ram(running, "freezing", |ram| ram.freeze()).await
    }

    /// Changes what is kept of the memory.
    async fn with_ram(
        &self,
        running: &Running,
        doing: &'static str,
        change: impl FnOnce(&Ram) -> std::io::Result<()> + Send + 'static,
    ) -> Result<(), Failure> {
        let (ram, dir) = (running.parts.ram.clone(), self.directory.file("memory"));
        blocking(move || change(&ram).map_err(|error| failed(doing, &dir, &error))).await
    }

    /// Notes, durably, that disks have new overlays, or that they have them no longer.
    fn note_overlays(&self, overlays: &[(String, String)], are: bool) -> Result<(), Failure> {
        let mut config = self.config();
        for (component, file) in overlays {
            let mut disks = config.disks.iter_mut();
            if let Some(disk) = disks.find(|disk| disk.component == *component) {
                match are {
                    true => disk.overlays.push(file.clone()),
                    false => disk.overlays.retain(|known| known != file),
                }
            }
        }
        self.directory.save(&config)
    }

    /// New overlays, empty: by disk their files.
    async fn next_overlays(&self) -> Result<Vec<(String, String)>, Failure> {
        let disks = self.config().disks.clone();
        let mut made = Vec::new();
        for disk in disks {
            let file = disk.next_overlay();
            let path = self.directory.file(&file);
            // That of a capture that failed before it was used.
            let _gone = std::fs::remove_file(&path);
            create_overlay(&path, disk.size).await?;
            made.push((disk.component, file));
        }
        Ok(made)
    }

    /// Has all that the guest wrote to its memory come to where it is kept.
    async fn sync_memory(&self, running: &Running) -> Result<(), Failure> {
        let path = running.parts.places.ram.clone();
        blocking(move || {
            let file = std::fs::File::open(&path);
            let synced = file.and_then(|file| file.sync_data());
            synced.map_err(|error| failed("writing", &path, &error))
        })
        .await
    }

    async fn publish(
        &self,
        running: &Running,
        request: &CaptureMachine,
        stopped: &Stopped,
        reporter: &Reporter,
    ) -> Result<Published, Failure> {
        let config = self.config().clone();
        let components = components(&self.directory, &config, running, stopped).await?;
        let capture = Capture {
            name: request.name.clone(),
            effort: request.effort,
            expires: request.expires,
            against_disks: request.against_disks,
            machine: Box::new(captured_machine(&config, stopped)),
            components,
        };
        let teller = reporter.clone();
        self.daemon
            .ask(capture, move |progress| teller.progress(progress))
            .await
    }

    /// Notes what was published: the next capture stands upon it.
    async fn settle(
        &self,
        running: &Running,
        request: &CaptureMachine,
        published: &Published,
        frozen: usize,
    ) -> Result<u64, Failure> {
        let before = self.config().capsules();
        let capsule = CapsuleRef(published.capsule.to_string());
        let machine = Some(self.directory.name().to_owned());
        let pin = Pin { capsule, machine };
        self.daemon.ask(pin, |_| {}).await?;
        let (written, after) = {
            let mut config = self.config();
            // The uppermost is not among what was captured: it is written to since.
            let written = self.directory.written(&config, 1).sum();
            config.stand_upon(published, |disk| disk.overlays.len().saturating_sub(1));
            config.resume = request.stop;
            self.directory.save(&config)?;
            (written, config.capsules())
        };
        running.is_of_origin.store(true, Ordering::Relaxed);
        // What cannot be merged for want of room stays as it is, and is told again with the next.
        let absorbed = self.with_ram(running, "merging", move |ram| ram.absorb(frozen));
        if let Err(error) = absorbed.await {
            tracing::warn!(%error, "memory that was captured takes room until the next capture");
        }
        self.let_go(before, &after).await;
        Ok(written)
    }
}

/// Has a guest do without the memory that it does not use, and gives it back: it is zeros now, and stays so until the guest uses it.
///
/// One that resumed with the balloon inflated would have to give back each page first, for which all of its tables come; and until it has, its
/// memory lies in such small pieces that Linux moves pages about to make larger ones: an upgraded Debian guest read 200 MB of its memory for that. When
/// it is done with that here, it is done elsewhere.
async fn squeeze(qemu: &Qemu) -> Result<Shrunk, Failure> {
    let shrunk = qemu.shrink().await?;
    // It may have been resumed so.
    if inflated(qemu).await > 0 {
        if let Err(error) = qemu.grow().await {
            tracing::warn!(%error, "the guest is captured with less memory than it could have");
        }
        qemu.quiet().await;
    }
    Ok(shrunk)
}

/// Bytes that the balloon has, as far as QEMU tells.
async fn inflated(qemu: &Qemu) -> u64 {
    qemu.inflated().await.unwrap_or_else(|error| {
        tracing::warn!(%error, "it is not known what the balloon has");
        0
    })
}

/// Lets a guest go on with all of its memory, if it has stopped; what is in the way is only told, as whoever asks has a better reason to fail.
async fn go_on(qemu: &Qemu, is_stopped: bool) {
    if is_stopped && let Err(error) = qemu.cont().await {
        tracing::warn!(%error, "the guest does not go on");
    }
    if let Err(error) = qemu.grow().await {
        tracing::warn!(%error, "the guest has less memory than it could");
    }
}

/// What resuming it takes.
fn captured_machine(config: &Config, stopped: &Stopped) -> Machine {
    Machine {
        ram: Some(RAM.to_owned()),
        state: Some(STATE.to_owned()),
        guest_tools: stopped.tools.clone(),
        captured_at: stopped.at,
        ..config.at_rest()
    }
}

/// All components of a machine that stood still.
async fn components(
    directory: &Directory,
    config: &Config,
    running: &Running,
    stopped: &Stopped,
) -> Result<Vec<Captured>, Failure> {
    let mut all = disks(directory, config, false).await?;
    let mut patches = Vec::new();
    for (number, frozen) in stopped.ram.iter().enumerate() {
        let runs = directory.file(&format!("ram.{number}.runs"));
        let (data, frozen) = (frozen.file.clone(), frozen.clone());
        patches.push(Patch {
            data,
            runs: Some(runs.clone()),
        });
        blocking(move || write_runs(&runs, &frozen)).await?;
    }
    let is_captured = running.is_of_origin.load(Ordering::Relaxed);
    all.push(Captured {
        name: RAM.to_owned(),
        kind: ComponentKind::Ram,
        size: Some(config.machine.ram_size),
        base: config.in_origin(RAM).filter(|_| is_captured),
        patches,
    });
    let size = std::fs::metadata(&stopped.state);
    let size = size
        .map_err(|error| failed("reading", &stopped.state, &error))?
        .len();
    all.push(Captured {
        name: STATE.to_owned(),
        kind: ComponentKind::DeviceState,
        size: Some(size),
        base: config.in_origin(STATE).filter(|_| is_captured),
        patches: vec![Patch {
            data: stopped.state.clone(),
            runs: None,
        }],
    });
    all.extend(config.boot_files());
    Ok(all)
}

/// The disks: what lies below the overlays that are not in the origin yet, and these; the last, which is written to while the machine runs, only
/// where `stands_still`.
pub async fn disks(
    directory: &Directory,
    config: &Config,
    stands_still: bool,
) -> Result<Vec<Captured>, Failure> {
    let mut all = Vec::new();
    for disk in &config.disks {
        let base = match disk.captured {
            0 => disk.base.clone(),
            _ => config.in_origin(&disk.component),
        };
        let running = usize::from(!stands_still);
        let frozen = disk
            .overlays
            .len()
            .saturating_sub(running)
            .max(disk.captured);
        let mut patches = Vec::new();
        for overlay in &disk.overlays[disk.captured..frozen] {
            patches.push(written(directory, overlay).await?);
        }
        all.push(Captured {
            name: disk.component.clone(),
            kind: ComponentKind::Disk,
            size: Some(disk.size),
            base,
            patches,
        });
    }
    Ok(all)
}

/// What an overlay has.
async fn written(directory: &Directory, overlay: &str) -> Result<Patch, Failure> {
    let data = directory.file(overlay);
    let runs = directory.file(&format!("{overlay}.runs"));
    // QEMU has it open, but writes to it no more.
    let told = Command::new("qemu-img")
        .args(["map", "-U", "--output=json", "-f", "qcow2"])
        .arg(&data)
        .output()
        .await;
    let told = told.map_err(|error| failed("running qemu-img on", &data, &error))?;
    if !told.status.success() {
        let said = String::from_utf8_lossy(&told.stderr).trim().to_owned();
        let message = format!("reading what {} has: {said}", data.display());
        return Err(Failure::new(FailureCode::Io, message));
    }
    let written = tokio::fs::write(&runs, told.stdout).await;
    written.map_err(|error| failed("writing", &runs, &error))?;
    Ok(Patch {
        data,
        runs: Some(runs),
    })
}

/// What was written to memory, told in the same manner.
fn write_runs(path: &Path, frozen: &Frozen) -> Result<(), Failure> {
    let told: Vec<_> = frozen
        .runs
        .iter()
        .map(|run| {
            json!({"start": run.start, "length": run.len, "present": true, "zero": !run.data, "offset": run.start})
        })
        .collect();
    let bytes = serde_json::to_vec(&told).map_err(std::io::Error::from);
    let written = bytes.and_then(|bytes| std::fs::write(path, bytes));
    written.map_err(|error| failed("writing", path, &error))
}
