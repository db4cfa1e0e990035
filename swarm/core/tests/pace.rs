//! Caps of what comes: requests are paced, whatever the providers could send.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::{GROUP_LEN, GroupRanges};
use capsule_swarm_core::{
    BlobSpec, Caps, Class, DownloadConfig, Downloads, Output, PeerKey, Rate, RequestId, Time,
    wire_bytes,
};

/// 1 GiB: more than any of these tests fetches.
const GROUPS: u64 = 1 << 16;
/// Time from a request to its response.
const DELAY: Duration = Duration::from_millis(3);

fn at(ms: u64) -> Time {
    Time::from_start(Duration::from_millis(ms))
}

fn root() -> RootHash {
    RootHash::of(b"blob")
}

fn beyond(mbit: u64) -> Caps {
    Caps {
        within: None,
        beyond: Some(Rate::from_bits(mbit * 1_000_000).expect("a cap")),
    }
}

/// Seeders that answer each request at once, and when what came of it.
struct Fleet {
    downloads: Downloads,
    now: Time,
    answers: VecDeque<(Time, PeerKey, RequestId, Range<u64>)>,
    asked: Vec<(Time, PeerKey, Range<u64>, bool)>,
    came: Vec<(Time, PeerKey, u64)>,
}

impl Fleet {
    fn new(seeders: u64) -> Self {
        let mut downloads = Downloads::new(DownloadConfig::default(), 7);
        let all = GroupRanges::from(0..GROUPS);
        let spec = BlobSpec {
            root: root(),
            size: GROUPS * GROUP_LEN,
            have: GroupRanges::new(),
            want: all.clone(),
            priority: 0,
        };
        downloads.add_blob(at(0), spec).expect("a first blob");
        for peer in (0..seeders).map(PeerKey) {
            assert!(downloads.peer_connected(at(0), peer, Class::Beyond));
            downloads.handle_have(at(0), peer, &root(), &all);
        }
        Self {
            downloads,
            now: at(0),
            answers: VecDeque::new(),
            asked: Vec::new(),
            came: Vec::new(),
        }
    }

    /// Goes on until then.
    fn run(&mut self, until: Time) {
        loop {
            while let Some(output) = self.downloads.poll_output(self.now) {
                if let Output::Request {
                    peer,
                    id,
                    groups,
                    demand,
                    ..
                } = output
                {
                    self.asked.push((self.now, peer, groups.clone(), demand));
                    self.answers.push_back((self.now + DELAY, peer, id, groups));
                }
            }
            let answer = self.answers.front().map(|(due, ..)| *due);
            let wake = self
                .downloads
                .poll_timeout()
                .into_iter()
                .chain(answer)
                .min();
            let Some(next) = wake.filter(|&next| next <= until) else {
                self.now = until;
                return;
            };
            // A timer is late by a little.
            self.now = self.now.max(next) + Duration::from_micros(700);
            while let Some((_, peer, id, groups)) =
                self.answers.pop_front_if(|(due, ..)| *due <= self.now)
            {
                let count = groups.end - groups.start;
                // Pairs of hashes over its groups, and on the path to the root, of 16 levels.
                let pairs = count - 1 + 16 - u64::from(count.ilog2());
                let bytes = 18 + count * GROUP_LEN + pairs * 64;
                self.came.push((self.now, peer, wire_bytes(bytes)));
                self.downloads.handle_received(self.now, peer, id, &groups);
            }
        }
    }

    /// Bytes that came from some peers in a time.
    fn between(&self, from: Time, to: Time, of: impl Fn(PeerKey) -> bool) -> u64 {
        let inside = |(at, peer, _): &&(Time, PeerKey, u64)| *at >= from && *at < to && of(*peer);
        self.came
            .iter()
            .filter(inside)
            .map(|(.., bytes)| bytes)
            .sum()
    }
}

#[test]
fn each_window_of_10_s_is_within_5_percent_of_the_cap() {
    for (mbit, seeders) in [(1, 1), (5, 1), (5, 8), (50, 3)] {
        let mut fleet = Fleet::new(seeders);
        fleet.downloads.set_caps(at(0), beyond(mbit));
        fleet.run(at(30_000));
        for from in (0..=20_000).step_by(1_000) {
            let bytes = fleet.between(at(from), at(from + 10_000), |_| true);
            let share = bytes as f64 / (mbit as f64 * 1e6 / 8.0 * 10.0);
            assert!(
                (0.95..1.05).contains(&share),
                "{mbit} Mbit/s from {seeders}, from {from} ms: {share}"
            );
        }
    }
}

#[test]
fn a_changed_cap_holds_within_a_second() {
    let mut fleet = Fleet::new(2);
    fleet.downloads.set_caps(at(0), beyond(1));
    fleet.run(at(3_000));
    for (step, mbit) in [(1, 10), (2, 2), (3, 8)] {
        let from = 3_000 * step;
        fleet.downloads.set_caps(at(from), beyond(mbit));
        fleet.run(at(from + 3_000));
        let bytes = fleet.between(at(from + 1_000), at(from + 3_000), |_| true);
        let share = bytes as f64 / (mbit as f64 * 1e6 / 8.0 * 2.0);
        assert!((0.85..1.15).contains(&share), "{mbit} Mbit/s: {share}");
    }
    fleet.downloads.set_caps(at(12_000), Caps::default());
    fleet.run(at(12_100));
    let bytes = fleet.between(at(12_000), at(12_100), |_| true);
    assert!(bytes > 2 << 20, "without a cap: {bytes}");
}

#[test]
fn what_is_demanded_goes_first_and_within_the_cap() {
    let mut fleet = Fleet::new(2);
    fleet.downloads.set_caps(at(0), beyond(1));
    fleet.run(at(5_000));
    let held = fleet.downloads.held(&root()).cloned().unwrap_or_default();
    let lacking = (0..GROUPS)
        .rfind(|group| !held.contains(*group))
        .expect("most lacks");
    let demanded = lacking..lacking + 1;
    let (root, now) = (root(), fleet.now);
    let _known = fleet.downloads.demand(now, &root, &demanded.clone().into());
    fleet.run(at(5_300));
    let first = fleet.asked.iter().find(|(asked, ..)| *asked >= at(5_000));
    let (asked, _, groups, demand) = first.expect("something is asked in 300 ms");
    assert!(*demand && *groups == demanded, "{groups:?}");
    assert!(*asked <= at(5_010), "it waited until {asked:?}");
    // And if everything is demanded, the cap holds all the same.
    let _known = fleet
        .downloads
        .demand(at(5_300), &root, &(0..GROUPS).into());
    fleet.run(at(16_000));
    let bytes = fleet.between(at(6_000), at(16_000), |_| true);
    let share = bytes as f64 / (1e6 / 8.0 * 10.0);
    assert!((0.95..1.05).contains(&share), "{share}");
}

#[test]
fn a_cap_beyond_the_site_leaves_the_site_alone() {
    let mut fleet = Fleet::new(1);
    let (near, root) = (PeerKey(1), root());
    assert!(fleet.downloads.peer_connected(at(0), near, Class::Within));
    fleet
        .downloads
        .handle_have(at(0), near, &root, &(0..GROUPS).into());
    fleet.downloads.set_caps(at(0), beyond(1));
    fleet.run(at(1_000));
    let of = |peer| fleet.between(at(0), at(1_000), move |other| other == PeerKey(peer));
    assert!(of(0) < 1_000_000 / 8 * 13 / 10, "{}", of(0));
    assert!(of(1) > 20 << 20, "{}", of(1));
}

#[test]
fn what_a_peer_that_left_did_not_send_is_asked_of_another_at_once() {
    let mut fleet = Fleet::new(1);
    fleet.downloads.set_caps(at(0), beyond(1));
    fleet.run(at(2_000));
    // It is asked, and does not answer any more: asking goes on up to its window, then it leaves.
    fleet.answers.clear();
    for ms in 2_000..6_000 {
        while fleet.downloads.poll_output(at(ms)).is_some() {}
    }
    fleet.downloads.peer_disconnected(at(6_000), PeerKey(0));
    fleet
        .downloads
        .peer_connected(at(6_000), PeerKey(1), Class::Beyond);
    fleet
        .downloads
        .handle_have(at(6_000), PeerKey(1), &root(), &(0..GROUPS).into());
    fleet.now = at(6_000);
    fleet.run(at(6_100));
    let bytes = fleet.between(at(6_000), at(6_100), |_| true);
    assert!(bytes > 30_000, "{bytes}");
}
