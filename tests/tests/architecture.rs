//! The direction of dependencies between the crates, as ARCHITECTURE.md draws it.

use std::collections::BTreeMap;
use std::process::Command;

/// Each crate, and which of ours it may depend on (tests see everything).
const ALLOWED: &[(&str, &[&str])] = &[
    ("capsule-proto", &[]),
    ("capsule-chunker", &["capsule-proto"]),
    ("capsule-swarm-core", &["capsule-proto"]),
    (
        "capsule-simulations",
        &["capsule-swarm-core", "capsule-proto"],
    ),
    (
        "capsule-swarm",
        &["capsule-swarm-core", "capsule-chunker", "capsule-proto"],
    ),
    (
        "capsule-node",
        &["capsule-swarm", "capsule-chunker", "capsule-proto"],
    ),
    (
        "capsule-tests",
        &[
            "capsule-node",
            "capsule-swarm",
            "capsule-swarm-core",
            "capsule-simulations",
            "capsule-chunker",
            "capsule-proto",
        ],
    ),
];

#[test]
fn dependencies_lead_one_way() {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--format-version",
            "1",
            "--offline",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let allowed: BTreeMap<_, _> = ALLOWED.iter().copied().collect();
    let packages = metadata["packages"].as_array().unwrap();
    assert_eq!(
        packages.len(),
        ALLOWED.len(),
        "a crate is missing from the table of this test"
    );
    for package in packages {
        let name = package["name"].as_str().unwrap();
        let may = allowed
            .get(name)
            .unwrap_or_else(|| panic!("{name} is not in the table of this test"));
        for dependency in package["dependencies"].as_array().unwrap() {
            let other = dependency["name"].as_str().unwrap();
            if other.starts_with("capsule-") {
                assert!(may.contains(&other), "{name} must not depend on {other}");
            }
        }
    }
}
