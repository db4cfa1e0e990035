//! What is told of what is read first.

use capsule_proto::RootHash;

use super::*;
use crate::control::{ByteRange, Prefetch};
use crate::publish::prefetch;

/// Tells that one page is read first; says whether that was published.
async fn tell(node: &Arc<Node>, component: RootHash, start: u64, renews: bool) -> bool {
    let length = 4096;
    let told = Prefetch {
        component,
        ranges: vec![ByteRange { start, length }],
        renews,
    };
    prefetch(node, told).await.unwrap().ranges == 1
}

/// Where the page lies of which was told last.
fn newest(node: &Arc<Node>, component: RootHash) -> Option<u64> {
    let told = node.records.prefetch_of(&component).unwrap();
    told.map(|newest| newest.ranges[0].0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_word_holds_until_it_is_renewed() {
    let lab = lab().await;
    let (node, other) = (&lab.publisher.node, &lab.puller.node);
    let component = RootHash::of(b"memory");
    assert!(tell(node, component, 0, false).await);
    assert!(!tell(node, component, 4096, false).await, "it is known");
    assert!(!tell(node, component, 0, true).await, "that is the same");
    assert_eq!(newest(node, component), Some(0));
    assert!(tell(node, component, 4096, true).await);
    until(|| newest(other, component) == Some(4096)).await;
    assert!(!tell(node, component, 0, true).await, "that was replaced");
    for page in 2..8 {
        assert!(tell(node, component, 4096 * page, true).await);
    }
    assert!(
        !tell(node, component, 4096 * 8, true).await,
        "that is enough"
    );
    lab.stop().await;
}
