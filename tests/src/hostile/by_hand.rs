//! Misbehaviour that the network crate is too well-bred for: what says it by hand on the wire, to many nodes at a time.
//!
//! Every loop ends at a time that the caller gives, waits between its turns, and has a bound on what it does altogether.

use std::collections::VecDeque;
use std::io::Result;
use std::sync::Arc;
use std::time::Duration;

use capsule_proto::credential::MachineKey;
use capsule_proto::ranges::{GROUP_LEN, group_count};
use capsule_proto::wire::{Control, DataHeader, FrameKind, Reject, RejectReason, Request};
use capsule_proto::{GroupRanges, RootHash};
use futures::io::AsyncWriteExt;
use futures::stream::{FuturesUnordered, StreamExt};
use libp2p::tcp::tokio::TcpStream;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::Held;
use crate::data;
use crate::member::Member;
use crate::rogue::{self, ALPN, Heard, Lane, Link};

/// Between two attempts to be let in by a node.
const PAUSE: Duration = Duration::from_secs(1);
/// Most attempts at one node.
const MAX_ATTEMPTS: usize = 2000;
/// What a drip is, and how often one falls.
const DRIP: usize = 16;
const DRIPS: Duration = Duration::from_secs(1);
/// Most requests whose answers wait to drip.
const MAX_WAITING: usize = 256;
/// Blobs announced to each node at once, and all in all: a node takes in the claims of 16,384 blobs.
const ANNOUNCED_AT_ONCE: usize = 4000;
const ANNOUNCED: usize = 16_000;
/// Between two more.
const ANNOUNCING: Duration = Duration::from_millis(20);
/// Longest that a member that flaps stays.
const STAY_MS: u64 = 600;
/// Most connections of strangers at a time, between two of one, and all in all.
const STRANGERS: usize = 8;
const KNOCKING: Duration = Duration::from_millis(20);
const MAX_KNOCKS: usize = 100_000;

/// A member by hand, and whom it is to trouble.
pub struct Trouble {
    /// Who it is.
    pub member: Member,
    /// Nodes' addresses: `HOST:PORT`.
    pub at: Vec<String>,
    /// Blobs that it says it has.
    pub blobs: Vec<Held>,
    /// Decides what is left to chance.
    pub seed: u64,
    /// When it ends.
    pub until: Instant,
}

/// What is said to a node until it cuts the connection.
enum Manner {
    Drip,
    Announce,
    Flap,
}

impl Trouble {
    /// Announces its blobs and answers what it is asked at a few bytes a second.
    pub async fn drip(self) {
        self.everywhere(Manner::Drip).await;
    }

    /// Announces thousands of blobs, and random ranges of its own, and has nothing.
    pub async fn announce(self) {
        self.everywhere(Manner::Announce).await;
    }

    /// Connects, announces and leaves, again and again.
    pub async fn flap(self) {
        self.everywhere(Manner::Flap).await;
    }

    async fn everywhere(self, manner: Manner) {
        let (me, manner) = (&self, &manner);
        let visits = self.at.iter().enumerate();
        let visits = visits.map(|(number, at)| me.visit(number as u64, at, manner));
        let mut visits: FuturesUnordered<_> = visits.collect();
        while visits.next().await.is_some() {}
    }

    /// Goes to a node again whenever it was cut off.
    async fn visit(&self, number: u64, at: &str, manner: &Manner) {
        let mut chance = SmallRng::seed_from_u64(self.seed ^ (number << 32));
        let mut link = None;
        for _ in 0..MAX_ATTEMPTS {
            let Member {
                key, credential, ..
            } = &self.member;
            if let Ok(mut entered) = Link::enter(at, key, credential).await {
                // That it is cut off is what is meant to happen.
                let _cut = match manner {
                    Manner::Drip => self.drip_to(&mut entered).await,
                    Manner::Announce => self.announce_to(&mut entered, &mut chance).await,
                    Manner::Flap => self.call_on(&mut entered, &mut chance).await,
                };
                link = Some(entered);
            }
            let pause = PAUSE.mul_f64(chance.random_range(0.2..1.0));
            sleep(pause).await;
            // Not before: what it said last is still on its way.
            drop(link.take());
            if Instant::now() >= self.until {
                return;
            }
        }
    }

    async fn say_all(&self, link: &mut Link) -> Result<()> {
        for blob in &self.blobs {
            let (root, size) = (blob.tree.root, blob.tree.size);
            let groups = GroupRanges::all(size);
            link.say(&Control::Have { root, size, groups }).await?;
        }
        Ok(())
    }

    async fn call_on(&self, link: &mut Link, chance: &mut SmallRng) -> Result<()> {
        self.say_all(link).await?;
        sleep(Duration::from_millis(chance.random_range(0..STAY_MS))).await;
        Ok(())
    }

    async fn drip_to(&self, link: &mut Link) -> Result<()> {
        self.say_all(link).await?;
        let mut waiting: VecDeque<Request> = VecDeque::new();
        let mut answer: VecDeque<u8> = VecDeque::new();
        let mut drips = tokio::time::interval(DRIPS);
        loop {
            tokio::select! {
                heard = timeout_at(self.until, link.hear()) => match heard {
                    Ok(Some(Heard::Control(Control::Request(request)))) if waiting.len() < MAX_WAITING => waiting.push_back(request),
                    Ok(Some(heard)) => be_polite(link, heard).await?,
                    Ok(None) | Err(_) => return Ok(()),
                },
                _ = drips.tick() => {
                    if answer.is_empty() && let Some(request) = waiting.pop_front() {
                        answer = self.answer(&request).into();
                    }
                    let drip: Vec<u8> = answer.drain(..DRIP.min(answer.len())).collect();
                    link.raw(Lane::Data, &drip).await?;
                }
            }
        }
    }

    /// The frame that answers a request, as it should be.
    fn answer(&self, request: &Request) -> Vec<u8> {
        let Some(blob) = (self.blobs.iter()).find(|blob| blob.tree.root == request.root) else {
            return vec![];
        };
        let header = DataHeader {
            request: request.id,
            groups: (request.groups.end - request.groups.start) as u32,
            compressed: false,
        };
        let mut payload = header.encode().to_vec();
        blob.encode(request.groups.clone(), request.height, &mut payload);
        rogue::frame(FrameKind::Data, &payload)
    }

    async fn announce_to(&self, link: &mut Link, chance: &mut SmallRng) -> Result<()> {
        for _ in 0..ANNOUNCED_AT_ONCE {
            link.say(&invented(chance)).await?;
        }
        let mut more = tokio::time::interval(ANNOUNCING);
        let mut left = ANNOUNCED - ANNOUNCED_AT_ONCE;
        loop {
            tokio::select! {
                heard = timeout_at(self.until, link.hear()) => match heard {
                    Ok(Some(heard)) => be_polite(link, heard).await?,
                    Ok(None) | Err(_) => return Ok(()),
                },
                _ = more.tick(), if left > 0 => {
                    left -= 1;
                    link.say(&invented(chance)).await?;
                    for blob in &self.blobs {
                        let (root, size) = (blob.tree.root, blob.tree.size);
                        let groups = ranges(chance, size);
                        link.say(&Control::Have { root, size, groups }).await?;
                    }
                }
            }
        }
    }
}

/// Answers as one that has nothing and lives: else it would be cut off for its silence.
async fn be_polite(link: &mut Link, heard: Heard) -> Result<()> {
    match heard {
        Heard::Control(Control::Ping { nonce }) => link.say(&Control::Pong { nonce }).await,
        Heard::Control(Control::Request(Request { id, .. })) => {
            let reason = RejectReason::NotHeld;
            link.say(&Control::Reject(Reject { id, reason })).await
        }
        _ => Ok(()),
    }
}

/// A blob that nobody has.
fn invented(chance: &mut SmallRng) -> Control {
    let size = chance.random_range(GROUP_LEN..1 << 30);
    Control::Have {
        root: RootHash::from_bytes(chance.random()),
        size,
        groups: ranges(chance, size),
    }
}

/// A few runs of groups, somewhere.
fn ranges(chance: &mut SmallRng, size: u64) -> GroupRanges {
    let count = group_count(size);
    let runs = 0..chance.random_range(1..16);
    let run = |_| {
        let start = chance.random_range(0..count);
        start..chance.random_range(start..count) + 1
    };
    runs.map(run).collect()
}

/// Connects without credentials again and again, in all ways that there are.
pub async fn strangers(at: Vec<String>, seed: u64, until: Instant) {
    let knocking = (0..STRANGERS as u64).map(|number| stranger(&at, seed ^ (number << 32), until));
    let mut knocking: FuturesUnordered<_> = knocking.collect();
    while knocking.next().await.is_some() {}
}

async fn stranger(at: &[String], seed: u64, until: Instant) {
    let mut chance = SmallRng::seed_from_u64(seed);
    for _ in 0..MAX_KNOCKS / STRANGERS {
        let node = &at[chance.random_range(0..at.len())];
        let way = chance.random_range(0..4);
        // How it is refused is not its business; the node ends it within 10 s.
        let _refused = timeout_at(until, knock(node, way, &mut chance)).await;
        let next = Instant::now() + KNOCKING;
        sleep_until(next.min(until)).await;
        if Instant::now() >= until {
            return;
        }
    }
}

async fn knock(node: &str, way: u8, chance: &mut SmallRng) -> Result<()> {
    let noise = data::noise(chance.random(), 2000);
    if way == 0 {
        let mut stream = TcpStream(rogue::dial(node, None).await?);
        stream.write_all(&noise).await?;
        rogue::rest(&mut stream).await?;
        return Ok(());
    }
    let key = (way > 1).then(|| Arc::new(MachineKey::from_secret(chance.random())));
    let mut stream = rogue::knock(node, key.as_deref(), &[ALPN]).await?;
    let greeting = rogue::greeting(if way == 2 { &[] } else { &noise[..500] });
    rogue::greet(&mut stream, &greeting).await?;
    rogue::rest(&mut stream).await?;
    Ok(())
}
