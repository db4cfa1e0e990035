//! Pulls under way: those of the same capsule are one, heard by all who wait for it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use capsule_proto::CapsuleId;
use capsule_proto::record::Layer;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::fetch::Manner;
use super::patience::{Patience, Place};
use super::transfer;
use crate::control::{Failure, FailureCode, Phase, Progress, Pulled};
use crate::node::Node;
use crate::records::Resolution;
use crate::work::Tell;

/// Layers remembered as wrong; beyond, they are found wrong again.
const MAX_REFUSED: usize = 1024;

/// Pulls under way.
#[derive(Debug, Default)]
pub struct Transfers {
    running: Mutex<HashMap<CapsuleId, Weak<Running>>>,
    refused: Mutex<HashSet<Layer>>,
}

type Outcome = Option<Result<Pulled, Failure>>;

/// A pull that one or more wait for.
#[derive(Debug)]
struct Running {
    name: String,
    progress: watch::Receiver<Progress>,
    outcome: watch::Receiver<Outcome>,
    patience: Arc<Patience>,
    task: AbortHandle,
}

/// A place among those who wait for a pull.
struct Joined {
    running: Arc<Running>,
    place: Place,
    /// Whether the pull was under way before.
    late: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Nobody waits any more; what is verified stays.
        self.task.abort();
    }
}

impl Transfers {
    /// Layers that turned out not to be what their records say.
    pub fn refused(&self) -> HashSet<Layer> {
        self.refused
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Never chooses a layer again: this one, as its record says it. Its blobs may rightly be another's.
    pub fn refuse(&self, layer: Layer) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if refused.len() < MAX_REFUSED {
            refused.insert(layer);
        }
    }

    /// Whether a capsule is being pulled.
    pub fn is_running(&self, capsule: &CapsuleId) -> bool {
        self.running()
            .get(capsule)
            .is_some_and(|running| running.strong_count() > 0)
    }

    /// What is being pulled, and how far it is.
    pub fn list(&self) -> Vec<(String, Progress)> {
        let running = self.running();
        let alive = running.values().filter_map(Weak::upgrade);
        alive
            .map(|running| (running.name.clone(), running.progress.borrow().clone()))
            .collect()
    }

    fn running(&self) -> MutexGuard<'_, HashMap<CapsuleId, Weak<Running>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins the pull of a capsule that is under way, or a new one.
    fn join(
        &self,
        node: &Arc<Node>,
        resolution: &Resolution,
        manner: &Manner,
        patience: Duration,
    ) -> Joined {
        let capsule = resolution.capsule;
        let mut all = self.running();
        all.retain(|_, running| running.strong_count() > 0);
        let known = all.get(&capsule).and_then(Weak::upgrade);
        let known = known.filter(|known| known.outcome.borrow().is_none());
        let late = known.is_some();
        let waiting = known
            .as_ref()
            .map_or_else(Arc::default, |known| known.patience.clone());
        // It has its place before anybody is asked whether to go on.
        let place = waiting.wait(Instant::now(), patience);
        let running = known.unwrap_or_else(|| {
            let new = Running::start(node.clone(), resolution.clone(), manner.clone(), waiting);
            let new = Arc::new(new);
            all.insert(capsule, Arc::downgrade(&new));
            new
        });
        Joined {
            running,
            place,
            late,
        }
    }
}

impl Running {
    fn start(
        node: Arc<Node>,
        resolution: Resolution,
        manner: Manner,
        patience: Arc<Patience>,
    ) -> Self {
        let name = manner.name.clone();
        let (progress, progress_receiver) = watch::channel(waiting(&name));
        let (outcome, outcome_receiver) = watch::channel(None);
        let asked = patience.clone();
        let task = tokio::spawn(async move {
            let tell = |now| drop(progress.send_replace(now));
            let result = transfer(&node, &resolution, &manner, &asked, &tell).await;
            outcome.send_replace(Some(result));
        });
        Self {
            name,
            progress: progress_receiver,
            outcome: outcome_receiver,
            patience,
            task: task.abort_handle(),
        }
    }
}

/// Fetches a capsule that is known, together with whoever else does. Fails where nothing arrives for as long as `patience`,
/// however long the others wait.
pub async fn fetch_capsule(
    node: &Arc<Node>,
    resolution: Resolution,
    manner: Manner,
    patience: Duration,
    tell: &dyn Tell,
) -> Result<Pulled, Failure> {
    let begun = Instant::now();
    loop {
        let joined = node.transfers.join(node, &resolution, &manner, patience);
        let late = joined.late;
        match hear(joined, tell).await {
            // Those who came before had lost their patience by then; this one has not.
            Err(failure)
                if late
                    && failure.code == FailureCode::Unreachable
                    && begun.elapsed() < patience => {}
            ended => return ended,
        }
    }
}

/// Waits for the end of a pull, or of the patience with it.
async fn hear(joined: Joined, tell: &dyn Tell) -> Result<Pulled, Failure> {
    let Joined {
        running, mut place, ..
    } = joined;
    let (mut progress, mut outcome) = (running.progress.clone(), running.outcome.clone());
    loop {
        tokio::select! {
            biased;
            done = outcome.wait_for(Option::is_some) => {
                let outcome = done.ok().and_then(|outcome| outcome.clone());
                return outcome.unwrap_or_else(|| Err(unheard()));
            }
            told = &mut place.left => return Err(told.unwrap_or_else(|_| unheard())),
            Ok(()) = progress.changed() => tell.tell(progress.borrow_and_update().clone()),
        }
    }
}

fn unheard() -> Failure {
    Failure::new(FailureCode::Internal, "the transfer ended without a word")
}

/// Progress before there is any.
pub(super) fn waiting(name: &str) -> Progress {
    let what = Some(name.to_owned());
    Progress {
        phase: Phase::Waiting,
        done: 0,
        total: None,
        rate: 0,
        peers: 0,
        written: 0,
        what,
    }
}
