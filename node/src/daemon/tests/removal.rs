//! What is removed stays so, and what is used stays, whatever comes between.

use std::collections::BTreeSet;

use capsule_proto::{CapsuleId, RootHash};
use capsule_swarm::Priority;

use super::*;
use crate::store::HeldCapsule;
use crate::transfer::{DEFAULT_PATIENCE, fetch_capsule, manner};
use crate::verify::mark_hurt;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_capsule_removed_while_its_damage_is_noted_stays_removed() {
    let lab = lab().await;
    let node = lab.puller.node.clone();
    let checked = tokio::task::spawn_blocking(move || {
        let id = CapsuleId(RootHash::of(b"a capsule"));
        let held = HeldCapsule {
            complete: true,
            added: 1,
        };
        for _ in 0..100 {
            node.store.put_capsule(&id, &held).unwrap();
            std::thread::scope(|scope| {
                let noting = scope.spawn(|| mark_hurt(&node, &BTreeSet::from([id.0])).unwrap());
                assert!(node.store.remove_unpinned(&id).unwrap());
                noting.join().unwrap();
            });
            assert_eq!(node.store.capsule(&id).unwrap(), None);
        }
    });
    checked.await.unwrap();
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_that_nobody_waits_for_any_more_notes_nothing() {
    let lab = lab().await;
    let capsule = lab
        .publish(&lab.tree("one"), "lab:1")
        .await
        .unwrap()
        .capsule;
    lab.plan("lab:1").await.unwrap();
    let node = lab.puller.node.clone();
    let resolution = node.resolve(&CapsuleRef("lab:1".into())).unwrap();
    {
        // As a collection does, which has seen that nothing of the capsule is here.
        let _keeping = node.keeping.lock().await;
        let pulling = node.clone();
        let pull = tokio::spawn(async move {
            let manner = manner(&resolution, Priority::Normal);
            let all = fetch_capsule(&pulling, resolution, manner, DEFAULT_PATIENCE, &(|_| ()));
            all.await.map(drop)
        });
        tokio::time::sleep(Duration::from_millis(700)).await;
        assert_eq!(node.store.capsule(&capsule).unwrap(), None);
        assert!(node.transfers.is_running(&capsule));
        pull.abort();
        let _ = pull.await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(node.store.capsule(&capsule).unwrap(), None);
    lab.pull("lab:1").await.unwrap();
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plans_beside_collections_read_what_they_fetched() {
    let lab = lab().await;
    lab.publish(&lab.tree("one"), "lab:1").await.unwrap();
    let node = lab.puller.node.clone();
    let collecting = tokio::spawn(async move {
        loop {
            crate::keep::gc(&node, Gc { dry_run: false }).await.unwrap();
        }
    });
    for _ in 0..60 {
        lab.plan("lab:1").await.unwrap();
    }
    collecting.abort();
    let _ = collecting.await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ways_to_trees_go_with_them() {
    let lab = lab().await;
    let root = lab
        .publish(&lab.tree("one"), "lab:1")
        .await
        .unwrap()
        .components[0]
        .root;
    lab.pull("lab:1").await.unwrap();
    let node = &lab.puller.node;
    assert!(node.holdings.tree_way(&root).unwrap().is_some());
    crate::keep::gc(node, Gc { dry_run: false }).await.unwrap();
    assert_eq!(node.holdings.tree_way(&root).unwrap(), None);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_failed_collection_removed_is_no_longer_announced() {
    let lab = lab().await;
    lab.publish(&lab.tree("one"), "lab:1").await.unwrap();
    lab.pull("lab:1").await.unwrap();
    let (node, publisher) = (&lab.puller.node, &lab.publisher.node);
    let pack = node
        .store
        .blobs()
        .into_iter()
        .max_by_key(|blob| blob.presence.size)
        .unwrap()
        .root;
    // What lies there is no file, and cannot be removed as one.
    let file = data_file(node, &pack);
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    wait_for_providers(publisher, pack, 1).await;
    let failed = crate::keep::gc(node, Gc { dry_run: false }).await;
    assert_eq!(failed.unwrap_err().code, FailureCode::Io);
    assert_eq!(node.store.present(&pack), None);
    wait_for_providers(publisher, pack, 0).await;
    lab.stop().await;
}

fn data_file(node: &Node, root: &RootHash) -> PathBuf {
    let (blobs, name) = (node.home.store_dir().join("blobs"), root.to_string());
    blobs.join(&name[..2]).join(format!("{name}.data"))
}

async fn wait_for_providers(node: &Node, root: RootHash, count: usize) {
    for _ in 0..400 {
        if node.network.providers(root).await.unwrap().len() == count {
            return;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("never {count} providers");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ways_take_is_noted_before_a_collection_and_kept_while_a_manifest_cannot_be_read() {
    let lab = lab().await;
    let dir = lab.temp.path().join("disk");
    // The same each time, as frames end where content says.
    let mut noise = vec![0; 4 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    fs::write(&dir, &noise).unwrap();
    lab.publish(&dir, "lab:1").await.unwrap();
    noise[..3 << 20].fill(7);
    fs::write(&dir, &noise).unwrap();
    let second = lab.publish(&dir, "lab:2").await.unwrap();
    lab.pull("lab:1").await.unwrap();
    lab.pull("lab:2").await.unwrap();
    let node = lab.puller.node.clone();
    let root = second.components[0].root;
    let layers = node.store.component(&root).unwrap().recipe.layers;
    assert_eq!(layers.len(), 2);
    let noted = || node.store.reached(&layers).unwrap();
    assert_eq!(noted(), None, "all of it is here");
    let gc = |dry_run| crate::keep::gc(&node, Gc { dry_run });
    let request = crate::control::Pin {
        capsule: CapsuleRef("lab:2".into()),
        machine: None,
    };
    crate::keep::pin(&node, request).await.unwrap();
    let told = gc(true).await.unwrap();
    assert!(noted().is_some() && told.punched == 1, "{told:?}");
    let collected = gc(false).await.unwrap();
    assert_eq!(collected.punched_bytes, told.punched_bytes);
    assert!(collected.punched_bytes >= 2 << 20, "{collected:?}");
    assert!(node.store.is_readable(&layers).unwrap());
    // Its manifest is damaged, and taken out: nobody can tell any more which ways there are.
    node.store.punch(&second.capsule.0, &(0..1).into()).unwrap();
    assert!(node.holdings.manifest(&second.capsule).is_none());
    gc(false).await.unwrap();
    assert!(noted().is_some());
    assert!(node.store.is_readable(&layers).unwrap());
    lab.stop().await;
}
