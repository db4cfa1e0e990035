//! Tests that have the network to themselves: in a namespace of their own.

use std::process::Command;

const INSIDE: &str = "CAPSULE_TEST_NETWORK";

/// Whether the test runs inside.
pub fn is_own() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs a test of the running test program again, in a network namespace that a shell script has set up.
pub fn run_in_its_own(test: &str, set_up: &str) {
    let output = Command::new("unshare")
        .args(["--net", "sh", "-ec"])
        .arg(format!("{set_up}\nexec \"$0\" \"$@\""))
        .arg(std::env::current_exe().expect("the running program has a path"))
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("unshare (util-linux) is there");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "it failed in a network namespace of its own, which takes root and iproute2\n{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
