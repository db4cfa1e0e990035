//! Versions that are made or fetched upon what is not as it was: a damaged parent, other data that changes while it is used.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use capsule_tests::short::text;
use capsule_tests::{Fleet, Node, data};
use serde_json::Value;

fn publish(node: &Node, path: &Path, name: &str, options: &[&str]) -> Value {
    let args = ["publish", text(path), "--as", "disk", "--name", name];
    node.json(&[&args[..], options].concat())
}

/// Flips bits all over the largest blob of a node that does not run.
fn damage(node: &Node) {
    let blobs = fs::read_dir(node.home().join("store/blobs")).unwrap();
    let files = blobs.flat_map(|dir| fs::read_dir(dir.unwrap().path()).unwrap());
    let paths = files.map(|file| file.unwrap().path());
    let packs = paths.filter(|path| path.extension().is_some_and(|kind| kind == "data"));
    let largest: PathBuf = packs
        .max_by_key(|path| path.metadata().unwrap().len())
        .expect("the store has blobs");
    let mut bytes = fs::read(&largest).unwrap();
    bytes.iter_mut().step_by(40_000).for_each(|byte| *byte ^= 1);
    fs::write(&largest, bytes).unwrap();
}

/// Two versions of a disk: in the second, content of the first lies elsewhere too, and there is new content.
fn versions(fleet: &Fleet) -> [PathBuf; 2] {
    let mut disk = data::noise(5, 12 << 20);
    let paths = ["one", "two"].map(|name| fleet.path(name));
    fs::write(&paths[0], &disk).unwrap();
    let moved = disk[1 << 20..3 << 20].to_vec();
    disk.extend(moved);
    disk.extend(data::prose(6, 1 << 20));
    fs::write(&paths[1], &disk).unwrap();
    paths
}

#[test]
fn a_damaged_parent_is_passed_over_unless_it_was_asked_for() {
    for asked in [false, true] {
        let mut fleet = Fleet::of(1);
        let [one, two] = versions(&fleet);
        publish(&fleet[0], &one, "lab:1", &[]);
        fleet[0].stop();
        damage(&fleet[0]);
        fleet[0].start();
        if asked {
            let args = ["publish", text(&two), "--as", "disk", "--name", "lab:2"];
            let said = fleet[0].fails(1, &[&args[..], &["--parent", "lab:1"]].concat());
            assert!(
                said.contains("cannot be read") && said.contains("capsule verify"),
                "{said}"
            );
            assert!(said.contains("--no-parent"), "{said}");
            publish(&fleet[0], &two, "lab:2", &["--no-parent"]);
        } else {
            let published = publish(&fleet[0], &two, "lab:2", &[]);
            assert_eq!(published["parent"], Value::Null, "{published:#}");
            let warning = published["warnings"][0].as_str().unwrap();
            assert!(warning.contains("published against nothing"), "{warning}");
        }
        let copy = fleet.path("copy");
        fleet[0].ok(&["export", "lab:2", "--to", text(&copy)]);
        assert!(fs::read(&copy).unwrap() == fs::read(&two).unwrap());
        let said = fleet[0].fails(1, &["export", "lab:1", "--to", text(&copy), "--force"]);
        assert!(said.contains("damaged"), "{said}");
    }
}

#[test]
fn an_update_upon_a_damaged_version_is_noticed_and_mended_from_peers() {
    let mut fleet = Fleet::of(2);
    let [one, two] = versions(&fleet);
    publish(&fleet[0], &one, "lab:1", &[]);
    fleet[1].ok(&["pull", "lab:1"]);
    fleet[1].ok(&["pin", "lab:1"]);
    let published = publish(&fleet[0], &two, "lab:2", &[]);
    assert!(published["copied_bytes"].as_u64().unwrap() >= 2 << 20);
    fleet[1].stop();
    damage(&fleet[1]);
    fleet[1].start();
    fleet[1].wait_for_peers(1);
    let said = fleet[1].fails(1, &["pull", "lab:2"]);
    assert!(
        said.contains("damaged on this machine's disk") && said.contains("the same command"),
        "{said}"
    );
    fleet[1].ok(&["pull", "lab:2"]);
    fleet[1].ok(&["verify", "--repair"]);
    for (source, name) in [(&one, "lab:1"), (&two, "lab:2")] {
        let copy = fleet.path("copy");
        fleet[1].ok(&["export", name, "--to", text(&copy), "--force"]);
        assert!(
            fs::read(&copy).unwrap() == fs::read(source).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn other_data_may_change_while_a_pull_uses_it() {
    let fleet = Fleet::of(2);
    let (image, like, copy) = (fleet.path("image"), fleet.path("like"), fleet.path("copy"));
    let bytes = data::noise(9, 24 << 20);
    fs::write(&image, &bytes).unwrap();
    publish(&fleet[0], &image, "lab:1", &[]);
    let (mut fetched, whole) = (Vec::new(), bytes.len() as u64);
    for round in 0..6u64 {
        fs::write(&like, &bytes).unwrap();
        let done = AtomicBool::new(false);
        let pulled = std::thread::scope(|scope| {
            scope.spawn(|| {
                use std::os::unix::fs::FileExt;
                let file = fs::File::options().write(true).open(&like).unwrap();
                // Later in later rounds: while it is searched, planned with, and built from.
                std::thread::sleep(Duration::from_millis(20 * round));
                for step in 0.. {
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                    let at = (step * 1_300_021) % (whole - 4096);
                    file.write_all_at(&data::noise(step, 4096), at).unwrap();
                    std::thread::sleep(Duration::from_micros(300));
                }
            });
            let pulled = fleet[1].run(&["pull", "lab:1", "--like", text(&like), "--json"]);
            done.store(true, Ordering::Relaxed);
            pulled
        });
        assert_eq!(pulled.code, Some(0), "round {round}: {pulled:#?}");
        let answer: Value = serde_json::from_str(&pulled.stdout).unwrap();
        fetched.push(answer["fetched_bytes"].as_u64().unwrap());
        fleet[1].ok(&["export", "lab:1", "--to", text(&copy), "--force"]);
        assert!(fs::read(&copy).unwrap() == bytes, "round {round}");
        fleet[1].ok(&["rm", "lab:1"]);
        fleet[1].ok(&["gc"]);
    }
    assert!(fetched.iter().any(|fetched| *fetched > 0), "{fetched:?}");
}

#[test]
fn a_pull_that_runs_takes_no_other_data_in() {
    let mut fleet = Fleet::of(2);
    let [one, two] = versions(&fleet);
    publish(&fleet[0], &one, "lab:1", &[]);
    // Its name is known, but nobody is there who has it.
    fleet[1].ok(&["plan", "lab:1"]);
    fleet[0].stop();
    let mut waiting = fleet[1].command(&["pull", "lab:1", "--wait", "60s"]);
    let mut waiting = waiting.spawn().unwrap();
    fleet[1].wait_until("the pull runs", |node| {
        let status = node.json(&["status"]);
        !status["transfers"].as_array().unwrap().is_empty()
    });
    let said = fleet[1].fails(1, &["pull", "lab:1", "--like", text(&two)]);
    assert!(said.contains("is being pulled already"), "{said}");
    assert!(said.contains("wait for that pull"), "{said}");
    fleet[0].start();
    assert!(waiting.wait().unwrap().success());
}
