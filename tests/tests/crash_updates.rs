//! `kill -9` of a node while it publishes, fetches, checks, builds, rebases or collects versions that stand on each other: at moments spread over
//! the time that the command takes. Whatever the moment, what was here stays, nothing that is half done counts, and the same command
//! does the rest.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use capsule_tests::short::text;
use capsule_tests::{Fleet, Node, data};
use serde_json::Value;

/// Moments at which a command's node is killed.
const MOMENTS: u32 = 6;
const DISK: usize = 24 << 20;

/// A version of a disk: prose, and some noise that differs from version to version.
fn version(fleet: &Fleet, number: u64) -> PathBuf {
    let path = fleet.path(&format!("version{number}"));
    let mut disk = data::prose(7, DISK);
    for at in 0..number as usize {
        let start = 4096 * (31 + 97 * at);
        let noise = data::noise(at as u64, 300_000);
        disk[start..start + noise.len()].copy_from_slice(&noise);
        let moved = disk[1 << 20..3 << 20].to_vec();
        let to = (4 + at) << 20;
        disk[to..to + moved.len()].copy_from_slice(&moved);
    }
    fs::write(&path, disk).unwrap();
    path
}

fn publish(node: &Node, path: &Path, name: &str) -> Value {
    node.json(&["publish", text(path), "--as", "disk", "--name", name])
}

/// How long a command takes that nobody disturbs.
fn time(node: &Node, args: &[&str]) -> Duration {
    let started = Instant::now();
    node.ok(args);
    started.elapsed()
}

/// Runs a command, kills the node after a part of the time that it takes, and starts it again. Whether the command was not done by then.
fn kill_during(node: &mut Node, args: &[&str], after: Duration) -> bool {
    let mut command = node.command(args).spawn().unwrap();
    std::thread::sleep(after);
    node.kill();
    // It says that the daemon went away, or was done before.
    let done = command.wait().unwrap().success();
    node.start();
    !done
}

fn assert_sound(node: &Node, what: &str) {
    let verified = node.json(&["verify"]);
    assert_eq!(verified["damaged"], Value::Array(vec![]), "{what}");
}

fn assert_exports(node: &Node, name: &str, source: &Path, fleet_path: &Path) {
    node.ok(&["export", name, "--to", text(fleet_path), "--force"]);
    assert!(fs::read(source).unwrap() == fs::read(fleet_path).unwrap());
}

fn moments(whole: Duration) -> impl Iterator<Item = Duration> {
    (0..MOMENTS).map(move |moment| whole * (2 * moment + 1) / (2 * MOMENTS))
}

#[test]
fn a_publisher_of_updates_is_killed() {
    let mut fleet = Fleet::of(1);
    let sources: Vec<_> = (0..=u64::from(MOMENTS) + 1)
        .map(|number| version(&fleet, number))
        .collect();
    let copy = fleet.path("copy");
    publish(&fleet[0], &sources[0], "lab:0");
    let args = |source: &Path, name: &str| {
        ["publish", text(source), "--as", "disk", "--name", name].map(str::to_owned)
    };
    let first = args(&sources[1], "lab:1");
    let whole = time(&fleet[0], &first.each_ref().map(String::as_str));
    let mut killed = 0;
    for (moment, after) in moments(whole).enumerate() {
        let number = moment + 2;
        let (source, name) = (&sources[number], format!("lab:{number}"));
        let args = args(source, &name);
        let args = args.each_ref().map(String::as_str);
        killed += u32::from(kill_during(&mut fleet[0], &args, after));
        assert_sound(&fleet[0], &name);
        for capsule in fleet[0].json(&["ls"])["capsules"].as_array().unwrap() {
            assert_eq!(capsule["holding"], "complete", "{name}: {capsule:#}");
        }
        let before = format!("lab:{}", number - 1);
        assert_exports(&fleet[0], &before, &sources[number - 1], &copy);
        let published = publish(&fleet[0], source, &name);
        if published["unchanged"] == false {
            assert_eq!(published["parent"], before, "{published:#}");
        }
        assert_exports(&fleet[0], &name, source, &copy);
    }
    assert!(killed > MOMENTS / 3, "{killed} were in time");
    // What the killed ones left is collected; all that was published stays.
    fleet[0].ok(&["gc"]);
    for (number, source) in sources.iter().enumerate() {
        assert_exports(&fleet[0], &format!("lab:{number}"), source, &copy);
    }
}

#[test]
fn a_puller_of_an_update_is_killed() {
    let mut fleet = Fleet::of(2);
    let (one, two) = (version(&fleet, 1), version(&fleet, 4));
    let copy = fleet.path("copy");
    publish(&fleet[0], &one, "lab:1");
    publish(&fleet[0], &two, "lab:2");
    fleet[1].ok(&["pull", "lab:1"]);
    fleet[1].ok(&["pin", "lab:1"]);
    let whole = time(&fleet[1], &["pull", "lab:2"]);
    let mut killed = 0;
    for after in moments(whole) {
        fleet[1].ok(&["rm", "lab:2"]);
        fleet[1].ok(&["gc"]);
        killed += u32::from(kill_during(&mut fleet[1], &["pull", "lab:2"], after));
        assert_sound(&fleet[1], "an update that was pulled");
        assert_exports(&fleet[1], "lab:1", &one, &copy);
        fleet[1].wait_for_peers(1);
        fleet[1].ok(&["pull", "lab:2"]);
        assert_exports(&fleet[1], "lab:2", &two, &copy);
    }
    assert!(killed > MOMENTS / 3, "{killed} were in time");
}

#[test]
fn a_puller_that_builds_of_other_data_is_killed() {
    let mut fleet = Fleet::of(2);
    let (one, other) = (version(&fleet, 3), version(&fleet, 1));
    let copy = fleet.path("copy");
    publish(&fleet[0], &one, "lab:1");
    let pull = ["pull", "lab:1", "--like", text(&other)];
    let whole = time(&fleet[1], &pull);
    let mut killed = 0;
    for after in moments(whole) {
        fleet[1].ok(&["rm", "lab:1"]);
        fleet[1].ok(&["gc"]);
        killed += u32::from(kill_during(&mut fleet[1], &pull, after));
        assert_sound(&fleet[1], "what was built");
        fleet[1].wait_for_peers(1);
        fleet[1].ok(&pull);
        assert_exports(&fleet[1], "lab:1", &one, &copy);
    }
    assert!(killed > MOMENTS / 3, "{killed} were in time");
}

#[test]
fn a_node_that_rebases_or_collects_is_killed() {
    let mut fleet = Fleet::of(1);
    let sources: Vec<_> = (0..3).map(|number| version(&fleet, number)).collect();
    let copy = fleet.path("copy");
    for (number, source) in sources.iter().enumerate() {
        publish(&fleet[0], source, &format!("lab:{number}"));
    }
    // Of another frame length each time, as the same again is known.
    let lengths: Vec<String> = (0..=MOMENTS).map(|n| format!("{}K", 32 + 4 * n)).collect();
    let rebase = |n: usize| ["publish", "--rebase", "lab:2", "--frame-max", &lengths[n]];
    let whole = time(&fleet[0], &rebase(MOMENTS as usize));
    let mut killed = 0;
    for (moment, after) in moments(whole).enumerate() {
        killed += u32::from(kill_during(&mut fleet[0], &rebase(moment), after));
        assert_sound(&fleet[0], "a rebase");
        assert_exports(&fleet[0], "lab:2", &sources[2], &copy);
        fleet[0].ok(&rebase(moment));
    }
    assert!(killed > MOMENTS / 3, "{killed} were in time");
    for (number, source) in sources.iter().enumerate() {
        assert_exports(&fleet[0], &format!("lab:{number}"), source, &copy);
    }
    // Collections are short: the first moments are those within them.
    let whole = Duration::from_millis(30);
    for (moment, after) in moments(whole).enumerate() {
        let name = format!("more:{moment}");
        publish(&fleet[0], &version(&fleet, 4 + moment as u64), &name);
        fleet[0].ok(&["unpin", &name]);
        if moment == 1 {
            fleet[0].ok(&["unpin", "lab:0"]);
            fleet[0].ok(&["unpin", "lab:1"]);
        }
        kill_during(&mut fleet[0], &["gc"], after);
        assert_sound(&fleet[0], "a collection");
        assert_exports(&fleet[0], "lab:2", &sources[2], &copy);
    }
    fleet[0].ok(&["gc"]);
    assert_exports(&fleet[0], "lab:2", &sources[2], &copy);
}
