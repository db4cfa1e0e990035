//! Bad input and mishaps on one node: each a clear error, nothing lost, nothing half-written in place of good data.

use std::fs;
use std::io::Write;

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
