//! What this node fetches: from a person's wish to requests, and from responses to the store.
//!
//! A transfer goes through three stages. *Asking*: what does the store hold of it already? *Sizing*, only where the
//! size is not known: see `sizing`. *Active*: the scheduler has it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Instant;

use capsule_proto::ranges::{Height, MAX_CONTENT_LEN};
use capsule_proto::wire::{Control, Request};
use capsule_proto::{GroupRanges, RootHash};
use capsule_swarm_core::{AddBlobError, BanReason, BlobSpec, Output, PeerKey};
use libp2p::PeerId;
use tokio::sync::{oneshot, watch};

use super::peer::Asked;
use super::pool::{Job, Part};
use super::{Engine, FetchCommand};
use crate::api::{FetchError, FetchProgress, FetchSpec, Priority, StoreError};

/// Most blobs fetched at once, also while their size is not known yet: as many as the scheduler takes.
const MAX_TRANSFERS: usize = 1024;
/// Most fetches that wait for one blob.
const MAX_WAITERS: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Asking,
    Sizing,
    Active,
}

/// One blob being fetched, for all who asked for it.
#[derive(Debug)]
pub(super) struct Transfer {
    /// Tells this transfer from an earlier one of the same blob, whose last responses may still be on their way.
    number: u64,
    pub(super) size: Option<u64>,
    pub(super) stage: Stage,
    priority: Priority,
    waiters: Vec<Waiter>,
    pub(super) by_peer: BTreeMap<PeerId, u64>,
    /// Demanded before the scheduler had it.
    demanded: GroupRanges,
    pub(super) probe: Option<(PeerKey, Instant)>,
    /// Peers that did not prove their claim when asked.
    pub(super) unproved: BTreeSet<PeerKey>,
    /// The store turned out to lack hashes that it should have: answers are to prove groups from the root on.
    pub(super) from_root: bool,
    /// When peers were last asked who has it.
    pub(super) inquired: Instant,
}

/// One fetch.
#[derive(Debug)]
struct Waiter {
    spec: FetchSpec,
    /// Bytes lacking when the scheduler got it.
    lacking: Option<u64>,
    /// What peers had sent of the blob before it came.
    before: BTreeMap<PeerId, u64>,
    progress: watch::Sender<FetchProgress>,
    done: oneshot::Sender<Result<FetchProgress, FetchError>>,
}

impl Transfer {
    /// Size of the blob, once known.
    pub(super) fn size(&self) -> Option<u64> {
        self.size.filter(|_| self.stage == Stage::Active)
    }

    /// Ends all its fetches with an error.
    pub(super) fn fail_all(self, error: impl Fn() -> FetchError) {
        self.waiters
            .into_iter()
            .for_each(|waiter| waiter.end(Err(error())));
    }

    /// Whether some of its fetches may be complete before the blob is.
    pub(super) fn wants_parts(&self) -> bool {
        self.waiters.iter().any(|waiter| waiter.spec.want.is_some())
    }

    fn want(&self, size: u64) -> GroupRanges {
        let mut want = GroupRanges::new();
        self.waiters
            .iter()
            .for_each(|waiter| want.union_with(&waiter.want(size)));
        want
    }

    /// What is lacking of those of its fetches that somebody waits for.
    fn demanded_of(&self, size: u64, held: &GroupRanges) -> GroupRanges {
        let mut demanded = GroupRanges::new();
        self.waiters
            .iter()
            .filter(|waiter| waiter.spec.priority == Priority::Demand)
            .for_each(|waiter| demanded.union_with(&waiter.want(size).difference(held)));
        demanded
    }
}

impl Waiter {
    fn want(&self, size: u64) -> GroupRanges {
        let all = GroupRanges::all(size);
        self.spec
            .want
            .as_ref()
            .map_or_else(|| all.clone(), |want| want.intersection(&all))
    }

    /// Bytes wanted that are not held.
    fn lacking(&self, size: u64, held: &GroupRanges) -> u64 {
        self.want(size).difference(held).bytes(size)
    }

    /// What peers sent since it came.
    fn by_peer(&self, all: &BTreeMap<PeerId, u64>) -> Vec<(PeerId, u64)> {
        let since = |(peer, bytes): (&PeerId, &u64)| {
            let before = self.before.get(peer).copied().unwrap_or_default();
            (*bytes > before).then(|| (*peer, *bytes - before))
        };
        all.iter().filter_map(since).collect()
    }

    fn is_complete(&self, size: u64, held: &GroupRanges) -> bool {
        self.want(size).difference(held).is_empty()
    }

    fn end(self, result: Result<FetchProgress, FetchError>) {
        if let Ok(progress) = &result {
            self.progress.send_replace(progress.clone());
        }
        let _gone = self.done.send(result);
    }
}

impl Engine {
    pub(super) fn start_fetch(&mut self, command: FetchCommand) {
        let FetchCommand {
            spec,
            progress,
            done,
        } = command;
        let (root, asked) = (spec.root, spec.size);
        let mut waiter = Waiter {
            spec,
            lacking: None,
            before: BTreeMap::new(),
            progress,
            done,
        };
        if let Some(asked) = asked.filter(|size| *size > MAX_CONTENT_LEN) {
            return waiter.end(Err(FetchError::TooLarge { root, size: asked }));
        }
        let Some(transfer) = self.transfers.get_mut(&root) else {
            return self.start_transfer(root, waiter);
        };
        if transfer.waiters.len() >= MAX_WAITERS {
            return waiter.end(Err(FetchError::TooMany(MAX_WAITERS)));
        }
        match (transfer.size, asked) {
            (Some(known), Some(asked)) if known != asked => {
                return waiter.end(Err(FetchError::SizeConflict { root, known, asked }));
            }
            (None, Some(_)) => transfer.size = asked,
            _ => {}
        }
        waiter.before.clone_from(&transfer.by_peer);
        transfer.waiters.push(waiter);
        match (transfer.stage, transfer.size) {
            (Stage::Active, Some(size)) => self.want_more(root, size),
            (Stage::Sizing, Some(size)) => self.activate(root, size, GroupRanges::new()),
            _ => {}
        }
    }

    fn start_transfer(&mut self, root: RootHash, waiter: Waiter) {
        let (size, have, priority) = (
            waiter.spec.size,
            waiter.spec.have.clone(),
            waiter.spec.priority,
        );
        if self.transfers.len() >= MAX_TRANSFERS {
            return waiter.end(Err(FetchError::TooMany(MAX_TRANSFERS)));
        }
        self.next_transfer += 1;
        let transfer = Transfer {
            number: self.next_transfer,
            size,
            stage: Stage::Asking,
            priority,
            waiters: vec![waiter],
            by_peer: BTreeMap::new(),
            demanded: GroupRanges::new(),
            probe: None,
            unproved: BTreeSet::new(),
            from_root: false,
            inquired: Instant::now(),
        };
        self.transfers.insert(root, transfer);
        self.inquire(root);
        match (size, have) {
            (Some(size), Some(have)) => self.activate(root, size, have),
            _ => self.pool.submit(Job::Presence { root }),
        }
    }

    /// The store said what it holds of a blob.
    pub(super) fn on_presence(&mut self, root: RootHash, presence: Option<(u64, GroupRanges)>) {
        let Some(transfer) = self.transfers.get_mut(&root) else {
            return;
        };
        if transfer.stage != Stage::Asking {
            return;
        }
        // A size in the store has been proved by something that verified under it.
        let proved = presence.filter(|(_, groups)| !groups.is_empty());
        match (transfer.size, proved) {
            (Some(asked), Some((known, _))) if asked != known => {
                let error = || FetchError::SizeConflict { root, known, asked };
                if let Some(transfer) = self.transfers.remove(&root) {
                    transfer.fail_all(error);
                }
            }
            (_, Some((size, groups))) => self.activate(root, size, groups),
            (Some(size), None) => self.activate(root, size, GroupRanges::new()),
            (None, None) => {
                transfer.stage = Stage::Sizing;
                self.try_probe(root);
            }
        }
    }

    pub(super) fn ask(&mut self, key: PeerKey, request: Request, probe: bool) {
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        let Request {
            id,
            root,
            size,
            ref groups,
            ..
        } = request;
        let transfer = self
            .transfers
            .get(&root)
            .map_or(0, |transfer| transfer.number);
        if peer.asked.is_empty() {
            peer.gave = Instant::now();
        }
        peer.asked.insert(
            id,
            Asked {
                root,
                size,
                groups: groups.clone(),
                height: request.height,
                probe,
                transfer,
            },
        );
        self.send(key, &Control::Request(request));
    }

    /// Hands a blob to the scheduler.
    pub(super) fn activate(&mut self, root: RootHash, size: u64, have: GroupRanges) {
        let have = have.intersection(&GroupRanges::all(size));
        self.forget_other_sizes(root, size);
        let Some(transfer) = self.transfers.get_mut(&root) else {
            return;
        };
        transfer.size = Some(size);
        transfer.stage = Stage::Active;
        for waiter in &mut transfer.waiters {
            waiter.lacking = Some(waiter.lacking(size, &have));
        }
        let priority = transfer.priority as u8;
        let want = transfer.want(size);
        let mut demanded = std::mem::take(&mut transfer.demanded);
        demanded.union_with(&transfer.demanded_of(size, &have));
        let now = self.now();
        let spec = BlobSpec {
            root,
            size,
            have: have.clone(),
            want,
            priority,
        };
        if let Err(error) = self.downloads.add_blob(now, spec) {
            let Some(transfer) = self.transfers.remove(&root) else {
                return;
            };
            return transfer.fail_all(|| match error {
                AddBlobError::TooLarge { root, size } => FetchError::TooLarge { root, size },
                AddBlobError::TooMany(count) => FetchError::TooMany(count),
                AddBlobError::Known(_) => unreachable!("a blob is handed over once a transfer"),
            });
        }
        self.remind_of_claims(root, size);
        self.hold(root, size, &have);
        self.demand(root, demanded);
    }

    /// Begins anew with what the scheduler has of a transfer: some of what was here is not any more.
    pub(super) fn ask_store_again(&mut self, root: RootHash) {
        let now = self.now();
        if let Some(transfer) = self.transfers.get_mut(&root)
            && transfer.stage == Stage::Active
        {
            transfer.stage = Stage::Asking;
            self.downloads.remove_blob(now, &root);
            self.pool.submit(Job::Presence { root });
        }
    }

    /// Another fetch joined a transfer that the scheduler has.
    fn want_more(&mut self, root: RootHash, size: u64) {
        let now = self.now();
        let Some(transfer) = self.transfers.get_mut(&root) else {
            return;
        };
        let held = self.downloads.held(&root).cloned().unwrap_or_default();
        for waiter in transfer
            .waiters
            .iter_mut()
            .filter(|waiter| waiter.lacking.is_none())
        {
            waiter.lacking = Some(waiter.lacking(size, &held));
        }
        let want = transfer.want(size);
        // One that somebody waits for may have joined one that nobody does: what it lacks comes before all the rest.
        let demanded = transfer.demanded_of(size, &held);
        let _known = self.downloads.want(now, &root, &want);
        self.demand(root, demanded);
        self.end_complete(root);
    }

    /// Somebody waits for these groups.
    pub(super) fn demand(&mut self, root: RootHash, groups: GroupRanges) {
        let now = self.now();
        let Some(transfer) = self.transfers.get_mut(&root) else {
            return;
        };
        match transfer.size() {
            None => transfer.demanded.union_with(&groups),
            Some(size) => {
                let groups = groups.intersection(&GroupRanges::all(size));
                if !groups.is_empty() {
                    let _known = self.downloads.demand(now, &root, &groups);
                }
            }
        }
    }

    /// Up to where an answer has to prove groups of a blob: what stands above came with those that are here.
    fn height_above(&self, root: &RootHash, size: u64, groups: &Range<u64>) -> Height {
        let is_lost = |transfer: &Transfer| transfer.from_root;
        match self.held.get(root) {
            Some(held) if held.size == size && !self.transfers.get(root).is_some_and(is_lost) => {
                Height::known(size, groups, &held.groups)
            }
            _ => Height::ROOT,
        }
    }

    /// Carries out what the scheduler wants of others.
    pub(super) fn pump_downloads(&mut self) {
        let now = self.now();
        while let Some(output) = self.downloads.poll_output(now) {
            match output {
                Output::Request {
                    peer,
                    id,
                    root,
                    size,
                    groups,
                    demand,
                } => {
                    let request = Request {
                        id: id.0,
                        height: self.height_above(&root, size, &groups),
                        root,
                        size,
                        groups,
                        demand,
                        compress: false,
                    };
                    self.ask(peer, request, false);
                }
                Output::TellGateway { peers, notice } => self.tell_gateway(peers, notice),
                Output::Cancel { peer, id } => self.send(peer, &Control::Cancel { id: id.0 }),
                Output::Complete { root } => self.end_complete(root),
                Output::Ban { peer, reason } => self.ban(
                    peer,
                    match reason {
                        BanReason::Corrupt => "it sent content that does not match its hash",
                        BanReason::Malformed => "it sent something else than it was asked for",
                    },
                ),
            }
        }
    }

    /// Ends those fetches of a blob that have all they want, and the transfer with the last of them.
    pub(super) fn end_complete(&mut self, root: RootHash) {
        let now = self.now();
        let Some(transfer) = self.transfers.get_mut(&root) else {
            return;
        };
        let (Some(size), Some(held)) = (transfer.size(), self.downloads.held(&root)) else {
            return;
        };
        let (ended, waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut transfer.waiters)
            .into_iter()
            .partition(|waiter| waiter.is_complete(size, held));
        transfer.waiters = waiting;
        let by_peer = std::mem::take(&mut transfer.by_peer);
        let is_last = transfer.waiters.is_empty();
        for waiter in ended {
            let total = waiter.lacking.unwrap_or_default();
            let progress = FetchProgress {
                size: Some(size),
                bytes_total: total,
                bytes_done: total,
                rate: waiter.progress.borrow().rate,
                providers: waiter.progress.borrow().providers,
                by_peer: waiter.by_peer(&by_peer),
            };
            waiter.end(Ok(progress));
        }
        transfer.by_peer = by_peer;
        if is_last {
            self.transfers.remove(&root);
            self.downloads.remove_blob(now, &root);
        }
    }

    /// Ends the transfer that a response was for. Others of its responses may fail alike, after its end.
    pub(super) fn fail_transfer(&mut self, part: &Part, error: StoreError) {
        let (root, now) = (part.root, self.now());
        if self
            .transfers
            .get(&root)
            .is_none_or(|transfer| transfer.number != part.transfer)
        {
            return;
        }
        let Some(transfer) = self.transfers.remove(&root) else {
            return;
        };
        tracing::warn!(%root, %error, "fetch ends");
        self.downloads.remove_blob(now, &root);
        let again = || match &error {
            StoreError::Full => StoreError::Full,
            StoreError::Unknown => StoreError::Unknown,
            StoreError::Io(error) => {
                StoreError::Io(std::io::Error::new(error.kind(), error.to_string()))
            }
            StoreError::Invalid { group } => StoreError::Invalid { group: *group },
        };
        transfer.fail_all(|| FetchError::Store {
            root,
            source: again(),
        });
    }

    /// Ends transfers that nobody waits for any more.
    pub(super) fn reap_transfers(&mut self) {
        let now = self.now();
        let downloads = &mut self.downloads;
        self.transfers.retain(|root, transfer| {
            transfer.waiters.retain(|waiter| !waiter.done.is_closed());
            if transfer.waiters.is_empty() {
                downloads.remove_blob(now, root);
            }
            !transfer.waiters.is_empty()
        });
    }

    /// Renews the progress of all fetches; gives up on proofs that do not come.
    pub(super) fn tick_transfers(&mut self) {
        let roots: Vec<_> = self.transfers.keys().copied().collect();
        for root in roots {
            let Some(transfer) = self.transfers.get_mut(&root) else {
                continue;
            };
            if transfer.stage == Stage::Sizing {
                self.tick_probe(root);
            } else {
                self.report_progress(root);
            }
        }
    }

    fn report_progress(&mut self, root: RootHash) {
        let Some(transfer) = self.transfers.get(&root) else {
            return;
        };
        let Some(size) = transfer.size() else { return };
        let (Some(stats), Some(held)) =
            (self.downloads.blob_stats(&root), self.downloads.held(&root))
        else {
            return;
        };
        for waiter in &transfer.waiters {
            let total = waiter.lacking.unwrap_or_default();
            waiter.progress.send_replace(FetchProgress {
                size: Some(size),
                bytes_total: total,
                bytes_done: total.saturating_sub(waiter.lacking(size, held)),
                rate: stats.rate as u64,
                providers: stats.providers.len(),
                by_peer: waiter.by_peer(&transfer.by_peer),
            });
        }
    }
}
