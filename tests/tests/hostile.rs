//! Members that lie, stall or drip: they are cut off, what they send is not stored, and the transfer goes on with the others.

use std::fs;
use std::time::{Duration, Instant};

use capsule_proto::RootHash;
use capsule_proto::ranges::GroupRanges;
use capsule_proto::wire::{Control, DataHeader};
use capsule_tests::hostile::{Drip, Hostile, Vice};
use capsule_tests::member::Member;
use capsule_tests::rogue::{self, Heard, Link};
use capsule_tests::{Fleet, Node, data};
use serde_json::Value;

/// The bytes of a held blob, from the node's store.
fn blob_of(node: &Node, root: &str) -> Vec<u8> {
    let path = node
        .home()
        .join("store/blobs")
        .join(&root[..2])
        .join(format!("{root}.data"));
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn pack_of(node: &Node, name: &str) -> String {
    let shown = node.json(&["show", name]);
    shown["layers"][0]["pack"]["root"]
        .as_str()
        .unwrap_or_else(|| panic!("{shown:#}"))
        .to_owned()
}

/// A publisher with a capsule of noise, a hostile member that announces its pack, and a puller.
fn pull_beside(vice: Vice) -> (Fleet, Hostile, Value) {
    let mut fleet = Fleet::new();
    let source = fleet.path("source");
    data::noise_file(&source, 31, 12 << 20);
    fleet[0].publish(&source, "lab:1");
    let pack = blob_of(&fleet[0], &pack_of(&fleet[0], "lab:1"));
    let token = fleet.invite(&[]);
    let hostile = Hostile::start(&token, 66, vice, pack);
    let puller = fleet.join(&token);
    fleet[puller].wait_for_peers(2);
    let started = Instant::now();
    let pulled = fleet[puller].json(&["pull", "lab:1"]);
    assert!(
        started.elapsed() < Duration::from_secs(30),
        "it took {:?}",
        started.elapsed()
    );
    let copy = fleet.path("copy");
    fleet[puller].ok(&["export", "lab:1", "--to", copy.to_str().unwrap()]);
    assert!(fs::read(&source).unwrap() == fs::read(&copy).unwrap());
    assert!(
        hostile.asked() > 0,
        "the hostile member was asked, so that the test shows something"
    );
    let from_hostile = pulled["by_peer"]
        .as_array()
        .unwrap()
        .iter()
        .find(|peer| peer["peer"] == hostile.peer().as_str());
    assert!(from_hostile.is_none(), "nothing of it counts: {pulled:#}");
    (fleet, hostile, pulled)
}

#[test]
fn a_peer_that_sends_a_wrong_byte_is_banned_and_the_transfer_goes_on() {
    let (fleet, hostile, _) = pull_beside(Vice::Corrupts { percent: 100 });
    let status = fleet[1].json(&["status"]);
    assert_eq!(status["banned"], 1, "{status:#}");
    assert!(
        fleet[1].json(&["verify"])["damaged"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    // It stays away: only the publisher is connected.
    std::thread::sleep(Duration::from_secs(2));
    let peers = fleet[1].json(&["peers"]);
    assert!(
        !peers["peers"]
            .as_array()
            .unwrap()
            .iter()
            .any(|peer| peer["peer"] == hostile.peer().as_str()),
        "{peers:#}"
    );
}

#[test]
fn a_peer_that_announces_what_it_does_not_have_does_not_hold_up_the_transfer() {
    pull_beside(Vice::Lies { percent: 0 });
}

#[test]
fn a_peer_that_never_answers_does_not_hold_up_the_transfer() {
    pull_beside(Vice::Stalls);
}

#[test]
fn a_peer_that_sends_one_byte_a_second_does_not_hold_up_the_transfer() {
    let mut fleet = Fleet::new();
    let source = fleet.path("source");
    data::noise_file(&source, 33, 12 << 20);
    fleet[0].publish(&source, "lab:1");
    let token = fleet.invite(&[]);
    let second = fleet.join(&token);
    fleet[second].json(&["pull", "lab:1"]);
    // The puller meets the second node only through a relay that begins to drip once they are connected.
    let relay = Drip::before(fleet[second].address());
    let mut puller = Node::new(fleet.path("puller"));
    let through = fleet[0].ok(&["fleet", "invite", "--addr", &relay.address()]);
    puller.ok(&["join", through.trim()]);
    puller.start();
    puller.wait_for_peers(2);
    relay.drip();
    let started = Instant::now();
    puller.json(&["pull", "lab:1"]);
    assert!(
        started.elapsed() < Duration::from_secs(45),
        "it took {:?}",
        started.elapsed()
    );
    let copy = fleet.path("copy");
    puller.ok(&["export", "lab:1", "--to", copy.to_str().unwrap()]);
    assert!(fs::read(&source).unwrap() == fs::read(&copy).unwrap());
}

/// What a member that lies about sizes does when it is asked to prove them, and how often it was.
async fn claim(mut link: Link, claims: Vec<(RootHash, u64)>, answers: bool) -> Vec<RootHash> {
    for (root, size) in claims {
        let groups = GroupRanges::all(size);
        link.say(&Control::Have { root, size, groups })
            .await
            .unwrap();
    }
    let mut asked = Vec::new();
    while let Some(heard) = link.hear().await {
        let Heard::Control(Control::Request(request)) = heard else {
            continue;
        };
        asked.push(request.root);
        if answers {
            let header = DataHeader {
                request: request.id,
                groups: (request.groups.end - request.groups.start) as u32,
                compressed: false,
            };
            let _cut = link.answer(header, &data::noise(1, 1000)).await;
        }
    }
    asked
}

#[test]
fn peers_that_lie_about_sizes_hold_up_nothing() {
    let mut fleet = Fleet::of(2);
    let source = fleet.path("source");
    data::noise_file(&source, 35, 2 << 20);
    // Once the name has ended nobody says how long the manifest is: the first who claims to have it is asked for a proof.
    let path = source.to_str().unwrap();
    let publish = ["publish", path, "--name", "lab:1", "--expires", "4s"];
    let id = fleet[0].json(&publish)["capsule"].clone();
    let id = id.as_str().unwrap();
    let pack = pack_of(&fleet[0], "lab:1");
    for (what, code) in [("come", 0), ("gone", 1)] {
        fleet[1].wait_until(&format!("the name has {what}"), |node| {
            node.run(&["show", "lab:1"]).code == Some(code)
        });
    }
    let (manifest, pack): (RootHash, RootHash) = (id.parse().unwrap(), pack.parse().unwrap());
    let runtime = rogue::runtime();
    let sizes = [
        (1, false),
        (1 << 29, false),
        (123_456, true),
        (1 << 50, true),
    ];
    let mut number = 140;
    let liars = sizes.map(|(size, answers)| {
        number += 1;
        let member = Member::of(&fleet.invite(&[]), number);
        let claims = vec![(manifest, size), (pack, size)];
        let address = fleet[1].address().to_owned();
        runtime.spawn(async move {
            let link = Link::enter(&address, &member.key, &member.credential).await;
            claim(link.unwrap(), claims, answers).await
        })
    });
    let claims = |fleet: &Fleet, count: usize| {
        fleet[1].wait_until("all claims have come", |node| {
            let have = node.json(&["peers", "--have", id]);
            have["peers"].as_array().unwrap().len() == count
        });
    };
    claims(&fleet, 5);
    // The one who has it comes in last, so that the others are asked first.
    fleet[0].stop();
    claims(&fleet, 4);
    fleet[0].start();
    claims(&fleet, 5);
    let started = Instant::now();
    let pulled = fleet[1].json(&["pull", id]);
    assert!(
        started.elapsed() < Duration::from_secs(25),
        "it took {:?}",
        started.elapsed()
    );
    assert_eq!(pulled["by_peer"].as_array().unwrap().len(), 1, "{pulled:#}");
    let copy = fleet.path("copy");
    fleet[1].ok(&["export", id, "--to", copy.to_str().unwrap()]);
    assert!(fs::read(&source).unwrap() == fs::read(&copy).unwrap());
    let verified = fleet[1].json(&["verify"]);
    assert_eq!(verified["damaged_bytes"], 0, "{verified:#}");
    // The pack's length was known: who claims another is not asked for it at all.
    drop(fleet);
    let asked: Vec<RootHash> = liars
        .into_iter()
        .flat_map(|liar| runtime.block_on(liar).unwrap())
        .collect();
    assert!(!asked.contains(&pack), "{asked:?}");
    assert!(asked.contains(&manifest), "some were asked for a proof");
}
