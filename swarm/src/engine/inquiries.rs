//! Asking who has a blob.
//!
//! Peers announce what they hold, and mostly that settles who has what. But a node remembers so many blobs of a peer
//! and no more (`peer`), and a peer that holds more tells a newcomer only a little more than that. What is beyond is
//! asked for by name: of those peers that told more than is remembered, when a fetch of it begins or gets stuck, or when the node
//! wants to know. A peer answers by a `Have` of all it holds of the blob, or a `Drop` of all.
//!
//! What a fetch, or an open question, is about is remembered of a peer in any case: something else of that peer's is
//! forgotten for it.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{Duration, Instant};

use capsule_proto::wire::Control;
use capsule_proto::{GroupRanges, RootHash};
use capsule_swarm_core::PeerKey;
use tokio::sync::oneshot;

use super::Engine;
use super::transfers::Stage;
use crate::api::Provider;

/// Questions that may be open: as many as blobs can be fetched, and some that only the node asks.
const MAX_OPEN: usize = 2048;
/// Who waits for the answers to one question.
const MAX_REPLIES: usize = 64;
/// How long answers are waited for: they are some round trips away, and behind other news.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often a fetch that is stuck asks again.
const AGAIN: Duration = Duration::from_secs(10);
/// Questions asked of one peer in a row, and by the second from then on ...
const ASKED: Allowance = Allowance::new(256.0, 64.0);
/// ... and answered: twice that, so that no honest one goes without an answer.
const ANSWERED: Allowance = Allowance::new(512.0, 128.0);
/// Runs in an answer that count as one more question: so many bytes are about a question and its frame.
const RUNS_A_QUESTION: usize = 32;

/// How much may still be done: a store that fills by the second up to a bound. The last may cost more than is left.
#[derive(Clone, Debug)]
struct Allowance {
    left: f64,
    most: f64,
    each_second: f64,
    counted: Option<Instant>,
}

impl Allowance {
    const fn new(most: f64, each_second: f64) -> Self {
        Self {
            left: most,
            most,
            each_second,
            counted: None,
        }
    }

    fn take(&mut self, now: Instant, cost: f64) -> bool {
        let since = self
            .counted
            .replace(now)
            .map_or(Duration::ZERO, |at| now - at);
        self.left = (self.left + since.as_secs_f64() * self.each_second).min(self.most);
        let may = self.left > 0.0;
        if may {
            self.left -= cost;
        }
        may
    }
}

/// What one peer has to do with questions.
#[derive(Debug)]
pub(super) struct Asking {
    /// It announced more than is remembered.
    pub(super) tells_more: bool,
    asked: Allowance,
    answered: Allowance,
}

impl Default for Asking {
    fn default() -> Self {
        Self {
            tells_more: false,
            asked: ASKED,
            answered: ANSWERED,
        }
    }
}

/// One question.
#[derive(Debug)]
struct Inquiry {
    /// Who is to be asked, and who has not answered.
    unasked: BTreeSet<PeerKey>,
    unanswered: BTreeSet<PeerKey>,
    until: Instant,
    replies: Vec<oneshot::Sender<Vec<Provider>>>,
}

/// All questions that are open.
#[derive(Debug, Default)]
pub(super) struct Inquiries(BTreeMap<RootHash, Inquiry>);

impl Inquiries {
    /// Whether the answers about a blob are awaited.
    pub(super) fn contains(&self, root: &RootHash) -> bool {
        self.0.contains_key(root)
    }
}

impl Engine {
    /// Answers who has a blob, as soon as all who may have been asked.
    pub(super) fn find_providers(&mut self, root: RootHash, reply: oneshot::Sender<Vec<Provider>>) {
        self.inquire(root);
        match self.inquiries.0.get_mut(&root) {
            Some(inquiry) if inquiry.replies.len() < MAX_REPLIES => inquiry.replies.push(reply),
            _ => {
                let _gone = reply.send(self.providers(&root));
            }
        }
    }

    /// Asks for a blob those peers that may hold it without our knowing.
    pub(super) fn inquire(&mut self, root: RootHash) {
        let may_hold = |(&key, peer): (&PeerKey, &super::Peer)| {
            let claim = peer.claims.get(&root);
            let all = claim.is_some_and(|claim| claim.groups == GroupRanges::all(claim.size));
            (peer.asking.tells_more && !all).then_some(key)
        };
        let whom: Vec<_> = self.peers.iter().filter_map(may_hold).collect();
        let open = &mut self.inquiries.0;
        if whom.is_empty() || open.len() >= MAX_OPEN && !open.contains_key(&root) {
            return;
        }
        let until = Instant::now() + PATIENCE;
        let inquiry = open.entry(root).or_insert_with(|| Inquiry {
            unasked: BTreeSet::new(),
            unanswered: BTreeSet::new(),
            until,
            replies: Vec::new(),
        });
        let new = whom
            .into_iter()
            .filter(|key| !inquiry.unanswered.contains(key));
        inquiry.unasked.extend(new);
        self.send_queries(root);
    }

    /// Asks as many as may be asked now; the others' turn comes by and by.
    fn send_queries(&mut self, root: RootHash) {
        let now = Instant::now();
        let Some(inquiry) = self.inquiries.0.get_mut(&root) else {
            return;
        };
        let mut may_ask = |key: &PeerKey| {
            let peer = self.peers.get_mut(key);
            peer.is_some_and(|peer| peer.asking.asked.take(now, 1.0))
        };
        let asked: Vec<_> = inquiry
            .unasked
            .iter()
            .copied()
            .filter(&mut may_ask)
            .collect();
        for key in &asked {
            inquiry.unasked.remove(key);
            inquiry.unanswered.insert(*key);
            inquiry.until = now + PATIENCE;
        }
        asked
            .into_iter()
            .for_each(|key| self.send(key, &Control::SizeQuery { root }));
    }

    /// A peer asks what we hold of a blob.
    pub(super) fn on_size_query(&mut self, key: PeerKey, root: RootHash) {
        let held = self.held.get(&root);
        let runs = held.map_or(0, |held| held.groups.runs().len());
        let cost = 1.0 + (runs / RUNS_A_QUESTION) as f64;
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        if !peer.asking.answered.take(Instant::now(), cost) {
            return tracing::debug!(peer = %peer.id, "it asks too much: no answer");
        }
        let answer = match held {
            Some(held) => super::serve::haves(root, held.size, &held.groups),
            None => vec![Control::Drop { root, groups: None }],
        };
        answer
            .into_iter()
            .for_each(|message| self.send(key, &message));
    }

    /// A peer told what it holds of a blob: asked or not, that answers the question.
    pub(super) fn on_answer(&mut self, key: PeerKey, root: RootHash) {
        let Some(inquiry) = self.inquiries.0.get_mut(&root) else {
            return;
        };
        inquiry.unanswered.remove(&key);
        if inquiry.unanswered.is_empty() && inquiry.unasked.is_empty() {
            self.end_inquiry(root);
        }
    }

    fn end_inquiry(&mut self, root: RootHash) {
        let Some(inquiry) = self.inquiries.0.remove(&root) else {
            return;
        };
        for reply in inquiry.replies {
            let _gone = reply.send(self.providers(&root));
        }
    }

    /// A peer announced more than is remembered, for the first time: it may hold what we fetch.
    pub(super) fn on_tells_more(&mut self) {
        let roots: Vec<_> = self.transfers.keys().copied().collect();
        roots.into_iter().for_each(|root| self.inquire(root));
    }

    /// A peer is gone: it answers nothing.
    pub(super) fn forget_asked(&mut self, key: PeerKey) {
        let roots: Vec<_> = self.inquiries.0.keys().copied().collect();
        for root in roots {
            if let Some(inquiry) = self.inquiries.0.get_mut(&root) {
                inquiry.unasked.remove(&key);
            }
            self.on_answer(key, root);
        }
    }

    /// Asks whose turn it is, gives up on answers that do not come, and asks again for fetches that are stuck.
    pub(super) fn tick_inquiries(&mut self, now: Instant) {
        let roots: Vec<_> = self.inquiries.0.keys().copied().collect();
        for root in roots {
            self.send_queries(root);
            if self
                .inquiries
                .0
                .get(&root)
                .is_some_and(|inquiry| now >= inquiry.until)
            {
                self.end_inquiry(root);
            }
        }
        if !self.peers.values().any(|peer| peer.asking.tells_more) {
            return;
        }
        let asked = self.peers.values().flat_map(|peer| peer.asked.values());
        let moving: HashSet<_> = asked.map(|asked| asked.root).collect();
        let stuck = |(root, transfer): (&RootHash, &mut super::Transfer)| {
            let stuck = transfer.stage != Stage::Asking
                && !moving.contains(root)
                && now - transfer.inquired >= AGAIN;
            if stuck {
                transfer.inquired = now;
            }
            stuck.then_some(*root)
        };
        let stuck: Vec<_> = self.transfers.iter_mut().filter_map(stuck).collect();
        stuck.into_iter().for_each(|root| self.inquire(root));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_allowance_is_used_up_fills_again_and_goes_into_debt_once() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut allowance = Allowance::new(4.0, 2.0);
        let taken = |allowance: &mut Allowance, now, cost| {
            (0..100).filter(|_| allowance.take(now, cost)).count()
        };
        assert_eq!(taken(&mut allowance, start, 1.0), 4);
        assert_eq!(taken(&mut allowance, start + second, 1.0), 2);
        assert_eq!(taken(&mut allowance, start + 100 * second, 1.0), 4);
        assert_eq!(taken(&mut allowance, start + 200 * second, 50.0), 1);
        assert_eq!(taken(&mut allowance, start + 222 * second, 1.0), 0);
        assert_eq!(taken(&mut allowance, start + 224 * second, 1.0), 2);
    }
}
