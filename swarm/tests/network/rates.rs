//! Caps of rates hold for what is on the link, and change at run time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use capsule_proto::GroupRanges;
use capsule_swarm::{Caps, Fetch, FetchSpec, Priority, Rate};
use tokio::time::sleep;

use crate::node::{Fleet, Node, Start, content, relay_by, within};

/// What TCP and IP add to what passes a socket: headers of 52 bytes before 1,448.
const HEADERS: f64 = 1500.0 / 1448.0;

/// A provider, who fetches from it, and what passes between them.
struct Pair {
    provider: Node,
    taker: Node,
    /// From the provider.
    passed: Arc<AtomicU64>,
    fetch: Fetch,
}

impl Pair {
    /// With caps in place before the first byte is asked for.
    async fn start(upload: Caps, download: Caps) -> Self {
        let fleet = Fleet::new(1);
        let provider = Start::new(fleet.enrol()).go().await;
        let passed = Arc::<AtomicU64>::default();
        let counted = passed.clone();
        let relay = relay_by(provider.address(), 64 << 10, move |now, _| {
            counted.fetch_add(now as u64, Ordering::Relaxed);
            std::future::ready(())
        })
        .await;
        let mut start = Start::new(fleet.enrol());
        start.bootstrap.push(relay);
        let taker = start.go().await;
        let none = Caps::default();
        provider.net.set_caps(upload, none).await.unwrap();
        taker.net.set_caps(none, download).await.unwrap();
        let tree = provider.share(&content(5, 32 << 20)).await;
        let spec = FetchSpec::whole(tree.root, Some(tree.size));
        let fetch = taker.net.fetch(spec).await.unwrap();
        Self {
            provider,
            taker,
            passed,
            fetch,
        }
    }

    /// What comes from the provider on the link in a time, in bits a second.
    async fn rate(&self, time: Duration) -> f64 {
        let (begun, before) = (Instant::now(), self.passed.load(Ordering::Relaxed));
        sleep(time).await;
        let bytes = self.passed.load(Ordering::Relaxed) - before;
        bytes as f64 * HEADERS * 8.0 / begun.elapsed().as_secs_f64()
    }
}

/// On loopback all peers are within the site.
fn mbit(mbit: u64) -> Caps {
    Caps {
        within: Some(Rate::from_bits(mbit * 1_000_000).unwrap()),
        beyond: None,
    }
}

fn is_about(rate: f64, mbit: f64, tolerance: f64) {
    let share = rate / (mbit * 1e6);
    assert!(
        (share - 1.0).abs() < tolerance,
        "{:.2} Mbit/s where {mbit} may pass",
        rate / 1e6
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_sent_keeps_to_its_cap_and_to_a_changed_one_within_a_second() {
    let mut pair = Pair::start(mbit(4), Caps::default()).await;
    sleep(Duration::from_secs(1)).await;
    is_about(pair.rate(Duration::from_secs(3)).await, 4.0, 0.08);
    let (more, none) = (mbit(16), Caps::default());
    pair.provider.net.set_caps(more, none).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    is_about(pair.rate(Duration::from_secs(2)).await, 16.0, 0.1);
    pair.provider.net.set_caps(none, none).await.unwrap();
    within(pair.fetch.done()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_keeps_to_its_cap_and_to_a_changed_one_within_a_second() {
    let mut pair = Pair::start(Caps::default(), mbit(4)).await;
    sleep(Duration::from_secs(1)).await;
    is_about(pair.rate(Duration::from_secs(3)).await, 4.0, 0.08);
    let (more, none) = (mbit(16), Caps::default());
    pair.taker.net.set_caps(none, more).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    is_about(pair.rate(Duration::from_secs(2)).await, 16.0, 0.1);
    pair.taker.net.set_caps(none, none).await.unwrap();
    within(pair.fetch.done()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cap_for_peers_beyond_the_site_does_not_hold_for_those_within() {
    let beyond = Caps {
        within: None,
        beyond: mbit(1).within,
    };
    let mut pair = Pair::start(beyond, beyond).await;
    let begun = Instant::now();
    within(pair.fetch.done()).await.unwrap();
    // At the cap it would take four minutes.
    assert!(begun.elapsed() < Duration::from_secs(15));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_somebody_waits_for_passes_a_fetch_of_the_same_blob_that_nobody_waits_for() {
    let fleet = Fleet::new(1);
    let provider = Start::new(fleet.enrol()).go().await;
    let taker = Start::new(fleet.enrol()).to(&provider).go().await;
    let caps = (Caps::default(), mbit(4));
    taker.net.set_caps(caps.0, caps.1).await.unwrap();
    let tree = provider.share(&content(5, 32 << 20)).await;
    let all = FetchSpec::whole(tree.root, Some(tree.size));
    let _all = taker.net.fetch(all.clone()).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    // Parts here and there: whichever come next by themselves, all of them do not.
    for group in [2047, 1024, 1500, 300, 700] {
        let begun = Instant::now();
        let spec = FetchSpec {
            want: Some(GroupRanges::from(group..group + 1)),
            priority: Priority::Demand,
            ..all.clone()
        };
        within(taker.net.fetch(spec).await.unwrap().done())
            .await
            .unwrap();
        // All of it takes more than a minute.
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(4), "group {group}: {took:?}");
    }
}
