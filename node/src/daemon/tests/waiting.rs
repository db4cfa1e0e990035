//! How long who waits: alone, and together with others.

use capsule_swarm::Priority;

use super::*;
use crate::control::Pulled;
use crate::transfer::{fetch_capsule, manner};

/// Starts a pull of `lab:1` with a patience of its own, as a follower does.
fn begin(node: &Arc<Node>, patience: u64) -> tokio::task::JoinHandle<Result<Pulled, Failure>> {
    let node = node.clone();
    tokio::spawn(async move {
        let asked = node.clone();
        let resolution = crate::work::blocking(move || asked.resolve(&CapsuleRef("lab:1".into())));
        let resolution = resolution.await?;
        let manner = manner(&resolution, Priority::Background);
        let patience = Duration::from_secs(patience);
        fetch_capsule(&node, resolution, manner, patience, &(|_| ())).await
    })
}

async fn pull(node: &Arc<Node>, wait: u64) -> Result<Pulled, Failure> {
    let request = Pull {
        capsule: CapsuleRef("lab:1".into()),
        wait: Some(wait),
        like_path: None,
        like_capsule: None,
    };
    crate::transfer::pull(node, request, &Reporter::silent()).await
}

/// A lab whose puller knows all about `lab:1`, and has nobody to fetch it from. Also the publisher's home.
async fn deserted() -> (Lab, Home) {
    let lab = lab().await;
    lab.publish(&lab.tree("one"), "lab:1").await.unwrap();
    lab.plan("lab:1").await.unwrap();
    let home = lab.publisher.node.home.clone();
    (lab, home)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_joins_a_pull_with_less_patience_leaves_alone() {
    let (lab, _) = deserted().await;
    let (temp, node) = (lab.temp, lab.puller.node.clone());
    lab.publisher.stop().await.unwrap();
    let background = begin(&node, 60);
    let capsule = node.resolve(&CapsuleRef("lab:1".into())).unwrap().capsule;
    until(|| node.transfers.is_running(&capsule)).await;
    let begun = std::time::Instant::now();
    let left = pull(&node, 4).await.unwrap_err();
    assert_eq!(left.code, FailureCode::Unreachable, "{}", left.message);
    let waited = begun.elapsed();
    assert!(
        (Duration::from_secs(4)..Duration::from_secs(10)).contains(&waited),
        "{waited:?}"
    );
    assert!(!background.is_finished(), "that one goes on");
    background.abort();
    lab.puller.stop().await.unwrap();
    drop(temp);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_joins_a_pull_with_more_patience_gets_it() {
    let (lab, home) = deserted().await;
    let (temp, node) = (lab.temp, lab.puller.node.clone());
    lab.publisher.stop().await.unwrap();
    let background = begin(&node, 3);
    let capsule = node.resolve(&CapsuleRef("lab:1".into())).unwrap().capsule;
    until(|| node.transfers.is_running(&capsule)).await;
    let waiting = node.clone();
    let patient = tokio::spawn(async move { pull(&waiting, 60).await });
    let left = background.await.unwrap().unwrap_err();
    assert_eq!(left.code, FailureCode::Unreachable, "{}", left.message);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!patient.is_finished(), "it waits on");
    let publisher = restart(&home).await;
    let pulled = tokio::time::timeout(Duration::from_secs(40), patient).await;
    assert_eq!(pulled.unwrap().unwrap().unwrap().capsule, capsule);
    lab.puller.stop().await.unwrap();
    publisher.stop().await.unwrap();
    drop(temp);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_would_not_wait_still_gets_what_is_there() {
    let lab = lab().await;
    lab.publish(&lab.tree("one"), "lab:1").await.unwrap();
    // The name is known; then nothing but the content is left to be waited for.
    lab.plan("lab:1").await.unwrap();
    pull(&lab.puller.node, 0).await.unwrap();
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_never_came_is_not_expected_for_ever() {
    let lab = lab().await;
    let nowhere = capsule_proto::RootHash::of(b"nowhere");
    let request = Pull {
        capsule: CapsuleRef(nowhere.to_string()),
        wait: Some(0),
        like_path: None,
        like_capsule: None,
    };
    let node = &lab.puller.node;
    let failure = crate::transfer::pull(node, request, &Reporter::silent())
        .await
        .unwrap_err();
    assert_eq!(failure.code, FailureCode::Unreachable);
    assert!(!node.blobs.is_expected(&nowhere));
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_of_layers_may_come_after_the_name() {
    let lab = lab().await;
    let root = lab
        .publish(&lab.tree("one"), "lab:1")
        .await
        .unwrap()
        .components[0]
        .root;
    lab.plan("lab:1").await.unwrap();
    let node = lab.puller.node.clone();
    let mut late = Vec::new();
    for record in node.store.records_about(&root).unwrap() {
        assert!(node.store.remove_record(&record.id()).unwrap());
        late.push(record);
    }
    assert!(!late.is_empty());
    let waiting = node.clone();
    let patient = tokio::spawn(async move { pull(&waiting, 10).await });
    tokio::time::sleep(Duration::from_millis(700)).await;
    for record in &late {
        assert!(node.store.put_record(record).unwrap());
    }
    node.records.touch();
    patient.await.unwrap().unwrap();
    lab.stop().await;
}
