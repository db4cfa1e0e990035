//! What is kept stays, whatever else goes on: collection beside publication and pins.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use capsule_tests::{Fleet, data};

const PUBLICATIONS: u64 = 15;

#[test]
fn what_is_published_beside_collections_is_all_there_afterwards() {
    let fleet = Fleet::new();
    let (node, done) = (&fleet[0], AtomicBool::new(false));
    let source = |n: u64| fleet.path(&format!("source{n}"));
    for n in 0..PUBLICATIONS {
        fs::write(source(n), data::noise(n, 40_000)).unwrap();
    }
    let collections = std::thread::scope(|scope| {
        let collector = scope.spawn(|| {
            let mut collections = 0;
            while !done.load(Ordering::Relaxed) {
                node.ok(&["gc"]);
                collections += 1;
            }
            collections
        });
        let publisher = scope.spawn(|| {
            for n in 0..PUBLICATIONS {
                let name = format!("lab:{n}");
                node.publish(&source(n), &name);
                if n % 3 == 0 {
                    // Content that is complete and not pinned, until it is published again.
                    node.ok(&["unpin", &name]);
                    node.publish(&source(n), &name);
                }
            }
        });
        let published = publisher.join();
        // In any case, so that the collector ends.
        done.store(true, Ordering::Relaxed);
        published.unwrap();
        collector.join().unwrap()
    });
    assert!(collections > 0, "collections went on meanwhile");
    node.ok(&["gc"]);
    for n in 0..PUBLICATIONS {
        let shown = node.json(&["show", &format!("lab:{n}")]);
        assert_eq!(shown["holding"], "complete", "{shown:#}");
        assert_eq!(shown["pins"][0], "publication", "{shown:#}");
        let copy = fleet.path(&format!("copy{n}"));
        node.ok(&[
            "export",
            &format!("lab:{n}"),
            "--to",
            copy.to_str().unwrap(),
        ]);
        assert!(fs::read(source(n)).unwrap() == fs::read(&copy).unwrap());
    }
}
