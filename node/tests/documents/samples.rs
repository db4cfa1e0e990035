//! A sample of every answer: `full` with all that may be there, else without. A new key must be added here, or this
//! does not compile.

use capsule_node::control::*;
use capsule_node::machine::api::*;
use capsule_node::machine::config::Origin;
use capsule_proto::manifest::{ComponentKind, Machine};
use capsule_proto::{CapsuleId, RootHash};

fn root() -> RootHash {
    RootHash::of(b"sample")
}

fn capsule() -> CapsuleId {
    CapsuleId(root())
}

fn text() -> String {
    "sample".to_owned()
}

pub fn progress(full: bool) -> Progress {
    Progress {
        phase: Phase::Fetching,
        done: 1,
        total: full.then_some(2),
        rate: 1,
        peers: 1,
        written: 1,
        what: full.then(text),
    }
}

pub fn failure(full: bool) -> Failure {
    Failure {
        code: FailureCode::NotFound,
        message: text(),
        hint: full.then(text),
    }
}

fn component() -> ComponentInfo {
    ComponentInfo {
        name: text(),
        kind: "disk".to_owned(),
        root: root(),
        size: 1,
        content_size: 1,
    }
}

pub fn published(full: bool) -> Published {
    Published {
        capsule: capsule(),
        name: text(),
        unchanged: false,
        components: vec![component()],
        content_bytes: 1,
        zero_bytes: 1,
        trimmed_bytes: 1,
        trimmable_bytes: full.then_some(1),
        repeated_bytes: 1,
        parent: full.then(|| "lab:0".into()),
        inherited_bytes: 1,
        copied_bytes: 1,
        referring_bytes: 1,
        unread_bytes: 1,
        pack_bytes: 1,
        index_bytes: 1,
        seconds: 1.5,
        warnings: vec![text()],
    }
}

pub fn rebased(_: bool) -> Rebased {
    Rebased {
        capsule: capsule(),
        name: text(),
        unchanged: false,
        pack_bytes: 1,
        index_bytes: 1,
        seconds: 1.5,
    }
}

pub fn listed(full: bool) -> Listed {
    let listed = ListedCapsule {
        capsule: capsule(),
        names: vec![text()],
        holding: Holding::Complete,
        content_bytes: full.then_some(1),
        stored_bytes: 1,
        kinds: vec!["disk".to_owned()],
        pins: vec![text()],
        conflict: false,
        issued: full.then_some(1),
        added: full.then_some(1),
    };
    Listed {
        capsules: vec![listed],
    }
}

pub fn shown(full: bool) -> Shown {
    let name = NameInfo {
        name: text(),
        capsule: capsule(),
        sequence: 1,
        issued: 1,
        expires: full.then_some(1),
        signer: text(),
        newest: true,
        conflict: false,
    };
    let holder = HolderInfo {
        peer: text(),
        name: full.then(text),
        complete: true,
    };
    Shown {
        capsule: capsule(),
        names: vec![name],
        holding: Holding::Complete,
        manifest_bytes: full.then_some(1),
        components: vec![component()],
        content_bytes: full.then_some(1),
        layers: vec![layer(full)],
        stored_bytes: 1,
        pins: vec![text()],
        added: full.then_some(1),
        holders: vec![holder],
    }
}

fn layer(full: bool) -> LayerInfo {
    let blob = || BlobStatus {
        root: root(),
        size: 1,
        have: 1,
    };
    LayerInfo {
        component: text(),
        parent: full.then(root),
        target: root(),
        space: "stream".to_owned(),
        target_size: 1,
        index: blob(),
        pack: full.then(blob),
        order: 1,
        signer: text(),
        issued: 1,
    }
}

pub fn layer_list(full: bool) -> LayerList {
    LayerList {
        capsule: capsule(),
        layers: vec![layer(full)],
        reads: vec![ReadInfo {
            component: text(),
            space: "stream".to_owned(),
            layers: 1,
            own: 1,
        }],
    }
}

fn planned_component() -> PlannedComponent {
    PlannedComponent {
        component: component(),
        way: "layers".to_owned(),
        layers: 1,
        have: 1,
        inherited: 1,
        copied: 1,
        referring: 1,
        new: 1,
        found: 1,
        fetch: 1,
    }
}

pub fn planned(full: bool) -> Planned {
    Planned {
        capsule: capsule(),
        name: full.then(text),
        components: vec![planned_component()],
        have_bytes: 1,
        fetch_bytes: 1,
        planning_bytes: 1,
        content_bytes: 1,
        seconds: 1.5,
    }
}

pub fn pulled(full: bool) -> Pulled {
    let peer = PeerBytes {
        peer: text(),
        name: full.then(text),
        machine: full.then(text),
        bytes: 1,
    };
    Pulled {
        capsule: capsule(),
        name: full.then(text),
        unchanged: false,
        components: vec![planned_component()],
        fetched_bytes: 1,
        had_bytes: 1,
        planning_bytes: 1,
        content_bytes: 1,
        by_peer: vec![peer],
        planning_seconds: 1.5,
        fetch_seconds: 1.5,
        fetch_cpu_seconds: 1.5,
        check_seconds: 1.5,
        seconds: 1.5,
    }
}

pub fn followed(full: bool) -> Followed {
    Followed {
        channel: text(),
        new: true,
        newest: full.then(text),
    }
}

pub fn unfollowed(_full: bool) -> Unfollowed {
    Unfollowed {
        channel: text(),
        followed: true,
    }
}

pub fn exported(full: bool) -> Exported {
    Exported {
        capsule: capsule(),
        component: component(),
        to: "/sample".into(),
        bytes: 1,
        files: full.then_some(1),
        seconds: 1.5,
        warnings: vec![text()],
    }
}

pub fn serving(full: bool) -> Serving {
    Serving {
        capsule: capsule(),
        name: full.then(text),
        component: component(),
        uri: text(),
        whole_bytes: full.then_some(1),
        whole_seconds: full.then_some(1.5),
    }
}

pub fn mounted(full: bool) -> Mounted {
    Mounted {
        capsule: capsule(),
        name: full.then(text),
        components: vec![component()],
        at: "/sample".into(),
    }
}

pub fn verified(_full: bool) -> Verified {
    let damage = DamageInfo {
        root: root(),
        kind: "pack".to_owned(),
        bytes: 1,
        repaired: 1,
    };
    Verified {
        checked: 1,
        checked_bytes: 1,
        damaged: vec![damage],
        damaged_bytes: 1,
        repaired_bytes: 1,
        seconds: 1.5,
    }
}

pub fn status(full: bool) -> NodeStatus {
    let transfer = TransferInfo {
        capsule: text(),
        progress: progress(full),
    };
    let ban = BanInfo {
        peer: text(),
        name: full.then(text),
        reason: text(),
        until: full.then_some(1),
    };
    let follow = FollowInfo {
        channel: text(),
        newest: full.then(text),
        holding: Holding::Absent,
        since: 1,
        trouble: full.then(text),
    };
    NodeStatus {
        version: text(),
        home: "/sample".into(),
        fleet: text(),
        machine: text(),
        machine_name: text(),
        peer: text(),
        roles: vec!["publisher".to_owned()],
        channels: full.then(|| vec![text()]),
        credential_expires: 1,
        site: full.then(text),
        listening: vec![text()],
        uptime: 1,
        peers: 1,
        banned: 1,
        bans: vec![ban],
        records: 1,
        capsules: 1,
        partial: 1,
        store_bytes: 1,
        quota: full.then_some(1),
        free_bytes: 1,
        sent_bytes: 1,
        received_bytes: 1,
        transfers: vec![transfer],
        follows: vec![follow],
        caps: vec![rate(full)],
        troubles: vec![text()],
    }
}

pub fn peer_list(full: bool) -> PeerList {
    let peer = ConnectedPeer {
        peer: text(),
        name: text(),
        machine: text(),
        roles: vec!["admin".to_owned()],
        address: text(),
        site: full.then(text),
        beyond: false,
        dialled: true,
        rtt: full.then_some(0.5),
        rate_in: 1,
        rate_out: 1,
        bytes_in: 1,
        bytes_out: 1,
        blobs: 1,
        connected: 1,
        have: full.then_some(1),
        have_of: full.then_some(1),
    };
    PeerList { peers: vec![peer] }
}

fn rate(full: bool) -> RateInfo {
    RateInfo {
        direction: "upload".to_owned(),
        peers: PeersWhere::Beyond,
        schedule: text(),
        cap: full.then_some(1),
        next_change: full.then_some(1),
        next_cap: full.then_some(1),
    }
}

pub fn rate_list(full: bool) -> RateList {
    RateList {
        rates: vec![rate(full)],
    }
}

pub fn hash_list(_full: bool) -> HashList {
    let held = HeldHash {
        root: root(),
        kind: "pack".to_owned(),
        size: 1,
        have: 1,
        sent: 1,
        received: 1,
    };
    HashList { hashes: vec![held] }
}

pub fn pinned(_full: bool) -> Pinned {
    Pinned {
        capsule: capsule(),
        changed: true,
        pins: vec![text()],
    }
}

pub fn collected(_full: bool) -> Collected {
    Collected {
        dry_run: true,
        capsules: vec![capsule()],
        blobs: 1,
        punched: 1,
        punched_bytes: 1,
        bytes: 1,
        busy: 1,
    }
}

pub fn removed(_full: bool) -> Removed {
    Removed {
        capsule: capsule(),
        blobs: 1,
        punched: 1,
        punched_bytes: 1,
        bytes: 1,
        busy: 1,
    }
}

/// Both kinds.
pub fn base(of_capsule: bool) -> Base {
    match of_capsule {
        true => Base::Capsule {
            capsule: CapsuleRef(text()),
            component: text(),
        },
        false => Base::File {
            path: "/sample".into(),
        },
    }
}

pub fn captured(full: bool) -> Captured {
    let patch = |full: bool| Patch {
        data: "/sample".into(),
        runs: full.then(|| "/sample".into()),
    };
    Captured {
        name: text(),
        kind: ComponentKind::Disk,
        size: full.then_some(1),
        base: Some(base(full)),
        patches: vec![patch(true), patch(false)],
    }
}

pub fn range() -> ByteRange {
    ByteRange {
        start: 0,
        length: 1,
    }
}

pub fn described(full: bool) -> Described {
    Described {
        capsule: capsule(),
        name: full.then(text),
        components: vec![component()],
        machine: full.then(Machine::default),
        prefetch: vec![ReadFirst {
            component: text(),
            ranges: vec![range()],
        }],
    }
}

pub fn name_free(_full: bool) -> NameFree {
    NameFree { name: text() }
}

pub fn prefetched(_full: bool) -> Prefetched {
    Prefetched {
        component: root(),
        ranges: 1,
    }
}

pub fn origin(full: bool) -> Origin {
    Origin {
        capsule: capsule(),
        name: full.then(text),
    }
}

pub fn machine_info(full: bool) -> MachineInfo {
    MachineInfo {
        name: text(),
        state: MachineState::Running,
        origin: Some(origin(full)),
        resume: true,
        memory: 1,
        cpus: 1,
        disks: 1,
        written: 1,
        read: 1,
        started_seconds: full.then_some(1.5),
        waiting_seconds: full.then_some(1.5),
    }
}

/// Of each kind of origin.
pub fn machine_infos() -> Vec<MachineInfo> {
    let without = MachineInfo {
        origin: None,
        ..machine_info(true)
    };
    vec![machine_info(true), machine_info(false), without]
}

pub fn captured_machine(full: bool) -> CapturedMachine {
    CapturedMachine {
        machine: text(),
        pause_seconds: full.then_some(1.5),
        balloon: true,
        ram_written: 1,
        disk_written: 1,
        published: published(full),
    }
}

pub fn stopped_machine(full: bool) -> StoppedMachine {
    StoppedMachine {
        machine: text(),
        orderly: true,
        capsule: full.then(capsule),
    }
}
