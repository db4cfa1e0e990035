//! Peers that lie, stall, drip; stores that are full. The transfer goes on with the others.

use std::sync::atomic::Ordering;
use std::time::Duration;

use capsule_proto::GroupRanges;
use capsule_swarm::{Event, FetchError, FetchSpec, StoreError};

use crate::node::{Fleet, Start, content, relay, within};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_liar_is_banned_and_the_transfer_goes_on() {
    let fleet = Fleet::new(1);
    let honest = Start::new(fleet.enrol()).go().await;
    let liar = Start::new(fleet.enrol()).go().await;
    let data = content(1, 12 << 20);
    let tree = honest.share(&data).await;
    liar.share(&data).await;
    liar.store.faults.lies.store(true, Ordering::Relaxed);
    let mut puller = Start::new(fleet.enrol()).to(&honest).to(&liar).go().await;
    puller.connected(2).await;
    let done = puller.pull(tree.root, Some(tree.size)).await;
    assert_eq!(
        done.by_peer,
        [(honest.net.local_peer(), tree.size)],
        "nothing of the liar's was stored"
    );
    let banned = |event| match event {
        Event::PeerBanned { peer, .. } => Some(peer),
        _ => None,
    };
    assert_eq!(puller.event(banned).await, liar.net.local_peer());
    // It does not come back, though it tries.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let peers = puller.net.peers().await.unwrap();
    assert!(peers.iter().all(|peer| peer.id == honest.net.local_peer()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_lost_hashes_asks_for_them_again() {
    let fleet = Fleet::new(1);
    let provider = Start::new(fleet.enrol()).go().await;
    let data = content(1, 4 << 20);
    let tree = provider.share(&data).await;
    let puller = Start::new(fleet.enrol()).to(&provider).go().await;
    puller.store.faults.forgets.store(true, Ordering::Relaxed);
    let done = puller.pull(tree.root, Some(tree.size)).await;
    assert_eq!(
        done.by_peer,
        [(provider.net.local_peer(), tree.size)],
        "nobody is blamed"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_size_is_the_claimants_fault() {
    let fleet = Fleet::new(1);
    let liar = Start::new(fleet.enrol()).go().await;
    let data = content(2, 40_000);
    let tree = liar.store.add(&data);
    liar.net
        .announce(tree.root, tree.size + 1, GroupRanges::all(tree.size + 1))
        .await
        .unwrap();
    let puller = Start::new(fleet.enrol()).to(&liar).go().await;
    puller
        .until(async || !puller.net.providers(tree.root).await.unwrap().is_empty())
        .await;
    let mut fetch = puller
        .net
        .fetch(FetchSpec::whole(tree.root, None))
        .await
        .unwrap();
    puller
        .until(async || puller.net.peers().await.unwrap().is_empty())
        .await;
    let honest = Start::new(fleet.enrol()).go().await;
    honest.share(&data).await;
    puller
        .net
        .add_address(honest.address().to_string())
        .await
        .unwrap();
    assert_eq!(within(fetch.done()).await.unwrap().size, Some(tree.size));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_provider_that_never_answers_does_not_hold_up_the_rest() {
    let fleet = Fleet::new(1);
    let honest = Start::new(fleet.enrol()).go().await;
    let stalled = Start::new(fleet.enrol()).go().await;
    let data = content(3, 12 << 20);
    let tree = honest.share(&data).await;
    stalled.share(&data).await;
    stalled.store.faults.stalls.store(true, Ordering::Relaxed);
    let puller = Start::new(fleet.enrol())
        .to(&honest)
        .to(&stalled)
        .go()
        .await;
    puller.connected(2).await;
    puller.pull(tree.root, Some(tree.size)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_provider_that_drips_does_not_hold_up_the_rest() {
    let fleet = Fleet::new(1);
    let honest = Start::new(fleet.enrol()).go().await;
    let dripping = Start::new(fleet.enrol()).go().await;
    let data = content(4, 12 << 20);
    let tree = honest.share(&data).await;
    dripping.share(&data).await;
    let mut start = Start::new(fleet.enrol()).to(&honest);
    start.bootstrap.push(relay(dripping.address(), 320).await);
    let puller = start.go().await;
    puller.connected(2).await;
    puller.pull(tree.root, Some(tree.size)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_store_ends_the_fetch_and_says_so() {
    let fleet = Fleet::new(1);
    let publisher = Start::new(fleet.enrol()).go().await;
    let puller = Start::new(fleet.enrol()).to(&publisher).go().await;
    puller.store.faults.full.store(true, Ordering::Relaxed);
    let tree = publisher.share(&content(5, 5 << 20)).await;
    let mut fetch = puller
        .net
        .fetch(FetchSpec::whole(tree.root, Some(tree.size)))
        .await
        .unwrap();
    let error = within(fetch.done()).await.unwrap_err();
    assert!(
        matches!(
            error,
            FetchError::Store {
                source: StoreError::Full,
                ..
            }
        ),
        "{error}"
    );
    // Nobody is to blame, and it works when there is room.
    puller.store.faults.full.store(false, Ordering::Relaxed);
    puller.pull(tree.root, Some(tree.size)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_provider_whose_blob_is_gone_says_so_and_others_are_asked() {
    let fleet = Fleet::new(1);
    let honest = Start::new(fleet.enrol()).go().await;
    let forgetful = Start::new(fleet.enrol()).go().await;
    let data = content(6, 6 << 20);
    let tree = honest.share(&data).await;
    forgetful.share(&data).await;
    forgetful.store.remove(&tree.root);
    let puller = Start::new(fleet.enrol())
        .to(&honest)
        .to(&forgetful)
        .go()
        .await;
    puller.connected(2).await;
    let done = puller.pull(tree.root, Some(tree.size)).await;
    assert_eq!(done.by_peer, [(honest.net.local_peer(), tree.size)]);
}
