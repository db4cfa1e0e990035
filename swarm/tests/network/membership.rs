//! Who is let in, and that everybody finds everybody.

use std::sync::Arc;
use std::time::Duration;

use capsule_proto::credential::{Revoked, TokenId};
use capsule_proto::record::Body;
use capsule_swarm::{Event, FetchSpec};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::node::{Fleet, NOW, Records, Start, content, relay, within};

fn refusal(event: Event) -> Option<String> {
    match event {
        Event::Refused { reason, .. } => Some(reason),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_of_another_fleet_is_refused() {
    let mut ours = Start::new(Fleet::new(1).enrol()).go().await;
    let mut theirs = Start::new(Fleet::new(2).enrol()).to(&ours).go().await;
    let (reason, told) = (ours.event(refusal).await, theirs.event(refusal).await);
    assert!(
        reason.contains("we refused peer") && reason.contains("another fleet"),
        "{reason}"
    );
    assert!(
        told.contains("the peer refused us") && told.contains("another fleet"),
        "{told}"
    );
    assert!(ours.net.peers().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_dials_itself_is_nobodys_trouble() {
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let own = free.local_addr().unwrap();
    drop(free);
    let fleet = Fleet::new(1);
    let mut start = Start::new(fleet.enrol());
    (start.listen, start.bootstrap) = (Some(own), vec![own]);
    let mut node = start.go().await;
    let waiting = node.event(refusal);
    let refused = tokio::time::timeout(Duration::from_secs(3), waiting).await;
    assert!(refused.is_err(), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_credential_is_refused_and_its_owner_told() {
    let fleet = Fleet::new(1);
    let mut node = Start::new(fleet.enrol()).go().await;
    let mut expired = Start::new(fleet.enrol_until(NOW - 1)).to(&node).go().await;
    let (reason, told) = (node.event(refusal).await, expired.event(refusal).await);
    assert!(reason.contains("expired"), "{reason}");
    assert!(
        told.contains("the peer refused us: the credential expired"),
        "{told}"
    );
    // It is refused too where it is the one that is dialled.
    let expired_listener = Start::new(fleet.enrol_until(NOW - 1)).go().await;
    let mut dialler = Start::new(fleet.enrol()).to(&expired_listener).go().await;
    assert!(dialler.event(refusal).await.contains("expired"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revocation_travels_with_the_handshake() {
    let fleet = Fleet::new(1);
    let (admin, revoked) = (fleet.enrol(), fleet.enrol());
    let machines = [revoked.key.machine()].into();
    let revocation = admin.sign(Body::Revocation(Revoked {
        machines,
        ..Revoked::default()
    }));
    let records = Arc::new(Records::new(&admin));
    records.insert(&revocation);
    let knows = Start::new(admin).go_with(records).await;
    // Learns of it by its first connection.
    let learns = Start::new(fleet.enrol()).to(&knows).go().await;
    learns.connected(1).await;
    let mut outcast = Start::new(revoked).to(&learns).go().await;
    let told = outcast.event(refusal).await;
    assert!(told.contains("revoked"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_token_ends_all_its_machines() {
    let fleet = Fleet::new(1);
    let admin = fleet.enrol();
    let records = Arc::new(Records::new(&admin));
    let tokens = [TokenId([1; 8])].into();
    records.insert(&admin.sign(Body::Revocation(Revoked {
        tokens,
        ..Revoked::default()
    })));
    let node = Start::new(admin).go_with(records).await;
    let mut other = Start::new(fleet.enrol()).to(&node).go().await;
    assert!(other.event(refusal).await.contains("revoked"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_silence_do_not_disturb() {
    let fleet = Fleet::new(1);
    let node = Start::new(fleet.enrol()).go().await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        let mut garbage = TcpStream::connect(node.address()).await.unwrap();
        garbage.write_all(&content(1, 5000)).await.unwrap();
        let mut rest = Vec::new();
        let _closed = within(garbage.read_to_end(&mut rest)).await;
        silent.push(TcpStream::connect(node.address()).await.unwrap());
    }
    let member = Start::new(fleet.enrol()).to(&node).go().await;
    member.connected(1).await;
    assert_eq!(node.net.peers().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_restarts_is_found_again() {
    let fleet = Fleet::new(1);
    let first = Start::new(fleet.enrol()).go().await;
    let (machine, address) = (first.machine.clone(), first.address());
    let second = Start::new(fleet.enrol()).to(&first).go().await;
    second.connected(1).await;
    within(first.net.shutdown()).await;
    second
        .until(async || second.net.peers().await.unwrap().is_empty())
        .await;
    let again = Start {
        listen: Some(address),
        ..Start::new(machine)
    }
    .go()
    .await;
    let tree = again.share(&content(1, 50_000)).await;
    second.pull(tree.root, Some(tree.size)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_may_dial_at_once() {
    let fleet = Fleet::new(1);
    let first = Start::new(fleet.enrol()).go().await;
    let second = Start::new(fleet.enrol()).go().await;
    let (a, b) = (first.address().to_string(), second.address().to_string());
    let (x, y) = tokio::join!(first.net.add_address(b), second.net.add_address(a));
    x.and(y).unwrap();
    let tree = first.share(&content(1, 3_000_000)).await;
    second.pull(tree.root, Some(tree.size)).await;
    for node in [&first, &second] {
        assert_eq!(node.net.peers().await.unwrap().len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_node_lets_newcomers_in() {
    let fleet = Fleet::new(1);
    let mut start = Start::new(fleet.enrol());
    start.limits.connections_max = 2;
    let hub = start.go().await;
    let tree = hub.share(&content(1, 100_000)).await;
    // None of them listens, so each depends on the hub.
    let mut nodes = Vec::new();
    for _ in 0..5 {
        let node = Start {
            listen: None,
            ..Start::new(fleet.enrol())
        }
        .to(&hub)
        .go()
        .await;
        node.pull(tree.root, Some(tree.size)).await;
        nodes.push(node);
    }
    assert!(hub.net.peers().await.unwrap().len() <= 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn newcomers_do_not_break_a_transfer() {
    let fleet = Fleet::new(1);
    let provider = Start::new(fleet.enrol()).go().await;
    let wanted = provider.share(&content(1, 1_000_000)).await;
    // A node with two places: one for its provider, over a slow link, one for whoever comes.
    let mut start = Start::new(fleet.enrol());
    start.limits.connections_max = 2;
    start
        .bootstrap
        .push(relay(provider.address(), 150_000).await);
    let mut hub = start.go().await;
    let spec = FetchSpec::whole(wanted.root, Some(wanted.size));
    let mut fetch = hub.net.fetch(spec).await.unwrap();
    hub.until(async || fetch.progress().borrow().bytes_done > 0)
        .await;
    // Somebody takes more of it in that time than it gets from its provider ...
    let served = hub.share(&content(2, 6 << 20)).await;
    let alone = |machine| Start {
        listen: None,
        ..Start::new(machine)
    };
    let mut taker = alone(fleet.enrol());
    taker.bootstrap.push(relay(hub.address(), 2_000_000).await);
    let taker = taker.go().await;
    let spec = FetchSpec::whole(served.root, Some(served.size));
    let mut taking = taker.net.fetch(spec).await.unwrap();
    hub.until(async || {
        let peers = hub.net.peers().await.unwrap();
        peers.iter().any(|peer| peer.bytes_out > wanted.size)
    })
    .await;
    // ... when a newcomer knocks, which gets its share too.
    let newcomer = alone(fleet.enrol()).to(&hub).go().await;
    newcomer.pull(served.root, Some(served.size)).await;
    within(taking.done()).await.unwrap();
    within(fetch.done()).await.unwrap();
    let provider = provider.net.local_peer();
    while let Ok(event) = hub.events.try_recv() {
        let broke = matches!(event, Event::PeerDisconnected(peer) if peer == provider);
        assert!(!broke, "the newcomer took the provider's place");
    }
}
