//! Handshake, frames, control messages and status.

use capsule_proto::credential::MachineId;
use capsule_proto::ranges::Height;
use capsule_proto::record::RecordId;
use capsule_proto::wire::{
    Control, DataHeader, FrameHeader, FrameKind, Gateway, Greeting, HeldCapsule, PeerAddress,
    Reject, RejectReason, Request, Status, Verdict,
};
use capsule_proto::{CapsuleId, GroupRanges, RootHash};

use super::{Case, Encoding, Format, case};

macro_rules! protobuf {
    ($($type:ty),*) => {$(
        impl Format for $type {
            // Protobuf: fields may come in any order, and unknown ones are skipped.
            const ENCODING: Encoding = Encoding::Pinned;

            fn encode(&self) -> Vec<u8> {
                self.encode()
            }

            fn decode(bytes: &[u8]) -> Result<Self, String> {
                Self::decode(bytes).map_err(|error| error.to_string())
            }
        }
    )*};
}
protobuf!(Greeting, Verdict, Control, Status);

macro_rules! fixed {
    ($($type:ty),*) => {$(
        impl Format for $type {
            const ENCODING: Encoding = Encoding::Canonical;

            fn encode(&self) -> Vec<u8> {
                self.encode().to_vec()
            }

            fn decode(bytes: &[u8]) -> Result<Self, String> {
                let bytes = bytes.try_into().map_err(|_| "another length".to_owned())?;
                Self::decode(bytes).map_err(|error| error.to_string())
            }
        }
    )*};
}
fixed!(FrameHeader, DataHeader);

pub fn cases() -> Vec<Box<dyn Case>> {
    let mut cases = vec![
        case("greeting.hex", greeting()),
        case("verdict-accepted.hex", Verdict(Ok(()))),
        case(
            "verdict-refused.hex",
            Verdict(Err("the credential expired".into())),
        ),
        case(
            "frame-control.hex",
            FrameHeader {
                kind: FrameKind::Control,
                len: 300,
            },
        ),
        case(
            "frame-data.hex",
            FrameHeader {
                kind: FrameKind::Data,
                len: 16_397,
            },
        ),
        case(
            "data-header.hex",
            DataHeader {
                request: 99,
                groups: 64,
                compressed: true,
            },
        ),
        case("status.hex", status()),
        case(
            "greeting-site.hex",
            Greeting {
                site: "lab".into(),
                ..greeting()
            },
        ),
    ];
    cases.extend(
        controls()
            .into_iter()
            .map(|(file, control)| case(file, control)),
    );
    cases
}

fn root(of: &str) -> RootHash {
    RootHash::of(of.as_bytes())
}

fn greeting() -> Greeting {
    Greeting {
        protocol: 1,
        credential: b"a credential".into(),
        revocation: Some(b"a record".into()),
        newest_time: 1_780_000_000,
        agent: "capsule/0.1.0".into(),
        site: String::new(),
    }
}

fn status() -> Status {
    Status {
        machine: MachineId([3; 32]),
        sequence: 5,
        capsules: vec![
            HeldCapsule {
                id: CapsuleId(root("one")),
                complete: true,
            },
            HeldCapsule {
                id: CapsuleId(root("two")),
                complete: false,
            },
        ],
        addresses: vec!["/ip4/192.0.2.1/tcp/4001".into()],
        name: "pc-17".into(),
        site: "lab".into(),
    }
}

fn controls() -> Vec<(&'static str, Control)> {
    let groups: GroupRanges = [0..3, 10..11, 500..1000].into_iter().collect();
    let id = |of| RecordId(root(of));
    let peer = PeerAddress {
        machine: MachineId([4; 32]),
        addresses: vec!["/ip4/192.0.2.4/tcp/4001".into()],
        site: String::new(),
    };
    let request = Request {
        id: 99,
        root: root("pack"),
        size: 20 << 20,
        groups: 64..128,
        demand: true,
        compress: true,
        height: Height::of(128),
    };
    vec![
        (
            "control-have.hex",
            Control::Have {
                root: root("pack"),
                size: 20 << 20,
                groups: groups.clone(),
            },
        ),
        (
            "control-drop.hex",
            Control::Drop {
                root: root("pack"),
                groups: Some(groups.clone()),
            },
        ),
        (
            "control-drop-all.hex",
            Control::Drop {
                root: root("pack"),
                groups: None,
            },
        ),
        (
            "control-drop-none.hex",
            Control::Drop {
                root: root("pack"),
                groups: Some(GroupRanges::new()),
            },
        ),
        ("control-request.hex", Control::Request(request)),
        ("control-cancel.hex", Control::Cancel { id: 99 }),
        (
            "control-reject.hex",
            Control::Reject(Reject {
                id: 99,
                reason: RejectReason::Busy,
            }),
        ),
        (
            "control-record-summary.hex",
            Control::RecordSummary {
                count: 3,
                digest: root("ids"),
            },
        ),
        (
            "control-record-ids.hex",
            Control::RecordIds {
                ids: vec![id("a"), id("b")],
                last: true,
            },
        ),
        (
            "control-record-want.hex",
            Control::RecordWant { ids: vec![id("a")] },
        ),
        (
            "control-records.hex",
            Control::Records {
                records: vec![b"a record".into(), b"another".into()],
            },
        ),
        (
            "control-peers-site.hex",
            Control::Peers(vec![PeerAddress {
                site: "lab".into(),
                ..peer.clone()
            }]),
        ),
        ("control-peers.hex", Control::Peers(vec![peer])),
        ("control-ping.hex", Control::Ping { nonce: 300 }),
        ("control-pong.hex", Control::Pong { nonce: 300 }),
        (
            "control-size-query.hex",
            Control::SizeQuery { root: root("pack") },
        ),
        (
            "control-gateway.hex",
            Control::Gateway(Gateway {
                root: root("pack"),
                machine: MachineId([4; 32]),
                sequence: 7,
                groups: groups.clone(),
            }),
        ),
        ("control-status.hex", Control::Status(status())),
    ]
}
