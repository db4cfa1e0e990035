//! Members that ask for content and do not read it.

use std::time::Duration;

use capsule_proto::ranges::Height;
use capsule_proto::wire::{Control, Reject, RejectReason, Request};
use capsule_swarm_core::MAX_REQUEST_GROUPS;
use tokio::time::timeout;

use super::Raw;
use super::node::{Fleet, Start, content, within};
use crate::api::Limits;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_that_do_not_read_do_not_keep_others_from_being_served() {
    let fleet = Fleet::new(1);
    let provider = Start::new(fleet.enrol()).go().await;
    let tree = provider.share(&content(1, 16 << 20)).await;
    // All but one of the provider's connections, each with more in longest requests than it will ever take.
    let mut greedy = Vec::new();
    for _ in 1..Limits::default().connections_max {
        let mut raw = Raw::join(&fleet.enrol(), provider.address()).await;
        for id in 0..16 {
            let start = id * MAX_REQUEST_GROUPS;
            raw.ask(Request {
                id,
                root: tree.root,
                size: tree.size,
                groups: start..start + MAX_REQUEST_GROUPS,
                demand: true,
                compress: false,
                height: Height::ROOT,
            });
        }
        greedy.push(raw.live());
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let puller = Start::new(fleet.enrol()).to(&provider).go().await;
    let pull = puller.pull(tree.root, Some(tree.size));
    timeout(Duration::from_secs(10), pull)
        .await
        .expect("an honest member is served");
    assert!(
        greedy.iter().all(|raw| !raw.is_finished()),
        "the greedy were there all the time"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_requests_are_bounded_though_they_are_for_next_to_nothing() {
    let fleet = Fleet::new(1);
    let provider = Start::new(fleet.enrol()).go().await;
    let tree = provider.share(&[1]).await;
    let mut raw = Raw::join(&fleet.enrol(), provider.address()).await;
    // Some 14,000 frames fit into the connection.
    let mut busy = 0;
    for id in 0..40_000 {
        raw.ask(Request {
            id,
            root: tree.root,
            size: 1,
            groups: 0..1,
            demand: true,
            compress: false,
            height: Height::ROOT,
        });
        if id % 100 == 0 {
            while let Ok(heard) = timeout(Duration::from_millis(1), raw.hear()).await {
                busy += u32::from(matches!(
                    heard.expect("a busy provider is no fault"),
                    Control::Reject(Reject {
                        reason: RejectReason::Busy,
                        ..
                    })
                ));
            }
        }
    }
    within(async {
        while busy < 10_000 {
            let heard = raw.hear().await.expect("a busy provider is no fault");
            busy += u32::from(matches!(heard, Control::Reject(_)));
        }
    })
    .await;
}
