//! Any valid value survives its encoding: made-up manifests, trees, records and messages. (Layers: `index.rs`.)

use std::collections::{BTreeMap, BTreeSet};

use capsule_proto::credential::{
    Channels, FleetKey, Grant, MachineId, MachineKey, Revoked, Roles, TokenId,
};
use capsule_proto::index::Space;
use capsule_proto::listing::{Entry, EntryKind, EntryPath, Listing, Metadata};
use capsule_proto::manifest::{Component, ComponentKind, Machine, Manifest};
use capsule_proto::name::{Channel, Version};
use capsule_proto::ranges::{Height, MAX_CONTENT_LEN, group_count};
use capsule_proto::record::{
    BlobRef, Body, Layer, Name, Prefetch, Record, RecordId, Release, SignedRecord,
};
use capsule_proto::wire::{
    Control, Gateway, HeldCapsule, PeerAddress, Reject, RejectReason, Request, Status,
};
use capsule_proto::{CapsuleId, GroupRanges, RootHash};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;

fn root() -> impl Strategy<Value = RootHash> {
    any::<[u8; 32]>().prop_map(RootHash::from_bytes)
}

fn text() -> impl Strategy<Value = String> {
    "[a-zA-Zäß漢 =/.:-]{0,20}"
}

fn component() -> impl Strategy<Value = Component> {
    let kinds = [
        ComponentKind::Disk,
        ComponentKind::File,
        ComponentKind::Tree,
    ];
    (
        "[a-z0-9_-][a-z0-9._-]{0,63}",
        prop::sample::select(kinds.to_vec()),
        root(),
        0..1u64 << 30,
        0..1u64 << 40,
    )
        .prop_map(|(name, kind, root, size, content)| {
            let content_size = if kind == ComponentKind::Tree {
                content
            } else {
                size
            };
            Component {
                name,
                kind,
                root,
                size,
                content_size,
            }
        })
}

fn manifest() -> impl Strategy<Value = Manifest> {
    let machine = (
        text(),
        text(),
        1u32..4096,
        0..MAX_CONTENT_LEN,
        vec((text(), 0..MAX_CONTENT_LEN), 0..4),
        any::<u64>(),
    );
    let machine = machine.prop_map(
        |(cpu_model, emulator, cpus, ram_size, firmware, captured_at)| Machine {
            machine_type: "q35".into(),
            cpu_model,
            emulator,
            cpus,
            ram_size,
            firmware,
            captured_at,
            ..Machine::default()
        },
    );
    (vec(component(), 1..20), option::of(machine)).prop_map(|(mut components, machine)| {
        components.sort_by(|a, b| a.name.cmp(&b.name));
        components.dedup_by(|a, b| a.name == b.name);
        Manifest {
            components,
            machine,
        }
    })
}

fn meta() -> impl Strategy<Value = Metadata> {
    let xattrs = btree_map(vec(1u8.., 1..8), vec(any::<u8>(), 0..20), 0..3);
    (
        0u16..0o10000,
        any::<u32>(),
        any::<u32>(),
        any::<i64>(),
        0u32..1_000_000_000,
        xattrs,
    )
        .prop_map(|(mode, uid, gid, seconds, nanos, xattrs)| Metadata {
            mode,
            uid,
            gid,
            mtime: (seconds, nanos),
            xattrs: xattrs.into_iter().collect(),
        })
}

fn kind() -> impl Strategy<Value = EntryKind> {
    let device = (any::<u32>(), any::<u32>());
    prop_oneof![
        3 => (0..MAX_CONTENT_LEN >> 10, root()).prop_map(|(size, root)| EntryKind::File { size, root }),
        4 => Just(EntryKind::Directory),
        1 => vec(1u8.., 1..40).prop_map(|target| EntryKind::Symlink { target }),
        2 => any::<u32>().prop_map(|to| EntryKind::HardLink { to }),
        1 => device.prop_map(|(major, minor)| EntryKind::CharDevice { major, minor }),
        1 => device.prop_map(|(major, minor)| EntryKind::BlockDevice { major, minor }),
        1 => Just(EntryKind::Fifo),
        1 => Just(EntryKind::Socket),
    ]
}

/// Names that sort around `/`, share beginnings, and are no UTF-8.
fn entry_name() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![
        Just(b'a'),
        Just(b'b'),
        Just(b'-'),
        Just(b'.'),
        Just(b'0'),
        Just(0xff),
        Just(1)
    ];
    vec(byte, 1..5).prop_filter("a name", |name| name != b"." && name != b"..")
}

fn tree() -> impl Strategy<Value = Vec<Entry>> {
    let child = (any::<prop::sample::Index>(), entry_name(), meta(), kind());
    (meta(), vec(child, 0..60)).prop_map(|(meta, children)| {
        let mut directories = vec![vec![]];
        let mut entries = BTreeMap::from([(EntryPath::root(), (meta, EntryKind::Directory))]);
        for (parent, name, meta, kind) in children {
            let parent: &Vec<u8> = parent.get(&directories);
            let path = if parent.is_empty() {
                name
            } else {
                [&parent[..], b"/", &name].concat()
            };
            let at = EntryPath::new(path.clone()).unwrap();
            if entries.contains_key(&at) {
                continue;
            }
            if kind == EntryKind::Directory {
                directories.push(path);
            }
            entries.insert(at, (meta, kind));
        }
        link(
            entries
                .into_iter()
                .map(|(path, (meta, kind))| Entry { path, meta, kind })
                .collect(),
        )
    })
}

/// Points hard links at an earlier entry that can be linked to; without one they become pipes.
fn link(mut entries: Vec<Entry>) -> Vec<Entry> {
    let mut linkable: Vec<u32> = vec![];
    for at in 0..entries.len() {
        if let EntryKind::HardLink { to } = entries[at].kind {
            if linkable.is_empty() {
                entries[at].kind = EntryKind::Fifo;
            } else {
                let to = linkable[to as usize % linkable.len()];
                entries[at].meta = entries[to as usize].meta.clone();
                entries[at].kind = EntryKind::HardLink { to };
                continue;
            }
        }
        if entries[at].kind != EntryKind::Directory {
            linkable.push(at as u32);
        }
    }
    entries
}

fn channel() -> impl Strategy<Value = Channel> {
    "[a-zA-Z0-9][a-z0-9._+-]{0,20}(/[a-z0-9][a-z.]{0,5}){0,2}"
        .prop_map(|text| text.parse().unwrap())
}

fn version() -> impl Strategy<Value = Version> {
    "[0-9a-z][a-z0-9._+-]{0,30}".prop_map(|text| text.parse().unwrap())
}

fn blob(bound: u64) -> impl Strategy<Value = BlobRef> {
    (root(), 1..bound).prop_map(|(root, size)| BlobRef { root, size })
}

fn body() -> impl Strategy<Value = Body> {
    let capsule = || root().prop_map(CapsuleId);
    let name = (channel(), version(), capsule(), 0u64..1 << 18).prop_map(
        |(channel, version, capsule, manifest_size)| {
            Body::Name(Name {
                channel,
                version,
                capsule,
                manifest_size,
            })
        },
    );
    let layer = (
        any::<bool>(),
        option::of(root()),
        root(),
        0..MAX_CONTENT_LEN,
        blob(1 << 34),
        option::of(blob(MAX_CONTENT_LEN)),
    )
        .prop_map(|(contents, parent, target, target_size, index, pack)| {
            let space = if contents {
                Space::Contents
            } else {
                Space::Stream
            };
            Body::Layer(Layer {
                space,
                parent,
                target,
                target_size,
                index,
                pack,
            })
        });
    let prefetch = (
        root(),
        vec((0..MAX_CONTENT_LEN / 2, 1..MAX_CONTENT_LEN / 2), 0..50),
    )
        .prop_map(|(component, ranges)| Body::Prefetch(Prefetch { component, ranges }));
    let release = (
        channel(),
        version(),
        capsule(),
        0u8..=100,
        any::<u64>(),
        option::of(any::<u64>()),
    )
        .prop_map(
            |(channel, version, capsule, percent, not_before, deadline)| {
                Body::Release(Release {
                    channel,
                    version,
                    capsule,
                    percent,
                    not_before,
                    deadline,
                })
            },
        );
    let tokens = btree_set(any::<[u8; 8]>().prop_map(TokenId), 0..20);
    let machines = btree_set(any::<[u8; 32]>().prop_map(MachineId), 0..20);
    let revocation = (tokens, machines)
        .prop_map(|(tokens, machines)| Body::Revocation(Revoked { tokens, machines }));
    prop_oneof![name, layer, prefetch, release, revocation]
}

fn groups() -> impl Strategy<Value = GroupRanges> {
    vec((0u64..1 << 30, 1u64..1 << 20), 1..100).prop_map(|runs| {
        runs.into_iter()
            .map(|(start, len)| start..start + len)
            .collect()
    })
}

fn control() -> impl Strategy<Value = Control> {
    let ids = || vec(root().prop_map(RecordId), 0..20);
    let reasons = [
        RejectReason::NotHeld,
        RejectReason::Busy,
        RejectReason::Damaged,
        RejectReason::Cancelled,
    ];
    let request = (
        any::<u64>(),
        root(),
        1..MAX_CONTENT_LEN,
        any::<u64>(),
        1u64..=64,
        any::<bool>(),
        any::<bool>(),
    );
    let peer = (
        any::<[u8; 32]>().prop_map(MachineId),
        vec("[a-z0-9/.]{0,100}", 1..16),
        "[a-z0-9 ]{0,64}",
    )
        .prop_map(|(machine, addresses, site)| PeerAddress {
            machine,
            addresses,
            site,
        });
    let gateway = (
        root(),
        any::<[u8; 32]>().prop_map(MachineId),
        any::<u64>(),
        groups(),
    )
        .prop_map(|(root, machine, sequence, groups)| {
            Control::Gateway(Gateway {
                root,
                machine,
                sequence,
                groups,
            })
        });
    prop_oneof![
        (root(), MAX_CONTENT_LEN / 2..MAX_CONTENT_LEN, groups())
            .prop_map(|(root, size, groups)| Control::Have { root, size, groups }),
        (
            root(),
            option::of(prop_oneof![groups(), Just(GroupRanges::new())])
        )
            .prop_map(|(root, groups)| Control::Drop { root, groups }),
        request.prop_map(|(id, root, size, first, count, demand, compress)| {
            let first = first % group_count(size);
            let groups = first..(first + count).min(group_count(size));
            let heights = (0..=Height::ROOT.get()).filter_map(Height::new);
            let spanning: Vec<_> = heights.filter(|height| height.spans(&groups)).collect();
            Control::Request(Request {
                id,
                root,
                size,
                height: spanning[id as usize % spanning.len()],
                groups,
                demand,
                compress,
            })
        }),
        any::<u64>().prop_map(|id| Control::Cancel { id }),
        (any::<u64>(), prop::sample::select(reasons.to_vec()))
            .prop_map(|(id, reason)| Control::Reject(Reject { id, reason })),
        (any::<u64>(), root()).prop_map(|(count, digest)| Control::RecordSummary { count, digest }),
        (ids(), any::<bool>()).prop_map(|(ids, last)| Control::RecordIds { ids, last }),
        ids().prop_map(|ids| Control::RecordWant { ids }),
        vec(vec(any::<u8>(), 0..50), 0..5).prop_map(|records| Control::Records { records }),
        vec(peer, 0..10).prop_map(Control::Peers),
        any::<u64>().prop_map(|nonce| Control::Ping { nonce }),
        any::<u64>().prop_map(|nonce| Control::Pong { nonce }),
        root().prop_map(|root| Control::SizeQuery { root }),
        gateway,
    ]
}

proptest! {
    #[test]
    fn manifests(manifest in manifest()) {
        let bytes = manifest.encode();
        prop_assert_eq!(Manifest::decode(&bytes), Ok(manifest.clone()));
        prop_assert_eq!(manifest.id(), CapsuleId(RootHash::of(&bytes)));
    }

    #[test]
    fn listings(entries in tree()) {
        let listing = Listing::new(entries.clone()).unwrap();
        prop_assert_eq!(listing.entries(), &entries[..]);
        prop_assert_eq!(Listing::decode(&listing.encode()), Ok(listing.clone()));
        // What is in a directory follows it without a gap: the oracle looks at all pairs.
        for (at, dir) in entries.iter().enumerate().filter(|(_, entry)| entry.kind == EntryKind::Directory) {
            let inside = |entry: &Entry| dir.path.is_root() || entry.path.as_bytes().starts_with(&[dir.path.as_bytes(), b"/"].concat());
            let positions: BTreeSet<usize> = (0..entries.len()).filter(|&i| i != at && inside(&entries[i])).collect();
            prop_assert_eq!(&positions, &(at + 1..at + 1 + positions.len()).collect());
        }
    }

    #[test]
    fn records(body in body(), issued in 100..u64::MAX / 2, sequence: u64, lasts in option::of(1u64..1000)) {
        let grant = Grant {
            id: TokenId([1; 8]),
            roles: Roles { publisher: true, admin: true },
            channels: Channels::All,
            issued: 0,
            expires: u64::MAX,
        };
        let (fleet, machine) = (FleetKey::from_secret([1; 32]), MachineKey::from_secret([3; 32]));
        let credential = fleet.invite(grant, [2; 32], &[]).enrol(machine.machine(), "pc", 50);
        let record = Record { issued, expires: lasts.map(|lasts| issued + lasts), sequence, body };
        let signed = SignedRecord::sign(record.clone(), &credential, &machine).unwrap();
        prop_assert_eq!(signed.record(), &record);
        prop_assert_eq!(SignedRecord::decode(signed.as_bytes()), Ok(signed.clone()));
        prop_assert!(signed.verify(&fleet.fleet(), issued, &Revoked::default()).is_ok());
    }

    #[test]
    fn control_messages(message in control()) {
        prop_assert_eq!(Control::decode(&message.encode()), Ok(message));
    }

    #[test]
    fn statuses(
        machine: [u8; 32],
        sequence: u64,
        capsules in vec((root(), any::<bool>()), 0..512),
        addresses in vec("[a-z0-9/.]{0,256}", 0..16),
        name in "[a-zä ]{0,32}",
        site in "[a-z0-9]{0,64}",
    ) {
        let capsules = capsules.into_iter().map(|(root, complete)| HeldCapsule { id: CapsuleId(root), complete }).collect();
        let status = Status { machine: MachineId(machine), sequence, capsules, addresses, name, site };
        prop_assert_eq!(Status::decode(&status.encode()), Ok(status.clone()));
        let control = Control::Status(status);
        prop_assert_eq!(Control::decode(&control.encode()), Ok(control));
    }

    // What a member makes of its own settings must never be a message that its peers refuse.
    #[test]
    fn our_own_texts_are_made_to_fit(name in any::<String>(), addresses in vec(any::<String>(), 0..30), long in 0usize..400) {
        let name = name + &"ä".repeat(long);
        let status = Status {
            machine: MachineId([1; 32]),
            sequence: 0,
            capsules: vec![HeldCapsule { id: CapsuleId(RootHash::of(b"")), complete: true }; 600],
            addresses: addresses.iter().cloned().chain(["a".repeat(long)]).collect(),
            name: name.clone(),
            site: name,
        };
        prop_assert!(Status::decode(&status.encode()).is_ok());
        let peer = PeerAddress { machine: MachineId([1; 32]), addresses, site: "s".repeat(long) };
        prop_assert!(Control::decode(&Control::Peers(vec![peer; 100]).encode()).is_ok());
    }
}
