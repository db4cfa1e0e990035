//! The rules together: what is accepted, what it means, what is dropped.

use std::sync::Arc;

use capsule_proto::credential::{
    Channels, Credential, FleetKey, Grant, MachineKey, Revoked, Roles, TokenId,
};
use capsule_proto::record::{Name, Record};
use capsule_proto::{CapsuleId, RootHash};
use capsule_swarm::{Offer, RecordStore};

use super::*;
use crate::clock::Clock;
use crate::control::CapsuleRef;
use crate::store::{Store, StoreOptions};

const NOW: u64 = 1_900_000_000;

struct Member {
    key: MachineKey,
    credential: Credential,
}

fn fleet() -> FleetKey {
    FleetKey::from_secret([1; 32])
}

fn member(n: u8, roles: Roles) -> Member {
    let channels = Channels::only(vec!["lab".parse().unwrap()]);
    let grant = Grant {
        id: TokenId([n; 8]),
        roles,
        channels,
        issued: NOW - 10,
        expires: NOW + 1000,
    };
    let key = MachineKey::from_secret([n; 32]);
    let token = fleet().invite(grant, [n + 100; 32], &[]);
    Member {
        credential: token.enrol(key.machine(), "pc", NOW),
        key,
    }
}

fn publisher(n: u8) -> Member {
    member(
        n,
        Roles {
            publisher: true,
            admin: false,
        },
    )
}

fn admin(n: u8) -> Member {
    member(
        n,
        Roles {
            publisher: false,
            admin: true,
        },
    )
}

fn sign(member: &Member, sequence: u64, expires: Option<u64>, body: Body) -> SignedRecord {
    SignedRecord::sign(
        Record {
            issued: NOW,
            expires,
            sequence,
            body,
        },
        &member.credential,
        &member.key,
    )
    .unwrap()
}

fn capsule(n: u8) -> CapsuleId {
    CapsuleId(RootHash::from_bytes([n; 32]))
}

fn name(version: &str, id: u8) -> Body {
    let (channel, version) = ("lab".parse().unwrap(), version.parse().unwrap());
    Body::Name(Name {
        channel,
        version,
        capsule: capsule(id),
        manifest_size: 100,
    })
}

fn records() -> (tempfile::TempDir, Records) {
    let temp = tempfile::tempdir().unwrap();
    let store = Store::open(temp.path(), StoreOptions::default()).unwrap();
    let clock = Arc::new(Clock::with_system(|| NOW, 0));
    let records = Records::open(store, fleet().fleet(), clock).unwrap();
    (temp, records)
}

fn resolve(records: &Records, text: &str) -> Result<CapsuleId, ResolveError> {
    records
        .resolve(&CapsuleRef(text.into()), &[])
        .map(|found| found.capsule)
}

#[test]
fn names_resolve_to_the_newest_the_exact_and_the_prefix() {
    let (_temp, records) = records();
    let one = publisher(1);
    for (sequence, version, id) in [(1, "a", 1), (3, "c", 3), (2, "b", 2)] {
        assert_eq!(
            records.offer(sign(&one, sequence, None, name(version, id)).as_bytes()),
            Offer::New
        );
    }
    assert_eq!(resolve(&records, "lab").unwrap(), capsule(3));
    assert_eq!(resolve(&records, "lab:a").unwrap(), capsule(1));
    assert_eq!(
        resolve(&records, &capsule(2).to_string()[..8]).unwrap(),
        capsule(2)
    );
    assert_eq!(
        resolve(&records, &capsule(9).to_string()).unwrap(),
        capsule(9),
        "an id need not be known"
    );
    assert!(matches!(
        resolve(&records, "lab:z"),
        Err(ResolveError::UnknownVersion { .. })
    ));
    assert!(matches!(
        resolve(&records, "other"),
        Err(ResolveError::UnknownName(_))
    ));
    assert!(matches!(
        resolve(&records, "ffffffff"),
        Err(ResolveError::UnknownPrefix(_))
    ));
    assert!(matches!(
        resolve(&records, "a b"),
        Err(ResolveError::Malformed(_))
    ));
    assert_eq!(records.next_sequence(&"lab".parse().unwrap()).unwrap(), 4);
}

#[test]
fn a_channel_does_not_go_back_when_its_newest_name_ends() {
    let temp = tempfile::tempdir().unwrap();
    let store = Store::open(temp.path(), StoreOptions::default()).unwrap();
    let open = |now: fn() -> u64| {
        let clock = Arc::new(Clock::with_system(now, 0));
        Records::open(store.clone(), fleet().fleet(), clock).unwrap()
    };
    let one = publisher(1);
    let records = open(|| NOW);
    records.offer(sign(&one, 7, None, name("a", 1)).as_bytes());
    records.offer(sign(&one, 8, Some(NOW + 10), name("b", 2)).as_bytes());
    assert_eq!(resolve(&records, "lab").unwrap(), capsule(2));
    drop(records);
    // Before the ended record is dropped, after, and after another start.
    for _ in 0..2 {
        let records = open(|| NOW + 10);
        assert!(matches!(
            resolve(&records, "lab"),
            Err(ResolveError::Ended { ended, newest: Some(newest) })
                if ended.to_string() == "lab:b" && newest.to_string() == "lab:a"
        ));
        assert_eq!(resolve(&records, "lab:a").unwrap(), capsule(1));
        assert_eq!(records.next_sequence(&"lab".parse().unwrap()).unwrap(), 9);
        records.purge().unwrap();
    }
    let records = open(|| NOW + 11);
    records.offer(sign(&one, 9, None, name("c", 3)).as_bytes());
    assert_eq!(resolve(&records, "lab").unwrap(), capsule(3));
}

#[test]
fn records_of_equal_sequence_are_both_kept_and_told_apart_by_version_only() {
    let (_temp, records) = records();
    records.offer(sign(&publisher(1), 1, None, name("a", 1)).as_bytes());
    records.offer(sign(&publisher(2), 1, None, name("b", 2)).as_bytes());
    assert!(
        matches!(resolve(&records, "lab"), Err(ResolveError::Ambiguous { candidates, .. }) if candidates.len() == 2)
    );
    assert_eq!(resolve(&records, "lab:b").unwrap(), capsule(2));
    // The same version with other content, whatever the sequence, is for a person to decide.
    records.offer(sign(&publisher(2), 5, None, name("a", 3)).as_bytes());
    assert!(matches!(
        resolve(&records, "lab:a"),
        Err(ResolveError::Ambiguous { .. })
    ));
    assert_eq!(records.names_of(&"lab".parse().unwrap()).unwrap().len(), 3);
}

#[test]
fn what_a_member_may_not_say_is_its_senders_fault_and_what_ended_is_not() {
    let (_temp, records) = records();
    let plain = member(3, Roles::default());
    assert!(matches!(
        records.offer(sign(&plain, 1, None, name("a", 1)).as_bytes()),
        Offer::Rejected(_)
    ));
    assert!(matches!(records.offer(b"noise"), Offer::Rejected(_)));
    assert_eq!(
        records.offer(sign(&publisher(1), 1, Some(NOW - 1), name("a", 1)).as_bytes()),
        Offer::Known
    );
    let good = sign(&publisher(1), 1, Some(NOW + 1), name("a", 1));
    assert_eq!(records.offer(good.as_bytes()), Offer::New);
    assert_eq!(records.offer(good.as_bytes()), Offer::Known);
    let mut flipped = good.as_bytes().to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    assert!(matches!(records.offer(&flipped), Offer::Rejected(_)));
    assert_eq!(records.purge().unwrap(), Some(NOW + 1));
}

#[test]
fn newer_formats_and_other_clocks_are_nobodys_fault() {
    let (_temp, records) = records();
    let record = sign(&publisher(1), 1, None, name("a", 1));
    let mut newer = record.as_bytes().to_vec();
    newer[4] += 1;
    assert_eq!(records.offer(&newer), Offer::Known);
    assert!(matches!(records.offer(&newer[1..]), Offer::Rejected(_)));
    let member = publisher(1);
    let ahead = Record {
        issued: NOW + 500,
        expires: None,
        sequence: 1,
        body: name("a", 1),
    };
    let ahead = SignedRecord::sign(ahead, &member.credential, &member.key).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let store = Store::open(temp.path(), StoreOptions::default()).unwrap();
    let clock = Arc::new(Clock::with_system(|| NOW - 3 * 24 * 3600, 0));
    let behind = Records::open(store, fleet().fleet(), clock).unwrap();
    assert!(matches!(behind.offer(ahead.as_bytes()), Offer::Later(_)));
    assert_eq!(records.offer(ahead.as_bytes()), Offer::New);
}

#[test]
fn a_member_over_its_bound_waits_and_its_revocations_count() {
    let (_temp, records) = records();
    let roles = Roles {
        publisher: true,
        admin: true,
    };
    let one = member(1, roles);
    let full = (one.key.machine(), MAX_PER_SIGNER);
    records.write().per_signer.extend([full]);
    let record = sign(&one, 1, None, name("a", 1));
    assert!(matches!(records.offer(record.as_bytes()), Offer::Later(_)));
    let revoked = Revoked {
        tokens: [TokenId([2; 8])].into(),
        ..Revoked::default()
    };
    let revocation = sign(&one, 1, None, Body::Revocation(revoked.clone()));
    assert_eq!(records.offer(revocation.as_bytes()), Offer::New);
    assert_eq!(records.revoked(), revoked);
}

#[test]
fn a_revocation_drops_what_its_members_said_and_never_goes_back() {
    let (temp, records) = records();
    records.offer(sign(&publisher(1), 1, None, name("a", 1)).as_bytes());
    records.offer(sign(&publisher(2), 2, None, name("b", 2)).as_bytes());
    let revoke = |n: u8| {
        Body::Revocation(Revoked {
            tokens: [TokenId([n; 8])].into(),
            ..Revoked::default()
        })
    };
    assert!(matches!(
        records.offer(sign(&publisher(1), 1, None, revoke(2)).as_bytes()),
        Offer::Rejected(_)
    ));
    let newest = sign(&admin(9), 7, None, revoke(2));
    assert_eq!(records.offer(newest.as_bytes()), Offer::New);
    assert_eq!(resolve(&records, "lab").unwrap(), capsule(1));
    assert_eq!(
        records.offer(sign(&publisher(2), 9, None, name("c", 3)).as_bytes()),
        Offer::Known
    );
    assert_eq!(
        records.offer(sign(&admin(9), 6, None, revoke(1)).as_bytes()),
        Offer::Known
    );
    assert_eq!(records.revocation_head(), Some(newest.as_bytes().to_vec()));
    assert!(!records.revoked().tokens.contains(&TokenId([1; 8])));
    // It holds over a restart.
    drop(records);
    let store = Store::open(temp.path(), StoreOptions::default()).unwrap();
    let records = Records::open(
        store,
        fleet().fleet(),
        Arc::new(Clock::with_system(|| NOW, 0)),
    )
    .unwrap();
    assert!(records.revoked().tokens.contains(&TokenId([2; 8])));
    assert_eq!(records.count(), 2);
}
