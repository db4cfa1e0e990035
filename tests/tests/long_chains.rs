//! A long line of small versions stays cheap to read: who follows it encodes one of them anew now and then.

use std::fs;
use std::path::Path;

use capsule_tests::{Fleet, Node, data};
use serde_json::Value;

/// From so many layers on a chain is dear (`node/src/materialise.rs`).
const DEAR: u64 = 16;

fn publish(node: &Node, path: &Path, content: &[u8], version: u64) {
    fs::write(path, content).unwrap();
    let (path, name) = (path.to_str().unwrap(), format!("lab:{version}"));
    node.ok(&["publish", path, "--as", "file", "--name", &name]);
}

/// Through how many layers a version is read on a node, and how many of them only that has.
fn reads(node: &Node, version: u64) -> (u64, u64) {
    let shown = node.json(&["layers", &format!("lab:{version}")]);
    let reads = &shown["reads"][0];
    let number = |key: &str| reads[key].as_u64().unwrap_or_else(|| panic!("{shown:#}"));
    (number("layers"), number("own"))
}

fn pull(node: &Node, version: u64) -> u64 {
    let pulled = node.json(&["pull", &format!("lab:{version}")]);
    pulled["fetched_bytes"].as_u64().unwrap()
}

fn check(fleet: &Fleet, node: &Node, version: u64, content: &[u8]) {
    let (name, copy) = (format!("lab:{version}"), fleet.path("copy"));
    node.ok(&["export", &name, "--to", copy.to_str().unwrap(), "--force"]);
    assert!(fs::read(copy).unwrap() == content, "{name}");
    let verified = node.json(&["verify"]);
    assert_eq!(verified["damaged"], Value::Array(vec![]), "{verified:#}");
}

fn stored(node: &Node) -> u64 {
    node.json(&["status"])["store_bytes"].as_u64().unwrap()
}

#[test]
fn twenty_small_versions_are_read_through_few_layers() {
    let mut fleet = Fleet::of(2);
    let path = fleet.path("file");
    let mut content = data::prose(1, 24 << 20);
    for version in 1..=20 {
        // Some of it changes, and more comes.
        let at = version as usize * 1_000_000;
        content[at..at + 3000].copy_from_slice(&data::noise(version, 3000));
        content.extend(data::prose(100 + version, 5000));
        publish(&fleet[0], &path, &content, version);
        let fetched = pull(&fleet[1], version);
        assert!(version == 1 || fetched < 100_000, "{version}: {fetched}");
        if version == DEAR {
            // Cut short, it begins again; nothing is lost by it.
            fleet[1].kill();
            fleet[1].start();
            fleet[1].wait_for_peers(1);
            for node in [0, 1] {
                fleet[node].wait_until("it is read through one layer", |node| {
                    reads(node, DEAR) == (1, 1)
                });
                check(&fleet, &fleet[node], DEAR, &content);
            }
        } else if version < DEAR {
            assert_eq!(reads(&fleet[1], version), (version, 0));
        }
    }
    // Later ones stand on it, at the publisher too, which keeps for others what it told of.
    for node in [0, 1] {
        fleet[node].wait_until("the last is read through few layers", |node| {
            reads(node, 20) == (21 - DEAR, 1)
        });
        check(&fleet, &fleet[node], 20, &content);
    }

    // Who published nothing no longer needs the old layers.
    fleet[1].ok(&["pin", "lab:20"]);
    let before = stored(&fleet[1]);
    fleet[1].wait_until("nothing is in use", |node| {
        node.json(&["gc", "--dry-run"])["busy"] == 0
    });
    fleet[1].ok(&["gc"]);
    let after = stored(&fleet[1]);
    assert!(after < before * 6 / 10, "{before} -> {after}");
    check(&fleet, &fleet[1], 20, &content);
    fleet[0].ok(&["gc"]);
    check(&fleet, &fleet[0], 1, &first());

    // A newcomer comes by all of it through the layers that were published.
    let token = fleet.invite(&[]);
    fleet[1].stop();
    let third = fleet.join(&token);
    fleet[third].wait_for_peers(1);
    let planned = fleet[third].json(&["plan", "lab:20", "--wait", "30s"]);
    assert_eq!(planned["components"][0]["layers"], 20, "{planned:#}");
    assert_eq!(
        Some(pull(&fleet[third], 20)),
        planned["fetch_bytes"].as_u64()
    );
    fleet[third].wait_until("a newcomer reads it through one layer", |node| {
        reads(node, 20) == (1, 1)
    });
    check(&fleet, &fleet[third], 20, &content);
}

/// The first version.
fn first() -> Vec<u8> {
    let mut content = data::prose(1, 24 << 20);
    content[1_000_000..1_003_000].copy_from_slice(&data::noise(1, 3000));
    content.extend(data::prose(101, 5000));
    content
}
