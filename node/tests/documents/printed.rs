//! `cli.md` beside what commands print that need no node.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::markdown::Document;
use crate::values::Comparison;

fn json(home: &Path, args: &[&str]) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_capsule"));
    command.arg("--home").arg(home).args(args).arg("--json");
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(
        output.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn memberships_and_tokens_have_the_keys_that_the_document_names() {
    let temp = tempfile::tempdir().unwrap();
    let (first, second) = (temp.path().join("first"), temp.path().join("second"));
    let founded = json(&first, &["fleet", "init"]);
    let invite = ["fleet", "invite", "--channel", "lab", "--addr", "lab:4277"];
    let invited = json(&first, &invite);
    let joined = json(&second, &["join", invited["token"].as_str().unwrap()]);

    let document = Document::read("cli.md");
    let mut comparison = Comparison::with(&document);
    comparison.samples("Membership", &[&founded, &joined]);
    comparison.samples("Token", &[&invited]);
    // Compared where the demo runs.
    comparison.seen.extend(
        [
            "DemoReport",
            "DemoPublisher",
            "DemoPull",
            "DemoUpdate",
            "DemoExport",
        ]
        .map(str::to_owned),
    );
    comparison.unseen();
    comparison.conclude();
}
