//! The lab does what a scenario says, and its nodes come through it.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

#[test]
fn a_small_scenario_is_run_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("lab.json");
    let scenario = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios/smoke.toml");
    let output = Command::new(env!("CARGO_BIN_EXE_lab"))
        .arg(scenario)
        .arg("--json")
        .arg(&json)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "it takes root and iproute2\n{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let runs: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let run = &runs[0];
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
    // All names and mounts of the lab are gone; the machine may have names of its own.
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains("tmpfs /run/netns"), "{mounts}");
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
