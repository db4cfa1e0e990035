//! Machines: captured while they run, resumed elsewhere while they come, by real QEMUs with a small guest.

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use capsule_node::control::{CapsuleRef, Client, Describe};
use capsule_tests::machines::{Console, Machine, disk, wait_until};
use capsule_tests::node::Outcome;
use capsule_tests::serving::packs;
use capsule_tests::short::{number, text};
use capsule_tests::{Fleet, Node};
use serde_json::Value;

/// Longest time for which a guest of this size stands still for a capture; it takes some 40 ms.
const STILL: f64 = 2.0;

/// Two nodes that may publish.
fn two() -> Fleet {
    let mut fleet = Fleet::new();
    let token = fleet.invite(&["--role", "publisher"]);
    fleet.join(&token);
    fleet[1].wait_for_peers(1);
    fleet
}

/// A machine with a disk, which runs, and its console.
fn started(fleet: &Fleet, name: &str) -> (Machine, Console) {
    let image = fleet.path(&format!("{name}.img"));
    disk(&image, 64);
    let machine = Machine::create(&fleet[0], name, "", &["--disk", text(&image)]);
    assert_eq!(machine.state(&fleet[0]), "stopped");
    machine.run(&fleet[0]);
    let mut console = machine.console();
    assert_eq!(console.ask("mount /dev/vda /mnt"), "");
    (machine, console)
}

/// Leaves a mark in the guest's memory (all but its disk is there) and on its disk.
fn mark(console: &mut Console, number: u64) {
    let both = format!("echo memory {number} >>/tmp/mark; echo disk {number} >>/mnt/mark; sync");
    assert_eq!(console.ask(&both), "");
}

/// The marks in memory and on disk: the latter as the disk has them, not the guest's cache.
fn marks(console: &mut Console) -> Vec<String> {
    let read = "cat /tmp/mark; echo 3 >/proc/sys/vm/drop_caches; cat /mnt/mark";
    console.ask(read).lines().map(str::to_owned).collect()
}

/// What marks of these numbers look like.
fn marked(numbers: &[u64]) -> Vec<String> {
    let lines = |what: &str| {
        let line = |number: &u64| format!("{what} {number}");
        numbers.iter().map(line).collect::<Vec<_>>()
    };
    [lines("memory"), lines("disk")].concat()
}

/// Noise of its own in a guest's memory and on its disk, and the sums of it.
fn noise(console: &mut Console) -> String {
    let make =
        |path: &&str| drop(console.ask(&format!("head -c 3000000 /dev/urandom >{path}; sync")));
    ["/tmp/noise", "/mnt/noise"].iter().for_each(make);
    sums(console)
}

fn sums(console: &mut Console) -> String {
    let sums = console.ask("sha256sum /tmp/noise /mnt/noise");
    assert_eq!(sums.lines().count(), 2, "{sums}");
    sums
}

/// What counts for as long as the guest runs.
fn count(console: &mut Console) {
    let counting = "(n=0; while :; do n=$((n+1)); echo $n >/tmp/count; sleep 1; done) </dev/null &";
    console.ask(counting);
    counts_on(console, 0);
}

/// Asks until it has counted further; how far it is then.
fn counts_on(console: &mut Console, from: u64) -> u64 {
    for _ in 0..100 {
        // It may be writing it just now.
        let counted = console.ask("cat /tmp/count").parse().unwrap_or(0);
        assert!(counted == 0 || counted >= from, "{counted} after {from}");
        if counted > from {
            return counted;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    panic!("the guest counted no further than {from}");
}

fn pins(node: &Node, capsule: &Value) -> Vec<String> {
    let listed = node.json(&["ls"]);
    let capsules = listed["capsules"].as_array().unwrap();
    let found = capsules.iter().find(|found| found["capsule"] == *capsule);
    let pins = found.map_or(&Value::Null, |found| &found["pins"]);
    let pins = pins.as_array().into_iter().flatten();
    pins.map(|pin| pin.as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_machine_goes_to_a_node_that_had_nothing_and_comes_back() {
    let fleet = two();
    let (here, there) = (&fleet[0], &fleet[1]);
    let (first, mut console) = started(&fleet, "me");
    mark(&mut console, 1);
    let sums_then = noise(&mut console);
    count(&mut console);

    // Captured while it runs, it goes on.
    let one = first.capture(here, "me:1", &[]);
    assert_eq!(one["balloon"], true);
    assert_eq!(
        one["warnings"],
        Value::Array(Vec::new()),
        "the balloon has given all back"
    );
    assert!(one["pause_seconds"].as_f64().unwrap() < STILL, "{one:#}");
    assert!(number(&one, "ram_written") > 8 << 20, "{one:#}");
    assert!(number(&one, "disk_written") > 3_000_000, "{one:#}");
    let counted = counts_on(&mut console, 0);
    let counted = counts_on(&mut console, counted);
    let running = first.info(here);
    assert_eq!(running["state"], "running");
    assert_eq!(running["origin"]["name"], "me:1");
    assert_eq!(running["origin"]["capsule"], one["capsule"]);
    assert!(pins(here, &one["capsule"]).contains(&"machine:me".to_owned()));
    mark(&mut console, 2);

    // What changed is all that the second costs; and there it stops.
    let two = first.capture(here, "me:2", &["--stop"]);
    assert_eq!(two["pause_seconds"], Value::Null);
    assert_eq!(two["parent"], "me:1");
    let (all, changed) = (number(&one, "pack_bytes"), number(&two, "pack_bytes"));
    assert!(changed * 20 < all, "{changed} of {all}");
    first.is_gone();
    let stopped = first.info(here);
    assert_eq!(
        (&stopped["state"], &stopped["resume"]),
        (&"stopped".into(), &true.into())
    );
    assert_eq!(stopped["origin"]["name"], "me:2");
    assert!(!pins(here, &one["capsule"]).contains(&"machine:me".to_owned()));
    assert!(pins(here, &two["capsule"]).contains(&"machine:me".to_owned()));
    drop(console);

    // On a node that has nothing it goes on where it was.
    there.wait_until("the version is known", |node| {
        node.run(&["show", "me:2"]).code == Some(0)
    });
    // All of it by layers: memory that was compared with the first version's disk, too.
    let plan = there.json(&["plan", "me:2"]);
    let planned = plan["components"].as_array().unwrap();
    assert!(
        planned.iter().all(|component| component["way"] == "layers"),
        "{plan:#}"
    );
    assert_eq!(packs(there), 0);
    let (second, ran) = Machine::resume(there, "me:2", "me");
    assert_eq!(
        (&ran["state"], &ran["resume"]),
        (&"running".into(), &true.into())
    );
    let mut console = second.console();
    assert_eq!(marks(&mut console), marked(&[1, 2]));
    assert_eq!(sums(&mut console), sums_then);
    counts_on(&mut console, counted);
    assert!(pins(there, &two["capsule"]).contains(&"machine:me".to_owned()));

    // Work goes on there, and comes back.
    mark(&mut console, 3);
    let counted = counts_on(&mut console, counted);
    let three = second.capture(there, "me:3", &["--stop"]);
    assert_eq!(three["parent"], "me:2");
    assert!(number(&three, "pack_bytes") * 20 < all, "{three:#}");
    drop(console);
    here.wait_until("the new version is known", |node| {
        node.run(&["show", "me:3"]).code == Some(0)
    });
    let ran = here.json(&["machine", "run", "me:3", "--as", "me"]);
    assert_eq!(
        (&ran["state"], &ran["origin"]["name"]),
        (&"running".into(), &"me:3".into())
    );
    let mut console = first.console();
    assert_eq!(marks(&mut console), marked(&[1, 2, 3]));
    assert_eq!(sums(&mut console), sums_then);
    counts_on(&mut console, counted);
    mark(&mut console, 4);
    drop(console);
    may_be_removed_only_when_nothing_is_lost(here, &first);
    assert!(!pins(here, &three["capsule"]).contains(&"machine:me".to_owned()));
    assert!(there.ok(&["machine", "rm", "me"]).contains("is removed"));
}

/// Of a machine that runs, and was written to.
fn may_be_removed_only_when_nothing_is_lost(node: &Node, machine: &Machine) {
    let refused = node.fails(1, &["machine", "rm", "me"]);
    assert!(
        refused.contains("runs") && refused.contains("capsule machine stop me"),
        "{refused}"
    );
    // Its guest hears the power button.
    let stopped = node.json(&["machine", "stop", "me"]);
    assert_eq!(stopped["orderly"], true);
    machine.is_gone();
    assert_eq!(machine.info(node)["resume"], false, "its memory is gone");
    let refused = node.fails(1, &["machine", "rm", "me"]);
    assert!(
        refused.contains("written to") && refused.contains("--force"),
        "{refused}"
    );
    assert!(machine.dir().exists());
    node.ok(&["machine", "rm", "me", "--force"]);
    assert!(!machine.dir().exists());
    assert_eq!(
        node.json(&["machine", "ls"])["machines"],
        Value::Array(vec![])
    );
}

#[test]
fn one_capsule_becomes_two_machines_that_go_their_own_ways() {
    let fleet = two();
    let node = &fleet[0];
    let (base, mut console) = started(&fleet, "base");
    mark(&mut console, 1);
    let captured = base.capture(node, "base:1", &["--stop"]);
    drop(console);
    let machines = ["left", "right"].map(|name| Machine::resume(node, "base:1", name).0);
    let mut consoles = [0, 1].map(|at: usize| machines[at].console());
    for (console, own) in consoles.iter_mut().zip([10, 20]) {
        assert_eq!(marks(console), marked(&[1]));
        mark(console, own);
    }
    for (console, own) in consoles.iter_mut().zip([10, 20]) {
        assert_eq!(marks(console), marked(&[1, own]));
    }
    let twice = node.fails(1, &["machine", "run", "base:1", "--as", "left"]);
    assert!(twice.contains("left runs already"), "{twice}");
    // Each becomes a version of its own; the capsule that they come from is what it was.
    for (machine, name) in machines.iter().zip(["left:1", "right:1"]) {
        let branch = machine.capture(node, name, &[]);
        assert!(
            number(&branch, "pack_bytes") * 10 < number(&captured, "pack_bytes"),
            "{branch:#}"
        );
    }
    drop(consoles);
    for (name, numbers) in [
        ("base:1", &[1][..]),
        ("right:1", &[1, 20]),
        ("left:1", &[1, 10]),
    ] {
        let (machine, _) = Machine::resume(&fleet[1], name, "again");
        assert_eq!(marks(&mut machine.console()), marked(numbers), "{name}");
        fleet[1].ok(&["machine", "stop", "again", "--force"]);
        fleet[1].ok(&["machine", "rm", "again", "--force"]);
    }
}

/// What a node knows of what resuming a capsule reads first of memory.
fn first_reads(node: &Node, capsule: &str) -> Vec<(u64, u64)> {
    let describe = Describe {
        capsule: CapsuleRef(capsule.to_owned()),
        wait: None,
    };
    let client = Client::connect(node.home()).unwrap();
    let described = client.call(describe).unwrap();
    let of_memory = described.prefetch.into_iter();
    let of_memory = of_memory.filter(|first| first.component == "ram");
    let ranges = of_memory.flat_map(|first| first.ranges);
    ranges.map(|range| (range.start, range.length)).collect()
}

#[test]
fn what_was_read_first_of_a_capture_is_known_of_the_next() {
    let fleet = two();
    let (here, there) = (&fleet[0], &fleet[1]);
    let (first, mut console) = started(&fleet, "me");
    mark(&mut console, 1);
    first.capture(here, "me:1", &[]);
    assert_eq!(first_reads(here, "me:1"), []);
    // Somebody resumes it, and tells what that read when he captures it.
    there.wait_until("the version is known", |node| {
        node.run(&["show", "me:1"]).code == Some(0)
    });
    let (second, _) = Machine::resume(there, "me:1", "other");
    let mut elsewhere = second.console();
    assert_eq!(marks(&mut elsewhere), marked(&[1]));
    drop(elsewhere);
    second.capture(there, "other:1", &["--stop"]);
    here.wait_until("what was read first is known", |node| {
        !first_reads(node, "me:1").is_empty()
    });
    let told = first_reads(here, "me:1");
    assert_eq!(first_reads(there, "other:1"), told);
    // The machine that it was captured of was never resumed itself.
    mark(&mut console, 2);
    first.capture(here, "me:2", &[]);
    assert_eq!(first_reads(here, "me:2"), told);
    assert_eq!(first.state(here), "running");
}

/// What of `qemu-ga` machines use, as a script of the guest; it answers as late as one does that comes over a thin link.
const AGENT: &str = r#"cat >/agent <<'END'
port=$(grep -l org.qemu.guest_agent.0 /sys/class/virtio-ports/*/name)
port=${port%/name}
exec 3<>/dev/${port##*/}
sleep 15
while :; do
    while read -r asked <&3; do
        case "$asked" in
            *guest-sync-delimited*)
                id=${asked##*'"id":'}
                printf '\377{"return": %s}\n' "${id%%\}*}" >&3 ;;
            *guest-set-time*)
                time=${asked##*'"time":'}
                date -s "@$((${time%%\}*} / 1000000000))" >/dev/null
                printf '{"return": {}}\n' >&3 ;;
        esac
    done
    sleep 0.1
done
END
sh /agent </dev/null >/dev/null 2>&1 &"#;

#[test]
fn a_guest_with_an_agent_is_told_the_time_when_it_goes_on() {
    const LONG_AGO: u64 = 1_000_000_000;
    let fleet = Fleet::new();
    let node = &fleet[0];
    let machine = Machine::create(node, "me", "", &[]);
    machine.run(node);
    let mut console = machine.console();
    console.ask(AGENT);
    console.ask(&format!("date -s @{LONG_AGO}"));
    machine.capture(node, "me:1", &["--stop"]);
    drop(console);
    let (other, _) = Machine::resume(node, "me:1", "other");
    let mut console = other.console();
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    wait_until("the guest's clock is right", || {
        let told = console.number("date +%s");
        assert!(told >= LONG_AGO);
        told.abs_diff(now().as_secs()) < 60
    });
}

#[test]
fn a_guest_that_shuts_down_starts_anew_with_its_disk() {
    let fleet = two();
    let node = &fleet[0];
    let (machine, mut console) = started(&fleet, "me");
    mark(&mut console, 1);
    machine.capture(node, "me:1", &["--stop"]);
    drop(console);
    machine.run(node);
    let mut console = machine.console();
    mark(&mut console, 2);
    console.say("umount /mnt; poweroff -f");
    machine.is_gone();
    // What it remembers is on its disk alone: its memory of before does not fit that.
    let stopped = machine.info(node);
    assert_eq!(
        (&stopped["state"], &stopped["resume"]),
        (&"stopped".into(), &false.into())
    );
    let disks = machine.capture(node, "me:2", &[]);
    assert_eq!(disks["ram_written"], 0);
    for (node, name) in [(&fleet[0], "me"), (&fleet[1], "other")] {
        let machine = Machine::called(node, name);
        let what = if name == "me" { "me" } else { "me:2" };
        node.wait_until("it is known", |node| {
            node.run(&["show", "me:2"]).code == Some(0)
        });
        let mut run = vec!["machine", "run", what];
        run.extend(if name == "me" {
            &[][..]
        } else {
            &["--as", "other"]
        });
        assert_eq!(node.json(&run)["resume"], false);
        let mut console = machine.console();
        let read = "mount /dev/vda /mnt; cat /mnt/mark; ls /tmp";
        assert_eq!(console.ask(read), "disk 1\ndisk 2");
    }
}

#[test]
fn what_is_piped_into_the_console_is_typed() {
    let fleet = Fleet::new();
    let machine = Machine::create(&fleet[0], "me", "", &[]);
    let early = fleet[0].fails(1, &["machine", "console", "me"]);
    assert!(early.contains("capsule machine run me"), "{early}");
    machine.run(&fleet[0]);
    drop(machine.console());
    let mut console = fleet[0].command(&["machine", "console", "me"]);
    let (typed, mut typing) = std::io::pipe().unwrap();
    console.stdin(Stdio::from(typed));
    typing.write_all(b"echo $((6 * 7)) is it\n").unwrap();
    drop(typing);
    let said = Outcome::of(console);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.stdout.contains("42 is it"), "{said:?}");
}
