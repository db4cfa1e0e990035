//! The command line from outside: arguments, help, exit codes, what goes to which stream. No daemon runs here; what
//! commands do with one is tested in the `tests` crate.

use std::path::Path;
use std::process::{Command, Output, Stdio};

fn capsule(home: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_capsule"));
    command
        .env_clear()
        .env("CAPSULE_HOME", home)
        .args(args)
        .stdin(Stdio::null());
    command.output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

const HASH: &str = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";

#[test]
fn without_a_daemon_commands_exit_3_and_name_the_one_to_run() {
    let temp = tempfile::tempdir().unwrap();
    let home = temp.path().join("h");
    for args in [
        &["publish", "/etc/hostname", "--name", "lab:1"][..],
        &["ls"],
        &["show", "lab"],
        &["plan", "lab"],
        &["pull", "lab", "--json"],
        &["follow", "lab"],
        &["unfollow", "lab"],
        &["export", "lab", "--to", "/nowhere/x"],
        &["verify"],
        &["status"],
        &["peers", "--have", HASH],
        &["hashes", "--json"],
        &["pin", "lab"],
        &["unpin", "lab"],
        &["gc", "--dry-run"],
        &["rm", "lab"],
    ] {
        let output = capsule(&home, args);
        assert_eq!(
            output.status.code(),
            Some(3),
            "{args:?}: {}",
            stderr(&output)
        );
        let expected = format!("capsule --home {} node", home.display());
        assert!(
            stderr(&output).contains(&expected),
            "{args:?}: {}",
            stderr(&output)
        );
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(!home.exists(), "{args:?} made a home");
    }
}

#[test]
fn wrong_arguments_exit_2() {
    let temp = tempfile::tempdir().unwrap();
    for args in [
        &[][..],
        &["nonsense"],
        &["pull"],
        &["publish", "/etc", "--name", "lab"],
        &["publish", "/etc", "--name", "lab:1", "--as", "floppy"],
        &["publish", "/etc", "--name", "lab:1", "--frame-max", "5G"],
        &["follow", "lab:1"],
        &["peers", "--have", "12"],
        &["pull", "lab", "--wait", "soon"],
        &["fleet", "invite", "--role", "member", "--channel", "lab"],
        &["fleet", "invite", "--expires", "0d"],
        &["demo", "--nodes", "1"],
        &["completions", "tcl"],
    ] {
        let output = capsule(temp.path(), args);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{args:?}: {}",
            stderr(&output)
        );
        assert!(
            output.stdout.is_empty() && !output.stderr.is_empty(),
            "{args:?}"
        );
    }
}

#[test]
fn a_fleet_is_founded_invited_to_and_joined_without_a_daemon() {
    let temp = tempfile::tempdir().unwrap();
    let (first, second) = (temp.path().join("first"), temp.path().join("second"));
    let refused = capsule(&first, &["fleet", "invite"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        stderr(&refused).contains("capsule fleet init"),
        "{}",
        stderr(&refused)
    );

    let founded = capsule(&first, &["fleet", "init", "--json"]);
    assert!(founded.status.success(), "{}", stderr(&founded));
    let founded: serde_json::Value = serde_json::from_slice(&founded.stdout).unwrap();
    assert_eq!(founded["roles"], serde_json::json!(["publisher", "admin"]));
    assert_eq!(
        capsule(&first, &["fleet", "init"]).status.code(),
        Some(1),
        "a fleet is not founded twice"
    );

    let invited = capsule(
        &first,
        &[
            "fleet",
            "invite",
            "--role",
            "publisher",
            "--channel",
            "lab",
            "--addr",
            "10.0.0.1:4277",
        ],
    );
    let token = stdout(&invited);
    assert!(invited.stderr.is_empty(), "{}", stderr(&invited));
    assert_eq!(
        token.split_whitespace().count(),
        1,
        "only the token: {token:?}"
    );

    let joined = join_by_stdin(&second, &token);
    assert!(joined.status.success(), "{}", stderr(&joined));
    let joined: serde_json::Value = serde_json::from_slice(&joined.stdout).unwrap();
    assert_eq!(joined["fleet"], founded["fleet"]);
    assert_eq!(
        (&joined["channels"][0], &joined["addresses"][0]),
        (&"lab".into(), &"10.0.0.1:4277".into())
    );
    let broken = capsule(&temp.path().join("third"), &["join", &token.trim()[..40]]);
    assert_eq!(broken.status.code(), Some(1));
    assert!(
        stderr(&broken).starts_with("error: "),
        "{}",
        stderr(&broken)
    );
}

#[test]
fn a_home_is_told_whole_as_hints_are_followed_elsewhere() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().canonicalize().unwrap();
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_capsule"));
        let output = command.current_dir(&dir).args(["--home", "h"]).args(args);
        output.stdin(Stdio::null()).output().unwrap()
    };
    let home = dir.join("h");
    let founded = run(&["fleet", "init"]);
    assert!(stdout(&founded).contains(home.to_str().unwrap()));
    let next = format!("capsule --home {} node", home.display());
    for output in [founded, run(&["status"])] {
        assert!(stderr(&output).contains(&next), "{}", stderr(&output));
    }
}

fn join_by_stdin(home: &Path, token: &str) -> Output {
    use std::io::Write;
    let mut command = Command::new(env!("CARGO_BIN_EXE_capsule"));
    command
        .arg("--home")
        .arg(home)
        .args(["join", "-", "--json"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(token.as_bytes())
        .unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_capsule"));
    command
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        stderr(&output)
    );
}

#[test]
fn help_lists_every_command_and_completions_know_them() {
    let temp = tempfile::tempdir().unwrap();
    let help = stdout(&capsule(temp.path(), &["--help"]));
    let commands: Vec<&str> = help
        .lines()
        .skip_while(|line| !line.starts_with("Commands:"))
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            line.strip_prefix("  ")?
                .split(' ')
                .next()
                .filter(|word| !word.is_empty())
        })
        .collect();
    let expected = [
        "demo",
        "fleet",
        "join",
        "node",
        "publish",
        "ls",
        "show",
        "layers",
        "plan",
        "pull",
        "follow",
        "unfollow",
        "export",
        "nbd",
        "mount",
        "machine",
        "verify",
        "status",
        "peers",
        "hashes",
        "rates",
        "pin",
        "unpin",
        "gc",
        "rm",
        "completions",
        "help",
    ];
    assert_eq!(commands, expected, "{help}");
    for shell in ["bash", "zsh", "fish"] {
        let script = stdout(&capsule(temp.path(), &["completions", shell]));
        assert!(
            expected.iter().all(|command| script.contains(command)),
            "{shell}"
        );
    }
}
