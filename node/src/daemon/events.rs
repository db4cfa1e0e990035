//! What happens by itself: events of the network, damage on the disk, records that end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use capsule_swarm::{Event, PeerId};
use tokio::sync::mpsc;

use super::memory;
use crate::control::Failure;
use crate::node::Node;
use crate::store::{Ban, Damage, Store};
use crate::verify::mark_hurt;
use crate::work::blocking;

/// How long a peer that sent wrong bytes stays banned: bad memory does not heal, but machines are repaired.
const BAN: u64 = 7 * 24 * 3600;
/// How often bans are looked at that may have ended: against a week, an hour more is nothing.
const LIFT_EVERY: Duration = Duration::from_secs(3600);
/// Where addresses of peers are kept between runs.
const ADDRESSES: &str = "peer addresses";
/// Addresses kept: enough that some of them still answer after a year.
const MAX_ADDRESSES: usize = 64;
/// How often addresses are saved while peers come and go; also at the end.
const SAVE_EVERY: Duration = Duration::from_secs(600);
/// Without content moved for so long, the network is quiet. Looking costs microseconds.
const QUIET: Duration = Duration::from_secs(15);
/// Longest sleep between looks at which records have ended: a clock may be set.
const PURGE_EVERY: Duration = Duration::from_secs(3600);
/// Shortest.
const PURGE_AT_MOST: Duration = Duration::from_secs(10);

/// Hears the network until it ends.
pub async fn watch_network(node: Arc<Node>, mut events: mpsc::Receiver<Event>) {
    let mut saved = Instant::now();
    while let Some(event) = events.recv().await {
        match event {
            // Whoever waits for records hears of them from the records themselves.
            Event::RecordReceived { .. } => {}
            Event::PeerConnected(_) => {
                if saved.elapsed() >= SAVE_EVERY {
                    saved = Instant::now();
                    save_addresses(&node).await;
                }
            }
            Event::PeerDisconnected(_) => {}
            Event::PeerBanned { peer, reason } => ban(&node, peer, reason).await,
            Event::Refused { address, reason } => {
                node.trouble(format!("{address} was refused: {reason}"))
            }
            Event::StoreDamaged { root, reason } => {
                node.trouble(format!("{root} could not be served: {reason}"))
            }
            Event::Status {
                peer,
                name,
                capsules,
                ..
            } => node.heard(peer, name, capsules),
        }
    }
}

async fn ban(node: &Arc<Node>, peer: PeerId, reason: String) {
    let who = node
        .name_of(&peer)
        .map_or_else(|| peer.to_string(), |name| format!("{name} ({peer})"));
    node.trouble(format!("{who} is banned for a week: {reason}"));
    let (store, until) = (node.store.clone(), node.clock.now() + BAN);
    let kept = blocking(move || {
        Ok(store.ban(
            &peer.to_bytes(),
            &Ban {
                reason,
                until: Some(until),
            },
        )?)
    })
    .await;
    if let Err(failure) = kept {
        tracing::warn!(%failure, "the ban holds only until the node is restarted");
    }
}

/// Lets banned peers come again when their ban has ended. Runs for ever.
pub async fn lift_bans(node: Arc<Node>) {
    loop {
        tokio::time::sleep(LIFT_EVERY).await;
        if let Err(failure) = lift_ended_bans(&node, node.clock.now()).await {
            tracing::warn!(%failure, "bans that have ended could not be lifted");
        }
    }
}

/// Lifts the bans that have ended at a time.
pub async fn lift_ended_bans(node: &Node, now: u64) -> Result<(), Failure> {
    let store = node.store.clone();
    let lifted = blocking(move || Ok(store.lift_ended_bans(now)?)).await?;
    for peer in lifted
        .iter()
        .filter_map(|peer| PeerId::from_bytes(peer).ok())
    {
        tracing::info!(%peer, "its ban has ended");
        node.network.unban(peer).await?;
    }
    Ok(())
}

/// Takes back what no longer verifies, and notes which capsules that hurts.
pub async fn watch_damage(node: Arc<Node>, mut damage: mpsc::Receiver<Damage>) {
    while let Some(first) = damage.recv().await {
        // Where much is damaged, much of it is found at a time.
        let mut all = BTreeMap::from([(first.root, first)]);
        while let Ok(more) = damage.try_recv() {
            let same = all.entry(more.root).or_insert_with(|| more.clone());
            same.groups.union_with(&more.groups);
        }
        for (root, found) in all {
            let groups = found.groups.count();
            node.trouble(format!(
                "{groups} chunk groups of {root} are damaged on the disk: `capsule verify --repair` fetches them again; look at the disk's health"
            ));
            if let Err(failure) = take_back(&node, found).await {
                tracing::warn!(%failure, %root, "damage could not be taken note of");
            }
        }
    }
}

async fn take_back(node: &Arc<Node>, found: Damage) -> Result<(), Failure> {
    node.network.withdraw(found.root).await?;
    node.announce([found.root]).await?;
    let hurt = node.while_keeping(move |node| {
        let here = node.store.present(&found.root);
        // Whoever read it may have had it come again.
        match here.is_some_and(|here| found.groups.difference(&here.ranges).is_empty()) {
            true => Ok(Vec::new()),
            false => mark_hurt(node, &BTreeSet::from([found.root])),
        }
    });
    hurt.await?;
    // Followers look whether what they follow is still whole, and fetch what is not.
    node.records.touch();
    node.tell_capsules().await
}

/// Gives memory back when the network has become quiet. Runs for ever.
pub async fn trim_when_quiet(node: Arc<Node>) {
    let (mut moved, mut busy) = (0, true);
    loop {
        tokio::time::sleep(QUIET).await;
        let Ok(totals) = node.network.totals().await else {
            return;
        };
        let now = totals.all.sent + totals.all.received;
        let quiet = now == moved;
        if quiet && busy {
            memory::trim();
        }
        (moved, busy) = (now, !quiet);
    }
}

/// Drops records when they end. Runs for ever.
pub async fn purge_records(node: Arc<Node>) {
    loop {
        let records = node.records.clone();
        let next = blocking(move || Ok(records.purge()?))
            .await
            .unwrap_or_default();
        let wait = next.map_or(PURGE_EVERY, |end| {
            Duration::from_secs(end.saturating_sub(node.clock.now()))
        });
        tokio::time::sleep(wait.clamp(PURGE_AT_MOST, PURGE_EVERY)).await;
    }
}

/// Keeps the addresses of peers that answer, for the next start.
pub async fn save_addresses(node: &Node) {
    let Ok(peers) = node.network.peers().await else {
        return;
    };
    node.remember_names(&peers);
    // Where a peer dialled us from says nothing about where it listens.
    let mut addresses: Vec<String> = peers
        .iter()
        .filter(|peer| peer.dialled)
        .map(|peer| peer.address.to_string())
        .collect();
    if addresses.is_empty() {
        return;
    }
    addresses.extend(known_addresses(&node.store));
    let mut seen = BTreeSet::new();
    addresses.retain(|address| seen.insert(address.clone()));
    addresses.truncate(MAX_ADDRESSES);
    let store = node.store.clone();
    let text = addresses.join("\n");
    if let Err(failure) = blocking(move || Ok(store.set_value(ADDRESSES, text.as_bytes())?)).await {
        tracing::debug!(%failure, "addresses of peers were not kept");
    }
}

/// Addresses of peers kept by earlier runs. What cannot be read is done without.
pub fn known_addresses(store: &Store) -> Vec<String> {
    let value = store.value(ADDRESSES).ok().flatten().unwrap_or_default();
    String::from_utf8_lossy(&value)
        .lines()
        .map(str::to_owned)
        .collect()
}
