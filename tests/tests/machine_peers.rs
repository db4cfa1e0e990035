//! Machines that are resumed while they come, from peers that go, come back, or lie: the guest stands still for as long as it has to, and never
//! sees a wrong byte.

use std::fs;
use std::time::Duration;

use capsule_tests::hostile::{Hostile, Vice};
use capsule_tests::machines::{Machine, disk, wait_until};
use capsule_tests::node::PATIENCE;
use capsule_tests::serving::packs;
use capsule_tests::short::{number, text};
use capsule_tests::{Fleet, Node};
use serde_json::Value;

/// Bytes of noise in the guest's memory and on its disk, which do not compress.
const NOISE: u64 = 24_000_000;
/// So that most of it has not come when the guest runs.
const SLOW: &str = "30 Mbit/s";
/// Where it lies: what reads all of it, and tells it.
const SUMS: &str = "echo 3 >/proc/sys/vm/drop_caches; sha256sum /tmp/noise /mnt/noise";

/// A publisher with a capsule of a machine, a member that has nothing, and the sums of the noise in it.
fn captured() -> (Fleet, String) {
    let fleet = Fleet::of(2);
    let node = &fleet[0];
    let image = fleet.path("image");
    disk(&image, 64);
    let machine = Machine::create(node, "me", "", &["--disk", text(&image)]);
    machine.run(node);
    let mut console = machine.console();
    console.ask("mount /dev/vda /mnt");
    for path in ["/tmp/noise", "/mnt/noise"] {
        console.ask(&format!("head -c {NOISE} /dev/urandom >{path}"));
    }
    let sums = console.ask(&format!("sync; {SUMS}"));
    assert_eq!(sums.lines().count(), 2, "{sums}");
    let captured = machine.capture(node, "me:1", &["--stop"]);
    assert!(number(&captured, "pack_bytes") > 2 * NOISE, "{captured:#}");
    fleet[1].wait_until("it is known", |node| {
        node.run(&["show", "me:1"]).code == Some(0)
    });
    (fleet, sums)
}

/// Resumes it where it comes slowly; most of it is still missing then.
fn resumed(node: &Node) -> Machine {
    node.ok(&["rates", "--download", SLOW]);
    let (machine, ran) = Machine::resume(node, "me:1", "me");
    assert_eq!(ran["resume"], true);
    machine
}

fn free(node: &Node) {
    node.ok(&["rates", "--download", "unlimited"]);
}

#[test]
fn a_guest_stands_still_while_nobody_has_what_it_reads_and_goes_on_then() {
    let (mut fleet, sums) = captured();
    let machine = resumed(&fleet[1]);
    let mut console = machine.console_at_once();
    let address = fleet[0].address().to_owned();
    fleet[0].kill();
    free(&fleet[1]);
    let had = packs(&fleet[1]);
    assert!(had < 2 * NOISE, "{had} bytes have come already");
    console.say(SUMS);
    assert_eq!(console.hear(Duration::from_secs(3)), None, "nobody has it");
    wait_until("the machine waits", || {
        machine.state(&fleet[1]) == "waiting"
    });
    let info = machine.info(&fleet[1]);
    assert!(info["waiting_seconds"].as_f64().unwrap() > 1.0, "{info:#}");
    let listed = fleet[1].ok(&["machine", "ls"]);
    assert!(listed.contains("waits for peers"), "{listed}");
    fleet[0].start_on(&address);
    assert_eq!(console.hear(PATIENCE).as_deref(), Some(&*sums));
    wait_until("it waits no more", || machine.state(&fleet[1]) == "running");
}

#[test]
fn a_guest_goes_on_when_its_node_is_killed_and_started_again() {
    let (mut fleet, sums) = captured();
    let machine = resumed(&fleet[1]);
    let mut console = machine.console_at_once();
    console.say(SUMS);
    fleet[1].kill();
    let host = machine.host().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(machine.host(), Some(host), "it does without its node");
    fleet[1].start();
    free(&fleet[1]);
    assert_eq!(console.hear(PATIENCE).as_deref(), Some(&*sums));
    assert_eq!(machine.state(&fleet[1]), "running");
    // Again, while it works: what it reads of its disk waits for the node.
    fleet[1].kill();
    console.say("for n in 1 2 3; do echo $n >/mnt/$n; sync; done; cat /mnt/1 /mnt/2 /mnt/3");
    fleet[1].start();
    assert_eq!(console.hear(PATIENCE).as_deref(), Some("1\n2\n3"));
}

#[test]
fn what_a_corrupt_peer_sends_does_not_reach_the_guest() {
    let (mut fleet, sums) = captured();
    let shown = fleet[0].json(&["show", "me:1"]);
    let layers = shown["layers"].as_array().unwrap();
    let token = fleet.invite(&[]);
    // Members that hold the packs of memory and disk, and serve each answer with a wrong bit.
    let of = |component: &str| -> Vec<u8> {
        let layer = layers.iter().find(|layer| layer["component"] == component);
        blob_of(&fleet[0], &layer.unwrap()["pack"]["root"])
    };
    let corrupt = Vice::Corrupts { percent: 100 };
    let liars = [(66, "ram"), (67, "disk0")]
        .map(|(number, component)| Hostile::start(&token, number, corrupt, of(component)));
    let node = fleet.join(&token);
    let node = &fleet[node];
    node.wait_for_peers(3);
    let machine = Machine::resume(node, "me:1", "me").0;
    let mut console = machine.console();
    assert_eq!(console.ask(SUMS), sums);
    let asked: Vec<u64> = liars.iter().map(Hostile::asked).collect();
    assert!(asked.iter().all(|asked| *asked > 0), "{asked:?}");
    let status = node.json(&["status"]);
    assert_eq!(status["banned"], 2, "{status:#}");
    let verified = node.json(&["verify"]);
    assert_eq!(verified["damaged_bytes"], 0, "{verified:#}");
}

/// The bytes of a held blob, from the node's store.
fn blob_of(node: &Node, root: &Value) -> Vec<u8> {
    let root = root.as_str().unwrap();
    let blobs = node.home().join("store/blobs").join(&root[..2]);
    fs::read(blobs.join(format!("{root}.data"))).unwrap()
}
