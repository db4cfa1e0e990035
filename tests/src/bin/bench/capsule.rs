//! Our own daemons as benchmarks use them: asked over their sockets, with a deadline.

use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};

use anyhow::{Context, Result};
use capsule_node::control::{
    CapsuleRef, Client, ClientError, Command, Progress, Publish, Published, Pull, Pulled,
};
use capsule_tests::Node;

use crate::process::Deadline;

/// What benchmarks publish.
const NAME: &str = "bench:1";

/// Process id of a node's daemon.
pub fn pid(node: &Node) -> u32 {
    node.pid().as_raw_nonzero().get().unsigned_abs()
}

/// Publishes a path.
pub fn publish(node: &Node, path: &Path, deadline: &Deadline) -> Result<Published> {
    let request = Publish::of(path, NAME.parse().context("the name is a good one")?);
    ask(node, "publishing", request, deadline, drop)
}

/// Pulls what was published.
pub fn pull(node: &Node, deadline: &Deadline, on_progress: impl FnMut(Progress)) -> Result<Pulled> {
    let request = Pull {
        capsule: CapsuleRef(NAME.into()),
        wait: None,
        like_path: None,
        like_capsule: None,
    };
    ask(node, "the pull", request, deadline, on_progress)
}

/// Asks a daemon; stops the request at the deadline.
pub fn ask<C: Command>(
    node: &Node,
    what: &str,
    command: C,
    deadline: &Deadline,
    on_progress: impl FnMut(Progress),
) -> Result<C::Answer> {
    let client = Client::connect(node.home())?;
    let canceller = client.canceller()?;
    let (done, waiting) = channel::<()>();
    let left = deadline.left();
    let watchdog = std::thread::spawn(move || {
        if waiting.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
            canceller.cancel();
        }
    });
    let answer = client.run(command, on_progress, drop);
    drop(done);
    // It does nothing that could panic.
    let _ = watchdog.join();
    if matches!(answer, Err(ClientError::Lost)) {
        deadline.check(what)?;
    }
    answer.with_context(|| what.to_owned())
}
