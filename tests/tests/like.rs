//! Hashing: a machine without any older version, but with other data, fetches only what it does not have.

use std::fs;
use std::path::Path;

use capsule_tests::short::{number, text};
use capsule_tests::{Fleet, data};
use serde_json::Value;

/// A disk on which files lie in whole pages, in an order.
fn disk(path: &Path, files: impl Iterator<Item = u64>) {
    let mut bytes = vec![0; 1 << 20];
    for file in files {
        bytes.extend(data::noise(file, 150_000 + 70_000 * file as usize));
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
    }
    bytes.resize(24 << 20, 0);
    fs::write(path, bytes).unwrap();
}

fn found(planned: &Value) -> u64 {
    number(&planned["components"][0], "found")
}

#[test]
fn a_disk_is_made_of_another_image_and_of_what_was_fetched() {
    let fleet = Fleet::of(2);
    let (ours, theirs, copy) = (
        fleet.path("ours.raw"),
        fleet.path("theirs.raw"),
        fleet.path("copy.raw"),
    );
    disk(&theirs, 0..18);
    disk(&ours, (0..17).rev());
    fleet[0].ok(&["publish", text(&theirs), "--as", "disk", "--name", "lab:1"]);

    let without = fleet[1].json(&["plan", "lab:1"]);
    assert_eq!(found(&without), 0);
    let options = ["--like", text(&ours)];
    let planned = fleet[1].json(&[&["plan", "lab:1"], &options[..]].concat());
    let (whole, fetch) = (
        number(&without, "fetch_bytes"),
        number(&planned, "fetch_bytes"),
    );
    assert!(fetch < whole * 6 / 10, "{fetch} of {whole}");
    assert_eq!(found(&planned) + fetch, whole);
    let pulled = fleet[1].json(&[&["pull", "lab:1"], &options[..]].concat());
    assert_eq!(number(&pulled, "fetched_bytes"), fetch, "{pulled:#}");
    fleet[1].ok(&["export", "lab:1", "--to", text(&copy)]);
    assert!(fs::read(&copy).unwrap() == fs::read(&theirs).unwrap());

    // It is held like any other: verified, kept by a collection, and served to others under its own root.
    fleet[1].ok(&["pin", "lab:1"]);
    fleet[1].ok(&["gc"]);
    assert_eq!(fleet[1].json(&["verify"])["damaged"], Value::Array(vec![]));
    let root = planned["components"][0]["root"].as_str().unwrap();
    fleet[0].wait_until("the other announces the component", |node| {
        let peers = node.json(&["peers", "--have", root]);
        let holders = peers["peers"].as_array().unwrap().iter();
        holders.filter(|peer| peer["have"].is_u64()).count() == 1
    });

    // An update upon it is fetched as an update.
    disk(&theirs, 0..18);
    let mut bytes = fs::read(&theirs).unwrap();
    bytes[5 << 20..(5 << 20) + 100].copy_from_slice(&data::noise(99, 100));
    fs::write(&theirs, &bytes).unwrap();
    fleet[0].ok(&["publish", text(&theirs), "--as", "disk", "--name", "lab:2"]);
    let pulled = fleet[1].json(&["pull", "lab:2"]);
    assert!(number(&pulled, "fetched_bytes") < 20_000, "{pulled:#}");
    fleet[1].ok(&["export", "lab:2", "--to", text(&copy), "--force"]);
    assert!(fs::read(&copy).unwrap() == bytes);
}

#[test]
fn where_all_is_found_only_the_plan_is_fetched() {
    let fleet = Fleet::of(2);
    let (image, copy) = (fleet.path("image.raw"), fleet.path("copy.raw"));
    disk(&image, 0..10);
    fleet[0].ok(&["publish", text(&image), "--as", "disk", "--name", "lab:1"]);
    let options = ["--like", text(&image)];
    let planned = fleet[1].json(&[&["plan", "lab:1"], &options[..]].concat());
    assert_eq!(number(&planned, "fetch_bytes"), 0, "{planned:#}");
    let pulled = fleet[1].json(&[&["pull", "lab:1"], &options[..]].concat());
    assert_eq!(number(&pulled, "fetched_bytes"), 0, "{pulled:#}");
    fleet[1].ok(&["export", "lab:1", "--to", text(&copy)]);
    assert!(fs::read(&copy).unwrap() == fs::read(&image).unwrap());
}

#[test]
fn a_tree_is_made_of_capsules_that_are_here() {
    let fleet = Fleet::of(2);
    let (one, two) = (fleet.path("one"), fleet.path("two"));
    for dir in [&one, &two] {
        fs::create_dir(dir).unwrap();
        for file in 0..20 {
            // In another order, and not all of them.
            let name = if *dir == one { file } else { 100 - file };
            if *dir == two || file % 5 > 0 {
                let bytes = data::noise(file, 300_000 + file as usize * 1000);
                fs::write(dir.join(format!("file{name:03}")), bytes).unwrap();
            }
        }
    }
    fleet[0].publish(&one, "one:1");
    fleet[1].ok(&["pull", "one:1"]);
    fleet[0].publish(&two, "two:1");
    let planned = fleet[1].json(&["plan", "two:1", "--like", "one"]);
    let (found, fetch) = (found(&planned), number(&planned, "fetch_bytes"));
    assert!(found > fetch, "{planned:#}");
    let pulled = fleet[1].json(&["pull", "two:1"]);
    assert_eq!(number(&pulled, "fetched_bytes"), fetch);
    let copy = fleet.path("copy");
    fleet[1].ok(&["export", "two:1", "--to", text(&copy)]);
    data::compare_trees(&two, &copy).unwrap();
    // What it was made of may go.
    fleet[1].ok(&["pin", "two:1"]);
    fleet[1].ok(&["rm", "one:1"]);
    fleet[1].ok(&["gc"]);
    assert_eq!(fleet[1].json(&["verify"])["damaged"], Value::Array(vec![]));
    // What is not there is said so.
    let said = fleet[1].fails(1, &["plan", "two:1", "--like", "/nowhere/at/all"]);
    assert!(said.contains("/nowhere/at/all"), "{said}");
}

#[test]
fn what_came_as_a_blob_of_its_own_takes_updates_too() {
    let mut fleet = Fleet::of(2);
    let (image, copy) = (fleet.path("image.raw"), fleet.path("copy.raw"));
    disk(&image, 0..10);
    fleet[0].ok(&["publish", text(&image), "--as", "disk", "--name", "lab:1"]);
    fleet[1].ok(&["pull", "lab:1", "--like", text(&image)]);
    let token = fleet.invite(&[]);
    let third = fleet.join(&token);
    fleet[third].wait_for_peers(2);
    let root = fleet[1].json(&["plan", "lab:1"])["components"][0]["root"].clone();
    let root = root.as_str().unwrap();
    fleet[third].wait_until("the second announces the component", |node| {
        let peers = node.json(&["peers", "--have", root]);
        let holders = peers["peers"].as_array().unwrap().iter();
        holders.filter(|peer| peer["have"].is_u64()).count() >= 2
    });
    // Only who made it of other data is left, and has the published layer not.
    fleet[0].stop();
    let planned = fleet[third].json(&["plan", "lab:1"]);
    assert_eq!(planned["components"][0]["way"], "blob", "{planned:#}");
    fleet[third].ok(&["pull", "lab:1"]);
    fleet[0].start();
    let mut bytes = fs::read(&image).unwrap();
    bytes[5 << 20..(5 << 20) + 100].copy_from_slice(&data::noise(99, 100));
    fs::write(&image, &bytes).unwrap();
    fleet[0].ok(&["publish", text(&image), "--as", "disk", "--name", "lab:2"]);
    fleet[third].wait_for_peers(2);
    let pulled = fleet[third].json(&["pull", "lab:2"]);
    assert!(number(&pulled, "fetched_bytes") < 20_000, "{pulled:#}");
    fleet[third].ok(&["export", "lab:2", "--to", text(&copy)]);
    assert!(fs::read(&copy).unwrap() == bytes);
    fleet[third].ok(&["pin", "lab:2"]);
    fleet[third].ok(&["rm", "lab:1"]);
    fleet[third].ok(&["gc"]);
    assert_eq!(
        fleet[third].json(&["verify"])["damaged"],
        Value::Array(vec![])
    );
    fleet[third].ok(&["export", "lab:2", "--to", text(&copy), "--force"]);
    assert!(fs::read(&copy).unwrap() == bytes);
}
