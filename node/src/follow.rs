//! Following channels: each new version is pulled by itself, and the newest two are kept pinned.
//!
//! After a time away that is the newest version first, and then what came with it of those that are to be kept.
//!
//! One task a channel. It sleeps until records change, or, after a failure, until its next try; nothing polls.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capsule_proto::name::Channel;
use capsule_swarm::Priority;
use tokio::task::AbortHandle;

use crate::control::{
    Failure, FailureCode, Follow, FollowInfo, Followed, Holding, Unfollow, Unfollowed,
};
use crate::node::Node;
use crate::records::{KnownName, Resolution};
use crate::store::{Follow as FollowRow, PinOrigin};
use crate::transfer::{DEFAULT_PATIENCE, fetch_capsule, manner};
use crate::work::blocking;

/// Versions of a followed channel that stay pinned: the current one, and the one to go back to.
const KEEP: u32 = 2;
/// Most channels followed: each has a task.
const MAX_FOLLOWS: usize = 256;
/// First wait after a failure; doubled each time.
const RETRY_FIRST: Duration = Duration::from_secs(5);
/// Longest wait after failures: a provider that comes back is noticed within it.
const RETRY_MAX: Duration = Duration::from_secs(300);

/// The tasks that follow.
#[derive(Debug, Default)]
pub struct Follower {
    channels: Mutex<HashMap<Channel, Task>>,
}

#[derive(Debug)]
struct Task {
    abort: AbortHandle,
    trouble: Option<String>,
}

impl Drop for Task {
    fn drop(&mut self) {
        self.abort.abort();
    }
}

impl Follower {
    fn channels(&self) -> MutexGuard<'_, HashMap<Channel, Task>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, node: &Arc<Node>, channel: Channel, follow: FollowRow) {
        // A weak reference: a node that is put down does not wait for its followers.
        let (weak, followed) = (Arc::downgrade(node), channel.clone());
        let task = tokio::spawn(async move {
            let mut wait = None;
            let Some(mut changes) = weak.upgrade().map(|node| node.records.changes()) else {
                return;
            };
            loop {
                changes.borrow_and_update();
                let Some(node) = weak.upgrade() else { return };
                wait = match catch_up(&node, &followed, &follow).await {
                    Ok(()) => None,
                    Err(failure) => {
                        node.follower.note(&followed, Some(failure.message));
                        Some(wait.map_or(RETRY_FIRST, |wait: Duration| (wait * 2).min(RETRY_MAX)))
                    }
                };
                drop(node);
                let changed = changes.changed();
                let gone = match wait {
                    Some(wait) => matches!(tokio::time::timeout(wait, changed).await, Ok(Err(_))),
                    None => changed.await.is_err(),
                };
                if gone {
                    return;
                }
            }
        });
        let abort = task.abort_handle();
        self.channels().insert(
            channel,
            Task {
                abort,
                trouble: None,
            },
        );
    }

    fn note(&self, channel: &Channel, trouble: Option<String>) {
        if let Some(task) = self.channels().get_mut(channel) {
            task.trouble = trouble;
        }
    }

    fn stop(&self, channel: &Channel) {
        self.channels().remove(channel);
    }

    /// Stops following, without forgetting what is followed.
    pub fn stop_all(&self) {
        self.channels().clear();
    }
}

/// Takes up the channels that the store says are followed.
pub async fn resume(node: &Arc<Node>) -> Result<(), Failure> {
    let store = node.store.clone();
    for (channel, follow) in blocking(move || Ok(store.follows()?)).await? {
        node.follower.start(node, channel, follow);
    }
    Ok(())
}

/// Follows a channel.
pub async fn follow(node: &Arc<Node>, request: Follow) -> Result<Followed, Failure> {
    let (channel, shared) = (request.channel, node.clone());
    // What the store says and who follows change together, though who asked may go away.
    node.while_keeping(move |node| {
        let known = node.store.follows()?;
        let new = !known.iter().any(|(known, _)| *known == channel);
        if new && known.len() >= MAX_FOLLOWS {
            let message = format!("{MAX_FOLLOWS} channels are followed already");
            return Err(
                Failure::new(FailureCode::Refused, message).hint("`capsule unfollow` some of them")
            );
        }
        if new {
            let row = FollowRow {
                keep: KEEP,
                since: node.clock.now(),
            };
            node.store.follow(&channel, &row)?;
            node.follower.start(&shared, channel.clone(), row);
        }
        let newest = node.records.newest(&channel)?;
        Ok(Followed {
            channel: channel.to_string(),
            new,
            newest: newest.map(|newest| newest.name.to_string()),
        })
    })
    .await
}

/// Follows a channel no longer; its pins go, its content stays until collected.
pub async fn unfollow(node: &Arc<Node>, request: Unfollow) -> Result<Unfollowed, Failure> {
    let channel = request.channel;
    node.while_keeping(move |node| {
        let followed = node.store.unfollow(&channel)?;
        // It pins while it holds what is held here: none of its pins comes later.
        node.follower.stop(&channel);
        let ours = PinOrigin::Follow(channel.to_string());
        for (capsule, _) in node
            .store
            .pins()?
            .into_iter()
            .filter(|(_, origin)| *origin == ours)
        {
            node.store.unpin(&capsule, &ours)?;
        }
        Ok(Unfollowed {
            channel: channel.to_string(),
            followed,
        })
    })
    .await
}

/// Channels followed, for `status`. Blocks.
pub fn list(node: &Node) -> Result<Vec<FollowInfo>, Failure> {
    let mut follows = Vec::new();
    for (channel, follow) in node.store.follows()? {
        let newest = node.records.newest(&channel)?;
        let holding = newest.as_ref().map_or(Ok(Holding::Absent), |newest| {
            node.holdings.holding(&newest.capsule)
        })?;
        let trouble = node
            .follower
            .channels()
            .get(&channel)
            .and_then(|task| task.trouble.clone());
        let (channel, newest) = (
            channel.to_string(),
            newest.map(|newest| newest.name.to_string()),
        );
        follows.push(FollowInfo {
            channel,
            newest,
            holding,
            since: follow.since,
            trouble,
        });
    }
    Ok(follows)
}

/// Brings the newest versions here, and pins the newest that are.
async fn catch_up(node: &Arc<Node>, channel: &Channel, follow: &FollowRow) -> Result<(), Failure> {
    let (shared, asked) = (node.clone(), channel.clone());
    let known = move || {
        Ok((
            shared.records.names_of(&asked)?,
            shared.records.ended(&asked)?,
        ))
    };
    let (names, ended) = blocking(known).await?;
    // What is left when the newest has ended is older than what was here.
    let (Some(newest), None) = (names.first(), ended) else {
        return Ok(());
    };
    bring(node, newest).await?;
    let keep = follow.keep as usize;
    let pin = async |names: Vec<KnownName>| {
        let followed = channel.clone();
        node.while_keeping(move |node| pin_newest(node, &followed, &names, keep))
            .await
    };
    pin(names.clone()).await?;
    // Of the others what came since the channel is followed; before that, nobody asked for it.
    let others = names.iter().skip(1).take(keep.saturating_sub(1));
    for name in others.filter(|name| name.issued >= follow.since) {
        bring(node, name).await?;
        pin(names.clone()).await?;
    }
    node.follower.note(channel, None);
    Ok(())
}

/// Brings a version here, unless it is.
async fn bring(node: &Arc<Node>, name: &KnownName) -> Result<(), Failure> {
    let (shared, capsule) = (node.clone(), name.capsule);
    let held = blocking(move || Ok(shared.holdings.holding(&capsule)?)).await?;
    if held == Holding::Complete {
        return Ok(());
    }
    let resolution = Resolution {
        capsule,
        name: Some(name.name.clone()),
        manifest_size: Some(name.manifest_size),
    };
    let manner = manner(&resolution, Priority::Background);
    fetch_capsule(node, resolution, manner, DEFAULT_PATIENCE, &(|_| ())).await?;
    Ok(())
}

/// Pins the newest versions that are here, and takes the pins of older ones away. Fails where the very newest is not here any
/// more: it was collected between its arrival and its pin, and comes again with the next try.
fn pin_newest(
    node: &Node,
    channel: &Channel,
    names: &[KnownName],
    keep: usize,
) -> Result<(), Failure> {
    let mut kept = Vec::new();
    for name in names {
        let fresh = kept.len() < keep && !kept.contains(&name.capsule);
        if fresh && node.holdings.holding(&name.capsule)? == Holding::Complete {
            kept.push(name.capsule);
        }
    }
    let ours = PinOrigin::Follow(channel.to_string());
    // New pins first, so that at no time less is kept than should be.
    for capsule in &kept {
        node.store.pin(capsule, &ours)?;
    }
    for (capsule, origin) in node.store.pins()? {
        if origin == ours && !kept.contains(&capsule) {
            node.store.unpin(&capsule, &ours)?;
        }
    }
    match names.first() {
        Some(newest) if !kept.contains(&newest.capsule) => {
            let message = format!("{} was removed before it was pinned", newest.name);
            Err(Failure::new(FailureCode::Busy, message).hint("it is fetched again by itself"))
        }
        _ => Ok(()),
    }
}
