//! Whether a node looks in other sites for what it fetches, and whom it asks there.

use std::collections::BTreeMap;
use std::time::Duration;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::{GROUP_LEN, GroupRanges};
use capsule_swarm_core::{
    BlobSpec, Class, DownloadConfig, Downloads, Output, PauseReason, PeerKey, Time,
};

const GROUPS: u64 = 1024;

/// When a node to which nothing came is forsaken, however the lots fell.
const LATE: u64 = 20_000;

const NEAR: PeerKey = PeerKey(1);
const FAR: PeerKey = PeerKey(2);

fn at(ms: u64) -> Time {
    Time::from_start(Duration::from_millis(ms))
}

fn root() -> RootHash {
    RootHash::of(b"blob")
}

/// A node that fetches a blob, connected to a peer of its site and one of another.
fn node() -> Downloads {
    let mut downloads = Downloads::new(DownloadConfig::default(), 3);
    let spec = BlobSpec {
        root: root(),
        size: GROUPS * GROUP_LEN,
        have: GroupRanges::new(),
        want: (0..GROUPS).into(),
        priority: 0,
    };
    downloads.add_blob(at(0), spec).expect("a first blob");
    for (peer, class) in [(NEAR, Class::Within), (FAR, Class::Beyond)] {
        assert!(downloads.peer_connected(at(0), peer, class));
    }
    downloads
}

fn holds(downloads: &mut Downloads, peer: PeerKey, groups: std::ops::Range<u64>) {
    downloads.handle_have(at(0), peer, &root(), &groups.into());
}

fn seeks(downloads: &mut Downloads, ms: u64) -> bool {
    while downloads.poll_output(at(ms)).is_some() {}
    downloads
        .seeks_beyond(at(ms), &root())
        .expect("it is being fetched")
}

#[test]
fn who_knows_nobody_that_has_anything_looks_beyond() {
    let mut downloads = node();
    assert!(seeks(&mut downloads, 0));
    holds(&mut downloads, NEAR, 5..6);
    assert!(!seeks(&mut downloads, 0), "it may get it by and by");
    downloads.peer_disconnected(at(10), NEAR);
    assert!(seeks(&mut downloads, 10));
    assert_eq!(downloads.seeks_beyond(at(10), &RootHash::of(b"")), None);
}

#[test]
fn a_little_that_somebody_has_does_not_end_the_search_for_ever() {
    let mut downloads = node();
    holds(&mut downloads, NEAR, 5..6);
    assert!(!seeks(&mut downloads, 1_000));
    assert!(seeks(&mut downloads, LATE));
    // Who comes and has all is somebody to wait for.
    let other = PeerKey(3);
    assert!(downloads.peer_connected(at(LATE), other, Class::Within));
    holds(&mut downloads, other, 0..GROUPS);
    assert!(!seeks(&mut downloads, LATE));
}

#[test]
fn who_fetches_for_its_site_looks_for_somebody_who_has_all() {
    let mut downloads = node();
    holds(&mut downloads, FAR, 0..GROUPS - 1);
    let mut asked = Vec::new();
    for ms in 0..1_000 {
        while let Some(output) = downloads.poll_output(at(ms)) {
            if let Output::Request { peer, .. } = output {
                asked.push(peer);
            }
        }
    }
    assert!(downloads.is_gateway(&root()) && asked.contains(&FAR));
    assert!(seeks(&mut downloads, 1_000));
    holds(&mut downloads, FAR, GROUPS - 1..GROUPS);
    assert!(!seeks(&mut downloads, 1_000));
}

#[test]
fn who_wants_nothing_more_looks_for_nobody() {
    let mut downloads = node();
    downloads
        .pause_blob(at(0), &root(), PauseReason::Asked)
        .expect("it is being fetched");
    assert!(!seeks(&mut downloads, LATE));
}

/// Peers that were asked within a time, each with how much.
fn asked(downloads: &mut Downloads, ms: std::ops::Range<u64>) -> BTreeMap<PeerKey, u64> {
    let mut asked = BTreeMap::new();
    for ms in ms {
        while let Some(output) = downloads.poll_output(at(ms)) {
            if let Output::Request { peer, groups, .. } = output {
                *asked.entry(peer).or_default() += groups.end - groups.start;
            }
        }
    }
    asked
}

#[test]
fn who_fetches_for_its_site_asks_one_peer_beyond_while_that_gives() {
    let mut downloads = node();
    let (part, all) = (PeerKey(3), PeerKey(4));
    for peer in [part, all] {
        assert!(downloads.peer_connected(at(0), peer, Class::Beyond));
    }
    for (peer, groups) in [
        (FAR, 0..GROUPS / 2),
        (part, 0..GROUPS / 2),
        (all, 0..GROUPS),
    ] {
        holds(&mut downloads, peer, groups);
    }
    let only: Vec<_> = asked(&mut downloads, 0..1_000).into_keys().collect();
    assert_eq!(only, [all]);
    // It gives nothing at all: more and more of the others are asked, and it is not waited for.
    let more = asked(&mut downloads, 1_000..30_000);
    assert!(
        more.contains_key(&FAR) && more.contains_key(&part),
        "{more:?}"
    );
}
