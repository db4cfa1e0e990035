//! What ends, and what goes on: follows whose client went away, bans, content that went while nobody looked.

use std::os::unix::fs::FileExt;

use capsule_proto::RootHash;
use capsule_proto::index::Space;
use capsule_proto::manifest::{Component, ComponentKind, Manifest};

use super::*;
use crate::control::{Unfollow, Verify};
use crate::daemon::events::lift_ended_bans;
use crate::store::{Ban, BlobKind, HeldCapsule, LayerBlobs};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_is_followed_again_though_who_unfollowed_it_went_away() {
    let lab = lab().await;
    let node = lab.puller.node.clone();
    let follow = || {
        let channel = "lab".parse().unwrap();
        crate::follow::follow(&node, Follow { channel })
    };
    follow().await.unwrap();
    {
        // Something else changes what is kept; the client does not wait for that.
        let _keeping = node.keeping.lock().await;
        let request = Unfollow {
            channel: "lab".parse().unwrap(),
        };
        let unfollowing = crate::follow::unfollow(&node, request);
        let waited = tokio::time::timeout(Duration::from_millis(50), unfollowing).await;
        assert!(waited.is_err());
    }
    follow().await.unwrap();
    let published = lab.publish(&lab.tree("one"), "lab:1").await.unwrap();
    until(|| {
        !crate::keep::pins_of(&node, &published.capsule)
            .unwrap()
            .is_empty()
    })
    .await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ban_ends_in_a_running_node_too() {
    let lab = lab().await;
    let (banned, home) = (
        lab.puller.node.network.local_peer(),
        lab.publisher.node.home.clone(),
    );
    let end = crate::clock::system_seconds() + 3600;
    let ban = Ban {
        reason: "it sent content that does not match its hash".to_owned(),
        until: Some(end),
    };
    let store = lab.publisher.node.store.clone();
    store.ban(&banned.to_bytes(), &ban).unwrap();
    drop(store);
    lab.publisher.stop().await.unwrap();
    let publisher = restart(&home).await;
    let node = publisher.node.clone();
    // It asks to come in all the while.
    tokio::time::sleep(Duration::from_secs(2)).await;
    lift_ended_bans(&node, end - 1).await.unwrap();
    let status = crate::report::status(&node).await.unwrap();
    assert_eq!((status.banned, status.peers), (1, 0));
    assert_eq!(status.bans[0].peer, banned.to_string());
    assert_eq!(status.bans[0].until, Some(end));
    lift_ended_bans(&node, end).await.unwrap();
    let mut connected = false;
    for _ in 0..400 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        connected = !node.network.peers().await.unwrap().is_empty();
        if connected {
            break;
        }
    }
    assert!(connected, "it may come again");
    assert_eq!(crate::report::status(&node).await.unwrap().banned, 0);
    publisher.stop().await.unwrap();
    lab.puller.stop().await.unwrap();
    drop(lab.temp);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_went_while_nobody_looked_is_not_called_complete_and_can_be_repaired() {
    let lab = lab().await;
    let published = lab.publish(&lab.tree("one"), "lab:1").await.unwrap();
    lab.pull("lab:1").await.unwrap();
    let home = lab.puller.node.home.clone();
    lab.puller.stop().await.unwrap();
    let pack = largest_file(&home.store_dir().join("blobs"));
    fs::remove_file(&pack).unwrap();
    let puller = restart(&home).await;
    let node = puller.node.clone();
    let holding = || node.holdings.holding(&published.capsule).unwrap();
    assert_eq!(holding(), Holding::Partial);
    assert!(
        node.troubles()
            .iter()
            .any(|trouble| trouble.contains("no longer all here"))
    );
    // Also what was noted by nobody at all, as when a crash comes between.
    node.store.mark_capsule(&published.capsule, true).unwrap();
    let request = Verify {
        capsule: None,
        repair: true,
    };
    let verified = crate::verify::verify(&node, request, &Reporter::silent())
        .await
        .unwrap();
    assert!(verified.repaired_bytes >= 3 << 20, "{verified:?}");
    assert_eq!(holding(), Holding::Complete);
    puller.stop().await.unwrap();
    lab.publisher.stop().await.unwrap();
    drop(lab.temp);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_capsule_that_nobody_has_keeps_no_other_from_being_repaired() {
    let lab = lab().await;
    let published = lab.publish(&lab.tree("one"), "lab:1").await.unwrap();
    lab.pull("lab:1").await.unwrap();
    let node = lab.puller.node.clone();
    // A capsule that was begun, to which no layers are known; it comes first.
    let lost = (0..)
        .map(|n: u32| {
            let component = Component {
                name: "file".to_owned(),
                kind: ComponentKind::File,
                root: RootHash::of(&n.to_le_bytes()),
                size: 5,
                content_size: 5,
            };
            Manifest::new(vec![component]).unwrap()
        })
        .find(|manifest| manifest.id() < published.capsule)
        .unwrap();
    let begun = HeldCapsule {
        complete: false,
        added: 1,
    };
    node.store
        .put_small(&lost.encode(), BlobKind::Manifest)
        .unwrap();
    node.store.put_capsule(&lost.id(), &begun).unwrap();
    let pack = largest_file(&node.home.store_dir().join("blobs"));
    let file = fs::File::options().write(true).open(pack).unwrap();
    file.write_all_at(b"damage", 100_000).unwrap();
    let request = Verify {
        capsule: None,
        repair: true,
    };
    let failure = crate::verify::verify(&node, request, &Reporter::silent())
        .await
        .unwrap_err();
    assert_eq!(failure.code, FailureCode::Unreachable, "{failure}");
    let holding = node.holdings.holding(&published.capsule).unwrap();
    assert_eq!(holding, Holding::Complete);
    lab.stop().await;
}

fn largest_file(dir: &Path) -> PathBuf {
    let below = fs::read_dir(dir).unwrap().flat_map(|sub| {
        let files = fs::read_dir(sub.unwrap().path()).unwrap();
        files.map(|file| file.unwrap().path())
    });
    below
        .max_by_key(|file| fs::metadata(file).unwrap().len())
        .unwrap()
}

/// A way of the node's own to the contents of a tree, of which nothing reads: its pack, and that which others have.
fn put_own_way(node: &crate::node::Node, tree: &Component) -> (RootHash, RootHash) {
    let mut noise = vec![0; 300_000];
    crate::home::system_entropy(&mut noise);
    let store = &node.store;
    let pack = store.put_small(&noise, BlobKind::Pack).unwrap();
    let index = store.put_small(b"an index", BlobKind::Index).unwrap();
    let told = node
        .holdings
        .tree_way(&tree.root)
        .unwrap()
        .unwrap()
        .contents;
    let own = [LayerBlobs {
        index,
        pack: Some(pack),
    }];
    let put = node.holdings.put_own_way(Space::Contents, &tree.root, &own);
    put.unwrap();
    (pack, told[0].pack.unwrap())
}

fn spoil(node: &crate::node::Node, blob: &RootHash) {
    let name = blob.to_string();
    let dir = node.home.store_dir().join("blobs").join(&name[..2]);
    let path = dir.join(name + ".data");
    let file = fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(b"damage", 100_000).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_own_way_that_is_damaged_is_forgotten_and_not_sought() {
    let lab = lab().await;
    let published = lab.publish(&lab.tree("one"), "lab:1").await.unwrap();
    lab.pull("lab:1").await.unwrap();
    let node = lab.puller.node.clone();
    let manifest = node.holdings.manifest(&published.capsule).unwrap();
    let tree = &manifest.components[0];
    let (own, told) = put_own_way(&node, tree);
    let own_way = || node.holdings.own_way(Space::Contents, &tree.root).unwrap();
    let holding = || node.holdings.holding(&published.capsule).unwrap();
    let verify = || {
        let request = Verify {
            capsule: None,
            repair: true,
        };
        let node = node.clone();
        async move { crate::verify::verify(&node, request, &Reporter::silent()).await }
    };
    // What others have was found damaged earlier; the capsule is read without it meanwhile.
    spoil(&node, &told);
    assert!(!node.store.verify(&told).unwrap().is_empty());
    assert!(own_way().is_some());
    let verified = verify().await.unwrap();
    assert!(node.holdings.is_complete(&told), "{verified:?}");
    assert!(verified.repaired_bytes >= 16 << 10, "{verified:?}");
    assert!(own_way().is_some());
    assert_eq!(holding(), Holding::Complete);
    // Nobody else has the own one.
    spoil(&node, &own);
    let verified = verify().await.unwrap();
    assert_eq!(
        (verified.damaged_bytes, verified.repaired_bytes),
        (16 << 10, 0)
    );
    assert_eq!(verified.damaged[0].root, own);
    assert_eq!(own_way(), None);
    assert_eq!(holding(), Holding::Complete);
    assert!(verify().await.unwrap().damaged.is_empty());
    lab.stop().await;
}
