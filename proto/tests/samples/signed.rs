//! Tokens, credentials and records, with fixed keys.

use std::fmt;

use capsule_proto::credential::{
    Channels, Credential, FleetId, FleetKey, Grant, MachineId, MachineKey, Revoked, Roles, Token,
    TokenId,
};
use capsule_proto::index::Space;
use capsule_proto::record::{BlobRef, Body, Layer, Name, Prefetch, Record, Release, SignedRecord};
use capsule_proto::{CapsuleId, RootHash};

use super::{Case, Encoding, Format, case};

/// The root's secret key.
pub const FLEET_SECRET: [u8; 32] = [1; 32];
/// A time at which everything here holds.
pub const NOW: u64 = 1_780_000_100;
const ISSUED: u64 = 1_780_000_000;
const EXPIRES: u64 = 1_900_000_000;

impl Format for Credential {
    const ENCODING: Encoding = Encoding::Canonical;

    fn encode(&self) -> Vec<u8> {
        self.encode()
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        Self::decode(bytes).map_err(|error| error.to_string())
    }
}

impl Format for SignedRecord {
    const ENCODING: Encoding = Encoding::Canonical;

    fn encode(&self) -> Vec<u8> {
        self.as_bytes().to_vec()
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        Self::decode(bytes).map_err(|error| error.to_string())
    }
}

/// A token's text; a secret key cannot be compared otherwise.
struct TokenText(Token);

impl PartialEq for TokenText {
    fn eq(&self, other: &Self) -> bool {
        let parts = |token: &Token| {
            (
                token.fleet(),
                token.grant().clone(),
                token.addresses().to_vec(),
                token.to_string(),
            )
        };
        parts(&self.0) == parts(&other.0)
    }
}

impl fmt::Debug for TokenText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {:?} {:?}",
            self.0.fleet(),
            self.0.grant(),
            self.0.addresses()
        )
    }
}

impl Format for TokenText {
    // Letters may be of either case, and there may be blanks around.
    const ENCODING: Encoding = Encoding::Pinned;

    fn encode(&self) -> Vec<u8> {
        self.0.to_string().into_bytes()
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
        Token::parse(text, NOW)
            .map(Self)
            .map_err(|error| error.to_string())
    }
}

pub fn cases() -> Vec<Box<dyn Case>> {
    let record = |file, sequence, expires, body| {
        let record = Record {
            issued: ISSUED + 20,
            expires,
            sequence,
            body,
        };
        case(
            file,
            SignedRecord::sign(record, &admin(), &machine()).unwrap(),
        )
    };
    vec![
        case(
            "token.txt",
            TokenText(token(
                Channels::only(vec![name("lab"), name("ci/nightly")]),
                false,
            )),
        ),
        case("token-all.txt", TokenText(token(Channels::All, true))),
        case(
            "credential.hex",
            token(Channels::only(vec![name("lab")]), false).enrol(
                machine().machine(),
                "pc-17",
                ISSUED + 10,
            ),
        ),
        record("record-name.hex", 7, Some(EXPIRES), name_body()),
        record("record-layer.hex", 0, None, layer()),
        record("record-layer-zero.hex", 0, None, zero_layer()),
        record("record-prefetch.hex", 1, None, prefetch()),
        record("record-release.hex", 3, Some(EXPIRES), release()),
        record("record-revocation.hex", 2, None, revocation()),
    ]
}

/// The fleet of all samples.
pub fn fleet() -> FleetId {
    FleetKey::from_secret(FLEET_SECRET).fleet()
}

fn machine() -> MachineKey {
    MachineKey::from_secret([3; 32])
}

fn token(channels: Channels, admin: bool) -> Token {
    let grant = Grant {
        id: TokenId([7; 8]),
        roles: Roles {
            publisher: true,
            admin,
        },
        channels,
        issued: ISSUED,
        expires: EXPIRES,
    };
    let addresses = [
        "/ip4/192.0.2.1/tcp/4001".to_owned(),
        "/dns/publisher.example/tcp/4001".to_owned(),
    ];
    FleetKey::from_secret(FLEET_SECRET).invite(grant, [2; 32], &addresses)
}

fn admin() -> Credential {
    token(Channels::All, true).enrol(machine().machine(), "pc-17", ISSUED + 10)
}

fn name<T: std::str::FromStr<Err: fmt::Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

fn root(of: &str) -> RootHash {
    RootHash::of(of.as_bytes())
}

fn name_body() -> Body {
    Body::Name(Name {
        channel: name("lab"),
        version: name("2026-11"),
        capsule: CapsuleId(root("capsule")),
        manifest_size: 1234,
    })
}

fn layer() -> Body {
    Body::Layer(Layer {
        space: Space::Contents,
        parent: Some(root("parent")),
        target: root("target"),
        target_size: 5 << 30,
        index: BlobRef {
            root: root("index"),
            size: 70_000,
        },
        pack: Some(BlobRef {
            root: root("pack"),
            size: 5_000_000,
        }),
    })
}

/// A layer of zeros alone needs no pack.
fn zero_layer() -> Body {
    Body::Layer(Layer {
        space: Space::Stream,
        parent: None,
        target: root("zeros"),
        target_size: 1 << 20,
        index: BlobRef {
            root: root("index"),
            size: 70,
        },
        pack: None,
    })
}

fn prefetch() -> Body {
    Body::Prefetch(Prefetch {
        component: root("disk"),
        ranges: vec![(1 << 20, 65_536), (0, 4096)],
    })
}

fn release() -> Body {
    Body::Release(Release {
        channel: name("lab"),
        version: name("2026-11"),
        capsule: CapsuleId(root("capsule")),
        percent: 10,
        not_before: ISSUED + 3600,
        deadline: Some(ISSUED + 86_400),
    })
}

fn revocation() -> Body {
    Body::Revocation(Revoked {
        tokens: [TokenId([1; 8]), TokenId([2; 8])].into(),
        machines: [MachineId([5; 32]), MachineId([4; 32])].into(),
    })
}
