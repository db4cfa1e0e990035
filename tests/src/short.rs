//! What many tests say: paths as text, figures of answers, programs of the system.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

/// A path of a test's own, as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a test's paths are UTF-8")
}

/// A figure of an answer.
pub fn number(value: &Value, key: &str) -> u64 {
    value[key]
        .as_u64()
        .unwrap_or_else(|| panic!("{key} in {value:#}"))
}

/// Runs a program that `tests/run` installs, which must succeed; what it says.
pub fn run(program: &str, args: &[&str]) -> String {
    let path = format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_default()
    );
    let output = Command::new(program)
        .args(args)
        .env("PATH", path)
        .stdin(Stdio::null())
        .output();
    let output = output.unwrap_or_else(|e| panic!("{program} is needed: {e}; run tests/run"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
