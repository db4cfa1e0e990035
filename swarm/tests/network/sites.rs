//! Links between sites are dear: about one copy crosses each.

use std::time::Duration;

use capsule_proto::RootHash;
use capsule_swarm::{Fetch, FetchSpec};

use crate::node::{Fleet, Node, Start, content, within};

/// A publisher in a site of its own, and as many sites of so many nodes, all connected.
async fn sites(fleet: &Fleet, sites: usize, nodes: usize) -> (Node, Vec<Vec<Node>>) {
    let publisher = Start::new(fleet.enrol()).in_site("office").go().await;
    let mut all = Vec::new();
    for site in 0..sites {
        let mut here = Vec::new();
        for _ in 0..nodes {
            let node = Start::new(fleet.enrol()).in_site(&format!("site {site}"));
            here.push(node.to(&publisher).go().await);
        }
        all.push(here);
    }
    for node in all.iter().flatten() {
        within(async {
            loop {
                let peers = node.net.peers().await.unwrap();
                let near = peers.iter().filter(|peer| !peer.beyond).count();
                let beyond = peers
                    .iter()
                    .any(|peer| peer.id == publisher.net.local_peer());
                if near == nodes - 1 && beyond {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
    (publisher, all)
}

async fn fetch(node: &Node, root: RootHash, size: u64) -> Fetch {
    let spec = FetchSpec::whole(root, Some(size));
    node.net.fetch(spec).await.unwrap()
}

/// Bytes of a blob that nodes of one site received from peers of other sites.
async fn crossed(node: &Node) -> u64 {
    let peers = node.net.peers().await.unwrap();
    peers
        .iter()
        .filter(|peer| peer.beyond)
        .map(|peer| peer.bytes_in)
        .sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn about_one_copy_comes_into_each_site() {
    let fleet = Fleet::new(3);
    let (publisher, sites) = sites(&fleet, 2, 4).await;
    let data = content(3, 24 << 20);
    let tree = publisher.share(&data).await;
    let mut fetches = Vec::new();
    for node in sites.iter().flatten() {
        fetches.push(fetch(node, tree.root, tree.size).await);
    }
    for fetch in &mut fetches {
        within(fetch.done()).await.unwrap();
    }
    for site in &sites {
        let mut crossed_to = Vec::new();
        for node in site {
            assert_eq!(node.store.content(&tree.root).unwrap(), data);
            crossed_to.push(crossed(node).await);
        }
        let copies = crossed_to.iter().sum::<u64>() as f64 / tree.size as f64;
        // Two, where all goes by the clock; here nodes share cores, and may hear of each other late. Figures are the simulations' business.
        assert!(
            copies < 1.6,
            "{copies:.3} copies came into a site: {crossed_to:?}"
        );
        // Who hears late of the gateways has asked once or twice by then; without any, each would fetch a quarter.
        assert!(
            crossed_to.iter().any(|&bytes| bytes < tree.size / 10),
            "all went on asking beyond: {crossed_to:?} of {}",
            tree.size
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_whose_gateways_leave_goes_on() {
    let fleet = Fleet::new(4);
    let (publisher, mut sites) = sites(&fleet, 1, 4).await;
    let mut site = sites.remove(0);
    let data = content(4, 64 << 20);
    let tree = publisher.share(&data).await;
    let mut fetches = Vec::new();
    for node in &site {
        fetches.push(fetch(node, tree.root, tree.size).await);
    }
    // Whoever asks beyond first is gone at once.
    let gateway = within(async {
        loop {
            for (at, node) in site.iter().enumerate() {
                if crossed(node).await > 0 {
                    return at;
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let gone = site.remove(gateway);
    drop(fetches.remove(gateway));
    gone.net.shutdown().await;
    for fetch in &mut fetches {
        within(fetch.done()).await.unwrap();
    }
    for node in &site {
        assert_eq!(node.store.content(&tree.root).unwrap(), data);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_alone_in_its_site_waits_for_nobody() {
    let fleet = Fleet::new(5);
    let (publisher, sites) = sites(&fleet, 1, 1).await;
    let tree = publisher.share(&content(5, 100_000)).await;
    let started = std::time::Instant::now();
    within(fetch(&sites[0][0], tree.root, tree.size).await.done())
        .await
        .unwrap();
    assert!(
        started.elapsed() < Duration::from_millis(240),
        "{:?}",
        started.elapsed()
    );
}

/// They know a third of yet another site, and of each other nobody tells them but that one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_are_alone_in_their_sites_find_each_other() {
    let fleet = Fleet::new(5);
    let hub = Start::new(fleet.enrol()).in_site("hub").go().await;
    let alone = async |site: &str| {
        let start = Start::new(fleet.enrol()).in_site(site);
        start.to(&hub).go().await
    };
    let nodes = [alone("one").await, alone("two").await, alone("three").await];
    for node in &nodes {
        node.connected(3).await;
    }
}
