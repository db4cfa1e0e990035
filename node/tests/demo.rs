//! `capsule demo` from outside, small: it works, and it leaves nothing behind, neither directories nor processes.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

#[path = "documents/markdown.rs"]
mod markdown;
#[path = "documents/values.rs"]
#[allow(dead_code, reason = "each test program uses a part")]
mod values;

fn demo(temp: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_capsule"));
    command
        .env("TMPDIR", temp)
        .arg("demo")
        .args(args)
        .stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Processes whose command line names the directory: the demo's nodes.
fn processes_in(dir: &Path) -> Vec<String> {
    let dir = dir.to_str().unwrap();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let command_lines =
        processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    command_lines
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(dir))
        .collect()
}

fn assert_clean(temp: &Path) {
    assert_eq!(processes_in(temp), Vec::<String>::new());
    assert_eq!(
        fs::read_dir(temp).unwrap().count(),
        0,
        "its directory stayed"
    );
}

#[test]
fn it_ends_with_identical_copies_and_leaves_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let output = demo(temp.path(), &["--nodes", "3", "--size", "4M", "--json"])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let document = markdown::Document::read("cli.md");
    let mut comparison = values::Comparison::with(&document);
    comparison.samples("DemoReport", &[&with_differences(&report)]);
    comparison.conclude();
    assert_eq!(report["identical"], true);
    assert_eq!(report["verified_nodes"], 3);
    assert_eq!(report["export"]["bytes"], report["content_bytes"]);
    let pulls = report["pulls"].as_array().unwrap();
    assert_eq!(pulls.len(), 2);
    for pull in pulls {
        assert_eq!(pull["bytes"], report["fetch_bytes"]);
        assert!(
            pull["bytes"].as_u64().unwrap() >= report["pack_bytes"].as_u64().unwrap(),
            "{report}"
        );
    }
    let update = &report["update"];
    assert!(update["files"].as_u64().unwrap() > 0, "{report}");
    let fetched = update["fetch_bytes"].as_u64().unwrap();
    assert!(
        fetched > 0 && fetched * 3 < report["fetch_bytes"].as_u64().unwrap(),
        "{report}"
    );
    assert_clean(temp.path());
}

/// The report as if something had differed, to have a sample of every value.
fn with_differences(report: &serde_json::Value) -> serde_json::Value {
    let mut report = report.clone();
    report["export"]["differences"] = serde_json::json!(["sample"]);
    report["update"]["export"]["differences"] = serde_json::json!(["sample"]);
    report
}

#[test]
fn ctrl_c_ends_its_nodes_and_removes_its_directory() {
    let temp = tempfile::tempdir().unwrap();
    let mut child = demo(temp.path(), &["--nodes", "3", "--size", "4M"])
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let up = lines
        .by_ref()
        .map_while(Result::ok)
        .any(|line| line.starts_with("fleet"));
    assert!(up && processes_in(temp.path()).len() >= 3);
    let id = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(id, rustix::process::Signal::INT).unwrap();
    let said: Vec<String> = lines.map_while(Result::ok).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{said:?}");
    assert!(
        said.last()
            .is_some_and(|last| last.starts_with("stopped: ")),
        "{said:?}"
    );
    let mut out = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut out)
        .unwrap();
    assert_eq!(out, "");
    assert_clean(temp.path());
}

#[test]
fn too_large_a_size_is_refused_with_the_way_out() {
    let temp = tempfile::tempdir().unwrap();
    let output = demo(temp.path(), &["--size", "900000T"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("TMPDIR"));
    assert_clean(temp.path());
}
