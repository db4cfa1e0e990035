//! The lab does what a scenario says, and its nodes come through it.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Runs a scenario once; what each node did.
fn run(name: &str) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("lab.json");
    let scenarios = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let output = Command::new(env!("CARGO_BIN_EXE_lab"))
        .arg(scenarios.join(name))
        .arg("--json")
        .arg(&json)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "it takes root and iproute2\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let runs: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    runs[0].clone()
}

/// Mounts where namespaces have names; others on this machine may have made some.
fn mounts_of_names() -> Vec<String> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let lines = mounts.lines().filter(|line| line.contains("/run/netns"));
    lines.map(str::to_owned).collect()
}

#[test]
fn a_small_scenario_is_run_to_its_end() {
    let before = mounts_of_names();
    let run = run("smoke.toml");
    let bytes = run["bytes"].as_u64().unwrap();
    assert!(bytes > 6 << 20, "it does not compress");
    let nodes = run["nodes"].as_array().unwrap();
    for node in &nodes[1..] {
        let of = |key: &str| node[key].as_u64().unwrap();
        assert!(node["seconds"].as_f64().unwrap() > 1.0, "{node}");
        assert!(of("fetched_bytes") + of("had_bytes") >= bytes, "{node}");
        assert!(node["timeline"].as_array().unwrap().len() > 1, "{node}");
        assert!((1 << 20..128 << 20).contains(&of("peak_bytes")), "{node}");
    }
    // The one that was killed went on with what it had.
    assert!(nodes[2]["attempts"].as_u64().unwrap() > 1);
    assert!(nodes[2]["had_bytes"].as_u64().unwrap() > 0, "{}", nodes[2]);
    // The link was out for a while, and carried at least a copy.
    let there = &run["sites"][1];
    assert!(there["down"].as_u64().unwrap() >= bytes, "{there}");
    let last = nodes[3..]
        .iter()
        .map(|node| node["seconds"].as_f64().unwrap());
    assert!(last.fold(0.0, f64::max) > 4.0);
    // All names and mounts of the lab are gone.
    assert_eq!(mounts_of_names(), before);
}

#[test]
fn honest_nodes_come_through_all_that_goes_wrong() {
    let run = run("adversity-smoke.toml");
    let bytes = run["bytes"].as_u64().unwrap();
    let nodes = run["nodes"].as_array().unwrap();
    let hostile = |number: &u64| nodes[*number as usize]["hostile"].as_str();
    for node in &nodes[1..6] {
        assert_eq!(node["is_right"], true, "{node}");
    }
    // Who serves wrong bytes is found out; nobody else is, however useless.
    let banned = nodes[..6]
        .iter()
        .flat_map(|node| node["banned"].as_array().unwrap());
    let banned: BTreeSet<_> = banned
        .map(|number| hostile(&number.as_u64().unwrap()))
        .collect();
    assert!(banned.contains(&Some("corrupt")), "{banned:?}");
    let guilty = BTreeSet::from([Some("corrupt"), Some("lie")]);
    assert!(banned.is_subset(&guilty), "{banned:?}");
    // The publisher was killed when one copy was out, and not much later.
    let sent = nodes[0]["sent_bytes"].as_u64().unwrap();
    assert!((bytes..bytes * 4).contains(&sent), "{sent}");
    assert_eq!(nodes[1]["returns"].as_array().unwrap().len(), 1);
    // What has no room says so; those that had no part in anything have no figures.
    assert!(nodes[6]["seconds"].is_null(), "{}", nodes[6]);
    let hostile: Vec<_> = nodes
        .iter()
        .filter(|node| node["hostile"].is_string())
        .collect();
    assert_eq!(hostile.len(), 7);
    assert!(hostile.iter().all(|node| node["is_right"].is_null()));
}

#[test]
fn a_scenario_that_is_wrong_is_refused_before_anything_is_set_up() {
    let dir = tempfile::tempdir().unwrap();
    let scenario = dir.path().join("wrong.toml");
    std::fs::write(&scenario, "title = \"wrong\"\nmib = 1\nsites = []\n").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_lab"))
        .arg(&scenario)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("give 1 to 100"),
        "{said}"
    );
    let output = Command::new(env!("CARGO_BIN_EXE_lab"))
        .arg(dir.path().join("missing.toml"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("missing.toml"),
        "{said}"
    );
}
