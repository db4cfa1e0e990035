//! Manifests, listings and indexes.

use capsule_proto::index::{
    Codec, Frame, Index, IndexBuilder, IndexHeader, Reference, ReferenceTo, Run, RunFrom, Source,
    SourceKind, Space, Span,
};
use capsule_proto::listing::{Entry, EntryKind, EntryPath, Listing, Metadata};
use capsule_proto::manifest::{Component, ComponentKind, Device, DirectBoot, Machine, Manifest};
use capsule_proto::{FrameHash, RootHash};

use super::{Case, Encoding, Format, case};

impl Format for Manifest {
    const ENCODING: Encoding = Encoding::Canonical;

    fn encode(&self) -> Vec<u8> {
        self.encode()
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        Self::decode(bytes).map_err(|error| error.to_string())
    }
}

impl Format for Listing {
    const ENCODING: Encoding = Encoding::Canonical;

    fn encode(&self) -> Vec<u8> {
        self.encode()
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        Self::decode(bytes).map_err(|error| error.to_string())
    }
}

/// What an index says, however it is cut into pages.
#[derive(Debug, PartialEq)]
struct Layer {
    header: IndexHeader,
    runs: Vec<Run>,
    frames: Vec<Frame>,
}

impl Format for Layer {
    // Its pages are compressed, and every compressor does that in its own way.
    const ENCODING: Encoding = Encoding::Free;

    fn encode(&self) -> Vec<u8> {
        let mut builder = IndexBuilder::new();
        self.frames
            .iter()
            .for_each(|frame| assert!(builder.push_frame(frame.clone()).is_ok()));
        self.runs
            .iter()
            .for_each(|run| assert!(builder.push_run(*run).is_ok()));
        builder.finish(&self.header)
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        let Index {
            directory,
            runs,
            frames,
        } = Index::decode(bytes).map_err(|error| error.to_string())?;
        Ok(Self {
            header: directory.header().clone(),
            runs,
            frames,
        })
    }
}

pub fn cases() -> Vec<Box<dyn Case>> {
    vec![
        case(
            "manifest-file.hex",
            Manifest::new(vec![component("data", ComponentKind::File, 5, 5)]).unwrap(),
        ),
        case(
            "manifest-tree.hex",
            Manifest::new(vec![component("tree", ComponentKind::Tree, 300, 1 << 33)]).unwrap(),
        ),
        case("manifest-machine.hex", machine()),
        case(
            "listing-empty.hex",
            Listing::new(vec![entry("", EntryKind::Directory)]).unwrap(),
        ),
        case("listing-all.hex", listing()),
        case("index-empty.hex", empty()),
        case("index-plain.hex", plain()),
        case("index-update.hex", update()),
        case("index-code.hex", code()),
        case("index-contents.hex", contents()),
        case("index-pages.hex", pages()),
    ]
}

fn root(of: &str) -> RootHash {
    RootHash::of(of.as_bytes())
}

fn component(name: &str, kind: ComponentKind, size: u64, content_size: u64) -> Component {
    Component {
        name: name.into(),
        kind,
        root: root(name),
        size,
        content_size,
    }
}

fn machine() -> Manifest {
    let components = vec![
        component("disk0", ComponentKind::Disk, 20 << 30, 20 << 30),
        component("home", ComponentKind::Tree, 123_456, 7 << 30),
        component("initrd", ComponentKind::File, 40_000_000, 40_000_000),
        component("ram", ComponentKind::Ram, 2 << 30, 2 << 30),
        component("state", ComponentKind::DeviceState, 345_678, 345_678),
        component("vmlinuz", ComponentKind::File, 8_000_001, 8_000_001),
    ];
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let disk = Device {
        driver: "virtio-blk-pci".into(),
        id: "disk0".into(),
        address: "0x4".into(),
        component: Some("disk0".into()),
        properties: vec![pair("bootindex", "1"), pair("serial", "cap-0")],
    };
    let card = Device {
        driver: "virtio-net-pci".into(),
        id: "net0".into(),
        address: "0x5".into(),
        component: None,
        properties: vec![pair("mac", "52:54:00:12:34:56")],
    };
    let machine = Machine {
        machine_type: "pc-q35-7.2".into(),
        cpu_model: "qemu64-v1".into(),
        accelerator: "tcg".into(),
        emulator: "7.2.19".into(),
        cpus: 2,
        ram_size: 2 << 30,
        ram_id: "ram0".into(),
        ram: Some("ram".into()),
        state: Some("state".into()),
        devices: vec![disk, card],
        firmware: vec![("bios-256k.bin".into(), 262_144)],
        boot: Some(DirectBoot {
            kernel: "vmlinuz".into(),
            initrd: Some("initrd".into()),
            append: "root=/dev/vda console=ttyS0".into(),
        }),
        guest_tools: vec!["qemu-ga".into(), "balloon".into()],
        captured_at: 1_780_000_000,
    };
    let manifest = Manifest {
        components,
        machine: Some(machine),
    };
    Manifest::decode(&manifest.encode()).unwrap()
}

fn entry(path: &str, kind: EntryKind) -> Entry {
    let meta = Metadata {
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: (1_780_000_000, 0),
        xattrs: vec![],
    };
    Entry {
        path: EntryPath::new(path).unwrap(),
        meta,
        kind,
    }
}

/// An entry of each kind, and of each peculiarity of metadata.
fn listing() -> Listing {
    let file = |size, of| EntryKind::File {
        size,
        root: root(of),
    };
    let mut owned = entry("dir/file", file(300, "300 bytes"));
    owned.meta = Metadata {
        mode: 0o4755,
        uid: 1000,
        gid: u32::MAX,
        mtime: (-1, 999_999_999),
        xattrs: vec![
            (b"security.capability".into(), vec![1, 0, 0, 2]),
            (b"user.note".into(), b"".into()),
        ],
    };
    let linked = Entry {
        path: EntryPath::new("dir/link").unwrap(),
        kind: EntryKind::HardLink { to: 2 },
        ..owned.clone()
    };
    let not_utf8 = Entry {
        path: EntryPath::new(vec![b'z', 0xff]).unwrap(),
        ..entry("", file(0, ""))
    };
    let entries = vec![
        entry("", EntryKind::Directory),
        entry("dir", EntryKind::Directory),
        owned,
        linked,
        entry("dir-after", EntryKind::Socket),
        entry("fifo", EntryKind::Fifo),
        entry("null", EntryKind::CharDevice { major: 1, minor: 3 }),
        entry("sda", EntryKind::BlockDevice { major: 8, minor: 0 }),
        entry(
            "symlink",
            EntryKind::Symlink {
                target: b"../outside".into(),
            },
        ),
        not_utf8,
    ];
    Listing::new(entries).unwrap()
}

fn frame(pack_offset: u64, pack_len: u32, len: u32, codec: Codec) -> Frame {
    let hash = FrameHash::of(&len.to_le_bytes());
    Frame {
        pack_offset,
        pack_len,
        len,
        codec,
        hash,
        depth: 0,
        references: vec![],
        spans: vec![],
    }
}

const fn run(start: u64, len: u64, from: RunFrom) -> Run {
    Run { start, len, from }
}

fn header(
    space: Space,
    parent: Option<&str>,
    target_size: u64,
    sources: Vec<Source>,
) -> IndexHeader {
    IndexHeader {
        space,
        parent: parent.map(root),
        target: root("target"),
        target_size,
        sources,
    }
}

/// The layer of an empty file.
fn empty() -> Layer {
    Layer {
        header: header(Space::Stream, None, 0, vec![]),
        runs: vec![],
        frames: vec![],
    }
}

/// A stream from nothing: zeros, and new content.
fn plain() -> Layer {
    let spans = [30_000, 35_536].map(|len| Span {
        len,
        hash: FrameHash::of(&[len as u8]),
    });
    Layer {
        header: header(Space::Stream, None, 200_000, vec![]),
        runs: vec![
            run(0, 65_536, RunFrom::Frame { id: 0, offset: 0 }),
            run(65_536, 100_000, RunFrom::Zero),
            run(165_536, 34_464, RunFrom::Frame { id: 1, offset: 0 }),
        ],
        frames: vec![
            Frame {
                spans: spans.to_vec(),
                ..frame(0, 20_000, 65_536, Codec::Zstd)
            },
            frame(20_000, 34_464, 34_464, Codec::Stored),
        ],
    }
}

fn sources() -> Vec<Source> {
    let source = |kind, of, space, size| Source {
        kind,
        root: root(of),
        space,
        size,
    };
    vec![
        source(SourceKind::Parent, "parent", Space::Stream, 1 << 20),
        source(SourceKind::ParentCapsule, "tree", Space::Contents, 5 << 20),
        source(SourceKind::SameCapsule, "disk", Space::Stream, 1 << 30),
    ]
}

/// An update of a stream: all kinds of runs, sources, codecs and references; bytes that are inherited before, between
/// and behind the runs.
fn update() -> Layer {
    let to = |to, offset, len| Reference { to, offset, len };
    let delta = Frame {
        references: vec![
            to(ReferenceTo::Source(0), 4096, 8192),
            to(ReferenceTo::Source(2), 1 << 29, 1000),
        ],
        ..frame(5000, 300, 9000, Codec::ZstdReferences)
    };
    let of_frames = Frame {
        depth: 1,
        references: vec![
            to(ReferenceTo::Frame(1), 100, 8900),
            to(ReferenceTo::Frame(0), 0, 5000),
        ],
        ..frame(5300, 200, 9000, Codec::ZstdReferences)
    };
    let difference = Frame {
        depth: 2,
        references: vec![to(ReferenceTo::Frame(2), 0, 9000)],
        spans: vec![Span {
            len: 9000,
            hash: FrameHash::of(b"span"),
        }],
        ..frame(5500, 100, 9000, Codec::Difference)
    };
    let with_dictionary = Frame {
        references: vec![to(ReferenceTo::Source(1), 7, 100_000)],
        ..frame(5900, 40, 3000, Codec::LzmaReferences)
    };
    let patch = Frame {
        references: vec![to(ReferenceTo::Source(0), 0, 500)],
        ..frame(5940, 60, 4000, Codec::Patch)
    };
    Layer {
        header: header(Space::Stream, Some("parent"), 1 << 20, sources()),
        runs: vec![
            run(4096, 5000, RunFrom::Frame { id: 0, offset: 0 }),
            run(9096, 8900, RunFrom::Frame { id: 1, offset: 100 }),
            run(
                20_000,
                4000,
                RunFrom::Copy {
                    source: 0,
                    offset: 0,
                },
            ),
            run(
                24_000,
                4000,
                RunFrom::Copy {
                    source: 1,
                    offset: (5 << 20) - 4000,
                },
            ),
            run(28_000, 1, RunFrom::Zero),
            run(28_001, 9000, RunFrom::Frame { id: 3, offset: 0 }),
            run(50_000, 9000, RunFrom::Frame { id: 2, offset: 0 }),
            run(60_000, 100, RunFrom::Frame { id: 1, offset: 0 }),
            run(61_000, 7000, RunFrom::Frame { id: 4, offset: 0 }),
            run(68_000, 3000, RunFrom::Frame { id: 5, offset: 0 }),
            run(71_000, 4000, RunFrom::Frame { id: 6, offset: 0 }),
        ],
        frames: vec![
            frame(0, 5000, 5000, Codec::Stored),
            delta,
            of_frames,
            difference,
            frame(5600, 300, 7000, Codec::Lzma),
            with_dictionary,
            patch,
        ],
    }
}

/// An update of a program: a patch of code, against the old one and an earlier frame.
fn code() -> Layer {
    let to = |to, offset, len| Reference { to, offset, len };
    let patch = Frame {
        depth: 1,
        references: vec![
            to(ReferenceTo::Source(0), 4096, 50_000),
            to(ReferenceTo::Frame(0), 200, 800),
        ],
        ..frame(700, 90, 49_000, Codec::CodePatch)
    };
    let parent = sources().into_iter().take(1).collect();
    Layer {
        header: header(Space::Stream, Some("parent"), 1 << 20, parent),
        runs: vec![
            run(4096, 1000, RunFrom::Frame { id: 0, offset: 0 }),
            run(5096, 49_000, RunFrom::Frame { id: 1, offset: 0 }),
        ],
        frames: vec![frame(0, 700, 1000, Codec::Zstd), patch],
    }
}

/// A tree's contents that grew: what the parent does not reach is mentioned.
fn contents() -> Layer {
    let parent = Source {
        kind: SourceKind::Parent,
        root: root("tree"),
        space: Space::Contents,
        size: 1000,
    };
    Layer {
        header: header(Space::Contents, Some("tree"), 1500, vec![parent]),
        runs: vec![run(900, 600, RunFrom::Frame { id: 0, offset: 0 })],
        frames: vec![frame(0, 400, 600, Codec::Zstd)],
    }
}

/// More runs and frames than one page holds of either.
fn pages() -> Layer {
    let frames = (0..2500)
        .map(|id| frame(id * 1000, 1000, 4096, Codec::Zstd))
        .collect();
    let runs = (0..5000).map(|i| {
        let from = if i % 2 == 0 {
            RunFrom::Frame {
                id: i as u32 / 2,
                offset: 0,
            }
        } else {
            RunFrom::Zero
        };
        run(i * 4096, 4096, from)
    });
    Layer {
        header: header(Space::Stream, None, 5000 * 4096, vec![]),
        runs: runs.collect(),
        frames,
    }
}
