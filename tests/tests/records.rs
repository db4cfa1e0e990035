//! Records that do not count, sent by members who speak the protocol well: they are not taken, not passed on, and name nothing.
//!
//! Each fleet has the node that the hostile member joins, and a third node that is connected to that one only: what the third
//! knows was passed on.

use std::fs;
use std::time::Duration;

use capsule_proto::credential::{FleetKey, Revoked};
use capsule_proto::index::Space;
use capsule_proto::record::{BlobRef, Body, Layer, Name, Record};
use capsule_proto::{CapsuleId, RootHash};
use capsule_tests::hostile::{Hostile, id_of};
use capsule_tests::member::{Member, all_rights, now};
use capsule_tests::rogue::{self, Link};
use capsule_tests::{Fleet, Node, data};

/// A statement that a version is a capsule, which nobody has.
fn name(version: &str, capsule: u8) -> Body {
    let (channel, version) = version.split_once(':').expect("CHANNEL:VERSION");
    Body::Name(Name {
        channel: channel.parse().unwrap(),
        version: version.parse().unwrap(),
        capsule: capsule_of(capsule),
        manifest_size: 1000,
    })
}

fn capsule_of(number: u8) -> CapsuleId {
    CapsuleId(RootHash::of(&[number]))
}

/// A fleet of two nodes, and a publisher's token for channel `lab`.
fn fleet_and_publisher() -> (Fleet, Member) {
    let fleet = Fleet::of(2);
    let token = fleet.invite(&["--role", "publisher", "--channel", "lab"]);
    let publisher = Member::of(&token, 51);
    (fleet, publisher)
}

#[test]
fn what_does_not_count_is_neither_taken_nor_passed_on() {
    let (fleet, publisher) = fleet_and_publisher();
    let source = fleet.path("source");
    fs::write(&source, data::prose(41, 200_000)).unwrap();
    let published = fleet[0].publish(&source, "lab:real");
    let component = published["components"][0]["root"].as_str().unwrap();
    let plain = Member::of(&fleet.invite(&[]), 52);
    let grant = all_rights(7);
    let stranger = Member::enrol(
        &FleetKey::from_secret([53; 32]).invite(grant, [54; 32], &[]),
        55,
    );
    let blob = |what: &[u8]| BlobRef {
        root: RootHash::of(what),
        size: 100,
    };
    // A shorter way to a component that there is: whoever believed it would fetch it.
    let layer = |member: &Member| {
        member.sign(
            0,
            Body::Layer(Layer {
                space: Space::Stream,
                parent: None,
                target: component.parse().unwrap(),
                target_size: 200_000,
                index: blob(b"index"),
                pack: Some(blob(b"pack")),
            }),
        )
    };
    let mut unsigned = publisher.sign(90, name("lab:unsigned", 3));
    *unsigned.last_mut().unwrap() ^= 1;
    let dated = |issued, expires| Record {
        issued,
        expires,
        sequence: 91,
        body: name("lab:dated", 4),
    };
    let bad = [
        plain.sign(90, name("lab:plain", 1)),
        publisher.sign(90, name("other:publisher", 2)),
        plain.sign(1, Body::Revocation(Revoked::default())),
        layer(&plain),
        stranger.sign(90, name("lab:stranger", 5)),
        unsigned,
        // Nobody's fault, and yet nothing that counts.
        publisher.sign_record(dated(now() - 100, Some(now() - 1))),
        publisher.sign_record(dated(now() + 3 * 24 * 3600, None)),
    ];
    let good = publisher.sign(2, name("lab:good", 6));
    let records = fleet[0].json(&["status"])["records"].as_u64().unwrap();
    let hostile = Hostile::with_records(
        plain,
        [&bad[..], std::slice::from_ref(&good)].concat(),
        vec![],
    );
    // The good one shows that what came with it has been judged, and where it has come to.
    for node in fleet.nodes() {
        node.wait_until("the good record has arrived", |node| {
            node.run(&["show", "lab:good"]).code == Some(0)
        });
    }
    let given = hostile.given();
    for record in &bad {
        let times = given.iter().filter(|id| **id == id_of(record)).count();
        assert_eq!(times, 1, "each was asked for, and once: {given:?}");
    }
    drop(hostile);
    // Once more, from another, by gossip; and behind them one that counts.
    let token = fleet.invite(&["--role", "publisher", "--channel", "lab"]);
    let gossip = Hostile::with_records(Member::of(&token, 56), vec![], vec![]);
    fleet[0].wait_for_peers(2);
    // Each has heard by then what the other wants to hear.
    std::thread::sleep(Duration::from_secs(1));
    bad.iter().for_each(|record| gossip.gossip(record.clone()));
    gossip.gossip(publisher.sign(3, name("lab:better", 7)));
    for node in fleet.nodes() {
        node.wait_until("the gossip has arrived", |node| {
            node.run(&["show", "lab:better"]).code == Some(0)
        });
        let status = node.json(&["status"]);
        assert_eq!(status["records"], records + 2, "{status:#}");
        for name in ["plain", "unsigned", "dated", "stranger"] {
            let said = node.fails(1, &["show", &format!("lab:{name}")]);
            assert!(said.contains("not known"), "{said}");
        }
        node.fails(1, &["show", "other"]);
        let newest = node.json(&["show", "lab"])["capsule"].clone();
        assert_eq!(newest, capsule_of(7).to_string());
    }
    fleet[1].ok(&["pull", "lab:real"]);
    let layers = fleet[1].json(&["show", "lab:real"])["layers"].clone();
    assert_eq!(layers.as_array().unwrap().len(), 1, "{layers:#}");
}

#[test]
fn who_goes_on_sending_records_that_do_not_count_is_cut_off() {
    let (fleet, _) = fleet_and_publisher();
    let token = fleet.invite(&[]);
    let plain = Member::of(&token, 61);
    let bad = (0..20).map(|n| plain.sign(n, name(&format!("lab:{n}"), n as u8)));
    let hostile = Hostile::with_records(plain.clone(), bad.collect(), vec![]);
    fleet[0].wait_until("the hostile member is cut off", |node| {
        node.log()
            .contains("cut off: it sent a record that is not valid")
    });
    assert!(!hostile.given().is_empty());
    let status = fleet[0].json(&["status"]);
    assert_eq!(status["records"], 0, "{status:#}");
    // The others are none the worse for it.
    let source = fleet.path("source");
    fs::write(&source, data::noise(43, 100_000)).unwrap();
    fleet[0].publish(&source, "lab:1");
    fleet[1].ok(&["pull", "lab:1"]);
}

#[test]
fn an_older_record_never_replaces_a_newer_one() {
    let (mut fleet, publisher) = fleet_and_publisher();
    // They arrive in the wrong order: first the newest.
    let newest = publisher.sign(9, name("lab:nine", 9));
    let first = Hostile::with_records(publisher.clone(), vec![newest.clone()], vec![]);
    let known = |fleet: &Fleet, version: &str| {
        for node in fleet.nodes() {
            node.wait_until("the record has arrived", |node| {
                node.run(&["show", version]).code == Some(0)
            });
        }
    };
    known(&fleet, "lab:nine");
    drop(first);
    let late = Record {
        // Signed later, and yet of a lower sequence: the sequence counts.
        issued: now() + 60,
        expires: None,
        sequence: 5,
        body: name("lab:five", 5),
    };
    let records = vec![publisher.sign_record(late), newest];
    let _second = Hostile::with_records(publisher, records, vec![]);
    known(&fleet, "lab:five");
    for restart in [false, true] {
        if restart {
            fleet[1].stop();
            fleet[1].start();
        }
        for node in fleet.nodes() {
            let shown = node.json(&["show", "lab"]);
            assert_eq!(shown["capsule"], capsule_of(9).to_string(), "{shown:#}");
        }
    }
}

#[test]
fn an_older_revocation_lets_nobody_in_again() {
    let mut fleet = Fleet::of(2);
    let (token, good) = (fleet.invite(&[]), fleet.invite(&[]));
    let revoked = Member::of(&token, 71);
    let admin = Member::of(&fleet.invite(&["--role", "admin"]), 72);
    let list = Revoked {
        tokens: [revoked.credential.grant().id].into(),
        ..Revoked::default()
    };
    let newer = admin.sign(2, Body::Revocation(list));
    let older = admin.sign(1, Body::Revocation(Revoked::default()));
    // One that is in when it is revoked is let go.
    let runtime = rogue::runtime();
    let enter = |node: &Node| {
        runtime.block_on(Link::enter(
            node.address(),
            &revoked.key,
            &revoked.credential,
        ))
    };
    let mut link = enter(&fleet[0]).expect("it is a member yet");
    let first = Hostile::with_records(admin.clone(), vec![newer.clone()], vec![]);
    for node in fleet.nodes() {
        node.wait_until("the revocation has arrived", |node| {
            node.json(&["status"])["records"] == 1
        });
    }
    let is_cut = runtime.block_on(link.is_cut_within(Duration::from_secs(5)));
    assert!(is_cut, "{}", fleet[0].log());
    drop(first);
    let second = Hostile::with_records(admin, vec![older.clone()], vec![]);
    fleet[0].wait_until("the older one was offered", |_| {
        second.given().contains(&id_of(&older))
    });
    fleet[1].stop();
    fleet[1].start();
    // A new member of a token that still counts shows that the door is open at all.
    let newcomer = fleet.join(&good);
    fleet[newcomer].wait_for_peers(1);
    for node in fleet.nodes() {
        let refusal = enter(node).err().expect("it is refused");
        assert!(refusal.to_string().contains("revoked"), "{refusal}");
        assert_eq!(node.json(&["status"])["records"], 1);
    }
}
