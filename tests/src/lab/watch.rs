//! Whether all of what was published is with the nodes that pull: what a member hears that joins them and only listens.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use capsule_proto::wire::Control;
use capsule_proto::{GroupRanges, RootHash};
use futures::future::join_all;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};

use super::namespace::Namespace;
use crate::member::Member;
use crate::rogue::{Heard, Link};

/// Its number among members by hand.
const NUMBER: u8 = 250;
/// Before it connects again to who cut it off: it is of no use to them.
const PAUSE: Duration = Duration::from_millis(500);
/// Announcements that wait to be looked at.
const WAITING: usize = 1024;

/// Waits until the nodes at these addresses hold each chunk group of the blobs, all together.
pub fn all_is_out(
    namespace: &Namespace,
    token: &str,
    at: &[String],
    blobs: &[(RootHash, u64)],
    patience: Duration,
) -> Result<()> {
    let member = Member::of(token, NUMBER);
    namespace.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(listen(&member, at, blobs, Instant::now() + patience))
    })
}

async fn listen(
    member: &Member,
    at: &[String],
    blobs: &[(RootHash, u64)],
    deadline: Instant,
) -> Result<()> {
    let (tell, mut told) = mpsc::channel(WAITING);
    let visits = join_all(at.iter().map(|at| visit(member, at, tell.clone())));
    let mut lacking: BTreeMap<RootHash, GroupRanges> = blobs
        .iter()
        .map(|(root, size)| (*root, GroupRanges::all(*size)))
        .collect();
    let hear = async {
        while !lacking.values().all(GroupRanges::is_empty) {
            let heard = timeout_at(deadline, told.recv()).await;
            let (root, groups): (RootHash, GroupRanges) = heard
                .context("the others do not hold a copy in time")?
                .context("nobody is left to listen to")?;
            if let Some(lacking) = lacking.get_mut(&root) {
                *lacking = lacking.difference(&groups);
            }
        }
        Ok(())
    };
    ensure!(!at.is_empty(), "there is nobody to listen to");
    tokio::select! {
        done = hear => done,
        _ = visits => unreachable!("visits do not end"),
    }
}

/// Tells what a node announces.
async fn visit(member: &Member, at: &str, tell: mpsc::Sender<(RootHash, GroupRanges)>) {
    loop {
        if let Ok(mut link) = Link::enter(at, &member.key, &member.credential).await {
            while let Some(heard) = link.hear().await {
                match heard {
                    Heard::Control(Control::Have { root, groups, .. }) => {
                        let Ok(()) = tell.send((root, groups)).await else {
                            return;
                        };
                    }
                    Heard::Control(Control::Ping { nonce }) => {
                        // Where it was cut off, the next round tells.
                        let _cut = link.say(&Control::Pong { nonce }).await;
                    }
                    _ => {}
                }
            }
        }
        sleep(PAUSE).await;
    }
}
