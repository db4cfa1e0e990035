//! The process that has a machine while it runs, and survives the daemon.
//!
//! It takes the machine's directory, has its parts come as far as the guest reads them first (`parts`), starts QEMU, and then answers the requests of
//! `api` until the guest has shut down. `capture` takes the guest's state while it runs on; `prefetch` brings what those who resumed it before
//! read first, and publishes what this one read; `daemon` asks the daemon.

pub mod capture;
mod daemon;
mod parts;
mod prefetch;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use capsule_proto::manifest::Machine;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};

use super::api::{MachineInfo, MachineRequest, MachineState, StopMachine, StoppedMachine};
use super::config::{Config, Directory, Lock};
use super::qemu::{self, BeforeExec, Clock, Qemu, Status};
use crate::control::{
    CapsuleRef, Failure, FailureCode, Handler, Phase, Progress, Pull, Reporter, Unpin, listen,
    serve,
};
use crate::home::Home;
use daemon::Daemon;
use parts::Parts;
pub use parts::take_down;

/// How long a guest may take to shut down where nobody says.
const SHUTDOWN: Duration = Duration::from_secs(60);
/// The rest of a capsule is fetched when the guest reads nothing that has to come, or after so long.
const REST_AFTER: Duration = Duration::from_secs(15 * 60);
/// Before what did not come is asked for again.
const PULL_AGAIN: Duration = Duration::from_secs(15);
/// How long where this process is told to end.
const TERMINATING: Duration = Duration::from_secs(20);
/// Threads: as QEMU has the cores, two for what it waits for.
const THREADS: usize = 2;
/// Blocking calls at a time: requests to the daemon, each as long as a disk is served.
const BLOCKING: usize = 64;
/// How often it is looked whether something is waited for, and whether QEMU goes on.
const LOOK: Duration = Duration::from_millis(500);
/// A read that takes longer waits for peers.
const LATE: Duration = Duration::from_secs(5);
/// How soon, and for how long, an agent is asked again to set the guest's clock that did not answer.
const CLOCK_AGAIN: Duration = Duration::from_secs(10);
const CLOCK_WITHIN: Duration = Duration::from_secs(30 * 60);

/// A machine that runs, or is about to.
pub struct Host {
    directory: Directory,
    daemon: Daemon,
    config: Mutex<Config>,
    /// How far it is.
    stage: watch::Sender<Stage>,
    /// One capture or stop at a time.
    busy: tokio::sync::Mutex<()>,
    /// Told where it is not to be started after all.
    give_up: Notify,
    started: Instant,
}

/// How far a machine is.
#[derive(Clone)]
enum Stage {
    /// What it needs comes.
    Starting(Progress),
    /// The guest runs.
    Running(Arc<Running>),
    /// It is over, well or not.
    Ended(Option<Failure>),
}

/// What a machine consists of while it runs.
struct Running {
    qemu: Qemu,
    parts: Parts,
    /// Whether its memory was written upon that of the origin: it was resumed from it, or captured as it.
    is_of_origin: AtomicBool,
    /// What resuming read first, by component, once that is known.
    first_reads: Mutex<Vec<prefetch::Reads>>,
    /// From the start of the process until the guest ran.
    after: Duration,
}

/// Runs a machine until its guest has shut down. Blocks; makes its own threads.
///
/// # Errors
/// Why it could not be started, or ended otherwise.
pub fn run(home: &Home, name: &str) -> Result<(), Failure> {
    let directory = Directory::of(home, name)?;
    directory.load()?;
    let Some(lock) = directory.lock()? else {
        let message = format!("machine {name} runs already");
        return Err(Failure::new(FailureCode::Busy, message));
    };
    let config = directory.load()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .max_blocking_threads(BLOCKING)
        .enable_all()
        .build()
        .map_err(|error| Failure::new(FailureCode::Io, error.to_string()))?;
    let host = Arc::new(Host {
        daemon: Daemon::new(home.dir()),
        directory,
        config: Mutex::new(config),
        stage: watch::channel(Stage::Starting(waiting("qemu"))).0,
        busy: tokio::sync::Mutex::new(()),
        give_up: Notify::new(),
        started: Instant::now(),
    });
    let ended = runtime.block_on(host.live(lock));
    // What still reads waits for nobody any more.
    runtime.shutdown_background();
    ended
}

impl Host {
    async fn live(self: &Arc<Self>, _lock: Lock) -> Result<(), Failure> {
        self.directory.prepare_sockets()?;
        let socket = self.directory.socket();
        let clients =
            listen(&socket).map_err(|error| Failure::new(FailureCode::Io, error.to_string()))?;
        let serving = tokio::spawn(serve(clients, Arc::new(Requests(self.clone()))));
        let mut terminate = signal(SignalKind::terminate()).map_err(no_signals)?;
        let ended = tokio::select! {
            ended = self.start_and_watch() => ended,
            // Before the guest's first step there is nothing to shut down.
            () = self.give_up.notified() => Ok(()),
            _ = terminate.recv() => self.end_in_time().await,
        };
        // What is being captured was frozen before: it need not be lost with the guest.
        let _captured = self.busy.lock().await;
        self.stage.send_replace(Stage::Ended(ended.clone().err()));
        let _gone = std::fs::remove_file(&socket);
        // Those who wait hear of it.
        tokio::time::sleep(LOOK).await;
        serving.abort();
        ended
    }

    /// Ends with this machine, or this user's session: the guest is asked to shut down, but not waited for as long as usual.
    async fn end_in_time(&self) -> Result<(), Failure> {
        if let Ok(running) = self.running() {
            let shut_down = async {
                running.qemu.powerdown().await?;
                running.qemu.wait().await
            };
            if tokio::time::timeout(TERMINATING, shut_down).await.is_err() {
                running.qemu.quit().await?;
            }
        }
        Ok(())
    }

    async fn start_and_watch(self: &Arc<Self>) -> Result<(), Failure> {
        let running = Arc::new(self.start().await?);
        self.stage.send_replace(Stage::Running(running.clone()));
        let mut behind = tokio::task::JoinSet::new();
        behind.spawn(wake(running.clone()));
        behind.spawn(self.clone().fetch_the_rest(running.clone()));
        behind.spawn(prefetch::publish_later(self.clone(), running.clone()));
        behind.spawn(resume_after_errors(self.clone(), running.clone()));
        let ended = running.qemu.wait().await?;
        match ended.success() {
            true => Ok(()),
            false => Err(
                Failure::new(FailureCode::Io, format!("QEMU has ended ({ended})")).hint(format!(
                    "what it said is in {}",
                    running.parts.places.log().display()
                )),
            ),
        }
    }

    /// Has everything come that the guest needs before its first step, and lets it run.
    async fn start(&self) -> Result<Running, Failure> {
        let probed = qemu::probe().await?;
        let (before, unneeded) = {
            let mut config = self.config();
            qemu::check(&config.machine, &probed)?;
            let before = config.capsules();
            let unneeded = config.fold();
            self.directory.save(&config)?;
            (before, unneeded)
        };
        self.directory.remove(&unneeded);
        let config = self.config().clone();
        self.let_go(before, &config.capsules()).await;
        let mut parts = Parts::gather(self, &config).await?;
        parts.places.sandbox = probed.sandbox;
        self.tell(waiting("the guest"));
        let machine = Machine {
            ram: None,
            state: None,
            ..config.machine.clone()
        };
        // Faults of single pages fetch little; where nothing is fetched, larger ones are faster.
        let before: BeforeExec = match parts.state {
            Some(_) => before_paging_qemu,
            None => before_qemu,
        };
        let qemu = Qemu::start(&machine, &parts.places, Some(before)).await?;
        if let Some(state) = &parts.state {
            qemu.load(state).await?;
        }
        {
            // Whatever ends it from now on: its disks are no longer those of the capsule's memory.
            let mut config = self.config();
            config.resume = false;
            self.directory.save(&config)?;
        }
        qemu.cont().await?;
        let after = self.started.elapsed();
        Ok(Running {
            is_of_origin: AtomicBool::new(parts.state.is_some()),
            qemu,
            parts,
            first_reads: Mutex::default(),
            after,
        })
    }

    /// Takes the machine's pins from capsules on which it no longer stands.
    async fn let_go(&self, before: Vec<CapsuleRef>, after: &[CapsuleRef]) {
        for capsule in before
            .into_iter()
            .filter(|capsule| !after.contains(capsule))
        {
            let machine = Some(self.directory.name().to_owned());
            if let Err(error) = self.daemon.ask(Unpin { capsule, machine }, |_| {}).await {
                tracing::debug!(%error, "an older capsule stays pinned");
            }
        }
    }

    /// Fetches what the guest has not read yet, behind what it reads.
    async fn fetch_the_rest(self: Arc<Self>, running: Arc<Running>) {
        // Over a thin link each would slow the other down, and one of them is waited for.
        let settled = prefetch::settled(&running);
        let _in_any_case = tokio::time::timeout(REST_AFTER, settled).await;
        while let Err(error) = self.pull_all(|_| {}).await {
            tracing::warn!(%error, "the rest of a capsule did not come: it is asked for again");
            tokio::time::sleep(PULL_AGAIN).await;
        }
        std::future::pending().await
    }

    /// Has all come of what the machine stands upon.
    async fn pull_all(
        &self,
        tell: impl Fn(Progress) + Clone + Send + 'static,
    ) -> Result<(), Failure> {
        let capsules = self.config().capsules();
        for capsule in capsules {
            let pull = Pull {
                capsule,
                wait: Some(u64::from(u32::MAX)),
                like_path: None,
                like_capsule: None,
            };
            self.daemon.ask(pull, tell.clone()).await?;
        }
        Ok(())
    }

    /// Ends the guest.
    async fn stop(&self, request: StopMachine) -> Result<StoppedMachine, Failure> {
        let _alone = self.alone()?;
        if matches!(&*self.stage.borrow(), Stage::Starting(_)) {
            self.give_up.notify_one();
            return Ok(StoppedMachine {
                machine: self.directory.name().to_owned(),
                orderly: false,
                capsule: self.config().origin.as_ref().map(|origin| origin.capsule),
            });
        }
        let running = self.running()?;
        let patience = request.wait.map_or(SHUTDOWN, Duration::from_secs);
        let mut orderly = false;
        if !request.force {
            running.qemu.powerdown().await?;
            orderly = tokio::time::timeout(patience, running.qemu.wait())
                .await
                .is_ok();
            if !orderly {
                let message = format!(
                    "the guest of {} has not shut down within {} s",
                    self.directory.name(),
                    patience.as_secs()
                );
                return Err(Failure::new(FailureCode::Busy, message).hint(
                    "it may not listen to the power button: shut it down from its console, or use --force, which pulls its plug",
                ));
            }
        } else {
            running.qemu.quit().await?;
        }
        // Memory is gone; disks go on where they are.
        let capsule = {
            let mut config = self.config();
            config.resume = false;
            self.directory.save(&config)?;
            config.origin.as_ref().map(|origin| origin.capsule)
        };
        Ok(StoppedMachine {
            machine: self.directory.name().to_owned(),
            orderly,
            capsule,
        })
    }

    /// Answers when the guest runs.
    async fn await_running(&self, reporter: &Reporter) -> Result<MachineInfo, Failure> {
        let mut stage = self.stage.subscribe();
        loop {
            match stage.borrow_and_update().clone() {
                Stage::Starting(progress) => reporter.progress(progress),
                Stage::Running(_) => return Ok(self.info()),
                Stage::Ended(failure) => return Err(failure.unwrap_or_else(|| self.over())),
            }
            if stage.changed().await.is_err() {
                return Err(self.over());
            }
        }
    }

    /// How the machine is, as QEMU says it too.
    async fn status(&self) -> MachineInfo {
        let mut info = self.info();
        if info.state == MachineState::Running
            && let Ok(running) = self.running()
        {
            // One that does not answer waits for something itself.
            let told = tokio::time::timeout(LOOK, running.qemu.status()).await;
            if let Ok(Ok(Status::Paused | Status::Saved | Status::DiskError)) = told {
                info.state = MachineState::Paused;
            }
        }
        info
    }

    fn info(&self) -> MachineInfo {
        let config = self.config().clone();
        let mut info = stopped_info(&self.directory, &config);
        match &*self.stage.borrow() {
            Stage::Starting(_) => info.state = MachineState::Starting,
            Stage::Ended(_) => {}
            Stage::Running(running) => {
                info.resume = running.parts.state.is_some();
                let late = running.parts.late();
                info.state = match late {
                    Some(late) if late > LATE => MachineState::Waiting,
                    _ => MachineState::Running,
                };
                info.waiting_seconds = late.map(|late| late.as_secs_f64());
                info.started_seconds = Some(running.after.as_secs_f64());
                let stats = running.parts.ram.stats();
                info.written += stats.written + stats.frozen;
                info.read = running.parts.read();
            }
        }
        info
    }

    fn running(&self) -> Result<Arc<Running>, Failure> {
        match &*self.stage.borrow() {
            Stage::Running(running) => Ok(running.clone()),
            Stage::Starting(_) => {
                let message = format!("machine {} is being started", self.directory.name());
                Err(Failure::new(FailureCode::Busy, message).hint("wait until it runs"))
            }
            Stage::Ended(_) => Err(self.over()),
        }
    }

    /// Keeps others from capturing or stopping the machine meanwhile.
    fn alone(&self) -> Result<tokio::sync::MutexGuard<'_, ()>, Failure> {
        self.busy.try_lock().map_err(|_| {
            let message = format!(
                "machine {} is being captured or stopped already",
                self.directory.name()
            );
            Failure::new(FailureCode::Busy, message).hint("wait until that is done")
        })
    }

    fn over(&self) -> Failure {
        let message = format!("machine {} has ended", self.directory.name());
        Failure::new(FailureCode::Refused, message)
            .hint(format!("its log is {}", self.log().display()))
    }

    fn log(&self) -> PathBuf {
        self.directory.file("host.log")
    }

    fn tell(&self, progress: Progress) {
        self.stage.send_replace(Stage::Starting(progress));
    }

    fn config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Done in the process that becomes QEMU. It ends with the thread that starts it, the first of this process (`run` blocks on it), and so with this
/// process even where that is killed: its memory and disks are served by this one.
fn before_qemu() -> std::io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    Ok(())
}

/// The same for a QEMU whose memory comes while it runs.
fn before_paging_qemu() -> std::io::Result<()> {
    before_qemu()?;
    // Where the kernel has no such filters, it fetches more and works as well.
    let _fetches_more = super::ram::small_pages::deny_huge_pages();
    Ok(())
}

/// Tells a guest that was resumed what became of it: it may have been captured with less memory than it has, and some time ago.
async fn wake(running: Arc<Running>) {
    if running.parts.state.is_some() {
        match running.qemu.grow().await {
            Ok(0) => {}
            Ok(left) => tracing::info!(left, "the guest has not taken back all of its memory yet"),
            Err(error) => tracing::warn!(%error, "the guest has less memory than it could"),
        }
        // Over a thin link it takes until the agent itself has come.
        let set = async {
            while running.qemu.set_time().await == Clock::Unanswered {
                tokio::time::sleep(CLOCK_AGAIN).await;
            }
        };
        let _in_vain = tokio::time::timeout(CLOCK_WITHIN, set).await;
    }
}

/// Lets a guest go on that stopped because a disk could not be read, once nothing is waited for any more.
async fn resume_after_errors(host: Arc<Host>, running: Arc<Running>) {
    let mut wait = LOOK;
    loop {
        tokio::time::sleep(wait).await;
        wait = LOOK;
        if running.parts.late().is_some_and(|late| late > LATE) {
            continue;
        }
        // A monitor that does not answer is QEMU's own waiting, or its end.
        let has_stopped = async || matches!(running.qemu.status().await, Ok(Status::DiskError));
        if !has_stopped().await {
            continue;
        }
        // What is captured stands still on purpose.
        let Ok(_alone) = host.busy.try_lock() else {
            continue;
        };
        if has_stopped().await {
            tracing::warn!("a disk could not be read or written: it is tried again");
            let _again = running.qemu.cont().await;
            wait = LATE;
        }
    }
}

/// How a machine is that does not run.
pub fn stopped_info(directory: &Directory, config: &Config) -> MachineInfo {
    MachineInfo {
        name: directory.name().to_owned(),
        state: MachineState::Stopped,
        origin: config.origin.clone(),
        resume: config.resume,
        memory: config.machine.ram_size,
        cpus: config.machine.cpus,
        disks: config.disks.iter().map(|disk| disk.size).sum(),
        written: directory.written(config, 0).sum(),
        read: 0,
        started_seconds: None,
        waiting_seconds: None,
    }
}

/// Progress of what is waited for.
fn waiting(what: &str) -> Progress {
    Progress {
        phase: Phase::Waiting,
        done: 0,
        total: None,
        rate: 0,
        peers: 0,
        written: 0,
        what: Some(what.to_owned()),
    }
}

fn no_signals(error: std::io::Error) -> Failure {
    Failure::new(FailureCode::Io, format!("listening for signals: {error}"))
}

/// A capsule by its id.
fn by_id(capsule: &capsule_proto::CapsuleId) -> CapsuleRef {
    CapsuleRef(capsule.to_string())
}

/// Answers requests for a machine.
struct Requests(Arc<Host>);

impl Handler for Requests {
    type Request = MachineRequest;

    async fn handle(
        &self,
        request: MachineRequest,
        reporter: Reporter,
    ) -> Result<serde_json::Value, Failure> {
        let host = &self.0;
        match request {
            MachineRequest::MachineStatus(_) => crate::node::json(Ok(host.status().await)),
            MachineRequest::AwaitRunning(_) => {
                crate::node::json(host.await_running(&reporter).await)
            }
            MachineRequest::CaptureMachine(request) => {
                // Not stopped half-way with its client: the guest must go on.
                let (host, reporter) = (host.clone(), reporter.clone());
                let capture = async move { host.capture(request, &reporter).await };
                let captured = tokio::spawn(capture).await;
                let panicked = |panic| Err(crate::work::panicked(&panic));
                crate::node::json(captured.unwrap_or_else(panicked))
            }
            MachineRequest::StopMachine(request) => crate::node::json(host.stop(request).await),
        }
    }
}
