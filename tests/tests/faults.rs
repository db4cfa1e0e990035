//! Bad input and mishaps on one node: each a clear error, nothing lost, nothing half-written in place of good data.

use std::fs;
use std::io::Write;
use std::process::Command;

use capsule_tests::{Fleet, Node, data};

#[test]
fn commands_without_a_daemon_name_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::new(dir.path().join("home"));
    let said = node.fails(3, &["ls"]);
    assert!(said.contains("capsule") && said.contains("node"), "{said}");
    node.init();
    assert!(node.fails(3, &["status"]).contains("node"));
    node.fails(2, &["pull"]);
    node.fails(2, &["no-such-command"]);
    node.fails(1, &["join", "hello"]);
    assert!(
        node.ok(&["fleet", "invite"]).split_whitespace().count() == 1,
        "only the token is printed"
    );
    node.fails(1, &["fleet", "init"]);
}

#[test]
fn two_daemons_on_one_home_are_refused() {
    let fleet = Fleet::of(1);
    let said = fleet[0].fails(1, &["node", "--listen", "127.0.0.1:0"]);
    assert!(said.contains("node0"), "{said}");
    fleet[0].ok(&["status"]);
}

#[test]
fn names_and_ids_that_do_not_exist() {
    let fleet = Fleet::of(1);
    for name in ["nowhere:1", "nowhere", "0123456789abcdef"] {
        let said = fleet[0].fails(1, &["show", name]);
        assert!(said.contains(name), "{said}");
    }
    let said = fleet[0].fails(1, &["pull", "nowhere:1", "--wait", "1s"]);
    assert!(said.contains("nowhere:1"), "{said}");
    let said = fleet[0].fails(1, &["publish", "/nonexistent/file", "--name", "lab:1"]);
    assert!(said.contains("/nonexistent/file"), "{said}");
    fleet[0].fails(2, &["publish", "/etc/hostname", "--name", "bad name:1"]);
}

#[test]
fn export_leaves_what_exists_alone() {
    let fleet = Fleet::of(1);
    let (source, file, dir) = (fleet.path("source"), fleet.path("file"), fleet.path("dir"));
    fs::write(&source, b"content").unwrap();
    data::tree(&fleet.path("tree"), 5, 100_000);
    fleet[0].publish(&source, "file:1");
    fleet[0].publish(&fleet.path("tree"), "tree:1");
    fs::write(&file, b"precious").unwrap();
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("precious"), b"precious").unwrap();
    fleet[0].fails(1, &["export", "file:1", "--to", file.to_str().unwrap()]);
    fleet[0].fails(1, &["export", "tree:1", "--to", dir.to_str().unwrap()]);
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    assert_eq!(fs::read(dir.join("precious")).unwrap(), b"precious");
    fleet[0].ok(&[
        "export",
        "file:1",
        "--to",
        file.to_str().unwrap(),
        "--force",
    ]);
    fleet[0].ok(&["export", "tree:1", "--to", dir.to_str().unwrap(), "--force"]);
    assert_eq!(fs::read(&file).unwrap(), b"content");
    data::compare_trees(&fleet.path("tree"), &dir).unwrap();
}

#[test]
fn a_source_that_changes_while_it_is_published_is_noticed() {
    let fleet = Fleet::of(1);
    let source = fleet.path("growing");
    data::noise_file(&source, 9, 64 << 20);
    let mut publishing = fleet[0]
        .command(&[
            "publish",
            source.to_str().unwrap(),
            "--name",
            "lab:1",
            "--effort",
            "max",
        ])
        .spawn()
        .unwrap();
    let mut file = fs::OpenOptions::new().append(true).open(&source).unwrap();
    // Written to until it is over: at least once after the reading began and before it ended.
    let status = loop {
        file.write_all(b"more").unwrap();
        if let Some(status) = publishing.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    assert_eq!(status.code(), Some(1));
    fleet[0].fails(1, &["show", "lab:1"]);
    assert_eq!(
        fleet[0].json(&["ls"])["capsules"].as_array().unwrap().len(),
        0,
        "nothing was published"
    );
}

#[test]
fn a_full_disk_stops_a_pull_and_room_lets_it_go_on() {
    let fleet = Fleet::new();
    let source = fleet.path("source");
    data::noise_file(&source, 11, 24 << 20);
    fleet[0].publish(&source, "lab:1");
    let token = fleet.invite(&[]);
    let small = SmallDisk::mount(&fleet.path("small"), 16);
    let mut node = Node::new(small.path.join("home"));
    node.ok(&["join", &token]);
    node.start();
    let said = node.fails(1, &["pull", "lab:1"]);
    assert!(
        said.contains("room") || said.contains("full") || said.contains("space"),
        "{said}\n{}",
        node.log()
    );
    assert!(
        node.json(&["verify"])["damaged"]
            .as_array()
            .unwrap()
            .is_empty(),
        "what was kept is right"
    );
    let kept = node.json(&["status"])["store_bytes"].as_u64().unwrap();
    assert!(kept > 4 << 20, "what was verified is kept: {kept}");
    small.grow(64);
    let pulled = node.json(&["pull", "lab:1"]);
    assert!(
        pulled["had_bytes"].as_u64().unwrap() > 4 << 20,
        "{pulled:#}"
    );
    node.stop();
}

/// A tmpfs of a few megabytes.
struct SmallDisk {
    path: std::path::PathBuf,
}

impl SmallDisk {
    fn mount(path: &std::path::Path, megabytes: u64) -> Self {
        fs::create_dir(path).unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={megabytes}m"), "tmpfs"])
            .arg(path)
            .status();
        assert!(
            status.unwrap().success(),
            "this test mounts a tmpfs: run it as root"
        );
        Self {
            path: path.to_owned(),
        }
    }

    fn grow(&self, megabytes: u64) {
        let status = Command::new("mount")
            .args(["-o", &format!("remount,size={megabytes}m")])
            .arg(&self.path)
            .status();
        assert!(status.unwrap().success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: the daemon on it may still be ending.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

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
fn damage_largest(store: &std::path::Path) {
    let blob = largest_file(store);
    let mut bytes = fs::read(&blob).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&blob, bytes).unwrap();
}

fn largest_file(dir: &std::path::Path) -> std::path::PathBuf {
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
