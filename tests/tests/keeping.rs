//! What is kept stays, whatever else goes on: collection beside publication and pins.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use capsule_node::control::{
    CapsuleRef, Client, Command, Gc, Publish, PublishAs, Published, Unpin,
};
use capsule_tests::{Fleet, Node, data};

/// Rounds: enough that a publication which pins only what it has seen, not what is still there, loses some of it.
const ROUNDS: u64 = 120;

/// Asks the daemon without a process in between: the more requests, the more of them meet.
fn ask<C: Command>(node: &Node, command: C) -> C::Answer {
    let client = Client::connect(node.home()).expect("the daemon runs");
    client.call(command).expect("it is done")
}

fn publish(node: &Node, path: &Path, name: &str) -> Published {
    let publish = Publish {
        read_as: PublishAs::File,
        ..Publish::of(path, name.parse().unwrap())
    };
    ask(node, publish)
}

#[test]
fn what_is_published_beside_collections_is_all_there_afterwards() {
    let fleet = Fleet::new();
    let (node, done) = (&fleet[0], AtomicBool::new(false));
    let (collections, collected) = (AtomicU64::new(0), AtomicU64::new(0));
    let source = |n: u64| fleet.path(&format!("source{n}"));
    for n in 0..ROUNDS {
        fs::write(source(n), data::noise(n, 40_000)).unwrap();
    }
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let gone = ask(node, Gc { dry_run: false });
                    collections.fetch_add(1, Ordering::Relaxed);
                    collected.fetch_add(gone.capsules.len() as u64, Ordering::Relaxed);
                }
            });
        }
        let publisher = scope.spawn(|| {
            for n in 0..ROUNDS {
                let name = format!("lab:{n}");
                publish(node, &source(n), &name);
                // Content that is complete and not pinned, until it is published again.
                ask(
                    node,
                    Unpin {
                        capsule: CapsuleRef(name.clone()),
                        machine: None,
                    },
                );
                publish(node, &source(n), &name);
            }
        });
        let published = publisher.join();
        // In any case, so that the collectors end.
        done.store(true, Ordering::Relaxed);
        published.unwrap();
    });
    let (collections, collected) = (collections.into_inner(), collected.into_inner());
    assert!(
        collections >= ROUNDS && collected > 0,
        "{collections} collections, which took {collected} capsules between their publications"
    );
    node.ok(&["gc"]);
    for n in 0..ROUNDS {
        let shown = node.json(&["show", &format!("lab:{n}")]);
        assert_eq!(shown["holding"], "complete", "{shown:#}");
        assert_eq!(shown["pins"][0], "publication", "{shown:#}");
        let copy = fleet.path("copy");
        let to = copy.to_str().unwrap();
        node.ok(&["export", &format!("lab:{n}"), "--to", to, "--force"]);
        assert!(fs::read(source(n)).unwrap() == fs::read(&copy).unwrap());
    }
}
