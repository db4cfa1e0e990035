//! Whom announcements tell what, and when.

use std::time::Duration;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::GROUP_LEN;
use capsule_swarm_core::{Announce, AnnounceConfig, Announcements, Change, Class, PeerKey, Time};

const SIZE: u64 = 100 * GROUP_LEN;

fn at(ms: u64) -> Time {
    Time::from_start(Duration::from_millis(ms))
}

fn root(i: u8) -> RootHash {
    RootHash::of(&[i])
}

fn all(announcements: &mut Announcements, ms: u64) -> Vec<(Vec<u64>, Vec<u64>)> {
    let poll = || announcements.poll_announce(at(ms));
    let brief = |a: Announce| {
        (
            a.peers.iter().map(|p| p.0).collect(),
            a.ranges.iter().collect(),
        )
    };
    std::iter::from_fn(poll).map(brief).collect()
}

#[test]
fn new_peers_are_told_all_and_then_deltas_in_batches() {
    let mut announcements = Announcements::new(AnnounceConfig::default());
    announcements.handle_held(at(0), root(1), SIZE, &(0..2).into());
    assert_eq!(all(&mut announcements, 0), []);
    announcements.peer_connected(at(1), PeerKey(7), Class::Within);
    assert_eq!(all(&mut announcements, 1), [(vec![7], vec![0, 1])]);
    announcements.handle_held(at(5), root(1), SIZE, &(5..6).into());
    announcements.handle_held(at(6), root(1), SIZE, &(8..9).into());
    assert_eq!(announcements.poll_timeout(), Some(at(20)));
    assert_eq!(all(&mut announcements, 19), []);
    assert_eq!(all(&mut announcements, 20), [(vec![7], vec![5, 8])]);
    assert_eq!(announcements.poll_timeout(), None);
}

#[test]
fn what_others_wait_for_is_told_at_once() {
    let mut announcements = Announcements::new(AnnounceConfig::default());
    announcements.peer_connected(at(0), PeerKey(1), Class::Within);
    announcements.handle_held(at(0), root(1), SIZE, &(0..1).into());
    assert_eq!(all(&mut announcements, 0).len(), 1);
    announcements.hurry(at(1), &root(1));
    assert_eq!(announcements.poll_timeout(), None);
    announcements.handle_held(at(2), root(1), SIZE, &(7..8).into());
    announcements.hurry(at(2), &root(1));
    assert_eq!(all(&mut announcements, 2), [(vec![1], vec![7])]);
}

#[test]
fn who_has_no_interest_is_told_of_completion_only() {
    let mut announcements = Announcements::new(AnnounceConfig::default());
    [1, 2]
        .into_iter()
        .for_each(|peer| announcements.peer_connected(at(0), PeerKey(peer), Class::Within));
    announcements.set_interested(at(0), PeerKey(2), root(1), false);
    announcements.handle_held(at(0), root(1), SIZE, &(0..1).into());
    assert_eq!(all(&mut announcements, 0), [(vec![1], vec![0])]);
    announcements.set_interested(at(1), PeerKey(2), root(1), true);
    assert_eq!(all(&mut announcements, 1), [(vec![2], vec![0])]);
    announcements.set_interested(at(1), PeerKey(2), root(1), false);
    announcements.handle_held(at(2), root(1), SIZE, &(1..100).into());
    assert_eq!(
        all(&mut announcements, 2),
        [(vec![1, 2], (0..100).collect())]
    );
}

#[test]
fn other_sites_are_told_what_a_gateway_holds_now_and_then() {
    let mut announcements = Announcements::new(AnnounceConfig::default());
    announcements.peer_connected(at(0), PeerKey(1), Class::Within);
    announcements.peer_connected(at(0), PeerKey(2), Class::Beyond);
    announcements.handle_held(at(0), root(1), SIZE, &(0..1).into());
    assert_eq!(all(&mut announcements, 0), [(vec![1], vec![0])]);
    announcements.set_gateway(at(1), &root(1), true);
    announcements.set_gateway(at(2), &root(1), true);
    assert_eq!(all(&mut announcements, 2), [(vec![2], vec![0])]);
    announcements.handle_held(at(100), root(1), SIZE, &(1..2).into());
    assert_eq!(all(&mut announcements, 100), [(vec![1], vec![1])]);
    announcements.handle_dropped(at(200), root(1), &(1..2).into());
    assert_eq!(all(&mut announcements, 200), [(vec![1, 2], vec![1])]);
    announcements.handle_held(at(1_900), root(1), SIZE, &(5..7).into());
    assert_eq!(all(&mut announcements, 1_900), [(vec![1], vec![5, 6])]);
    announcements.handle_held(at(2_100), root(1), SIZE, &(7..8).into());
    let told = [(vec![1], vec![7]), (vec![2], vec![5, 6, 7])];
    assert_eq!(all(&mut announcements, 2_100), told);
    announcements.set_gateway(at(2_200), &root(1), false);
    announcements.handle_held(at(69_000), root(1), SIZE, &(8..9).into());
    let told = [(vec![1], vec![8]), (vec![2], vec![8])];
    assert_eq!(all(&mut announcements, 69_000), told, "a minute has gone");
    announcements.handle_held(at(69_100), root(1), SIZE, &(0..100).into());
    assert_eq!(
        all(&mut announcements, 69_100),
        [(vec![1, 2], (0..100).collect())]
    );
}

#[test]
fn other_sites_are_told_more_and_more_seldom() {
    let mut announcements = Announcements::new(AnnounceConfig::default());
    announcements.peer_connected(at(0), PeerKey(2), Class::Beyond);
    let size = 1000 * GROUP_LEN;
    let times: Vec<_> = (0..600)
        .filter(|group| {
            announcements.handle_held(at(group * 100), root(1), size, &(*group..group + 1).into());
            announcements.set_gateway(at(group * 100), &root(1), true);
            !all(&mut announcements, group * 100).is_empty()
        })
        .collect();
    let waits: Vec<_> = times.windows(2).map(|two| two[1] - two[0]).collect();
    assert!(waits.is_sorted(), "{waits:?}");
    assert_eq!((times[0], waits[0], waits.last()), (21, 30, Some(&100)));
}

#[test]
fn what_goes_is_told_at_once() {
    let mut announcements = Announcements::new(AnnounceConfig::default());
    announcements.peer_connected(at(0), PeerKey(1), Class::Within);
    announcements.handle_held(at(0), root(1), SIZE, &(0..4).into());
    assert_eq!(all(&mut announcements, 0).len(), 1);
    announcements.handle_dropped(at(1), root(1), &(2..50).into());
    let told = announcements.poll_announce(at(1)).expect("told at once");
    assert_eq!((told.change, told.ranges), (Change::Unhave, (2..4).into()));
    announcements.handle_dropped(at(1), root(1), &(0..4).into());
    announcements.peer_disconnected(at(1), PeerKey(1));
    assert_eq!(all(&mut announcements, 1), []);
}

#[test]
fn beyond_the_budget_batches_grow() {
    let mut announcements = Announcements::new(AnnounceConfig {
        advance: 1000,
        ..Default::default()
    });
    (0..20).for_each(|peer| announcements.peer_connected(at(0), PeerKey(peer), Class::Within));
    let mut told = 0;
    for ms in 0..1900 {
        let group = ms / 19;
        announcements.handle_held(at(ms), root(1), SIZE, &(group..group + 1).into());
        told += all(&mut announcements, ms).len();
    }
    assert!((4..8).contains(&told), "{told}");
}
