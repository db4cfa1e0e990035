//! Collection with layers: a dropped version gives back what nothing kept is read from, and takes nothing away from the others.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use capsule_tests::short::number;
use capsule_tests::{Fleet, Node, data};
use serde_json::Value;

fn publish(node: &Node, path: &Path, name: &str) -> Value {
    let path = path.to_str().unwrap();
    node.json(&["publish", path, "--as", "file", "--name", name])
}

/// The largest pack of a layer from nothing to a capsule's one component: root and size.
fn first_pack(node: &Node, name: &str) -> (String, u64) {
    let shown = node.json(&["layers", name]);
    let layers = shown["layers"].as_array().unwrap();
    let first = layers.iter().filter(|layer| layer["parent"].is_null());
    let packs = first
        .map(|layer| &layer["pack"])
        .filter(|pack| !pack.is_null());
    let pack = packs.max_by_key(|pack| number(pack, "size")).unwrap();
    (
        pack["root"].as_str().unwrap().to_owned(),
        number(pack, "size"),
    )
}

fn pack_file(node: &Node, root: &str) -> PathBuf {
    node.home()
        .join(format!("store/blobs/{}/{root}.data", &root[..2]))
}

/// Bytes that a file takes on the disk.
fn taken(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// Exports a capsule and compares.
fn check(fleet: &Fleet, node: &Node, name: &str, content: &[u8]) {
    let copy = fleet.path("copy");
    node.ok(&["export", name, "--to", copy.to_str().unwrap(), "--force"]);
    assert!(fs::read(copy).unwrap() == content, "{name}");
}

/// Nothing is damaged, and the capsule counts as whole.
fn is_sound(node: &Node, name: &str) {
    let verified = node.json(&["verify"]);
    assert_eq!(verified["damaged"], Value::Array(vec![]), "{verified:#}");
    assert_eq!(node.json(&["show", name])["holding"], "complete");
}

/// What a gc says that it would free, and then does.
fn collect(node: &Node) -> Value {
    // Components that were served stay open for a while.
    let quiet = |node: &Node| node.json(&["gc", "--dry-run"])["busy"] == 0;
    node.wait_until("nothing is in use", quiet);
    let planned = node.json(&["gc", "--dry-run"]);
    let before = number(&node.json(&["status"]), "store_bytes");
    let done = node.json(&["gc"]);
    for key in ["blobs", "bytes", "punched", "punched_bytes"] {
        assert_eq!(planned[key], done[key], "{planned:#} {done:#}");
    }
    let after = number(&node.json(&["status"]), "store_bytes");
    assert_eq!(before - after, number(&done, "bytes"));
    let again = node.json(&["gc"]);
    assert_eq!(number(&again, "bytes"), 0, "{again:#}");
    done
}

const MIB: usize = 1 << 20;

/// A first version, and a second that has a quarter of it: with frames of a megabyte it reaches a good third of the first pack at most.
fn versions() -> [Vec<u8>; 2] {
    let first = data::prose(1, 16 * MIB);
    let second = [&first[6 * MIB..10 * MIB], &data::prose(2, 3 * MIB)].concat();
    [first, second]
}

/// What of the first pack the second version reaches, about, and what it does not.
fn reached(size: u64) -> (Range<u64>, Range<u64>) {
    (size / 4..size * 7 / 16, size * 9 / 16..size * 3 / 4)
}

#[test]
fn dropping_a_version_frees_what_the_next_is_not_read_from() {
    let mut fleet = Fleet::of(2);
    let (path, [first, second]) = (fleet.path("file"), versions());
    fs::write(&path, &first).unwrap();
    publish(&fleet[0], &path, "lab:1");
    fleet[1].ok(&["pull", "lab:1"]);
    fs::write(&path, &second).unwrap();
    publish(&fleet[0], &path, "lab:2");
    fleet[1].ok(&["pull", "lab:2"]);
    let (pack, size) = first_pack(&fleet[1], "lab:2");
    let file = pack_file(&fleet[1], &pack);
    let (before, (live, dead)) = (taken(&file), reached(size));
    assert!(before >= size);

    fleet[1].ok(&["pin", "lab:2"]);
    let collected = collect(&fleet[1]);
    assert_eq!(number(&collected, "punched"), 1, "{collected:#}");
    let punched = number(&collected, "punched_bytes");
    assert!(dead.contains(&punched), "{collected:#}");
    let after = taken(&file);
    assert!(live.contains(&after), "{before} -> {after}");
    is_sound(&fleet[1], "lab:2");
    check(&fleet, &fleet[1], "lab:2", &second);
    assert_eq!(fleet[1].json(&["pull", "lab:2"])["unchanged"], true);
    let planned = fleet[1].json(&["plan", "lab:2"]);
    assert_eq!(number(&planned, "fetch_bytes"), 0, "{planned:#}");
    assert!(number(&planned, "have_bytes") < size, "{planned:#}");
    // It is no longer announced.
    fleet[0].wait_until("less is announced", |node| {
        let peers = node.json(&["peers", "--have", &pack]);
        peers["peers"]
            .as_array()
            .unwrap()
            .iter()
            .all(|peer| live.contains(&number(peer, "have")))
    });

    // A new start, after a kill too, knows that it is whole.
    fleet[1].kill();
    fleet[1].start();
    is_sound(&fleet[1], "lab:2");

    // Who has nothing gets it from there alone, and asks for no more than is there.
    let address = fleet[1].address().to_owned();
    let token = fleet.invite(&["--addr", &address]);
    fleet[0].stop();
    let third = fleet.join(&token);
    fleet[third].wait_for_peers(1);
    let planned = fleet[third].json(&["plan", "lab:2", "--wait", "30s"]);
    assert_eq!(planned["components"][0]["way"], "layers", "{planned:#}");
    assert_eq!(planned["components"][0]["layers"], 2, "{planned:#}");
    let pulled = fleet[third].json(&["pull", "lab:2"]);
    assert_eq!(pulled["fetched_bytes"], planned["fetch_bytes"]);
    let fetched = number(&pulled, "fetched_bytes");
    assert!(fetched < size, "{pulled:#}");
    is_sound(&fleet[third], "lab:2");
    check(&fleet, &fleet[third], "lab:2", &second);

    // The dropped version comes again from who has all of it: what is missing.
    fleet[0].start();
    fleet[1].wait_for_peers(2);
    let pulled = fleet[1].json(&["pull", "lab:1"]);
    let fetched = number(&pulled, "fetched_bytes");
    assert!(dead.contains(&fetched) && fetched <= punched, "{pulled:#}");
    check(&fleet, &fleet[1], "lab:1", &first);
    is_sound(&fleet[1], "lab:1");
    // And goes again.
    assert_eq!(number(&collect(&fleet[1]), "punched_bytes"), punched);
    check(&fleet, &fleet[1], "lab:2", &second);
}

#[test]
fn a_publisher_keeps_what_it_offers_and_publishes_upon_what_is_left() {
    let mut fleet = Fleet::of(2);
    let (path, [first, second]) = (fleet.path("tree"), versions());
    fs::create_dir(&path).unwrap();
    let publish = |fleet: &Fleet, content: &[u8], name: &str| {
        fs::write(path.join("file"), content).unwrap();
        fleet[0].publish(&path, name)
    };
    publish(&fleet, &first, "lab:1");
    publish(&fleet, &second, "lab:2");
    // Both are pinned by their publication.
    assert_eq!(number(&collect(&fleet[0]), "bytes"), 0);
    fleet[0].ok(&["unpin", "lab:1"]);
    let collected = collect(&fleet[0]);
    let (_, size) = first_pack(&fleet[0], "lab:2");
    let (_, dead) = reached(size);
    assert!(
        dead.contains(&number(&collected, "punched_bytes")),
        "{collected:#}"
    );
    is_sound(&fleet[0], "lab:2");

    let third = [&second[..], &data::prose(3, 100_000)].concat();
    let published = publish(&fleet, &third, "lab:3");
    assert_eq!(published["parent"], "lab:2");
    assert!(number(&published, "pack_bytes") < 200_000, "{published:#}");
    is_sound(&fleet[0], "lab:3");
    fleet[0].kill();
    fleet[0].start();
    is_sound(&fleet[0], "lab:3");
    fleet[1].wait_for_peers(1);
    let planned = fleet[1].json(&["plan", "lab:3"]);
    let pulled = fleet[1].json(&["pull", "lab:3"]);
    assert_eq!(pulled["fetched_bytes"], planned["fetch_bytes"]);
    assert!(number(&pulled, "fetched_bytes") < size, "{pulled:#}");
    let copy = fleet.path("copied");
    fleet[1].ok(&["export", "lab:3", "--to", copy.to_str().unwrap()]);
    assert!(fs::read(copy.join("file")).unwrap() == third);
    // What is removed by name frees the same way.
    fleet[1].ok(&["pull", "lab:2"]);
    fleet[1].ok(&["rm", "lab:3"]);
    is_sound(&fleet[1], "lab:2");
}

#[test]
fn a_collection_that_is_killed_leaves_all_that_is_kept_and_the_next_ends_it() {
    let mut fleet = Fleet::of(2);
    let path = fleet.path("file");
    let first = data::noise(1, 64 * MIB);
    // Of every 300,000 bytes a third stays: many holes, with frames as short as these.
    let parts: Vec<&[u8]> = first
        .chunks(300_000)
        .map(|part| &part[..part.len() / 3])
        .collect();
    let second: Vec<u8> = parts.concat();
    let publish = |fleet: &Fleet, content: &[u8], name: &str| {
        fs::write(&path, content).unwrap();
        let path = path.to_str().unwrap();
        let args = ["--as", "file", "--frame-max", "32768", "--name", name];
        fleet[0].ok(&[&["publish", path], &args[..]].concat());
    };
    publish(&fleet, &first, "lab:1");
    publish(&fleet, &second, "lab:2");
    fleet[1].ok(&["pull", "lab:1"]);
    fleet[1].ok(&["pull", "lab:2"]);
    fleet[1].ok(&["pin", "lab:2"]);
    fleet[1].ok(&["gc"]);
    let (pack, size) = first_pack(&fleet[1], "lab:2");
    let file = pack_file(&fleet[1], &pack);
    let kept = taken(&file);
    assert!(kept < size * 3 / 4, "{kept} of {size}");
    for round in 0..6u64 {
        fleet[1].ok(&["pull", "lab:1"]);
        assert!(
            taken(&file) > kept + 4 * MIB as u64,
            "{} of {kept}",
            taken(&file)
        );
        let mut gc = fleet[1].command(&["gc"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(7 * round));
        fleet[1].kill();
        let _ = gc.wait().unwrap();
        fleet[1].start();
        is_sound(&fleet[1], "lab:2");
        check(&fleet, &fleet[1], "lab:2", &second);
        fleet[1].wait_for_peers(1);
    }
    fleet[1].ok(&["gc"]);
    let after = taken(&file);
    assert!(after <= kept + (1 << 17), "{after}, and needed are {kept}");
    is_sound(&fleet[1], "lab:2");
    check(&fleet, &fleet[1], "lab:2", &second);
}
