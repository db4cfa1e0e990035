//! Ctrl-C and its kin, for commands that have something to put in order before they end.
//!
//! Commands that answer at once leave signals alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

/// Whether a signal has come, and which.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicI32>);

impl Interrupt {
    /// Catches SIGINT, SIGTERM and SIGHUP from now on: remembers the first, and runs `then` on a thread of its own. A
    /// second one ends the program at once if `impatient`; what leaves things behind when it ends halfway is not.
    ///
    /// # Errors
    /// The system gives no thread or no signal handler.
    pub fn catch(impatient: bool, then: impl FnOnce() + Send + 'static) -> Result<Self> {
        let interrupt = Self::default();
        let seen = Arc::clone(&interrupt.0);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build();
        let runtime = runtime.context("cannot listen for signals")?;
        let (mut int, mut term, mut hangup) = {
            let _entered = runtime.enter();
            let listen = |kind| signal(kind).context("cannot listen for signals");
            (
                listen(SignalKind::interrupt())?,
                listen(SignalKind::terminate())?,
                listen(SignalKind::hangup())?,
            )
        };
        let mut next = move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = int.recv() => SignalKind::interrupt(),
                    _ = term.recv() => SignalKind::terminate(),
                    _ = hangup.recv() => SignalKind::hangup(),
                }
                .as_raw_value()
            })
        };
        let watch = move || {
            seen.store(next(), Ordering::SeqCst);
            // What `then` does may hang; the second signal must not wait for it.
            let orderly = thread::Builder::new().name("interrupt".into()).spawn(then);
            loop {
                let again = next();
                if impatient || orderly.is_err() {
                    std::process::exit(128 + again);
                }
            }
        };
        thread::Builder::new()
            .name("signals".into())
            .spawn(watch)
            .context("cannot start a thread")?;
        Ok(interrupt)
    }

    /// The signal that came, if one did.
    pub fn signal(&self) -> Option<i32> {
        Some(self.0.load(Ordering::SeqCst)).filter(|&signal| signal != 0)
    }
}
