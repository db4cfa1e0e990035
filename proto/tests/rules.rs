//! Manifests, tokens, records and messages that are well-formed but break a rule: each is refused. (Indexes: `index.rs`.)

use capsule_proto::credential::{
    Channels, CredentialError, FleetKey, Grant, MachineKey, Revoked, Roles, TokenId,
};
use capsule_proto::index::Space;
use capsule_proto::manifest::{Component, ComponentKind, Manifest};
use capsule_proto::ranges::Height;
use capsule_proto::record::{
    BlobRef, Body, Layer, MAX_CLOCK_SKEW, Name, Prefetch, Record, RecordError, Release,
    SignedRecord,
};
use capsule_proto::wire::{Control, Greeting, Request, Verdict};
use capsule_proto::{CapsuleId, GroupRanges, RootHash};

fn root(of: &str) -> RootHash {
    RootHash::of(of.as_bytes())
}

#[test]
fn a_listing_is_fetched_whole_so_its_size_is_bounded() {
    let tree = |size| {
        let name = "tree".to_owned();
        Manifest::new(vec![Component {
            name,
            kind: ComponentKind::Tree,
            root: root("t"),
            size,
            content_size: 0,
        }])
    };
    assert!(tree(1 << 30).is_ok());
    assert!(tree((1 << 30) + 1).is_err());
}

const ISSUED: u64 = 1000;

fn member(roles: Roles, channels: &[&str]) -> (FleetKey, impl Fn(Body) -> SignedRecord) {
    let fleet = FleetKey::from_secret([1; 32]);
    let channels = Channels::only(
        channels
            .iter()
            .map(|channel| channel.parse().unwrap())
            .collect(),
    );
    let token = fleet.invite(
        Grant {
            id: TokenId([7; 8]),
            roles,
            channels,
            issued: 0,
            expires: 5000,
        },
        [2; 32],
        &[],
    );
    let key = MachineKey::from_secret([3; 32]);
    let credential = token.enrol(key.machine(), "pc", 10);
    let sign = move |body| {
        let record = Record {
            issued: ISSUED,
            expires: Some(9000),
            sequence: 1,
            body,
        };
        SignedRecord::sign(record, &credential, &key).unwrap()
    };
    (fleet, sign)
}

fn name(channel: &str) -> Body {
    let (channel, version) = (channel.parse().unwrap(), "1".parse().unwrap());
    Body::Name(Name {
        channel,
        version,
        capsule: CapsuleId(root("c")),
        manifest_size: 50,
    })
}

fn release(channel: &str) -> Body {
    let (channel, version) = (channel.parse().unwrap(), "1".parse().unwrap());
    let capsule = CapsuleId(root("c"));
    Body::Release(Release {
        channel,
        version,
        capsule,
        percent: 100,
        not_before: 0,
        deadline: None,
    })
}

fn layer() -> Layer {
    let index = BlobRef {
        root: root("i"),
        size: 50,
    };
    Layer {
        space: Space::Stream,
        parent: None,
        target: root("t"),
        target_size: 9,
        index,
        pack: None,
    }
}

#[test]
fn members_say_only_what_their_role_and_channels_allow() {
    let none = Revoked::default();
    let prefetch = || {
        Body::Prefetch(Prefetch {
            component: root("c"),
            ranges: vec![],
        })
    };
    let publisher = Roles {
        publisher: true,
        admin: false,
    };
    let admin = Roles {
        publisher: false,
        admin: true,
    };
    let allowed = |roles, body| {
        let (fleet, sign) = member(roles, &["lab"]);
        match sign(body).verify(&fleet.fleet(), ISSUED, &none) {
            Ok(_) => true,
            Err(RecordError::NotAllowed { .. }) => false,
            Err(error) => panic!("{error}"),
        }
    };
    for body in [
        name("lab"),
        release("lab"),
        Body::Layer(layer()),
        prefetch(),
    ] {
        assert!(allowed(publisher, body.clone()), "{body:?}");
        assert!(
            !allowed(admin, body.clone()) && !allowed(Roles::default(), body.clone()),
            "{body:?}"
        );
    }
    assert!(!allowed(publisher, name("other")) && !allowed(publisher, release("other")));
    assert!(allowed(admin, Body::Revocation(Revoked::default())));
    assert!(!allowed(publisher, Body::Revocation(Revoked::default())));
}

#[test]
fn records_count_in_their_time_and_while_their_signer_does() {
    let (fleet, sign) = member(
        Roles {
            publisher: true,
            admin: false,
        },
        &["lab"],
    );
    let record = sign(name("lab"));
    let verify = |now, revoked| record.verify(&fleet.fleet(), now, &revoked);
    let none = Revoked::default;
    assert!(verify(ISSUED, none()).is_ok());
    // The token's end does not end what was said before.
    assert!(verify(8999, none()).is_ok());
    assert_eq!(
        verify(9000, none()),
        Err(RecordError::Expired {
            expired: 9000,
            now: 9000
        })
    );
    let revoked = Revoked {
        tokens: [TokenId([7; 8])].into(),
        ..none()
    };
    assert!(matches!(
        verify(ISSUED, revoked),
        Err(RecordError::Signer(CredentialError::Revoked(_)))
    ));
    let future = SignedRecord::sign(
        Record {
            issued: 4999,
            expires: None,
            sequence: 0,
            body: name("lab"),
        },
        &fleet_credential(&fleet),
        &MachineKey::from_secret([3; 32]),
    );
    let future = future.unwrap();
    let now = 4999u64.saturating_sub(MAX_CLOCK_SKEW);
    assert!(future.verify(&fleet.fleet(), now, &none()).is_ok());
    let late = SignedRecord::sign(
        Record {
            issued: MAX_CLOCK_SKEW + 1,
            ..future.record().clone()
        },
        &fleet_credential(&fleet),
        &MachineKey::from_secret([3; 32]),
    );
    let late = late.unwrap();
    assert!(matches!(
        late.verify(&fleet.fleet(), 0, &none()),
        Err(RecordError::FromTheFuture { .. })
    ));
    assert!(late.verify(&fleet.fleet(), 1, &none()).is_ok());
}

/// A credential that lasts.
fn fleet_credential(fleet: &FleetKey) -> capsule_proto::credential::Credential {
    let roles = Roles {
        publisher: true,
        admin: false,
    };
    let grant = Grant {
        id: TokenId([8; 8]),
        roles,
        channels: Channels::All,
        issued: 0,
        expires: u64::MAX,
    };
    fleet
        .invite(grant, [2; 32], &[])
        .enrol(MachineKey::from_secret([3; 32]).machine(), "pc", 10)
}

#[test]
fn layers_lead_somewhere_and_have_no_empty_blobs() {
    let fleet = FleetKey::from_secret([1; 32]);
    let sign = |layer| {
        let record = Record {
            issued: ISSUED,
            expires: None,
            sequence: 0,
            body: Body::Layer(layer),
        };
        SignedRecord::sign(
            record,
            &fleet_credential(&fleet),
            &MachineKey::from_secret([3; 32]),
        )
    };
    assert!(sign(layer()).is_ok());
    let empty = BlobRef {
        root: root(""),
        size: 0,
    };
    assert!(
        sign(Layer {
            parent: Some(root("t")),
            ..layer()
        })
        .is_err()
    );
    assert!(
        sign(Layer {
            pack: Some(empty),
            ..layer()
        })
        .is_err()
    );
    assert!(
        sign(Layer {
            index: empty,
            ..layer()
        })
        .is_err()
    );
}

#[test]
fn a_token_is_readable_whatever_it_was_made_from() {
    let fleet = FleetKey::from_secret([1; 32]);
    let channels = Channels::Only(
        ["z", "a", "a"]
            .map(|channel| channel.parse().unwrap())
            .to_vec(),
    );
    let grant = Grant {
        id: TokenId([7; 8]),
        roles: Roles::default(),
        channels,
        issued: 0,
        expires: 5000,
    };
    let addresses = [
        "/ip4/192.0.2.1/tcp/1".to_owned(),
        "line\nbreak".into(),
        "x".repeat(257),
    ];
    let token = fleet.invite(grant, [2; 32], &addresses);
    let read = capsule_proto::credential::Token::parse(&token.to_string(), 1).unwrap();
    assert_eq!(read.addresses(), &addresses[..1]);
    assert_eq!(
        read.grant().channels,
        Channels::only(vec!["a".parse().unwrap(), "z".parse().unwrap()])
    );
}

#[test]
fn requests_and_drops_say_what_they_mean() {
    let below = |groups, height| {
        let request = Request {
            id: 1,
            root: root("b"),
            size: 100 << 14,
            groups,
            demand: false,
            compress: false,
            height: Height::new(height).unwrap(),
        };
        Control::decode(&Control::Request(request).encode())
    };
    let request = |groups| below(groups, Height::ROOT.get());
    assert!(request(0..64).is_ok() && request(36..100).is_ok());
    assert!(below(8..16, 3).is_ok() && below(8..16, 36).is_ok());
    assert!(below(7..9, 3).is_err() && below(8..10, 0).is_err());
    assert!(request(0..65).is_err() && request(37..101).is_err() && request(5..5).is_err());
    // Taking nothing back is not taking all back.
    let none = Control::Drop {
        root: root("b"),
        groups: Some(GroupRanges::new()),
    };
    assert_eq!(Control::decode(&none.encode()), Ok(none));
}

#[test]
fn texts_of_peers_cannot_reach_into_a_terminal() {
    let refused = Verdict(Err("no\u{1b}[2J entry\n".into()));
    assert_eq!(
        Verdict::decode(&refused.encode()),
        Ok(Verdict(Err("no[2J entry".into())))
    );
    // A peer that does not clean its texts: field 2, nine bytes.
    assert!(Verdict::decode(b"\x12\x09no\x1b[2J en").is_err());
    let greeting = Greeting {
        protocol: 1,
        credential: vec![],
        revocation: None,
        newest_time: 0,
        agent: "a\r\nb".into(),
        site: String::new(),
    };
    assert_eq!(Greeting::decode(&greeting.encode()).unwrap().agent, "ab");
}
