//! The provider's side alone: in which order requests are served, and what bounds them.

use std::time::Duration;

use capsule_proto::hash::RootHash;
use capsule_swarm_core::{
    Class, IncomingRequest, PeerKey, PieceGeometry, Refusal, RequestId, Time, UploadConfig, Uploads,
};

const SIZE: u64 = 4 << 20;

fn at(ms: u64) -> Time {
    Time::from_start(Duration::from_millis(ms))
}

fn request(id: u64, group: u64) -> IncomingRequest {
    let root = RootHash::of(b"blob");
    let groups = group..group + 1;
    IncomingRequest {
        id: RequestId(id),
        root,
        size: SIZE,
        groups,
        demand: false,
        whole: true,
        holds: 0,
    }
}

fn uploads(peers: u64) -> Uploads {
    let mut uploads = Uploads::new(UploadConfig::default());
    (0..peers).for_each(|peer| uploads.peer_connected(at(0), PeerKey(peer), Class::Within));
    uploads
}

/// How many of six peers, each of which asks for 128 KiB of its own, are sent something at once.
fn served_at_once(class: Class) -> usize {
    let mut uploads = Uploads::new(UploadConfig::default());
    for peer in 0..6 {
        uploads.peer_connected(at(0), PeerKey(peer), class);
        let mut long = request(peer, 0);
        long.groups = 8 * peer..8 * peer + 8;
        uploads
            .handle_request(at(0), PeerKey(peer), long)
            .expect("room");
    }
    std::iter::from_fn(|| uploads.poll_serve(at(0))).count()
}

#[test]
fn thin_links_to_other_sites_do_not_wait_for_each_other() {
    assert_eq!(served_at_once(Class::Within), 2);
    assert_eq!(served_at_once(Class::Beyond), 6);
}

/// Serves all that may be served, each response taking a millisecond; returns (peer, group) in order.
fn drain(uploads: &mut Uploads, from: u64) -> Vec<(u64, u64)> {
    let mut served = Vec::new();
    let mut ms = from;
    while let Some(serve) = uploads.poll_serve(at(ms)) {
        served.push((serve.peer.0, serve.groups.start));
        ms += 1;
        uploads.handle_finished(at(ms), serve.peer, serve.id, true);
    }
    served
}

#[test]
fn distinct_pieces_go_to_different_peers_and_second_copies_wait() {
    let mut uploads = uploads(2);
    for peer in 0..2 {
        for group in 0..4 {
            let group = if peer == 0 { group } else { group + 2 };
            uploads
                .handle_request(at(0), PeerKey(peer), request(group, group))
                .expect("room");
        }
    }
    let mut first = drain(&mut uploads, 0);
    first.sort_unstable_by_key(|&(_, group)| group);
    assert_eq!(
        first.iter().map(|&(_, group)| group).collect::<Vec<_>>(),
        [0, 1, 2, 3, 4, 5]
    );
    let wake = uploads.poll_timeout().expect("second copies are kept back");
    assert!(wake <= at(160), "{wake:?}");
    assert_eq!(drain(&mut uploads, 200).len(), 2);
}

#[test]
fn a_second_copy_is_kept_back_longer_while_much_is_in_flight() {
    let second = |change: fn(&mut IncomingRequest), ms, sent| {
        let mut uploads = uploads(3);
        let mut ask = |now, peer, request| {
            uploads
                .handle_request(at(now), PeerKey(peer), request)
                .expect("room");
            uploads
                .poll_serve(at(now))
                .map(|serve| (serve.peer.0, serve.groups.start))
        };
        assert_eq!(ask(0, 0, request(1, 0)), Some((0, 0)));
        let mut long = request(2, 100);
        long.groups.end += 7;
        assert_eq!(ask(0, 1, long), Some((1, 100)));
        let mut again = request(3, 0);
        change(&mut again);
        assert_eq!(
            ask(0, 2, again.clone()).is_some(),
            again.demand || !again.whole
        );
        uploads.handle_finished(at(1), PeerKey(0), RequestId(1), true);
        uploads.handle_sent(at(ms), PeerKey(1), RequestId(2), sent);
        uploads.poll_serve(at(ms)).map(|serve| serve.peer.0)
    };
    // 128 KiB are in flight, then half of that.
    assert_eq!(second(|_| (), 100, 64 << 10), None, "it was just sent");
    assert_eq!(second(|_| (), 200, 0), None);
    assert_eq!(second(|_| (), 200, 64 << 10), Some(2));
    assert_eq!(second(|_| (), 310, 0), Some(2), "not without end");
    second(|request| request.demand = true, 2, 0);
    second(|request| request.whole = false, 2, 0);
}

#[test]
fn short_responses_go_to_ten_at_once_and_long_ones_to_fewer() {
    let at_once = |groups: u64| {
        let mut uploads = uploads(20);
        for peer in 0..20 {
            let mut short = request(peer, 0);
            short.groups = groups * peer..groups * (peer + 1);
            uploads
                .handle_request(at(0), PeerKey(peer), short)
                .expect("room");
        }
        std::iter::from_fn(|| uploads.poll_serve(at(0))).count()
    };
    assert_eq!(at_once(1), 10);
    // 256 KiB.
    assert_eq!(at_once(4), 4);
}

#[test]
fn demand_comes_first_and_is_never_kept_back() {
    let mut uploads = uploads(2);
    uploads
        .handle_request(at(0), PeerKey(0), request(1, 0))
        .expect("room");
    assert_eq!(drain(&mut uploads, 0), [(0, 0)]);
    uploads
        .handle_request(at(1), PeerKey(1), request(1, 7))
        .expect("room");
    let demand = IncomingRequest {
        demand: true,
        ..request(2, 0)
    };
    uploads
        .handle_request(at(1), PeerKey(1), demand)
        .expect("room");
    assert_eq!(drain(&mut uploads, 2), [(1, 0), (1, 7)]);
}

#[test]
fn who_holds_less_is_served_more_but_not_without_end() {
    let mut uploads = uploads(2);
    let groups = PieceGeometry::of(SIZE).groups();
    for id in 0..100 {
        for (peer, holds) in [(0, 0), (1, groups)] {
            let request = IncomingRequest {
                holds,
                ..request(id, id + 100 * peer)
            };
            uploads
                .handle_request(at(0), PeerKey(peer), request)
                .expect("room");
        }
    }
    let served = drain(&mut uploads, 1);
    let to_the_first = |part: &[(u64, u64)]| part.iter().filter(|(peer, _)| *peer == 0).count();
    assert_eq!(to_the_first(&served[..100]), 80);
    assert_eq!(to_the_first(&served), 100);
}

#[test]
fn who_has_fallen_behind_comes_before_rare_pieces_but_not_at_a_seeder() {
    // Whether the second of two peers, which asks for what was sent before, is served first.
    let is_first = |holds: u64, whole: bool| {
        let mut uploads = uploads(3);
        let ask = |uploads: &mut Uploads, peer, group, holds| {
            let request = IncomingRequest {
                whole,
                holds,
                ..request(1, group)
            };
            uploads
                .handle_request(at(0), PeerKey(peer), request)
                .expect("room");
        };
        ask(&mut uploads, 2, 8, 200);
        assert_eq!(drain(&mut uploads, 0), [(2, 8)]);
        ask(&mut uploads, 0, 100, 200);
        ask(&mut uploads, 1, 8, holds);
        drain(&mut uploads, 2_000)[0].0 == 1
    };
    assert!(is_first(150, false));
    assert!(!is_first(195, false), "hardly behind");
    assert!(!is_first(150, true), "a seeder sends what others lack");
}

#[test]
fn who_says_that_it_lacks_everything_does_not_shut_out_the_others() {
    let mut uploads = uploads(3);
    // A mebibyte each: one the same again and again, the others what was sent less often.
    for id in 0..60 {
        for (peer, first, holds) in [(0, 0, 0), (1, 64, 200), (2, 128, 200)] {
            let request = IncomingRequest {
                whole: false,
                groups: first..first + 64,
                holds,
                ..request(id, 0)
            };
            uploads
                .handle_request(at(0), PeerKey(peer), request)
                .expect("room");
        }
    }
    let served = drain(&mut uploads, 1);
    let others = served[..30].iter().filter(|(peer, _)| *peer != 0).count();
    // A quarter of what it is served counts, so it gets twice as much as both others, but no more.
    assert!((8..=14).contains(&others), "{others}");
}

#[test]
fn shares_are_fair_between_peers_with_equally_rare_wishes() {
    let mut uploads = uploads(2);
    for id in 0..100 {
        uploads
            .handle_request(at(0), PeerKey(0), request(id, id))
            .expect("room");
    }
    for id in 0..10 {
        uploads
            .handle_request(at(0), PeerKey(1), request(id, 100 + id))
            .expect("room");
    }
    let served = drain(&mut uploads, 0);
    assert_eq!(
        served[..20].iter().filter(|(peer, _)| *peer == 1).count(),
        10
    );
}

#[test]
fn requests_that_break_the_protocol_or_the_bounds_are_refused() {
    let mut uploads = uploads(1);
    let (now, peer) = (at(0), PeerKey(0));
    let of = |groups| IncomingRequest {
        groups,
        size: 8 << 20,
        ..request(1, 0)
    };
    assert_eq!(
        uploads.handle_request(now, peer, of(3..3)),
        Err(Refusal::Malformed)
    );
    assert_eq!(
        uploads.handle_request(now, peer, of(0..65)),
        Err(Refusal::Malformed)
    );
    assert_eq!(
        uploads.handle_request(now, peer, of(511..513)),
        Err(Refusal::Malformed)
    );
    assert_eq!(
        uploads.handle_request(now, PeerKey(9), of(0..1)),
        Err(Refusal::UnknownPeer)
    );
    for id in 0..128 {
        assert_eq!(uploads.handle_request(now, peer, request(id, id)), Ok(()));
    }
    assert_eq!(
        uploads.handle_request(now, peer, request(5, 0)),
        Err(Refusal::Duplicate)
    );
    assert_eq!(
        uploads.handle_request(now, peer, request(128, 0)),
        Err(Refusal::Busy)
    );
}

#[test]
fn only_what_waits_can_be_cancelled() {
    let mut uploads = uploads(1);
    (0..2).for_each(|id| {
        uploads
            .handle_request(at(0), PeerKey(0), request(id, id))
            .expect("room")
    });
    let served = uploads.poll_serve(at(0)).expect("one").id;
    assert!(!uploads.handle_cancel(at(0), PeerKey(0), served));
    assert!(uploads.handle_cancel(at(0), PeerKey(0), RequestId(1 - served.0)));
    assert_eq!(uploads.poll_serve(at(0)), None);
}

#[test]
fn a_receiver_that_takes_nothing_does_not_hold_up_the_others() {
    let mut uploads = uploads(3);
    for peer in 0..3 {
        for id in 0..20 {
            let wide = IncomingRequest {
                groups: id * 8..id * 8 + 8,
                ..request(id, 0)
            };
            uploads
                .handle_request(at(0), PeerKey(peer), wide)
                .expect("room");
        }
    }
    // Peers 0 and 1 take nothing; peer 2 takes a response every 10 ms.
    let mut to_last = 0;
    for ms in 0..2000 {
        while let Some(serve) = uploads.poll_serve(at(ms)) {
            to_last += u32::from(serve.peer == PeerKey(2));
            if serve.peer == PeerKey(2) {
                uploads.handle_finished(at(ms), serve.peer, serve.id, true);
            }
        }
    }
    assert_eq!(to_last, 20);
}

#[test]
fn patience_does_not_grow_with_those_who_take_a_little_and_then_nothing() {
    let mut uploads = uploads(6);
    for peer in 0..6 {
        let mut greedy = request(1, 0);
        greedy.groups = 0..64;
        greedy.demand = true;
        uploads
            .handle_request(at(0), PeerKey(peer), greedy)
            .expect("room");
    }
    let mut served = Vec::new();
    for ms in (0..5000).step_by(10) {
        while let Some(serve) = uploads.poll_serve(at(ms)) {
            served.push(ms);
            uploads.handle_sent(at(ms), serve.peer, serve.id, 64 << 10);
        }
    }
    // A second for the first of them, a fifth of one for each other.
    assert_eq!(served.len(), 6, "{served:?}");
    assert!(served[5] <= 2000, "{served:?}");
}

#[test]
fn what_is_held_up_is_not_taken_for_our_own_rate() {
    let mut uploads = uploads(4);
    // Peer 2 asks for a little now and then and takes it within a millisecond; the others take nothing.
    let served_after = |uploads: &mut Uploads, from: u64, id: u64| {
        uploads
            .handle_request(at(from), PeerKey(2), request(id, id % 256))
            .expect("room");
        let served = (from..from + 5000).find(|&ms| {
            let mut served = false;
            while let Some(serve) = uploads.poll_serve(at(ms)) {
                if serve.peer == PeerKey(2) {
                    uploads.handle_finished(at(ms + 1), serve.peer, serve.id, true);
                    served = true;
                }
            }
            served
        });
        served.map(|ms| ms - from)
    };
    let take_nothing = |uploads: &mut Uploads, ms: u64, peer: u64| {
        let long = IncomingRequest {
            groups: 0..64,
            ..request(0, 0)
        };
        uploads
            .handle_request(at(ms), PeerKey(peer), long)
            .expect("room");
    };
    for id in 0..200 {
        assert_eq!(served_after(&mut uploads, 2 * id, id), Some(0));
    }
    take_nothing(&mut uploads, 1000, 0);
    take_nothing(&mut uploads, 1000, 1);
    for id in 200..230 {
        let waited = served_after(&mut uploads, 1000 + (id - 199) * 2000, id);
        // A second until our own rate is known.
        assert!(waited.is_some_and(|ms| ms < 1_000), "{waited:?}");
    }
    take_nothing(&mut uploads, 70_000, 3);
    let waited = served_after(&mut uploads, 70_001, 230);
    assert!(waited.is_some_and(|ms| ms < 500), "{waited:?}");
}

#[test]
fn bytes_in_flight_are_bounded() {
    let mut uploads = uploads(1);
    for id in 0..100 {
        uploads
            .handle_request(at(0), PeerKey(0), request(id, id))
            .expect("room");
    }
    let served = std::iter::from_fn(|| uploads.poll_serve(at(0))).count();
    assert_eq!(served, 16);
    assert_eq!(uploads.stats().in_flight, 256 << 10);
    uploads.handle_sent(at(1), PeerKey(0), RequestId(0), 1 << 30);
    assert_eq!(std::iter::from_fn(|| uploads.poll_serve(at(1))).count(), 1);
}
