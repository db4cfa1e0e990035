//! A publisher with every right, whose capsules are wrong: manifests, listings, indexes and packs that are cut, flipped, made up, or
//! bombs. Every byte arrives as its hash says, so nobody is to blame but who signed; the pull is refused with the reason,
//! nothing is kept as good, and whatever else there is goes on.

use std::fs;

use capsule_proto::index::{Codec, Frame, IndexBuilder, IndexHeader, Run, RunFrom, Space};
use capsule_proto::listing::{Entry, EntryKind, EntryPath, Listing, Metadata};
use capsule_proto::manifest::ComponentKind;
use capsule_proto::{FrameHash, RootHash};
use capsule_tests::shelf::{Encoded, Shelf, component, encoded};
use capsule_tests::{Fleet, data};

/// A layer of one frame of zstd, whatever it unfolds to.
fn one_frame(packed: Vec<u8>, root: RootHash, len: u32) -> Encoded {
    let frame = Frame {
        pack_offset: 0,
        pack_len: packed.len() as u32,
        len,
        codec: Codec::Zstd,
        hash: FrameHash([0; 16]),
        depth: 0,
        references: Vec::new(),
        spans: Vec::new(),
    };
    let mut builder = IndexBuilder::new();
    let id = builder.push_frame(frame).unwrap();
    let run = Run {
        start: 0,
        len: len.into(),
        from: RunFrom::Frame { id, offset: 0 },
    };
    builder.push_run(run).unwrap();
    let header = IndexHeader {
        space: Space::Stream,
        parent: None,
        target: root,
        target_size: len.into(),
        sources: Vec::new(),
    };
    (builder.finish(&header), packed)
}

fn entry(path: &str, kind: EntryKind) -> Entry {
    let meta = Metadata {
        mode: 0o755,
        ..Metadata::default()
    };
    let path = EntryPath::new(path).unwrap();
    Entry { path, meta, kind }
}

/// The one place where a piece of a listing stands, replaced.
fn replace(listing: &[u8], old: &[u8], new: &[u8]) -> Vec<u8> {
    let mut places = (0..listing.len()).filter(|at| listing[*at..].starts_with(old));
    let (Some(at), None) = (places.next(), places.next()) else {
        panic!("{old:?} stands in there once");
    };
    [&listing[..at], new, &listing[at + old.len()..]].concat()
}

/// Fills a shelf; the versions on it, with what is said of each.
fn fill(shelf: &mut Shelf) -> Vec<(&'static str, &'static str)> {
    let content = data::prose(91, 300_000);
    let (root, size) = (RootHash::of(&content), content.len() as u64);
    let good = encoded(&content, root);
    let manifest = component(ComponentKind::File, root, size, size);
    shelf.name("manifest-of-noise", data::noise(92, 400));
    shelf.name(
        "manifest-cut-short",
        manifest[..manifest.len() - 1].to_vec(),
    );
    shelf.name("manifest-with-more", [&manifest[..], &[0]].concat());

    // Each of its own target, so that no other layer leads there.
    let mut number = 0;
    let mut lost = || {
        number += 1;
        RootHash::of(&[number])
    };
    let (a, b, c, d, e, f, g, h) = (
        lost(),
        lost(),
        lost(),
        lost(),
        lost(),
        lost(),
        lost(),
        lost(),
    );
    let of = |root| encoded(&content, root);
    let flipped = |bytes: &[u8], at: usize| {
        let mut bytes = bytes.to_vec();
        bytes[at] ^= 1;
        bytes
    };
    shelf.file(
        "index-of-noise",
        a,
        size,
        (data::noise(93, 500), good.1.clone()),
    );
    let index = of(b).0;
    let cut = index[..index.len() - 1].to_vec();
    shelf.file("index-cut-short", b, size, (cut, good.1.clone()));
    let index = of(c).0;
    let bad = flipped(&index, index.len() - 3);
    shelf.file("index-flipped", c, size, (bad, good.1.clone()));
    shelf.file("index-of-another", d, size, good.clone());
    let noise = data::noise(94, good.1.len());
    shelf.file("pack-of-noise", e, size, (of(e).0, noise));
    let bad = flipped(&good.1, good.1.len() / 2);
    shelf.file("pack-flipped", f, size, (of(f).0, bad));
    shelf.file("content-of-another", g, size, of(g));
    // A gigabyte of zeros, which says that it is a megabyte.
    let bomb = zstd_of_zeros(1 << 30);
    shelf.file("bomb", h, 1 << 20, one_frame(bomb, h, 1 << 20));

    let file = |name: &str| {
        let kind = EntryKind::File {
            size: 0,
            root: RootHash::of(b""),
        };
        entry(name, kind)
    };
    let listing = |entries: Vec<Entry>| {
        let top = entry("", EntryKind::Directory);
        Listing::new([vec![top], entries].concat())
            .unwrap()
            .encode()
    };
    let inner = listing(vec![entry("aa", EntryKind::Directory), file("aa/stray")]);
    shelf.tree("listing-of-noise", &data::noise(95, 700));
    shelf.tree("listing-cut-short", &inner[..inner.len() - 1]);
    shelf.tree("listing-that-goes-up", &replace(&inner, b"aa", b".."));
    let absolute = replace(&listing(vec![file("xtmp-stray")]), b"xtmp", b"/tmp");
    shelf.tree("listing-from-the-top", &absolute);
    let target = b"/tmp".to_vec();
    let link = entry("ab", EntryKind::Symlink { target });
    let beside = listing(vec![link, file("ac")]);
    let through = replace(&beside, &[1, 1, b'c'], &[2, 2, b'/', b'c']);
    shelf.tree("listing-through-a-link", &through);

    let no_capsule = "is not a capsule";
    let (no_layers, other) = (
        "not what their records say",
        "is not what the manifest says",
    );
    vec![
        ("manifest-of-noise", no_capsule),
        ("manifest-cut-short", no_capsule),
        ("manifest-with-more", no_capsule),
        ("index-of-noise", no_layers),
        ("index-cut-short", no_layers),
        ("index-flipped", other),
        ("index-of-another", no_layers),
        ("pack-of-noise", other),
        ("pack-flipped", other),
        ("content-of-another", other),
        ("bomb", other),
        ("listing-of-noise", "malformed"),
        ("listing-cut-short", "malformed"),
        ("listing-that-goes-up", "malformed"),
        ("listing-from-the-top", "malformed"),
        ("listing-through-a-link", "malformed"),
    ]
}

/// Zeros, packed by whoever packs a lot of them into little.
fn zstd_of_zeros(len: usize) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    let zeros = vec![0; 1 << 20];
    for _ in 0..len >> 20 {
        std::io::Write::write_all(&mut encoder, &zeros).unwrap();
    }
    encoder.finish().unwrap()
}

#[test]
fn wrong_capsules_are_refused_with_the_reason_and_nothing_is_kept_as_good() {
    let fleet = Fleet::of(1);
    let node = &fleet[0];
    let token = fleet.invite(&["--role", "publisher", "--channel", "lab"]);
    let mut shelf = Shelf::of(&token, 96);
    let versions = fill(&mut shelf);
    // One that is right: its publisher is trusted as before.
    let content = data::prose(97, 200_000);
    let root = RootHash::of(&content);
    let size = content.len() as u64;
    shelf.file("good", root, size, encoded(&content, root));
    let _publisher = shelf.open();
    node.wait_until("the names have arrived", |node| {
        node.run(&["show", "lab:good"]).code == Some(0)
    });
    let memory = node.resident_bytes();
    for (version, why) in &versions {
        let name = format!("lab:{version}");
        let said = node.fails(1, &["pull", &name, "--wait", "5s"]);
        assert!(said.contains(why), "{version}: {said}");
        assert!(said.contains("hint: "), "{version}: {said}");
        let to = fleet.path("exported");
        let export = ["export", &name, "--to", to.to_str().unwrap()];
        node.fails(1, &export);
        assert!(!to.exists(), "{version}");
    }
    let grown = node.resident_bytes().saturating_sub(memory);
    assert!(grown < 100 << 20, "{grown} bytes of memory more");
    let status = node.json(&["status"]);
    assert_eq!(status["capsules"], 0, "{status:#}");
    assert_eq!(
        status["banned"], 0,
        "every byte was what its hash says: {status:#}"
    );
    let copy = fleet.path("copy");
    node.ok(&["pull", "lab:good"]);
    node.ok(&["export", "lab:good", "--to", copy.to_str().unwrap()]);
    assert!(fs::read(copy).unwrap() == content);
    // What was fetched in vain goes with the next collection.
    node.ok(&["pin", "lab:good"]);
    node.ok(&["gc"]);
    let left = node.json(&["hashes"]);
    let left = left["hashes"].as_array().unwrap();
    assert!(
        left.len() <= 4,
        "manifest, index, pack, component: {left:#?}"
    );
    assert!(!std::path::Path::new("/tmp/stray").exists());
}

#[test]
fn a_wrong_layer_is_passed_over_for_one_that_is_right() {
    let fleet = Fleet::of(2);
    let source = fleet.path("source");
    let content = data::prose(98, 400_000);
    fs::write(&source, &content).unwrap();
    fleet[0].publish(&source, "lab:1");
    // It joins at the one that pulls, so that what it serves is in reach.
    let address = fleet[1].address();
    let invite = ["fleet", "invite", "--channel", "lab", "--addr", address];
    let token = fleet[0].ok(&invite);
    let mut shelf = Shelf::of(token.trim(), 99);
    // Much cheaper than the right one, so that they are tried first.
    let (root, size) = (RootHash::of(&content), content.len() as u64);
    let zeros = encoded(&vec![0; content.len()], root);
    shelf.layer((Space::Stream, root, size), zeros);
    let noise = (data::noise(99, 90), data::noise(100, 90));
    shelf.layer((Space::Stream, root, size), noise);
    let hostile = shelf.open();
    fleet[1].wait_until("the layers are known", |node| {
        node.json(&["status"])["records"] == 4
    });
    let copy = fleet.path("copy");
    fleet[1].ok(&["pull", "lab:1"]);
    fleet[1].ok(&["export", "lab:1", "--to", copy.to_str().unwrap()]);
    assert!(fs::read(copy).unwrap() == content);
    drop(hostile);
}

#[test]
fn who_uses_right_blobs_wrongly_spoils_them_for_nobody() {
    let fleet = Fleet::of(1);
    let node = &fleet[0];
    let invite = || fleet.invite(&["--channel", "lab"]);
    let content = data::prose(101, 400_000);
    let (root, size) = (RootHash::of(&content), content.len() as u64);
    let (index, pack) = encoded(&content, root);
    // The right index with a wrong pack, the right pack with a wrong index, and both for something else.
    let mut wrong = Shelf::of(&invite(), 102);
    let target = (Space::Stream, root, size);
    let noise = data::noise(103, pack.len());
    wrong.layer(target, (index.clone(), noise));
    let zeros = encoded(&vec![0; content.len()], root);
    wrong.layer(target, (zeros.0, pack.clone()));
    let other = RootHash::of(b"something else");
    wrong.file("other", other, size, (index.clone(), pack.clone()));
    wrong.name("one", component(ComponentKind::File, root, size, size));
    let _wrong = wrong.open();
    node.wait_until("the names have arrived", |node| {
        node.run(&["show", "lab:one"]).code == Some(0)
    });
    for name in ["lab:other", "lab:one"] {
        let said = node.fails(1, &["pull", name]);
        let why = said.contains("not what their records say")
            || said.contains("not what the manifest says");
        assert!(why, "{name}: {said}");
    }
    let mut right = Shelf::of(&invite(), 104);
    right.layer(target, (index, pack));
    let _right = right.open();
    let copy = fleet.path("copy");
    node.wait_until("the right layer has arrived", |node| {
        node.json(&["status"])["records"] == 6
    });
    node.ok(&["pull", "lab:one"]);
    node.ok(&["export", "lab:one", "--to", copy.to_str().unwrap()]);
    assert!(fs::read(copy).unwrap() == content);
}
