//! The daemon's tables: what is put in comes out, after reopening too.

use std::path::Path;

use capsule_node::store::{
    Ban, DatabaseError, Follow, HeldCapsule, MAX_VALUE_LEN, PinOrigin, Store, StoreOptions,
};
use capsule_proto::credential::{
    Channels, Credential, FleetKey, Grant, MachineKey, Revoked, Roles, TokenId,
};
use capsule_proto::index::Space;
use capsule_proto::record::{BlobRef, Body, Layer, Name, Prefetch, Record, Release, SignedRecord};
use capsule_proto::{CapsuleId, RootHash};

fn open(dir: &Path) -> Store {
    Store::open(dir, StoreOptions::default()).unwrap()
}

fn hash(n: u8) -> RootHash {
    RootHash::from_bytes([n; 32])
}

/// Signs statements as a member of some fleet.
struct Signer {
    credential: Credential,
    key: MachineKey,
}

impl Signer {
    fn new() -> Self {
        let roles = Roles {
            publisher: true,
            admin: true,
        };
        let grant = Grant {
            id: TokenId([1; 8]),
            roles,
            channels: Channels::All,
            issued: 0,
            expires: 1000,
        };
        let token = FleetKey::from_secret([1; 32]).invite(grant, [2; 32], &[]);
        let key = MachineKey::from_secret([3; 32]);
        Self {
            credential: token.enrol(key.machine(), "lab-1", 1),
            key,
        }
    }

    fn sign(&self, sequence: u64, body: Body) -> SignedRecord {
        let record = Record {
            issued: 10,
            expires: None,
            sequence,
            body,
        };
        SignedRecord::sign(record, &self.credential, &self.key).unwrap()
    }
}

fn name(version: &str, capsule: u8) -> Body {
    let (channel, version) = ("lab".parse().unwrap(), version.parse().unwrap());
    Body::Name(Name {
        channel,
        version,
        capsule: CapsuleId(hash(capsule)),
        manifest_size: 100,
    })
}

#[test]
fn records_are_found_by_id_channel_and_subject() {
    let dir = tempfile::tempdir().unwrap();
    let signer = Signer::new();
    let blob = |n| BlobRef {
        root: hash(n),
        size: 9,
    };
    let layer = Layer {
        space: Space::Stream,
        parent: Some(hash(4)),
        target: hash(5),
        target_size: 70,
        index: blob(6),
        pack: Some(blob(7)),
    };
    let release = Release {
        channel: "lab".parse().unwrap(),
        version: "2".parse().unwrap(),
        capsule: CapsuleId(hash(2)),
        percent: 10,
        not_before: 0,
        deadline: None,
    };
    let (first, second) = (signer.sign(1, name("1", 1)), signer.sign(2, name("2", 2)));
    let layer = signer.sign(0, Body::Layer(layer));
    let prefetch = signer.sign(
        1,
        Body::Prefetch(Prefetch {
            component: hash(5),
            ranges: vec![(0, 10)],
        }),
    );
    let release = signer.sign(1, Body::Release(release));
    let revocation = signer.sign(1, Body::Revocation(Revoked::default()));
    let all = [&first, &second, &layer, &prefetch, &release, &revocation];
    let store = open(dir.path());
    assert!(all.iter().all(|record| store.put_record(record).unwrap()));
    assert!(!store.put_record(&first).unwrap());
    drop(store);

    let store = open(dir.path());
    let sorted = |mut records: Vec<SignedRecord>| {
        records.sort_by_key(SignedRecord::id);
        records
    };
    let same = |found: Vec<SignedRecord>, expected: &[&SignedRecord]| {
        assert_eq!(
            sorted(found),
            sorted(expected.iter().map(|record| (*record).clone()).collect())
        );
    };
    let lab = "lab".parse().unwrap();
    assert_eq!(store.record_ids().unwrap().len(), all.len());
    assert_eq!(
        store.record(&layer.id()).unwrap().as_deref(),
        Some(layer.as_bytes())
    );
    assert_eq!(store.channels().unwrap(), ["lab"]);
    same(store.names_of(&lab).unwrap(), &[&first, &second]);
    same(store.names_of(&"lab2".parse().unwrap()).unwrap(), &[]);
    same(store.revocations().unwrap(), &[&revocation]);
    same(store.records_about(&hash(5)).unwrap(), &[&layer, &prefetch]);
    same(store.records_about(&hash(4)).unwrap(), &[&layer]);
    same(store.records_about(&hash(2)).unwrap(), &[&second, &release]);
    assert!(store.remove_record(&second.id()).unwrap());
    assert!(!store.remove_record(&second.id()).unwrap());
    same(store.names_of(&lab).unwrap(), &[&first]);
    same(store.records_about(&hash(2)).unwrap(), &[&release]);
    assert_eq!(store.record(&second.id()).unwrap(), None);
}

#[test]
fn capsules_and_their_pins() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (one, two) = (CapsuleId(hash(1)), CapsuleId(hash(2)));
    let held = HeldCapsule {
        complete: false,
        added: 5,
    };
    store.put_capsule(&one, &held).unwrap();
    store.put_capsule(&two, &held).unwrap();
    store
        .put_capsule(
            &one,
            &HeldCapsule {
                complete: true,
                ..held
            },
        )
        .unwrap();
    let follow = PinOrigin::Follow("lab".into());
    assert!(store.pin(&one, &PinOrigin::User).unwrap());
    assert!(!store.pin(&one, &PinOrigin::User).unwrap());
    assert!(store.pin(&one, &follow).unwrap());
    assert!(store.pin(&two, &PinOrigin::Publication).unwrap());
    drop(store);
    let store = open(dir.path());
    assert_eq!(
        store.capsule(&one).unwrap(),
        Some(HeldCapsule {
            complete: true,
            added: 5
        })
    );
    assert_eq!(store.capsules().unwrap().len(), 2);
    assert_eq!(store.pins().unwrap().len(), 3);
    assert!(store.unpin(&one, &PinOrigin::User).unwrap());
    assert!(!store.unpin(&one, &PinOrigin::User).unwrap());
    assert_eq!(
        store.pins().unwrap(),
        [(one, follow), (two, PinOrigin::Publication)]
    );
    assert!(store.mark_capsule(&two, true).unwrap());
    assert!(store.mark_capsule(&one, false).unwrap());
    assert!(store.capsule(&two).unwrap().unwrap().complete);
    assert_eq!(store.capsule(&one).unwrap(), Some(held));
    assert!(store.remove_capsule(&one).unwrap());
    assert_eq!(store.pins().unwrap(), [(two, PinOrigin::Publication)]);
    assert_eq!(store.capsule(&one).unwrap(), None);
    assert!(!store.mark_capsule(&one, false).unwrap());
    assert_eq!(
        store.capsule(&one).unwrap(),
        None,
        "what is removed stays so"
    );
}

#[test]
fn follows_bans_and_values() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let lab = "lab".parse().unwrap();
    store.follow(&lab, &Follow { keep: 2, since: 7 }).unwrap();
    let ban = |until| Ban {
        reason: "sent wrong data\n".repeat(200),
        until,
    };
    store.ban(b"for a while", &ban(Some(100))).unwrap();
    store.ban(b"for good", &ban(None)).unwrap();
    assert!(matches!(
        store.ban(&[0; 65], &ban(None)),
        Err(DatabaseError::TooLong { .. })
    ));
    store.set_value("k", b"v").unwrap();
    assert!(matches!(
        store.set_value("k", &vec![0; MAX_VALUE_LEN + 1]),
        Err(DatabaseError::TooLong { .. })
    ));
    store.note_time(50).unwrap();
    store.note_time(40).unwrap();
    drop(store);
    let store = open(dir.path());
    assert_eq!(
        store.follows().unwrap(),
        [(lab.clone(), Follow { keep: 2, since: 7 })]
    );
    assert!(store.unfollow(&lab).unwrap());
    assert!(!store.unfollow(&lab).unwrap());
    assert_eq!(store.bans(99).unwrap().len(), 2);
    assert_eq!(store.bans(100).unwrap().len(), 1);
    assert!(store.lift_ended_bans(99).unwrap().is_empty());
    assert_eq!(store.lift_ended_bans(100).unwrap(), [b"for a while"]);
    assert_eq!(store.bans(0).unwrap().len(), 1);
    assert_eq!(store.value("k").unwrap().as_deref(), Some(&b"v"[..]));
    assert_eq!(store.value("none").unwrap(), None);
    assert_eq!(store.newest_time().unwrap(), 50);
}
