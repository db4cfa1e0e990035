//! Finds the program under test, and builds it where it is missing or older than its sources.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;

/// Path of the `capsule` program, of the same profile as the running test or benchmark.
pub fn capsule() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(find)
}

fn find() -> PathBuf {
    let me = std::env::current_exe().expect("the running program has a path");
    let profile = me
        .ancestors()
        .find(|dir| dir.join(".cargo-lock").exists() || dir.join("deps").is_dir());
    let profile = profile.expect("the running program lies in a target directory");
    let program = profile.join("capsule");
    // `cargo test --workspace` builds the program before any test runs; building a part of the workspace does not.
    if modified(&program).is_none_or(|built| newest_source() > built) {
        build(profile);
    }
    program
}

fn build(profile: &Path) {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args([
        "build",
        "--locked",
        "-p",
        "capsule-node",
        "--bin",
        "capsule",
        "--target-dir",
    ]);
    cargo.arg(
        profile
            .parent()
            .expect("a profile lies in the target directory"),
    );
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    let status = cargo
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .expect("cargo runs");
    assert!(status.success(), "the program under test does not build");
}

fn newest_source() -> SystemTime {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies in the workspace");
    let mut newest = SystemTime::UNIX_EPOCH;
    let mut open: Vec<PathBuf> = ["proto", "chunker", "swarm", "node"]
        .map(|room| root.join(room))
        .into();
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let in_crate = !["tests", "examples", "docs"]
                .iter()
                .any(|part| path.ends_with(part));
            if path.is_dir() && in_crate {
                open.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                newest = newest.max(modified(&path).unwrap_or(newest));
            }
        }
    }
    newest
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().and_then(|meta| meta.modified()).ok()
}
