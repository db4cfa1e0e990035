//! Nodes that hold more blobs than anybody remembers of a peer.

use std::time::Duration;

use capsule_proto::{GroupRanges, RootHash};
use capsule_swarm::{Event, FetchSpec};

use crate::node::{Fleet, Node, Start, content, within};

/// More blobs than are remembered of a peer: 16,384.
const MANY: u64 = 20_000;

/// Announces so many blobs of one byte, of which the store has none.
async fn announce_many(node: &Node, count: u64) {
    for number in 0..count {
        let root = RootHash::of(&number.to_le_bytes());
        let all = GroupRanges::all(1);
        node.net.announce(root, 1, all).await.unwrap();
    }
    // Commands are carried out in order.
    node.net.peers().await.unwrap();
}

/// Content whose root is among the last, in the order in which a newcomer is told.
fn last_told(seed: u64, len: usize) -> Vec<u8> {
    let candidates = (0..).map(|number| content(seed + 1000 * number, len));
    let is_last = |content: &Vec<u8>| RootHash::of(content).as_bytes()[0] == 0xff;
    candidates.into_iter().find(is_last).unwrap()
}

/// Waits until a node remembers of its only peer as many blobs as it does of one.
async fn knows_many(node: &Node) {
    node.until(async || {
        let peers = node.net.peers().await.unwrap();
        peers.iter().any(|peer| peer.blobs == 16_384)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_beyond_those_that_are_remembered_is_found() {
    let fleet = Fleet::new(1);
    let provider = Start::new(fleet.enrol()).go().await;
    announce_many(&provider, MANY).await;
    let (known, unsized_one, asked) = (last_told(1, 40_000), last_told(2, 40_000), last_told(3, 9));
    let known = provider.share(&known).await;
    let unsized_one = provider.share(&unsized_one).await;
    let asked = provider.share(&asked).await;
    let puller = Start::new(fleet.enrol()).to(&provider).go().await;
    knows_many(&puller).await;
    puller.pull(known.root, Some(known.size)).await;
    puller.pull(unsized_one.root, None).await;
    let providers = puller.net.providers(asked.root).await.unwrap();
    assert_eq!(providers.len(), 1);
    assert_eq!(providers[0].groups, GroupRanges::all(9));
    // Nobody has it: that is an answer too, and no later than the peer's.
    let nobody = puller.net.providers(RootHash::of(b"nobody has it"));
    assert!(within(nobody).await.unwrap().is_empty());
    // What is remembered has not grown.
    assert_eq!(puller.net.peers().await.unwrap()[0].blobs, 16_384);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_later_to_a_node_with_many_is_found_by_who_waits_for_it() {
    let fleet = Fleet::new(1);
    let provider = Start::new(fleet.enrol()).go().await;
    announce_many(&provider, MANY).await;
    let puller = Start::new(fleet.enrol()).to(&provider).go().await;
    knows_many(&puller).await;
    let data = content(4, 2_000_000);
    let spec = FetchSpec::whole(RootHash::of(&data), Some(2_000_000));
    let mut fetch = puller.net.fetch(spec).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    provider.share(&data).await;
    within(fetch.done()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fetch_that_waits_finds_a_node_with_many_that_joins() {
    let fleet = Fleet::new(1);
    let puller = Start::new(fleet.enrol()).go().await;
    let data = last_told(5, 40_000);
    let spec = FetchSpec::whole(RootHash::of(&data), Some(40_000));
    let mut fetch = puller.net.fetch(spec).await.unwrap();
    let provider = Start::new(fleet.enrol()).go().await;
    announce_many(&provider, MANY).await;
    provider.share(&data).await;
    let address = puller.address().to_string();
    provider.net.add_address(address).await.unwrap();
    within(fetch.done()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newcomer_is_not_told_more_than_it_can_take() {
    let fleet = Fleet::new(1);
    let provider = Start::new(fleet.enrol()).go().await;
    // All of it would be more than may wait for one peer, and end the connection.
    announce_many(&provider, 180_000).await;
    let tree = provider.share(&last_told(6, 40_000)).await;
    let mut puller = Start::new(fleet.enrol()).to(&provider).go().await;
    puller.pull(tree.root, Some(tree.size)).await;
    while let Ok(event) = puller.events.try_recv() {
        assert!(!matches!(event, Event::PeerDisconnected(_)), "{event:?}");
    }
}
