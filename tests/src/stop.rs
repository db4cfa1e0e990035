//! Stopping early, by Ctrl-C, SIGTERM, or the end of the program that started this one inside its namespaces: everything that
//! was started is ended, and gigabytes of scratch do not stay behind.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{SignalKind, signal};

use crate::accounts::members;
use crate::inside;

/// What a shell says of programs that Ctrl-C ended.
const STOPPED: i32 = 130;
/// How often removing is tried: what is being ended may still write.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);

/// Cleans up when a signal comes; inside namespaces also when the program that made them ends.
pub fn with_what_started_it(scratch: &Path) -> Result<()> {
    on_signals(scratch)?;
    if inside::network().is_some() {
        with_starter(scratch);
    }
    Ok(())
}

fn on_signals(scratch: &Path) -> Result<()> {
    let scratch = scratch.to_owned();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
        )
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        stop(&scratch)
    });
    Ok(())
}

/// Standard input ends then, whose other end the starting program holds.
fn with_starter(scratch: &Path) {
    let scratch: PathBuf = scratch.to_owned();
    std::thread::spawn(move || {
        // Nothing is ever written to it.
        let _ = std::io::stdin().read(&mut [0]);
        stop(&scratch)
    });
}

fn stop(scratch: &Path) {
    let me = std::process::id();
    for _ in 0..TRIES {
        for pid in members(me).into_iter().filter(|&pid| pid != me) {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                // One that has ended by itself needs nothing.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        if inside::network().is_some() {
            // It may be a file system of its own, which does not go like a directory.
            inside::unmount(scratch);
        }
        if std::fs::remove_dir_all(scratch).is_ok() || !scratch.exists() {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    eprintln!("stopped");
    std::process::exit(STOPPED);
}
