//! `kill -9` at any moment, then restart: nothing committed is lost, nothing unverified counts, the same command resumes.

use std::fs;
use std::time::Duration;

use capsule_tests::{Fleet, data};

#[test]
fn a_puller_that_is_killed_goes_on_where_it_was() {
    let mut fleet = Fleet::of(2);
    let source = fleet.path("source");
    data::noise_file(&source, 21, 96 << 20);
    fleet[0].publish(&source, "lab:1");
    let mut kept = 0;
    for round in 0..4u64 {
        let mut pull = fleet[1].command(&["pull", "lab:1"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(150 + 130 * round));
        fleet[1].kill();
        // It says that the daemon went away, or was done before.
        let _ = pull.wait().unwrap();
        fleet[1].start();
        assert!(
            fleet[1].json(&["verify"])["damaged"]
                .as_array()
                .unwrap()
                .is_empty(),
            "nothing unverified counts as present"
        );
        let now = fleet[1].json(&["status"])["store_bytes"].as_u64().unwrap();
        assert!(
            now >= kept,
            "what was committed is still there: {kept}, then {now}"
        );
        kept = now;
    }
    let pulled = fleet[1].json(&["pull", "lab:1"]);
    let both = pulled["had_bytes"].as_u64().unwrap() + pulled["fetched_bytes"].as_u64().unwrap();
    assert!(both >= 96 << 20, "{pulled:#}");
    let copy = fleet.path("copy");
    fleet[1].ok(&["export", "lab:1", "--to", copy.to_str().unwrap()]);
    assert!(fs::read(&source).unwrap() == fs::read(&copy).unwrap());
}

#[test]
fn a_publisher_that_is_killed_has_published_all_or_nothing() {
    let mut fleet = Fleet::of(1);
    let source = fleet.path("source");
    data::tree(&source, 23, 24 << 20);
    for round in 0..5u64 {
        let name = format!("lab:{round}");
        let mut publish = fleet[0]
            .command(&["publish", source.to_str().unwrap(), "--name", &name])
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(40 + 90 * round));
        fleet[0].kill();
        let _ = publish.wait().unwrap();
        fleet[0].start();
        assert!(
            fleet[0].json(&["verify"])["damaged"]
                .as_array()
                .unwrap()
                .is_empty()
        );
        let listed = fleet[0].json(&["ls"]);
        for capsule in listed["capsules"].as_array().unwrap() {
            assert_eq!(capsule["holding"], "complete", "{listed:#}");
        }
    }
    let published = fleet[0].publish(&source, "lab:last");
    let copy = fleet.path("copy");
    fleet[0].ok(&["export", "lab:last", "--to", copy.to_str().unwrap()]);
    data::compare_trees(&source, &copy).unwrap();
    assert_eq!(
        fleet[0].json(&["show", "lab"])["capsule"],
        published["capsule"]
    );
}

#[test]
fn a_stopped_pull_is_resumed_by_the_same_command() {
    let fleet = Fleet::of(2);
    let source = fleet.path("source");
    data::noise_file(&source, 25, 96 << 20);
    fleet[0].publish(&source, "lab:1");
    let mut pull = fleet[1].command(&["pull", "lab:1"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(250));
    // Ctrl-C.
    let pid = rustix::process::Pid::from_child(&pull);
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
    let code = pull.wait().unwrap().code();
    assert!(code == Some(130) || code == Some(0), "{code:?}");
    fleet[1].wait_until("the transfer has ended", |node| {
        node.json(&["status"])["transfers"]
            .as_array()
            .unwrap()
            .is_empty()
    });
    let before = fleet[1].json(&["status"])["received_bytes"]
        .as_u64()
        .unwrap();
    let pulled = fleet[1].json(&["pull", "lab:1"]);
    let after = fleet[1].json(&["status"])["received_bytes"]
        .as_u64()
        .unwrap();
    assert!(
        after - before <= (96 << 20) + (4 << 20),
        "what was verified is not fetched again"
    );
    let by_peer = pulled["by_peer"].as_array().unwrap().iter();
    let sum: u64 = by_peer.map(|peer| peer["bytes"].as_u64().unwrap()).sum();
    assert_eq!(
        sum, pulled["fetched_bytes"],
        "each byte counts once: {pulled:#}"
    );
    if code == Some(130) {
        assert!(pulled["had_bytes"].as_u64().unwrap() > 0, "{pulled:#}");
    }
}
