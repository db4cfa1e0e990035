//! The daemon, as a machine's process needs it: asked again where it is not there, as it may be restarted while the machine runs.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::control::{
    Canceller, CapsuleRef, Client, ClientError, Command, Failure, FailureCode, Nbd, Progress,
};
use crate::work::blocking;

/// Before the daemon is asked again.
const PAUSE: Duration = Duration::from_millis(300);
/// How long a daemon may take to be there again for what is asked once.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a disk may take to be served.
const READY: Duration = Duration::from_secs(600);

/// The daemon of a home.
#[derive(Debug, Clone)]
pub struct Daemon {
    home: PathBuf,
}

impl Daemon {
    /// Of a home.
    pub fn new(home: &Path) -> Self {
        Self { home: home.into() }
    }

    /// Asks it; waits a while for one that is not there, or that ends meanwhile.
    pub async fn ask<C>(
        &self,
        command: C,
        tell: impl Fn(Progress) + Send + 'static,
    ) -> Result<C::Answer, Failure>
    where
        C: Command + Clone + Send + 'static,
        C::Answer: Send + 'static,
    {
        let home = self.home.clone();
        blocking(move || {
            let mut until = Instant::now() + PATIENCE;
            loop {
                let asked = Client::connect(&home).and_then(|client| {
                    let answer = client.run(command.clone(), &tell, |_| {});
                    // It was there until now.
                    until = Instant::now() + PATIENCE;
                    answer
                });
                match asked {
                    Ok(answer) => return Ok(answer),
                    Err(ClientError::Failed(failure)) => return Err(failure),
                    Err(error) if Instant::now() > until => return Err(absent(&error)),
                    Err(_) => std::thread::sleep(PAUSE),
                }
            }
        })
        .await
    }

    /// Has it serve a component at a socket, again and again for as long as the answer is kept.
    pub async fn serve(
        &self,
        capsule: &CapsuleRef,
        component: &str,
        socket: &Path,
    ) -> Result<Served, Failure> {
        let nbd = Nbd {
            capsule: capsule.clone(),
            socket: Some(socket.to_owned()),
            listen: None,
            component: Some(component.to_owned()),
            wait: None,
            whole: false,
        };
        let (told, mut ready) = watch::channel(None);
        let served = Served::default();
        let (home, state) = (self.home.clone(), served.state.clone());
        std::thread::spawn(move || serve(&home, &nbd, &state, &told));
        let first = ready.wait_for(Option::is_some);
        let first = tokio::time::timeout(READY, first).await;
        let waited = || {
            let message = format!("component {component} of {} is not served", capsule.0);
            Failure::new(FailureCode::Unreachable, message)
                .hint("is the node running, and does it reach a machine that has the capsule?")
        };
        let first = first.map_err(|_| waited())?.map_err(|_| waited())?;
        match first.clone() {
            Some(Err(failure)) => Err(failure),
            _ => Ok(served),
        }
    }
}

/// A component that the daemon serves as long as this is kept.
#[derive(Default)]
pub struct Served {
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    over: AtomicBool,
    canceller: Mutex<Option<Canceller>>,
}

impl State {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn take(&self) -> Option<Canceller> {
        let mut canceller = self
            .canceller
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        canceller.take()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.state.over.store(true, Ordering::Relaxed);
        if let Some(canceller) = self.state.take() {
            canceller.cancel();
        }
    }
}

/// Asks for it until nobody wants it any more. What the daemon refuses at first is told; later it is only asked again.
fn serve(home: &Path, nbd: &Nbd, state: &State, told: &watch::Sender<Option<Result<(), Failure>>>) {
    while !state.is_over() {
        if let Some(socket) = &nbd.socket {
            // That of a daemon that was killed would be in the way of the next.
            let _gone = std::fs::remove_file(socket);
            let _gone = std::fs::remove_file(socket.with_added_extension("new"));
        }
        if let Ok(client) = Client::connect(home) {
            if let Ok(canceller) = client.canceller() {
                *state
                    .canceller
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner) = Some(canceller);
            }
            // It may have been over just before that.
            if state.is_over() {
                return;
            }
            let ready = |_| drop(told.send_replace(Some(Ok(()))));
            let ended = client.serve(nbd.clone(), |_| {}, |_| {}, ready);
            if let Err(ClientError::Failed(failure)) = ended
                && told.borrow().is_none()
            {
                told.send_replace(Some(Err(failure)));
                return;
            }
        }
        std::thread::sleep(PAUSE);
    }
}

fn absent(error: &ClientError) -> Failure {
    Failure::new(FailureCode::Io, error.to_string())
        .hint("start the node of this home again with `capsule node`")
}
