//! Disks that fill up: the error names the way out, what is good stays, and the same command goes on once there is room.

use std::fs;
use std::path::Path;

use capsule_tests::small_disk::SmallDisk;
use capsule_tests::{Fleet, Node, data};

/// Takes all but some of the room that a disk has.
fn fill(disk: &SmallDisk, leave: u64) {
    let free = disk.free();
    assert!(free > leave, "{free} bytes are free");
    fs::write(disk.path.join("filler"), vec![1; (free - leave) as usize]).unwrap();
}

fn names_the_way_out(said: &str) {
    assert!(
        said.contains("Free space there") && said.contains("capsule gc"),
        "{said}"
    );
}

/// No file of an import, of an export or of a transfer is left in a directory.
fn has_no_leftovers(dir: &Path) {
    let left: Vec<_> = fs::read_dir(dir).unwrap().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_full_disk_stops_a_pull_and_room_lets_it_go_on() {
    let fleet = Fleet::new();
    let source = fleet.path("source");
    data::noise_file(&source, 11, 24 << 20);
    fleet[0].publish(&source, "lab:1");
    let token = fleet.invite(&[]);
    let small = SmallDisk::mount(&fleet.path("home"), 16);
    let mut node = Node::new(&small.path);
    node.ok(&["join", &token]);
    node.start();
    let said = node.fails(1, &["pull", "lab:1"]);
    assert!(
        said.contains("no room for more content") && said.contains("free space"),
        "{said}"
    );
    assert!(said.contains("the same command resumes"), "{said}");
    assert_eq!(
        node.json(&["verify"])["damaged_bytes"],
        0,
        "what was kept is right"
    );
    let kept = node.json(&["status"])["store_bytes"].as_u64().unwrap();
    assert!(kept > 4 << 20, "what was verified is kept: {kept}");
    small.resize(64);
    let pulled = node.json(&["pull", "lab:1"]);
    assert!(
        pulled["had_bytes"].as_u64().unwrap() > 4 << 20,
        "{pulled:#}"
    );
    let copy = fleet.path("copy");
    node.ok(&["export", "lab:1", "--to", copy.to_str().unwrap()]);
    assert!(fs::read(&source).unwrap() == fs::read(&copy).unwrap());
    node.stop();
}

#[test]
fn a_full_disk_stops_a_publication_which_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    data::noise_file(&path("first"), 12, 3 << 20);
    data::noise_file(&path("large"), 13, 24 << 20);
    data::tree(&path("tree"), 14, 24 << 20);
    let small = SmallDisk::mount(&path("home"), 16);
    let mut node = Node::new(&small.path);
    node.init();
    node.start();
    node.publish(&path("first"), "lab:first");
    let before = node.json(&["status"])["store_bytes"].clone();
    for (source, name) in [("large", "lab:large"), ("tree", "lab:tree")] {
        let source = path(source);
        let publish = ["publish", source.to_str().unwrap(), "--name", name];
        names_the_way_out(&node.fails(1, &publish));
        node.fails(1, &["show", name]);
        has_no_leftovers(&node.home().join("store/tmp"));
        assert_eq!(node.json(&["status"])["store_bytes"], before);
        assert_eq!(node.json(&["verify"])["damaged_bytes"], 0);
    }
    let listed = node.json(&["ls"])["capsules"].clone();
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed:#}");
    // The earlier one is as good as it was.
    let copy = path("copy");
    node.ok(&["export", "lab:first", "--to", copy.to_str().unwrap()]);
    assert!(fs::read(path("first")).unwrap() == fs::read(&copy).unwrap());
    small.resize(128);
    for (source, name) in [("large", "lab:large"), ("tree", "lab:tree")] {
        node.publish(&path(source), name);
    }
    let copy = path("copied tree");
    node.ok(&["export", "lab:tree", "--to", copy.to_str().unwrap()]);
    data::compare_trees(&path("tree"), &copy).unwrap();
    node.stop();
}

#[test]
fn a_full_disk_lets_room_be_made_as_its_errors_say() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    data::noise_file(&path("old"), 15, 6 << 20);
    data::noise_file(&path("new"), 16, 5 << 20);
    let small = SmallDisk::mount(&path("home"), 16);
    let mut node = Node::new(&small.path);
    node.init();
    node.start();
    node.publish(&path("old"), "lab:old");
    fill(&small, 0);
    let new = path("new");
    let publish = ["publish", new.to_str().unwrap(), "--name", "lab:new"];
    names_the_way_out(&node.fails(1, &publish));
    // Not a byte is left, and room is made all the same, also by a node that had to be started for it.
    node.stop();
    node.start();
    let copy = path("copy");
    node.ok(&["export", "lab:old", "--to", copy.to_str().unwrap()]);
    assert!(fs::read(path("old")).unwrap() == fs::read(&copy).unwrap());
    node.ok(&["unpin", "lab:old"]);
    let freed = node.json(&["gc"])["bytes"].as_u64().unwrap();
    assert!(freed >= 6 << 20, "{freed}");
    node.ok(&publish);
    node.stop();
}

#[test]
fn a_full_disk_stops_an_export_and_what_was_there_stays() {
    let fleet = Fleet::new();
    let node = &fleet[0];
    data::noise_file(&fleet.path("file"), 17, 6 << 20);
    node.publish(&fleet.path("file"), "lab:file");
    // Of many small files: a file system takes more room for them than they have bytes.
    let many = fleet.path("many");
    fs::create_dir(&many).unwrap();
    for number in 0..3000 {
        fs::write(many.join(format!("file{number}")), data::noise(number, 300)).unwrap();
    }
    node.publish(&many, "lab:many");
    let small = SmallDisk::mount(&fleet.path("small"), 5);

    let (file, tree) = (small.path.join("file"), small.path.join("tree"));
    fs::write(&file, b"precious").unwrap();
    let to_file = [
        "export",
        "lab:file",
        "--force",
        "--to",
        file.to_str().unwrap(),
    ];
    let said = node.fails(1, &to_file);
    assert!(said.contains("choose another place"), "{said}");
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    let left: Vec<_> = fs::read_dir(&small.path).unwrap().flatten().collect();
    assert_eq!(left.len(), 1, "{left:?}");

    let to_tree = ["export", "lab:many", "--to", tree.to_str().unwrap()];
    let said = node.fails(1, &to_tree);
    assert!(
        said.contains(tree.to_str().unwrap()) && said.contains("again with --force to go on"),
        "{said}"
    );
    assert!(
        !said.contains("gc"),
        "it is not the store that is full: {said}"
    );
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    // What has a name in there is whole.
    for entry in fs::read_dir(&tree).into_iter().flatten().flatten() {
        let original = many.join(entry.file_name());
        let whole = fs::read(entry.path()).unwrap() == fs::read(&original).unwrap();
        assert!(whole, "{:?}", entry.path());
    }

    small.resize(64);
    node.ok(&to_file);
    node.ok(&[&to_tree[..], &["--force"]].concat());
    assert!(fs::read(fleet.path("file")).unwrap() == fs::read(&file).unwrap());
    data::compare_trees(&many, &tree).unwrap();
}

#[test]
fn a_full_disk_of_the_store_stops_no_export_to_another() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    // Decoded, so that it is hashed on its way out.
    fs::write(path("prose"), data::prose(18, 12 << 20)).unwrap();
    data::tree(&path("tree"), 19, 1 << 20);
    let small = SmallDisk::mount(&path("home"), 16);
    let mut node = Node::new(&small.path);
    node.init();
    node.start();
    node.publish(&path("prose"), "lab:prose");
    node.publish(&path("tree"), "lab:tree");
    fill(&small, 0);
    let (file, tree) = (path("file"), path("copied tree"));
    node.ok(&["export", "lab:prose", "--to", file.to_str().unwrap()]);
    node.ok(&["export", "lab:tree", "--to", tree.to_str().unwrap()]);
    assert!(fs::read(path("prose")).unwrap() == fs::read(&file).unwrap());
    data::compare_trees(&path("tree"), &tree).unwrap();
    node.stop();
}

#[test]
fn room_is_looked_for_where_the_export_is_written() {
    let fleet = Fleet::of(1);
    let (tree, above) = (fleet.path("tree"), fleet.path("above"));
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), data::noise(1, 6_000_000)).unwrap();
    fleet[0].publish(&tree, "lab:1");
    let _above = SmallDisk::mount(&above, 2);
    let target = above.join("mounted");
    let mounted = SmallDisk::mount(&target, 16);
    fleet[0].ok(&["export", "lab:1", "--to", target.to_str().unwrap()]);
    assert!(fs::read(target.join("file")).unwrap() == data::noise(1, 6_000_000));
    fs::remove_file(target.join("file")).unwrap();
    mounted.resize(4);
    let said = fleet[0].fails(1, &["export", "lab:1", "--to", target.to_str().unwrap()]);
    assert!(said.contains("bytes free"), "{said}");
}
