//! What goes wrong on one node with a machine: its QEMU, its guest, its disk, its process. The guest goes on where it can, nothing is half made,
//! and what is said names the way out.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use capsule_tests::guest::APPEND;
use capsule_tests::machines::{Console, Machine, disk, wait_until};
use capsule_tests::node::Outcome;
use capsule_tests::serving::packs;
use capsule_tests::short::{number, text};
use capsule_tests::small_disk::SmallDisk;
use capsule_tests::{Fleet, Node};
use serde_json::Value;

/// A program that stands for QEMU.
fn stand_in(fleet: &Fleet, name: &str, script: &str) -> PathBuf {
    let path = fleet.path(name);
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// The real one, without some lines of one of its lists.
fn without(fleet: &Fleet, list: &str, lines: &str) -> PathBuf {
    let script = format!(
        "case \"$*\" in\n*'{list} help'*) qemu-system-x86_64 \"$@\" | grep -v '{lines}' ;;\n\
         *) exec qemu-system-x86_64 \"$@\" ;;\nesac"
    );
    stand_in(fleet, &format!("without{list}"), &script)
}

/// What a command says that is refused with such a QEMU.
fn refused(node: &Node, qemu: &Path, args: &[&str]) -> String {
    let mut command = node.command(args);
    command.env("CAPSULE_QEMU", qemu);
    let outcome = Outcome::of(command);
    assert_eq!(outcome.code, Some(1), "{args:?}: {outcome:?}");
    outcome.stderr
}

fn machines(node: &Node) -> Value {
    node.json(&["machine", "ls"])["machines"].clone()
}

#[test]
fn a_qemu_that_is_missing_or_too_old_is_told_of_before_anything_is_made() {
    let fleet = Fleet::new();
    let node = &fleet[0];
    let create = Machine::creation("me", APPEND, &[]);
    let old = stand_in(&fleet, "old", "echo 'QEMU emulator version 6.0.0'");
    let other = stand_in(&fleet, "other", "echo 'something else'");
    let missing = Path::new("/nonexistent/qemu");
    for (qemu, words) in [
        (
            missing,
            &["/nonexistent/qemu", "qemu-system-x86", "CAPSULE_QEMU"][..],
        ),
        (&old, &["6.0.0", "too old", "or newer"]),
        (&other, &["version"]),
    ] {
        let said = refused(node, qemu, &create);
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
        assert_eq!(machines(node), Value::Array(vec![]));
        assert!(!node.home().join("machines/me").exists());
    }
    // One that was made waits until there is one.
    let machine = Machine::create(node, "me", "", &[]);
    let said = refused(node, &old, &["machine", "run", "me"]);
    assert!(said.contains("too old"), "{said}");
    machine.is_gone();
    machine.run(node);
    machine.console();
}

#[test]
fn what_cannot_be_a_machine_is_refused_with_the_reason() {
    let fleet = Fleet::new();
    let node = &fleet[0];
    let says = |options: &[&str], word: &str| {
        let said = node.fails(1, &Machine::creation("me", APPEND, options));
        assert!(said.contains(word), "{options:?}: {said}");
        assert_eq!(machines(node), Value::Array(vec![]));
    };
    says(&["--machine-type", "pc-q35-99.0"], "pc-q35-99.0");
    says(&["--cpu", "host"], "versioned");
    says(&["--cpu", "Nehalem-v99"], "Nehalem-v99");
    says(&["--disk", "/nonexistent/image"], "/nonexistent/image");
    let none = node.fails(1, &["machine", "create", "me"]);
    assert!(none.contains("--disk or --kernel"), "{none}");
    let kernel = ["machine", "create", "me", "--kernel", "/nonexistent/kernel"];
    let none = node.fails(1, &kernel);
    assert!(none.contains("/nonexistent/kernel"), "{none}");
    let none = node.fails(1, &["machine", "run", "me:1", "--wait", "0"]);
    assert!(none.contains("me:1"), "{none}");
    let none = node.fails(1, &["machine", "capture", "me", "--name", "me:1"]);
    assert!(none.contains("there is no machine me"), "{none}");
    let image = fleet.path("image");
    disk(&image, 4);
    node.publish(&image, "lab:1");
    let none = node.fails(1, &["machine", "run", "lab:1"]);
    assert!(
        none.contains("is no machine") && none.contains("machine create"),
        "{none}"
    );
    assert_eq!(machines(node), Value::Array(vec![]));
}

#[test]
fn a_capsule_for_which_this_qemu_lacks_something_is_not_started() {
    let fleet = Fleet::of(2);
    let machine = Machine::create(&fleet[0], "me", "", &[]);
    machine.run(&fleet[0]);
    machine.console();
    machine.capture(&fleet[0], "me:1", &["--stop"]);
    let node = &fleet[1];
    node.wait_until("it is known", |node| {
        node.run(&["show", "me:1"]).code == Some(0)
    });
    for (list, line, what) in [
        ("-machine", "pc-q35-", "machine type"),
        ("-cpu", "Nehalem-v1", "CPU model"),
    ] {
        let qemu = without(&fleet, list, line);
        let said = refused(node, &qemu, &["machine", "run", "me:1"]);
        assert!(said.contains(what) && said.contains(line), "{said}");
        assert!(said.contains("hint: "), "{said}");
        assert_eq!(machines(node), Value::Array(vec![]));
        assert_eq!(packs(node), 0, "nothing was fetched for it");
    }
    let (_machine, ran) = Machine::resume(node, "me:1", "me");
    assert_eq!(ran["resume"], true);
}

#[test]
fn a_guest_without_a_balloon_is_captured_all_the_same() {
    let fleet = Fleet::of(2);
    let machine = Machine::create(&fleet[0], "me", "without=virtio_balloon", &[]);
    machine.run(&fleet[0]);
    let mut console = machine.console();
    console.ask("echo marked >/tmp/mark");
    let captured = machine.capture(&fleet[0], "me:1", &[]);
    assert_eq!(captured["balloon"], false);
    assert_eq!(console.ask("cat /tmp/mark"), "marked", "it goes on");
    let (elsewhere, _) = Machine::resume(&fleet[1], "me:1", "me");
    assert_eq!(elsewhere.console().ask("cat /tmp/mark"), "marked");
}

#[test]
fn a_machine_that_is_being_captured_is_busy() {
    let fleet = Fleet::new();
    let node = &fleet[0];
    let machine = Machine::create(node, "me", "", &[]);
    machine.run(node);
    let mut console = machine.console();
    // Long enough to be met at it.
    console.ask("head -c 40000000 /dev/urandom >/tmp/noise");
    let capture = |name| node.run(&["machine", "capture", "me", "--name", name]);
    let outcomes = std::thread::scope(|scope| {
        let first = scope.spawn(|| capture("me:1"));
        std::thread::sleep(Duration::from_millis(500));
        let mut outcomes = vec![capture("me:2")];
        if outcomes[0].code != Some(0) {
            outcomes.push(node.run(&["machine", "stop", "me", "--force"]));
        }
        outcomes.push(first.join().unwrap());
        outcomes
    });
    let (done, busy): (Vec<_>, Vec<_>) = outcomes.iter().partition(|one| one.code == Some(0));
    assert_eq!(done.len(), 1, "{outcomes:?}");
    for refused in busy {
        assert!(refused.stderr.contains("already"), "{refused:?}");
        assert!(
            refused.stderr.contains("wait until that is done"),
            "{refused:?}"
        );
    }
    assert_eq!(console.ask("echo on"), "on");
    assert_eq!(capture("me:3").code, Some(0));
}

#[test]
fn who_may_not_publish_cannot_capture_and_the_guest_goes_on() {
    let fleet = Fleet::of(2);
    let member = &fleet[1];
    let machine = Machine::create(member, "me", "", &[]);
    machine.run(member);
    let mut console = machine.console();
    console.ask("echo marked >/tmp/mark");
    for _ in 0..2 {
        let said = member.fails(1, &["machine", "capture", "me", "--name", "me:1"]);
        assert!(said.contains("publisher"), "{said}");
        assert_eq!(machine.state(member), "running");
        assert_eq!(console.ask("cat /tmp/mark"), "marked");
    }
}

/// A node of its own whose home, or a part of it, lies on a small disk; with a machine that has noise in its memory and on its disk.
struct Cramped {
    machine: Machine,
    console: Console,
    sums: String,
    node: Node,
    small: SmallDisk,
    fleet: Fleet,
}

impl Cramped {
    /// With a home, of which this part (all, where it is empty) has so much room.
    fn new(part: &str, megabytes: u64) -> Self {
        let fleet = Fleet::new();
        let token = fleet.invite(&["--role", "publisher"]);
        let home = fleet.path("home");
        if !part.is_empty() {
            fs::create_dir(&home).unwrap();
        }
        let small = SmallDisk::mount(&home.join(part), megabytes);
        let mut node = Node::new(&home);
        node.ok(&["join", &token]);
        node.start();
        let image = fleet.path("image");
        disk(&image, 64);
        let machine = Machine::create(&node, "me", "", &["--disk", text(&image)]);
        machine.run(&node);
        let mut console = machine.console();
        console.ask("mount /dev/vda /mnt; echo 1 >/tmp/mark; echo 1 >/mnt/mark");
        let noise = "head -c 20000000 /dev/urandom >/tmp/noise; head -c 9000000 /dev/urandom >/mnt/noise; sync";
        console.ask(noise);
        Self {
            sums: console.ask(SUMS),
            machine,
            console,
            node,
            small,
            fleet,
        }
    }

    /// A capture is refused for want of room, and the guest goes on.
    fn fails(&mut self) {
        let said = self.node.fails(1, &CAPTURE);
        assert!(said.contains("capsule gc"), "{said}");
        assert_eq!(self.machine.state(&self.node), "running");
        assert_eq!(self.console.ask(SUMS), self.sums);
        self.console
            .ask("echo 2 >>/tmp/mark; echo 2 >>/mnt/mark; sync");
    }

    /// A capture succeeds, and all that the guest has is in it.
    fn succeeds(mut self) {
        let captured = self.node.json(&CAPTURE);
        assert!(number(&captured, "pack_bytes") > 29_000_000, "{captured:#}");
        let marks = self.console.ask("cat /tmp/mark /mnt/mark");
        assert!(marks.starts_with("1\n2\n"), "{marks}");
        assert_eq!(self.console.ask(SUMS), self.sums);
        let there = &self.fleet[0];
        there.wait_until("it is known", |node| {
            node.run(&["show", "me:1"]).code == Some(0)
        });
        let (elsewhere, _) = Machine::resume(there, "me:1", "me");
        let mut console = elsewhere.console();
        assert_eq!(console.ask("cat /tmp/mark /mnt/mark"), marks);
        assert_eq!(console.ask(SUMS), self.sums);
        drop(self.machine);
        self.node.stop();
    }
}

const SUMS: &str = "echo 3 >/proc/sys/vm/drop_caches; sha256sum /tmp/noise /mnt/noise";
const CAPTURE: [&str; 5] = ["machine", "capture", "me", "--name", "me:1"];

#[test]
fn a_store_that_is_full_stops_a_capture_and_the_next_has_everything() {
    let mut cramped = Cramped::new("store", 24);
    for _ in 0..2 {
        cramped.fails();
    }
    cramped.small.resize(200);
    cramped.succeeds();
}

/// What the guest has in its memory by then lies in the kernel's cache alone, which can be written nowhere.
#[test]
fn a_disk_that_is_full_of_a_machine_s_memory_stops_a_capture_and_the_next_has_everything() {
    let mut cramped = Cramped::new("", 400);
    let filler = cramped.small.path.join("filler");
    let left = cramped.small.free() as usize;
    fs::write(&filler, vec![1; left - (8 << 20)]).unwrap();
    for _ in 0..2 {
        cramped.fails();
    }
    fs::remove_file(&filler).unwrap();
    cramped.succeeds();
}

#[test]
fn a_machine_whose_process_is_killed_leaves_nothing_and_starts_anew_with_its_disk() {
    let fleet = Fleet::of(1);
    let node = &fleet[0];
    let image = fleet.path("image");
    disk(&image, 64);
    let machine = Machine::create(node, "me", "", &["--disk", text(&image)]);
    machine.run(node);
    let mut console = machine.console();
    console.ask("mount /dev/vda /mnt; echo 1 >/mnt/mark; sync; echo 1 >/tmp/mark");
    drop(console);
    machine.kill();
    let stopped = machine.info(node);
    assert_eq!(
        (&stopped["state"], &stopped["resume"]),
        (&"stopped".into(), &false.into())
    );
    machine.run(node);
    let mut console = machine.console();
    assert_eq!(
        console.ask("mount /dev/vda /mnt; cat /mnt/mark; ls /tmp"),
        "1"
    );
    console.ask("echo 1 >/tmp/mark; sync");
    // The same of one that went on from a capsule: its memory there does not fit what the disk has by now.
    machine.capture(node, "me:1", &["--stop"]);
    drop(console);
    assert_eq!(machine.run(node)["resume"], true);
    let mut console = machine.console();
    assert_eq!(console.ask("cat /tmp/mark"), "1");
    console.ask("echo 2 >>/mnt/mark; head -c 1000000 /dev/urandom >/mnt/noise; sync");
    drop(console);
    machine.kill();
    assert_eq!(machine.run(node)["resume"], false);
    let mut console = machine.console();
    assert_eq!(
        console.ask("mount /dev/vda /mnt; cat /mnt/mark; ls /tmp"),
        "1\n2"
    );
    drop(console);
    // QEMU alone: the machine is over, and says so.
    let qemu = machine.qemu().unwrap();
    rustix::process::kill_process(qemu, rustix::process::Signal::KILL).unwrap();
    machine.is_gone();
    wait_until("the machine is stopped", || {
        machine.state(node) == "stopped"
    });
    let started = Instant::now();
    machine.run(node);
    assert!(started.elapsed() < Duration::from_secs(30));
    let mut console = machine.console();
    assert_eq!(console.ask("mount /dev/vda /mnt; cat /mnt/mark"), "1\n2");
}
