//! Bytes that rot on a node's disk: noticed, never exported, never a reason to lose what is still good, and fetched again.

use std::fs;
use std::path::{Path, PathBuf};

use capsule_proto::RootHash;
use capsule_proto::index::Space;
use capsule_proto::manifest::{Component, ComponentKind, Manifest};
use capsule_tests::shelf::{Shelf, encoded};
use capsule_tests::{Fleet, Node, data};
use serde_json::Value;

#[test]
fn damage_on_disk_is_noticed_and_repaired_from_peers() {
    let mut fleet = Fleet::of(2);
    let source = fleet.path("source");
    data::noise_file(&source, 13, 4 << 20);
    fleet[0].publish(&source, "lab:1");
    fleet[1].json(&["pull", "lab:1"]);
    fleet[1].stop();
    damage_largest(&fleet[1].home().join("store"));
    fleet[1].start();
    fleet[1].wait_for_peers(1);
    let verified = fleet[1].json(&["verify", "--repair"]);
    assert!(
        verified["damaged_bytes"].as_u64().unwrap() > 0
            && verified["damaged_bytes"] == verified["repaired_bytes"],
        "{verified:#}"
    );
    assert!(
        fleet[1].json(&["verify"])["damaged"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    let copy = fleet.path("copy");
    fleet[1].ok(&["export", "lab:1", "--to", copy.to_str().unwrap()]);
    assert!(fs::read(&source).unwrap() == fs::read(&copy).unwrap());
}

#[test]
fn damage_on_disk_is_never_exported() {
    let mut fleet = Fleet::of(2);
    // One lies in its pack as it is, the other is decoded.
    let sources = [
        ("raw", data::noise(17, 3 << 20)),
        ("packed", data::prose(19, 8 << 20)),
    ];
    for (name, content) in &sources {
        let source = fleet.path(name);
        fs::write(&source, content).unwrap();
        fleet[0].publish(&source, &format!("{name}:1"));
    }
    for (name, content) in &sources {
        let capsule = format!("{name}:1");
        fleet[1].json(&["pull", &capsule]);
        export_damaged(&mut fleet, &capsule, &[]);
        export_damaged(&mut fleet, &capsule, &["--force"]);
        let copy = fleet.path(&format!("{name} copy"));
        fleet[1].ok(&["export", &capsule, "--to", copy.to_str().unwrap()]);
        assert!(fs::read(&copy).unwrap() == *content);
        // Leaves the largest blob to the next one.
        fleet[1].ok(&["rm", &capsule]);
        fleet[1].ok(&["gc"]);
    }
}

/// Damages a capsule on the second node, tries to export it, and repairs it.
fn export_damaged(fleet: &mut Fleet, capsule: &str, options: &[&str]) {
    fleet[1].stop();
    damage_largest(&fleet[1].home().join("store"));
    fleet[1].start();
    let dir = fleet.path("exported");
    fs::create_dir(&dir).unwrap();
    let to = dir.join("file");
    if !options.is_empty() {
        fs::write(&to, b"precious").unwrap();
    }
    let export = ["export", capsule, "--to", to.to_str().unwrap()];
    let said = fleet[1].fails(1, &[&export[..], options].concat());
    let way_out = format!("capsule verify --repair {capsule}");
    assert!(
        said.contains("damaged") && said.contains(&way_out),
        "{said}"
    );
    let left: Vec<_> = fs::read_dir(&dir).unwrap().flatten().collect();
    if options.is_empty() {
        assert!(left.is_empty(), "{left:?}");
    } else {
        assert_eq!(left.len(), 1, "{left:?}");
        assert_eq!(fs::read(&to).unwrap(), b"precious");
    }
    fs::remove_dir_all(&dir).unwrap();
    let said = fleet[1].fails(1, &[&export[..], options].concat());
    assert!(said.contains("in part"), "the damage is known now: {said}");
    fleet[1].wait_for_peers(1);
    // What was taken out before is not found damaged by this, but is fetched.
    let verified = fleet[1].json(&["verify", "--repair", capsule]);
    assert!(
        verified["repaired_bytes"].as_u64().unwrap() >= 16 << 10
            && verified["repaired_bytes"] == verified["damaged_bytes"],
        "{verified:#}"
    );
}

/// Flips a bit in the middle of the largest blob of a store that nobody has open.
fn damage_largest(store: &Path) {
    let blob = largest_file(store);
    let mut bytes = fs::read(&blob).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&blob, bytes).unwrap();
}

fn largest_file(dir: &Path) -> PathBuf {
    let mut files = vec![];
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            if entry.path().is_dir() {
                open.push(entry.path())
            } else {
                files.push(entry.path())
            }
        }
    }
    files.retain(|path| path.extension().is_some_and(|end| end == "data"));
    files
        .into_iter()
        .max_by_key(|path| path.metadata().unwrap().len())
        .expect("the store has blobs")
}

/// Flips a bit in the middle of a blob of a store that nobody has open.
fn damage_blob(node: &Node, root: &str) {
    let path = node.blob_file(root);
    let mut bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
}

/// A node that pulled and pinned a tree, and what `publish` said of it.
fn holder_of_a_tree(bytes: u64) -> (Fleet, Value) {
    let fleet = Fleet::of(2);
    data::tree(&fleet.path("source"), 81, bytes);
    // Many names: a listing of several groups.
    for number in 0..600 {
        let name = fleet.path(&format!("source/empty/file of number {number}"));
        fs::write(name, number.to_string()).unwrap();
    }
    let published = fleet[0].publish(&fleet.path("source"), "lab:tree");
    fleet[1].ok(&["pull", "lab:tree"]);
    fleet[1].ok(&["pin", "lab:tree"]);
    (fleet, published)
}

/// Finds the damage, collects, fetches again: little, and with it all is there.
fn mend(fleet: &mut Fleet, kind: &str, most: u64, fetch: &[&str]) {
    let node = &mut fleet[1];
    node.start();
    node.wait_for_peers(1);
    let before = node.json(&["status"])["store_bytes"].as_u64().unwrap();
    // Damage remains, so this exits 1.
    let verified = node.run(&["verify", "--json"]);
    assert_eq!(verified.code, Some(1), "{verified:#?}");
    let found: Value = serde_json::from_str(&verified.stdout).unwrap();
    assert!(
        found["damaged"]
            .as_array()
            .unwrap()
            .iter()
            .any(|damage| damage["kind"] == kind),
        "{found:#}"
    );
    let copy = fleet.path("copy");
    let export = ["export", "lab:tree", "--to", copy.to_str().unwrap()];
    let said = fleet[1].fails(1, &export);
    assert!(
        said.contains("in part") && said.contains("capsule pull lab:tree"),
        "{said}"
    );
    let node = &fleet[1];
    let collected = node.json(&["gc"]);
    assert_eq!(collected["bytes"], 0, "{collected:#}");
    let damaged = found["damaged_bytes"].as_u64().unwrap();
    let left = node.json(&["status"])["store_bytes"].as_u64().unwrap();
    // A hash pair goes with each group.
    let gone = damaged + damaged / 200;
    assert!(left + gone >= before, "{before} bytes, then {left}");
    let received = |node: &Node| {
        let status = node.json(&["status"]);
        status["received_bytes"].as_u64().unwrap()
    };
    let earlier = received(node);
    node.ok(fetch);
    let fetched = received(node) - earlier;
    assert!(fetched <= most, "{fetched} bytes to mend {damaged}");
    // What was fetched again is as safe from collection as what stayed.
    let collected = node.json(&["gc"]);
    assert_eq!(collected["bytes"], 0, "{collected:#}");
    let verified = node.json(&["verify"]);
    assert_eq!(verified["damaged_bytes"], 0, "{verified:#}");
    node.ok(&export);
    data::compare_trees(&fleet.path("source"), &copy).unwrap();
    let listed = node.json(&["show", "lab:tree"]);
    assert_eq!(listed["holding"], "complete", "{listed:#}");
}

#[test]
fn a_damaged_listing_is_fetched_again_and_the_contents_stay() {
    let fetches: [&[&str]; 2] = [&["pull", "lab:tree"], &["verify", "--repair"]];
    for fetch in fetches {
        let (mut fleet, published) = holder_of_a_tree(3_000_000);
        let listing = published["components"][0].clone();
        assert!(listing["size"].as_u64().unwrap() > 16 << 10);
        fleet[1].stop();
        damage_blob(&fleet[1], listing["root"].as_str().unwrap());
        // The damaged group, or the listing by way of its layer.
        let most = listing["size"].as_u64().unwrap() + (64 << 10);
        mend(&mut fleet, "listing", most, fetch);
    }
}

#[test]
fn a_damaged_manifest_is_fetched_again_and_nothing_else_goes() {
    let fetches: [&[&str]; 2] = [&["pull", "lab:many"], &["verify", "--repair"]];
    for fetch in fetches {
        let mut fleet = Fleet::of(1);
        let token = fleet.invite(&["--channel", "lab"]);
        let mut shelf = Shelf::of(&token, 82);
        // Of so many components that it does not fit into the database.
        let content = data::prose(83, 3_000_000);
        let (root, size) = (RootHash::of(&content), content.len() as u64);
        shelf.layer((Space::Stream, root, size), encoded(&content, root));
        let components = (0..250).map(|number| Component {
            name: format!("{number:0>50}"),
            kind: ComponentKind::File,
            root,
            size,
            content_size: size,
        });
        let manifest = Manifest::new(components.collect()).unwrap().encode();
        let id = RootHash::of(&manifest).to_string();
        shelf.name("many", manifest.clone());
        let _publisher = shelf.open();
        let node = &mut fleet[0];
        node.ok(&["pull", "lab:many", "--wait", "30s"]);
        node.ok(&["pin", "lab:many"]);
        let whole = node.json(&["status"])["store_bytes"].clone();
        // Its publisher knows it by its address, and comes back to that.
        let address = node.address().to_owned();
        node.stop();
        damage_blob(node, &id);
        node.start_on(&address);
        node.wait_for_peers(1);
        // It was found at the start, where all capsules are looked at.
        let troubles = node.json(&["status"])["troubles"].to_string();
        assert!(troubles.contains(&id), "{troubles}");
        let copy = fleet.path("copy");
        let component = format!("{:0>50}", 7);
        let to = copy.to_str().unwrap();
        let export = ["export", "lab:many", "--component", &component, "--to", to];
        let said = fleet[0].fails(1, &export);
        assert!(said.contains("capsule pull lab:many"), "{said}");
        // Nobody can tell what the capsule takes, so all that is here stays.
        let node = &fleet[0];
        for _ in 0..2 {
            let collected = node.json(&["gc"]);
            assert_eq!(collected["bytes"], 0, "{collected:#}");
        }
        node.ok(fetch);
        let fetched = node.json(&["status"])["received_bytes"].as_u64().unwrap();
        assert!(
            fetched <= manifest.len() as u64,
            "{fetched} bytes were fetched"
        );
        assert_eq!(node.json(&["status"])["store_bytes"], whole);
        node.ok(&export);
        assert!(fs::read(copy).unwrap() == content);
    }
}

#[test]
fn a_damaged_pack_costs_no_more_than_the_damage() {
    let (mut fleet, _) = holder_of_a_tree(8_000_000);
    let layers = fleet[1].json(&["show", "lab:tree"])["layers"].clone();
    let mut layers = layers.as_array().unwrap().iter();
    let contents = layers.find(|layer| layer["space"] == "contents").unwrap();
    let pack = contents["pack"]["root"].as_str().unwrap().to_owned();
    fleet[1].stop();
    damage_blob(&fleet[1], &pack);
    mend(&mut fleet, "pack", 16 << 10, &["verify", "--repair"]);
}
