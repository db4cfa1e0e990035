//! The requester's side alone, against scripted and random providers.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::{GROUP_LEN, GroupRanges};
use capsule_swarm_core::{
    AddBlobError, BanReason, BlobSpec, BlobStatus, Class, DownloadConfig, Downloads, Failure,
    GatewayNotice, MAX_REQUEST_GROUPS, NodeId, Output, PauseReason, PeerKey, RequestId, Time,
};
use proptest::prelude::*;

fn at(ms: u64) -> Time {
    Time::from_start(Duration::from_millis(ms))
}

fn root() -> RootHash {
    RootHash::of(b"blob")
}

fn spec(groups: u64) -> BlobSpec {
    let want = (0..groups).into();
    BlobSpec {
        root: root(),
        size: groups * GROUP_LEN,
        have: GroupRanges::new(),
        want,
        priority: 0,
    }
}

fn downloads() -> Downloads {
    Downloads::new(DownloadConfig::default(), 7)
}

/// With a blob of so many groups, and seeders 0, 1, ...
fn with_seeders(groups: u64, seeders: u64) -> Downloads {
    let mut downloads = downloads();
    downloads
        .add_blob(at(0), spec(groups))
        .expect("a first blob");
    for peer in 0..seeders {
        assert!(downloads.peer_connected(at(0), PeerKey(peer), Class::Within));
        downloads.handle_have(at(0), PeerKey(peer), &root(), &(0..groups).into());
    }
    downloads
}

fn outputs(downloads: &mut Downloads, now: Time) -> Vec<Output> {
    std::iter::from_fn(|| downloads.poll_output(now)).collect()
}

/// The requests among the outputs.
fn requests(outputs: &[Output]) -> Vec<(PeerKey, RequestId, Range<u64>, bool)> {
    let request = |output: &Output| match output {
        Output::Request {
            peer,
            id,
            groups,
            demand,
            ..
        } => Some((*peer, *id, groups.clone(), *demand)),
        _ => None,
    };
    outputs.iter().filter_map(request).collect()
}

/// Answers every request at once until nothing more is asked; returns how many there were.
fn answer_all(downloads: &mut Downloads, now: Time) -> usize {
    let mut answered = 0;
    loop {
        let asked = requests(&outputs(downloads, now));
        if asked.is_empty() {
            return answered;
        }
        for (peer, id, groups, _) in asked {
            downloads.handle_received(now, peer, id, &groups);
            answered += 1;
        }
    }
}

#[test]
fn haves_that_came_before_the_blob_count() {
    let mut downloads = downloads();
    downloads.peer_connected(at(0), PeerKey(1), Class::Within);
    downloads.handle_have(at(0), PeerKey(1), &root(), &(0..50).into());
    downloads.handle_unhave(at(0), PeerKey(1), &root(), &(40..50).into());
    assert_eq!(downloads.providers(&root()), [PeerKey(1)]);
    downloads.add_blob(at(1), spec(50)).expect("a first blob");
    assert_eq!(
        downloads.add_blob(at(1), spec(50)),
        Err(AddBlobError::Known(root()))
    );
    answer_all(&mut downloads, at(1));
    assert_eq!(downloads.held(&root()), Some(&(0..40).into()));
    assert_eq!(downloads.status(&root()), Some(BlobStatus::Starved));
    downloads.remove_blob(at(2), &root());
    assert_eq!(downloads.providers(&root()), [PeerKey(1)]);
}

#[test]
fn what_is_held_already_is_not_asked_for_again() {
    let mut downloads = downloads();
    downloads.peer_connected(at(0), PeerKey(1), Class::Within);
    downloads.handle_have(at(0), PeerKey(1), &root(), &(0..300).into());
    let have: GroupRanges = [3..7, 100..101, 290..300].into_iter().collect();
    downloads
        .add_blob(
            at(0),
            BlobSpec {
                have: have.clone(),
                ..spec(300)
            },
        )
        .expect("a first blob");
    let mut seen = have;
    loop {
        let asked = requests(&outputs(&mut downloads, at(0)));
        if asked.is_empty() {
            break;
        }
        for (peer, id, groups, _) in asked {
            assert!(!seen.intersects(&groups), "{groups:?} asked for twice");
            seen.insert(groups.clone());
            downloads.handle_received(at(0), peer, id, &groups);
        }
    }
    assert_eq!(downloads.status(&root()), Some(BlobStatus::Complete));
    assert_eq!(
        downloads.blob_stats(&root()).map(|stats| stats.duplicate),
        Some(0)
    );
}

#[test]
fn a_peer_that_sends_wrong_bytes_is_banned_and_the_others_go_on() {
    let mut downloads = with_seeders(64, 2);
    let asked = requests(&outputs(&mut downloads, at(0)));
    let (liar, id, ..) = asked[0];
    downloads.handle_failed(at(1), liar, id, Failure::Corrupt);
    let after = outputs(&mut downloads, at(1));
    assert!(after.contains(&Output::Ban {
        peer: liar,
        reason: BanReason::Corrupt
    }));
    assert!(requests(&after).iter().all(|(peer, ..)| *peer != liar));
    downloads.handle_have(at(1), liar, &root(), &(0..64).into());
    for (peer, id, groups, _) in asked.iter().chain(&requests(&after)) {
        downloads.handle_received(at(2), *peer, *id, groups);
    }
    answer_all(&mut downloads, at(2));
    assert_eq!(downloads.status(&root()), Some(BlobStatus::Complete));
}

#[test]
fn what_cannot_be_stored_pauses_the_blob_and_counts_for_nothing() {
    let mut downloads = with_seeders(64, 1);
    let asked = requests(&outputs(&mut downloads, at(0)));
    downloads.handle_failed(at(1), asked[0].0, asked[0].1, Failure::NotStored);
    assert_eq!(
        downloads.status(&root()),
        Some(BlobStatus::Paused(PauseReason::StoreFailed))
    );
    downloads
        .pause_blob(at(1), &root(), PauseReason::DiskFull)
        .expect("known");
    assert_eq!(
        downloads.status(&root()),
        Some(BlobStatus::Paused(PauseReason::DiskFull))
    );
    let paused = outputs(&mut downloads, at(2));
    assert!(requests(&paused).is_empty());
    assert!(
        paused
            .iter()
            .all(|output| matches!(output, Output::Cancel { .. }))
    );
    assert!(downloads.held(&root()).is_some_and(GroupRanges::is_empty));
    downloads.resume_blob(at(3), &root()).expect("known");
    answer_all(&mut downloads, at(3));
    assert_eq!(downloads.status(&root()), Some(BlobStatus::Complete));
}

#[test]
fn demand_goes_out_first_and_is_hedged_when_late() {
    let mut downloads = with_seeders(4096, 2);
    outputs(&mut downloads, at(0));
    downloads
        .demand(at(1), &root(), &(4000..4002).into())
        .expect("known");
    let asked = requests(&outputs(&mut downloads, at(1)));
    let (first, _, groups, demand) = asked[0].clone();
    assert!(demand && groups.contains(&4000), "{groups:?}");
    let mut hedge = None;
    for ms in 2..2000 {
        let now = at(ms);
        let again = requests(&outputs(&mut downloads, now));
        hedge = hedge.or(again
            .into_iter()
            .find(|(_, _, run, demand)| *demand && run.contains(&4000))
            .map(|r| (ms, r)));
    }
    let (ms, (second, id, run, _)) = hedge.expect("a second provider is asked");
    assert!(second != first && ms < 1500, "{second:?} after {ms} ms");
    downloads.handle_received(at(2000), second, id, &run);
    let cancels = outputs(&mut downloads, at(2000));
    assert!(
        cancels
            .iter()
            .any(|output| matches!(output, Output::Cancel { peer, .. } if *peer == first))
    );
}

#[test]
fn demand_is_answered_although_the_window_is_full() {
    let mut downloads = with_seeders(4096, 1);
    let before = requests(&outputs(&mut downloads, at(0)));
    assert!(!before.is_empty());
    let target = (0..4096)
        .find(|g| before.iter().all(|(_, _, run, _)| !run.contains(g)))
        .expect("more than a window");
    downloads
        .demand(at(1), &root(), &(target..target + 1).into())
        .expect("known");
    let asked = requests(&outputs(&mut downloads, at(1)));
    assert_eq!(asked.len(), 1);
    assert_eq!((asked[0].2.clone(), asked[0].3), (target..target + 1, true));
}

#[test]
fn a_silent_peer_is_left_alone_and_its_requests_go_to_others() {
    let mut downloads = with_seeders(16, 1);
    let stuck = requests(&outputs(&mut downloads, at(0)));
    assert!(!stuck.is_empty());
    downloads.peer_connected(at(100), PeerKey(9), Class::Within);
    downloads.handle_have(at(100), PeerKey(9), &root(), &(0..16).into());
    let mut done = None;
    for ms in (100..8000).step_by(10) {
        for output in outputs(&mut downloads, at(ms)) {
            match output {
                Output::TellGateway { .. } => panic!("no peer is beyond the site"),
                Output::Request {
                    peer: PeerKey(9),
                    id,
                    groups,
                    ..
                } => {
                    downloads.handle_received(at(ms), PeerKey(9), id, &groups);
                }
                Output::Complete { .. } => done = Some(ms),
                _ => {}
            }
        }
    }
    assert!(done.is_some_and(|ms| ms < 2000), "done after {done:?} ms");
    assert!(
        downloads
            .peer_stats(PeerKey(0))
            .is_some_and(|stats| stats.outstanding == 0)
    );
}

#[test]
fn a_lone_peer_that_recovers_is_asked_again() {
    let mut downloads = with_seeders(16, 1);
    outputs(&mut downloads, at(0));
    let mut asked = Vec::new();
    for ms in (10..60_000).step_by(10) {
        asked = requests(&outputs(&mut downloads, at(ms)));
        if !asked.is_empty() {
            break;
        }
    }
    for (peer, id, groups, _) in asked {
        downloads.handle_received(at(60_000), peer, id, &groups);
    }
    answer_all(&mut downloads, at(60_000));
    assert_eq!(downloads.status(&root()), Some(BlobStatus::Complete));
}

#[test]
fn blobs_of_higher_priority_come_first() {
    let mut downloads = downloads();
    downloads.peer_connected(at(0), PeerKey(1), Class::Within);
    let (low, high) = (RootHash::of(b"low"), RootHash::of(b"high"));
    for (root, priority) in [(low, 0), (high, 9)] {
        downloads
            .add_blob(
                at(0),
                BlobSpec {
                    root,
                    priority,
                    ..spec(100)
                },
            )
            .expect("room");
        downloads.handle_have(at(0), PeerKey(1), &root, &(0..100).into());
    }
    let first = downloads.poll_output(at(0));
    assert!(
        matches!(first, Some(Output::Request { root, .. }) if root == high),
        "{first:?}"
    );
}

/// What happens next to a request, or in the swarm.
#[derive(Clone, Debug)]
enum Step {
    Answer(usize),
    AnswerHalf(usize),
    Fail(usize, Failure),
    Have(u64, u64, u64),
    Unhave(u64, u64, u64),
    Connect(u64),
    Disconnect(u64),
    Gateway(u64, u64, u64),
    Demand(u64),
    Wait(u64),
}

const GROUPS: u64 = 2500;

fn step() -> impl Strategy<Value = Step> {
    let failure = prop_oneof![
        Just(Failure::NotHeld),
        Just(Failure::Busy),
        Just(Failure::Lost),
        Just(Failure::Cancelled),
        Just(Failure::Corrupt),
    ];
    prop_oneof![
        8 => any::<usize>().prop_map(Step::Answer),
        2 => any::<usize>().prop_map(Step::AnswerHalf),
        2 => (any::<usize>(), failure).prop_map(|(i, f)| Step::Fail(i, f)),
        4 => (0u64..6, 0..GROUPS, 1u64..900).prop_map(|(p, s, l)| Step::Have(p, s, l)),
        1 => (0u64..6, 0..GROUPS, 1u64..100).prop_map(|(p, s, l)| Step::Unhave(p, s, l)),
        2 => (0u64..6).prop_map(Step::Connect),
        1 => (0u64..6).prop_map(Step::Disconnect),
        2 => (0u64..6, 0..GROUPS, 1u64..900).prop_map(|(p, s, l)| Step::Gateway(p, s, l)),
        1 => (0..GROUPS).prop_map(Step::Demand),
        2 => (1u64..3000).prop_map(Step::Wait),
    ]
}

/// The swarm as the slow oracle sees it.
#[derive(Default)]
struct Oracle {
    held: GroupRanges,
    haves: BTreeMap<PeerKey, GroupRanges>,
    open: Vec<(PeerKey, RequestId, Range<u64>)>,
    /// A request that ended in the same step that may have made its cancel: they crossed.
    crossed: Option<(PeerKey, RequestId)>,
    banned: BTreeSet<PeerKey>,
    complete: bool,
    divided: bool,
    notices: u64,
}

impl Oracle {
    /// In half of all cases the peers of odd numbers are beyond the site.
    fn is_beyond(&self, peer: PeerKey) -> bool {
        self.divided && peer.0 % 2 == 1
    }

    fn connect(&self, downloads: &mut Downloads, now: Time, peer: PeerKey) -> bool {
        let class = if self.is_beyond(peer) {
            Class::Beyond
        } else {
            Class::Within
        };
        downloads.peer_connected(now, peer, class)
    }

    fn take_in(&mut self, outputs: Vec<Output>) -> Result<(), TestCaseError> {
        for output in outputs {
            match output {
                Output::TellGateway { peers, .. } => {
                    prop_assert!(peers.iter().all(|peer| !self.is_beyond(*peer)));
                }
                Output::Request {
                    peer, id, groups, ..
                } => {
                    prop_assert!(
                        !groups.is_empty() && groups.end - groups.start <= MAX_REQUEST_GROUPS
                    );
                    prop_assert!(!self.banned.contains(&peer));
                    prop_assert!(
                        self.haves
                            .get(&peer)
                            .is_some_and(|have| have.contains_run(&groups)),
                        "{:?} not announced by {:?} in {:?}",
                        groups,
                        peer,
                        self.haves.get(&peer)
                    );
                    prop_assert!(!self.held.contains_run(&groups), "{:?} is held", groups);
                    prop_assert!(self.open.iter().all(|(_, other, _)| *other != id));
                    self.open.push((peer, id, groups));
                }
                Output::Cancel { peer, id } => {
                    let is_open = self.open.iter().any(|(p, i, _)| (*p, *i) == (peer, id));
                    prop_assert!(
                        is_open || self.crossed == Some((peer, id)),
                        "cancelled what is not open"
                    );
                }
                Output::Complete { .. } => {
                    prop_assert!(self.held.contains_run(&(0..GROUPS)));
                    self.complete = true;
                }
                Output::Ban { peer, .. } => {
                    self.banned.insert(peer);
                    self.haves.remove(&peer);
                    self.open.retain(|(other, ..)| *other != peer);
                }
            }
        }
        self.crossed = None;
        Ok(())
    }

    fn apply(&mut self, step: &Step, downloads: &mut Downloads, now: Time) {
        let pick = |i: usize, open: &[(PeerKey, RequestId, Range<u64>)]| i.checked_rem(open.len());
        match *step {
            Step::Answer(i) => {
                let Some(i) = pick(i, &self.open) else { return };
                let (peer, id, groups) = self.open.swap_remove(i);
                self.held.insert(groups.clone());
                downloads.handle_received(now, peer, id, &groups);
            }
            Step::AnswerHalf(i) => {
                let Some(i) = pick(i, &self.open) else { return };
                let (peer, id, groups) = self.open.swap_remove(i);
                let half = groups.start..groups.start + (groups.end - groups.start) / 2;
                self.held.insert(half.clone());
                self.crossed = Some((peer, id));
                downloads.handle_received(now, peer, id, &half);
                downloads.handle_failed(now, peer, id, Failure::Lost);
            }
            Step::Fail(i, failure) => {
                let Some(i) = pick(i, &self.open) else { return };
                let (peer, id, groups) = self.open.swap_remove(i);
                if failure == Failure::NotHeld
                    && let Some(have) = self.haves.get_mut(&peer)
                {
                    have.remove(groups);
                }
                downloads.handle_failed(now, peer, id, failure);
            }
            Step::Have(peer, start, len) => {
                let (peer, run) = (PeerKey(peer), start..(start + len).min(GROUPS));
                if let Some(have) = self.haves.get_mut(&peer) {
                    have.insert(run.clone());
                }
                downloads.handle_have(now, peer, &root(), &run.into());
            }
            Step::Unhave(peer, start, len) => {
                let (peer, run) = (PeerKey(peer), start..(start + len).min(GROUPS));
                if let Some(have) = self.haves.get_mut(&peer) {
                    have.remove(run.clone());
                }
                downloads.handle_unhave(now, peer, &root(), &run.into());
            }
            Step::Gateway(peer, start, len) => {
                self.notices += 1;
                let notice = GatewayNotice {
                    root: root(),
                    node: NodeId([start as u8 % 4; 32]),
                    sequence: self.notices,
                    groups: (start..(start + len).min(GROUPS)).into(),
                };
                downloads.handle_gateway(now, PeerKey(peer), &notice);
            }
            Step::Connect(peer) => {
                if self.connect(downloads, now, PeerKey(peer)) {
                    self.haves.insert(PeerKey(peer), GroupRanges::new());
                }
            }
            Step::Disconnect(peer) => {
                let peer = PeerKey(peer);
                self.haves.remove(&peer);
                self.banned.remove(&peer);
                self.open.retain(|(other, ..)| *other != peer);
                downloads.peer_disconnected(now, peer);
            }
            Step::Demand(group) => downloads
                .demand(now, &root(), &(group..(group + 3).min(GROUPS)).into())
                .expect("known"),
            Step::Wait(_) => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]
    #[test]
    fn whatever_happens_held_is_what_came_and_a_provider_suffices(
        seed: u64,
        divided: bool,
        steps in prop::collection::vec(step(), 0..150),
    ) {
        let mut downloads = Downloads::new(DownloadConfig::default(), seed);
        downloads.add_blob(at(0), spec(GROUPS)).expect("a first blob");
        let mut oracle = Oracle {
            divided,
            ..Oracle::default()
        };
        let mut ms = 0;
        for step in &steps {
            ms += if let Step::Wait(wait) = step { *wait } else { 1 };
            oracle.apply(step, &mut downloads, at(ms));
            oracle.take_in(outputs(&mut downloads, at(ms)))?;
            prop_assert_eq!(downloads.held(&root()), Some(&oracle.held));
            let stats = downloads.blob_stats(&root()).expect("known");
            prop_assert!(stats.held + stats.in_flight <= stats.wanted);
            prop_assert_eq!(downloads.audit(), Ok(()));
        }
        // The others fall silent; one honest provider stays, and only answers when asked.
        let last = PeerKey(99);
        prop_assert!(oracle.connect(&mut downloads, at(ms), last));
        downloads.handle_have(at(ms), last, &root(), &(0..GROUPS).into());
        oracle.haves.insert(last, (0..GROUPS).into());
        for _ in 0..20_000 {
            oracle.take_in(outputs(&mut downloads, at(ms)))?;
            if oracle.complete {
                break;
            }
            match oracle.open.iter().rposition(|(peer, ..)| *peer == last) {
                Some(i) => oracle.apply(&Step::Answer(i), &mut downloads, at(ms)),
                None => ms += 20,
            }
        }
        prop_assert!(oracle.complete, "not complete after {} ms", ms);
    }
}

/// A seeder that was not asked yet has no measured rate: that a partial provider drips something is no reason to spare it.
#[test]
fn a_seeder_is_not_spared_before_its_rate_is_known() {
    let mut downloads = Downloads::new(DownloadConfig::default(), 1);
    downloads
        .add_blob(at(0), spec(GROUPS))
        .expect("a first blob");
    let (drips, seeder) = (PeerKey(1), PeerKey(2));
    assert!(downloads.peer_connected(at(0), drips, Class::Within));
    downloads.handle_have(at(0), drips, &root(), &(0..GROUPS - 1).into());
    let mut oracle = Oracle::default();
    oracle.haves.insert(drips, (0..GROUPS - 1).into());
    oracle.take_in(outputs(&mut downloads, at(0))).unwrap();
    // One answer in two seconds, and the rest of its window stays open.
    oracle.apply(&Step::Answer(0), &mut downloads, at(2000));
    assert!(downloads.peer_connected(at(2000), seeder, Class::Within));
    downloads.handle_have(at(2000), seeder, &root(), &(0..GROUPS).into());
    oracle.haves.insert(seeder, (0..GROUPS).into());
    // It answers at once, however often it is asked.
    let mut answers = 0;
    for _ in 0..200 {
        oracle.take_in(outputs(&mut downloads, at(2000))).unwrap();
        if let Some(i) = oracle.open.iter().rposition(|(peer, ..)| *peer == seeder) {
            oracle.apply(&Step::Answer(i), &mut downloads, at(2000));
            answers += 1;
        }
    }
    assert!(answers > 100, "{answers}");
}
