//! Content and records reach everybody.

use std::sync::Arc;
use std::time::Duration;

use capsule_proto::{CapsuleId, GroupRanges, RootHash};
use capsule_swarm::{Event, FetchError, FetchSpec, Priority};

use crate::node::{Fleet, Node, Records, Start, content, within};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_pulls_from_another() {
    let fleet = Fleet::new(1);
    let publisher = Start::new(fleet.enrol()).go().await;
    let puller = Start::new(fleet.enrol()).to(&publisher).go().await;
    for (seed, len) in [0, 1, 16 << 10, (16 << 10) + 1, 3_000_000, 20 << 20]
        .into_iter()
        .enumerate()
    {
        let data = content(seed as u64, len);
        let tree = publisher.share(&data).await;
        let done = puller.pull(tree.root, Some(tree.size)).await;
        assert_eq!(puller.store.content(&tree.root).unwrap(), data);
        assert_eq!((done.bytes_total, done.bytes_done), (tree.size, tree.size));
        // An empty blob is of its root alone: nobody sends a byte of it.
        let sent: &[_] = match tree.size {
            0 => &[],
            size => &[(publisher.net.local_peer(), size)],
        };
        assert_eq!(done.by_peer, sent);
    }
    let peers = puller.net.peers().await.unwrap();
    assert_eq!((peers.len(), peers[0].member.name.as_str()), (1, "pc-1"));
    assert_eq!(
        peers[0].bytes_in,
        publisher.net.peers().await.unwrap()[0].bytes_out
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_size_may_be_unknown() {
    let fleet = Fleet::new(1);
    let publisher = Start::new(fleet.enrol()).go().await;
    let puller = Start::new(fleet.enrol()).to(&publisher).go().await;
    for len in [0, 900, 5_000_000] {
        let tree = publisher.share(&content(9, len)).await;
        let done = puller.pull(tree.root, None).await;
        assert_eq!(done.size, Some(tree.size));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_nodes_help_each_other() {
    let fleet = Fleet::new(1);
    let publisher = Start::new(fleet.enrol()).go().await;
    let mut pullers: Vec<Node> = Vec::new();
    for _ in 0..7 {
        pullers.push(Start::new(fleet.enrol()).to(&publisher).go().await);
    }
    // Found through the publisher, which is all they were told of.
    for node in pullers.iter().chain([&publisher]) {
        node.connected(7).await;
    }
    let tree = publisher.share(&content(1, 24 << 20)).await;
    let mut fetches = Vec::new();
    for node in &pullers {
        fetches.push(
            node.net
                .fetch(FetchSpec::whole(tree.root, Some(tree.size)))
                .await
                .unwrap(),
        );
    }
    for fetch in &mut fetches {
        within(fetch.done()).await.unwrap();
    }
    for node in &pullers {
        assert!(node.store.content(&tree.root).is_some());
    }
    let totals = publisher.net.totals().await.unwrap();
    let sent = totals
        .blobs
        .iter()
        .find(|(root, _)| *root == tree.root)
        .unwrap()
        .1
        .sent;
    assert!(
        sent < 4 * tree.size,
        "the publisher sent {:.2} copies",
        sent as f64 / tree.size as f64
    );
    let providers = pullers[0].net.providers(tree.root).await.unwrap();
    assert!(
        providers
            .iter()
            .any(|provider| provider.peer == publisher.net.local_peer())
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_fetch_keeps_what_it_verified_and_resumes() {
    let fleet = Fleet::new(1);
    let publisher = Start::new(fleet.enrol()).go().await;
    let puller = Start::new(fleet.enrol()).to(&publisher).go().await;
    let tree = publisher.share(&content(3, 32 << 20)).await;
    let fetch = puller
        .net
        .fetch(FetchSpec::whole(tree.root, Some(tree.size)))
        .await
        .unwrap();
    let root = tree.root;
    puller
        .until(async || puller.store.held(&root).count() >= 64)
        .await;
    drop(fetch);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let kept = puller.store.held(&root).bytes(tree.size);
    let done = puller.pull(root, Some(tree.size)).await;
    assert!(
        kept > 0 && done.bytes_total <= tree.size - kept,
        "{kept} kept, {} fetched",
        done.bytes_total
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_can_be_wanted_and_demanded() {
    let fleet = Fleet::new(1);
    let publisher = Start::new(fleet.enrol()).go().await;
    let puller = Start::new(fleet.enrol()).to(&publisher).go().await;
    let tree = publisher.share(&content(3, 8 << 20)).await;
    let want = GroupRanges::from(100..110);
    let spec = FetchSpec {
        want: Some(want.clone()),
        ..FetchSpec::whole(tree.root, Some(tree.size))
    };
    let mut fetch = puller.net.fetch(spec).await.unwrap();
    fetch.demand(GroupRanges::from(105..107)).await.unwrap();
    let done = within(fetch.done()).await.unwrap();
    assert_eq!(done.bytes_done, 10 << 14);
    assert_eq!(puller.store.held(&tree.root), want);
}

/// Also while more of it is being fetched, which nobody has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_lost_comes_again() {
    let fleet = Fleet::new(1);
    let publisher = Start::new(fleet.enrol()).go().await;
    let tree = publisher.share(&content(3, 8 << 20)).await;
    let there = GroupRanges::from(0..100);
    let (absent, lost) = (
        GroupRanges::all(tree.size).difference(&there),
        GroupRanges::from(20..30),
    );
    publisher.store.lose(&tree.root, &absent);
    let withdrawn = publisher.net.withdraw(tree.root).await;
    withdrawn.unwrap();
    let announced = publisher.net.announce(tree.root, tree.size, there.clone());
    announced.await.unwrap();
    let puller = Start::new(fleet.enrol()).to(&publisher).go().await;
    let whole = FetchSpec::whole(tree.root, Some(tree.size));
    let _all = puller.net.fetch(whole.clone()).await.unwrap();
    puller
        .until(async || puller.store.held(&tree.root) == there)
        .await;
    puller.store.lose(&tree.root, &lost);
    puller.net.withdraw(tree.root).await.unwrap();
    let spec = FetchSpec {
        want: Some(lost.clone()),
        priority: Priority::Demand,
        ..whole
    };
    let mut fetch = puller.net.fetch(spec).await.unwrap();
    within(fetch.done()).await.unwrap();
    assert_eq!(puller.store.held(&tree.root), there);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_has_is_waited_for_until_somebody_has_it() {
    let fleet = Fleet::new(1);
    let publisher = Start::new(fleet.enrol()).go().await;
    let puller = Start::new(fleet.enrol()).to(&publisher).go().await;
    puller.connected(1).await;
    let data = content(5, 100_000);
    let root = RootHash::of(&data);
    let mut known = puller
        .net
        .fetch(FetchSpec::whole(root, Some(100_000)))
        .await
        .unwrap();
    let other = content(6, 100_000);
    let mut unknown = puller
        .net
        .fetch(FetchSpec::whole(RootHash::of(&other), None))
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    publisher.share(&data).await;
    publisher.share(&other).await;
    within(known.done()).await.unwrap();
    within(unknown.done()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_withdrawn_is_not_asked_for() {
    let fleet = Fleet::new(1);
    let publisher = Start::new(fleet.enrol()).go().await;
    let puller = Start::new(fleet.enrol()).to(&publisher).go().await;
    let tree = publisher.share(&content(5, 100_000)).await;
    let announced = async || !puller.net.providers(tree.root).await.unwrap().is_empty();
    puller.until(announced).await;
    publisher.net.withdraw(tree.root).await.unwrap();
    puller.until(async || !announced().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_ends_fetches() {
    let fleet = Fleet::new(1);
    let node = Start::new(fleet.enrol()).go().await;
    let mut fetch = node
        .net
        .fetch(FetchSpec::whole(RootHash::of(b"nowhere"), Some(7)))
        .await
        .unwrap();
    within(node.net.shutdown()).await;
    assert!(matches!(
        within(fetch.done()).await,
        Err(FetchError::Closed)
    ));
    assert!(node.net.peers().await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_reach_everybody_early_and_late() {
    let fleet = Fleet::new(1);
    let machine = fleet.enrol();
    let records = Arc::new(Records::new(&machine));
    (0..300).for_each(|number| records.insert(&machine.record(number)));
    let first = Start::new(machine).go_with(records).await;
    let mut second = Start::new(fleet.enrol()).to(&first).go().await;
    // What was there before arrives on connecting ...
    second.until(async || second.records.len() == 300).await;
    // ... also at a third that is connected to the second only ...
    let third = Start {
        listen: None,
        ..Start::new(fleet.enrol())
    }
    .to(&second)
    .go()
    .await;
    third.until(async || third.records.len() == 300).await;
    // ... and what is made later by gossip, or anti-entropy.
    let news = first.machine.record(1000);
    first.records.insert(&news);
    first
        .net
        .publish_record(news.as_bytes().to_vec())
        .await
        .unwrap();
    let heard = |event| {
        matches!(event, Event::RecordReceived { bytes, .. } if bytes == news.as_bytes())
            .then_some(())
    };
    second.event(heard).await;
    third.until(async || third.records.len() == 301).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_is_heard() {
    let fleet = Fleet::new(1);
    let first = Start::new(fleet.enrol()).go().await;
    let mut second = Start::new(fleet.enrol()).to(&first).go().await;
    let capsule = CapsuleId(RootHash::of(b"capsule"));
    first.net.set_capsules(vec![(capsule, true)]).await.unwrap();
    let told = |event| match event {
        Event::Status {
            machine, capsules, ..
        } if !capsules.is_empty() => Some((machine, capsules)),
        _ => None,
    };
    let first_holds = (first.machine.key.machine(), vec![(capsule, true)]);
    assert_eq!(second.event(told).await, first_holds);
    // Who comes when gossip has forgotten it is told too.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut third = Start::new(fleet.enrol()).to(&first).go().await;
    assert_eq!(third.event(told).await, first_holds);
}
