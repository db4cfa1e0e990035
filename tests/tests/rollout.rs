//! `bench rollout` measures our nodes and other tools on the same links, and leaves nothing behind.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// Content of the scenario `tiny`, and the rate of its links.
const BYTES: f64 = (2 << 20) as f64;
const BYTES_PER_SECOND: f64 = 20e6 / 8.0;

fn bench(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bench"))
        .arg("rollout")
        .args(args)
        .args(["--runs", "1", "--dir"])
        .arg(dir)
        .arg("--json")
        .arg(dir.join("bench.json"))
        .output()
        .unwrap()
}

fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

#[test]
fn a_tiny_rollout_is_measured_beside_other_tools() {
    let dir = tempfile::tempdir().unwrap();
    let output = bench(
        dir.path(),
        &["--only", "tiny,tiny", "--tools", "capsule,rsync,udpcast"],
    );
    let said = said(&output);
    assert!(
        output.status.success(),
        "it takes root, iproute2, rsync and udpcast\n{said}"
    );
    let json = std::fs::read(dir.path().join("bench.json")).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    // One scenario after the other, on a network of its own each.
    let rows = json["tables"][1]["rows"].as_array().unwrap();
    let names: Vec<&str> = rows
        .iter()
        .map(|row| row["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["capsule", "rsync, one server", "udpcast"]);
    for row in rows {
        let run = &row["runs"][0];
        let of = |key: &str| run[key].as_f64().unwrap();
        assert_eq!(run["seconds"].as_array().unwrap().len(), 2, "{row}");
        // No link is faster than it was set to, but for what its bucket holds.
        assert!(of("last") > 0.9 * BYTES / BYTES_PER_SECOND, "{row}");
        assert!(of("p50") <= of("p99") && of("p99") <= of("last"), "{row}");
        assert!(of("peak_bytes") > 500e3, "{row}");
        assert!(of("beyond_tcp") > -0.05, "{row}");
    }
    let copies = |row: usize| rows[row]["runs"][0]["copies"].as_f64().unwrap();
    assert!((2.0..2.2).contains(&copies(1)), "rsync serves each: {said}");
    assert!(
        (0.98..1.9).contains(&copies(2)),
        "udpcast serves all at once: {said}"
    );
    assert!(said.contains("a node's memory"), "{said}");
    // Scratch and mounts are gone.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "{said}");
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(
        !mounts.contains(&dir.path().display().to_string()),
        "{mounts}"
    );
}

#[test]
fn a_scenario_that_is_missing_is_refused_before_anything_is_set_up() {
    let dir = tempfile::tempdir().unwrap();
    let output = bench(dir.path(), &["--only", "nowhere"]);
    let said = said(&output);
    assert!(
        !output.status.success() && said.contains("nowhere.toml"),
        "{said}"
    );
}
