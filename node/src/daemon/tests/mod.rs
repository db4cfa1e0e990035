//! Whole daemons in one process, on loopback: a publisher and who pulls from it.

mod ending;
mod paged;
mod read_first;
mod removal;
mod waiting;

use std::fs;
use std::path::Path;

use capsule_proto::credential::Roles;

use super::*;
use crate::control::{
    CapsuleRef, Export, Failure, FailureCode, Follow, Gc, Holding, Plan, Publish, PublishAs, Pull,
    Reporter, Rm, Show,
};

#[test]
fn a_port_is_taken_again_only_where_any_is_right_and_it_is_free() {
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let fixed: SocketAddr = "127.0.0.1:9".parse().unwrap();
    let taken = std::net::TcpListener::bind(any).unwrap();
    let free = std::net::TcpListener::bind(any)
        .unwrap()
        .local_addr()
        .unwrap();
    assert_eq!(
        same_ports(&[any, fixed], &[free.to_string()]),
        [free, fixed]
    );
    assert_eq!(
        same_ports(&[any], &[taken.local_addr().unwrap().to_string()]),
        [any]
    );
    assert_eq!(same_ports(&[any], &[]), [any]);
}

#[test]
fn tokens_get_addresses_that_lead_somewhere() {
    let given = [
        "10.1.2.3:5".parse().unwrap(),
        "127.0.0.1:6".parse().unwrap(),
    ];
    assert_eq!(reachable(&given), ["10.1.2.3:5"]);
    assert_eq!(reachable(&given[1..]), ["127.0.0.1:6"]);
    let everywhere = reachable(&["0.0.0.0:7".parse().unwrap()]);
    assert!(
        everywhere
            .iter()
            .all(|address| address.ends_with(":7") && !address.starts_with("0.0.0.0"))
    );
}

#[tokio::test]
async fn a_part_that_ends_ends_the_daemon_with_an_error() {
    let mut parts = RunningParts::default();
    parts.start("patient part", std::future::pending());
    parts.start("faulty part", async { panic!("a fault") });
    let error = parts.first_end().await.to_string();
    assert!(
        error.contains("faulty part failed") && error.contains("a fault"),
        "{error}"
    );
    let mut parts = RunningParts::default();
    parts.start("patient part", std::future::pending());
    parts.start("short part", async {});
    let error = parts.first_end().await.to_string();
    assert!(error.contains("short part ended"), "{error}");
}

/// A daemon and the directory that it lives in.
struct Lab {
    temp: tempfile::TempDir,
    publisher: Daemon,
    puller: Daemon,
}

fn loopback() -> NodeOptions {
    NodeOptions {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        ..NodeOptions::default()
    }
}

async fn start(home: &Home) -> Daemon {
    Daemon::start(home.clone(), loopback()).await.unwrap()
}

/// Starts a daemon again as soon as the last has let go of its store, which its threads do a moment after it stopped.
async fn restart(home: &Home) -> Daemon {
    for _ in 0..400 {
        match Daemon::start(home.clone(), loopback()).await {
            Err(NodeError::Store(OpenError::InUse { .. })) => {
                tokio::time::sleep(Duration::from_millis(25)).await;
            }
            started => return started.unwrap(),
        }
    }
    panic!("the store was not let go of");
}

/// A publisher, and a machine that joined with its token.
async fn lab() -> Lab {
    let temp = tempfile::tempdir().unwrap();
    let (one, two) = (
        Home::new(temp.path().join("one")),
        Home::new(temp.path().join("two")),
    );
    let mut entropy = crate::home::system_entropy;
    let now = crate::clock::system_seconds();
    one.init_fleet(&Default::default(), now, &mut entropy)
        .unwrap();
    let publisher = start(&one).await;
    let invitation = crate::home::InviteOptions {
        roles: Roles::default(),
        channels: Vec::new(),
        expires: now + 1000,
        addresses: Vec::new(),
    };
    let token = one.invite(&invitation, now, &mut entropy).unwrap().token;
    two.join(&token, &Default::default(), now, &mut entropy)
        .unwrap();
    Lab {
        puller: start(&two).await,
        publisher,
        temp,
    }
}

impl Lab {
    fn tree(&self, extra: &str) -> PathBuf {
        let dir = self.temp.path().join("tree");
        fs::create_dir_all(dir.join("sub")).unwrap();
        let mut noise = vec![0; 3 << 20];
        crate::home::system_entropy(&mut noise);
        fs::write(dir.join("sub/noise"), noise).unwrap();
        fs::write(dir.join("extra"), extra).unwrap();
        dir
    }

    async fn publish(&self, path: &Path, name: &str) -> Result<crate::control::Published, Failure> {
        let request = Publish::of(path, name.parse().unwrap());
        crate::publish::publish(&self.publisher.node, request, &Reporter::silent()).await
    }

    async fn plan(&self, name: &str) -> Result<crate::control::Planned, Failure> {
        let request = Plan {
            capsule: CapsuleRef(name.into()),
            wait: Some(10),
            like_path: None,
            like_capsule: None,
        };
        crate::transfer::plan(&self.puller.node, request, &Reporter::silent()).await
    }

    async fn pull(&self, name: &str) -> Result<crate::control::Pulled, Failure> {
        let request = Pull {
            capsule: CapsuleRef(name.into()),
            wait: Some(10),
            like_path: None,
            like_capsule: None,
        };
        crate::transfer::pull(&self.puller.node, request, &Reporter::silent()).await
    }

    async fn export(&self, name: &str, to: &str) -> Result<PathBuf, Failure> {
        let to = self.temp.path().join(to);
        let request = Export {
            capsule: CapsuleRef(name.into()),
            to: to.clone(),
            component: None,
            force: false,
        };
        crate::export::export(&self.puller.node, request, &Reporter::silent())
            .await
            .map(|_| to)
    }

    async fn stop(self) {
        self.puller.stop().await.unwrap();
        self.publisher.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tree_goes_from_machine_to_machine_and_the_plan_was_right() {
    let lab = lab().await;
    let dir = lab.tree("one");
    let published = lab.publish(&dir, "lab:1").await.unwrap();
    assert!(lab.publish(&dir, "lab:1").await.unwrap().unchanged);
    let planned = lab.plan("lab:1").await.unwrap();
    assert_eq!(
        (planned.capsule, planned.have_bytes),
        (published.capsule, planned.planning_bytes)
    );
    let pulled = lab.pull("lab").await.unwrap();
    assert_eq!(pulled.fetched_bytes, planned.fetch_bytes);
    assert_eq!(
        pulled.by_peer.iter().map(|peer| peer.bytes).sum::<u64>(),
        pulled.fetched_bytes
    );
    let again = lab
        .pull(&published.capsule.to_string()[..12])
        .await
        .unwrap();
    assert!(again.unchanged && again.fetched_bytes == 0);
    let out = lab.export("lab:1", "out").await.unwrap();
    assert!(fs::read(out.join("sub/noise")).unwrap() == fs::read(dir.join("sub/noise")).unwrap());
    assert_eq!(
        lab.export("lab:1", "out").await.unwrap_err().code,
        FailureCode::Exists
    );
    // What the puller holds, it serves: also the component under its own hash.
    let root = published.components[0].root;
    assert!(
        lab.puller
            .node
            .store
            .present(&root)
            .is_some_and(|here| here.complete)
    );
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_do_not_change_what_they_mean_and_unknown_ones_are_told() {
    let lab = lab().await;
    lab.publish(&lab.tree("one"), "lab:1").await.unwrap();
    let refused = lab.publish(&lab.tree("other"), "lab:1").await.unwrap_err();
    assert_eq!(refused.code, FailureCode::Exists);
    let store = &lab.publisher.node.store;
    assert_eq!(
        store.capsules().unwrap().len(),
        1,
        "what was refused left nothing"
    );
    let request = Pull {
        capsule: CapsuleRef("nowhere".into()),
        wait: Some(0),
        like_path: None,
        like_capsule: None,
    };
    let unknown = crate::transfer::pull(&lab.puller.node, request, &Reporter::silent())
        .await
        .unwrap_err();
    assert_eq!(unknown.code, FailureCode::NotFound);
    let member = Publish::of(lab.temp.path().join("tree"), "lab:2".parse().unwrap());
    let not_allowed = crate::publish::publish(&lab.puller.node, member, &Reporter::silent())
        .await
        .unwrap_err();
    assert_eq!(not_allowed.code, FailureCode::NotPermitted);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_has_ended_leaves_the_id() {
    let lab = lab().await;
    let file = lab.temp.path().join("file");
    fs::write(&file, "content ".repeat(10_000)).unwrap();
    // Time enough to sign it on a busy machine.
    let end = crate::clock::system_seconds() + 4;
    let request = Publish {
        read_as: PublishAs::File,
        expires: Some(end),
        ..Publish::of(file.clone(), "lab:1".parse().unwrap())
    };
    let capsule = crate::publish::publish(&lab.publisher.node, request, &Reporter::silent())
        .await
        .unwrap()
        .capsule;
    while crate::clock::system_seconds() <= end {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // Nobody tells the size of the manifest: whoever has it proves it.
    let pulled = lab.pull(&capsule.to_string()).await.unwrap();
    assert_eq!(pulled.name, None);
    let out = lab.export(&capsule.to_string(), "out").await.unwrap();
    assert!(fs::read(out).unwrap() == fs::read(file).unwrap());
    lab.stop().await;
}

/// Waits until something is so, for at most 20 s.
async fn until(mut is_so: impl FnMut() -> bool) {
    for _ in 0..800 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("it did not become so");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_followed_channel_comes_by_itself_and_only_the_newest_two_stay() {
    let lab = lab().await;
    let node = lab.puller.node.clone();
    crate::follow::follow(
        &node,
        Follow {
            channel: "lab".parse().unwrap(),
        },
    )
    .await
    .unwrap();
    let mut ids = Vec::new();
    for version in ["1", "2", "3"] {
        let published = lab
            .publish(&lab.tree(version), &format!("lab:{version}"))
            .await
            .unwrap();
        let pinned = |id| !crate::keep::pins_of(&node, id).unwrap().is_empty();
        until(|| pinned(&published.capsule)).await;
        ids.push(published.capsule);
    }
    // The new pin comes first, then the old one goes.
    until(|| crate::keep::pins_of(&node, &ids[0]).unwrap().is_empty()).await;
    let refused = crate::keep::rm(
        &node,
        Rm {
            capsule: CapsuleRef("lab:3".into()),
            force: false,
        },
    )
    .await
    .unwrap_err();
    assert_eq!(refused.code, FailureCode::Refused);
    let collected = crate::keep::gc(&node, Gc { dry_run: false }).await.unwrap();
    assert_eq!(collected.capsules, ids[..1]);
    let shown = crate::report::show(
        &node,
        Show {
            capsule: CapsuleRef("lab:2".into()),
        },
    )
    .await
    .unwrap();
    assert_eq!(
        (shown.holding, shown.pins),
        (Holding::Complete, vec!["follow:lab".to_owned()])
    );
    lab.export("lab:2", "out").await.unwrap();
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_daemon_is_kept_away() {
    let lab = lab().await;
    let again = Daemon::start(lab.publisher.node.home.clone(), NodeOptions::default()).await;
    assert!(matches!(
        again.err(),
        Some(NodeError::Store(OpenError::InUse { .. }))
    ));
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_daemons_never_share_an_address() {
    let lab = lab().await;
    let other = Home::new(lab.temp.path().join("other"));
    let (now, mut entropy) = (crate::clock::system_seconds(), crate::home::system_entropy);
    other
        .init_fleet(&Default::default(), now, &mut entropy)
        .unwrap();
    let taken = lab.publisher.ready.listening.clone();
    let start = |listen| {
        let options = NodeOptions {
            listen,
            ..NodeOptions::default()
        };
        Daemon::start(other.clone(), options)
    };
    let Err(refused) = start(taken.clone()).await else {
        panic!("it listens on {taken:?} too")
    };
    assert!(matches!(refused, NodeError::Listen { address, .. } if address == taken[0]));
    let text = refused.to_string();
    assert!(text.contains("--listen"), "{text}");
    start(vec!["127.0.0.1:0".parse().unwrap()])
        .await
        .unwrap()
        .stop()
        .await
        .unwrap();
    lab.stop().await;
}
