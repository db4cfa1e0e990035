//! A directory with one of everything goes all the way round.

mod tree_util;

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use capsule_chunker::content::{Content, Source};
use capsule_chunker::tree::{self, RestoreError, RestoreOptions, TreeWriter};
use capsule_proto::listing::{EntryKind, Listing};
use proptest::prelude::*;
use tree_util::{assert_is, is_root, make_everything, mode, noise, publish, restore, scan};

#[test]
fn everything_comes_back() {
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    make_everything(&from);
    let tree = publish(&from);
    let restored = restore(&to, &tree, false).unwrap();
    assert_eq!(restored.warnings(), Vec::<String>::new());
    assert_eq!(restored.files_written, tree.0.files().count() as u64);
    assert_is(&to, &tree.0);
    assert_is(&from, &tree.0);
    // The same content has the same name, wherever it lies.
    assert_eq!(publish(&to).0.root(), tree.0.root());
    assert_eq!(Listing::decode(&tree.0.encode()).unwrap(), *tree.0);
    assert!(!has_leftovers(&to));
    // Holes came back as holes.
    for name in ["sparse", "all-hole"] {
        assert!(
            to.join(name).metadata().unwrap().blocks() * 512 < 1 << 20,
            "{name}"
        );
    }
    let inodes = ["big", "a/big-too", "usr/bin/big-three"]
        .map(|name| to.join(name).metadata().unwrap().ino());
    assert!(inodes.iter().all(|inode| *inode == inodes[0]));
    if is_root() {
        let null = to.join("null").metadata().unwrap();
        assert_eq!(
            (null.rdev(), null.ino()),
            (0x103, to.join("null-too").metadata().unwrap().ino())
        );
        assert_eq!(to.join("a/x").metadata().unwrap().mode() & 0o7777, 0o6755);
    }
}

fn has_leftovers(dir: &Path) -> bool {
    scan(dir).entries().iter().any(|entry| {
        entry
            .path
            .as_bytes()
            .windows(8)
            .any(|name| name == b".capsule")
    })
}

#[test]
fn the_source_reads_any_range_and_knows_its_holes() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("tree");
    make_everything(&dir);
    let source = scan(&dir);
    let mut whole = vec![0; source.len() as usize];
    source.read_at(0, &mut whole).unwrap();
    // Slowly: each file by itself.
    let mut slow = Vec::new();
    for file in 0..source.file_count() {
        assert_eq!(slow.len() as u64, source.file_range(file).start);
        slow.extend(std::fs::read(source.file_path(file)).unwrap());
    }
    assert!(whole == slow);
    let parts: Vec<u64> = source.parts().unwrap().collect();
    assert_eq!(
        (parts.len(), parts.iter().sum::<u64>()),
        (source.file_count(), source.len())
    );
    for (offset, len) in [
        (0, 0),
        (1, 100_000),
        (source.len() - 3, 3),
        (source.len(), 0),
        (100_000, 1 << 20),
    ] {
        let mut part = vec![0; len];
        source.read_at(offset, &mut part).unwrap();
        assert!(
            part == whole[offset as usize..offset as usize + len],
            "{offset}"
        );
    }
    assert!(source.read_at(source.len() - 3, &mut [0; 4]).is_err());
    let (mut at, mut zeros) = (0, 0);
    for extent in source.extents() {
        let extent = extent.unwrap();
        assert_eq!(extent.range.start, at);
        at = extent.range.end;
        if extent.zero {
            zeros += extent.range.end - extent.range.start;
            assert!(
                whole[extent.range.start as usize..at as usize]
                    .iter()
                    .all(|&b| b == 0)
            );
        }
    }
    assert_eq!(at, source.len());
    assert!(zeros > 16 << 20, "{zeros}");
}

#[test]
fn an_empty_directory_is_a_tree() {
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    std::fs::create_dir(&from).unwrap();
    let tree = publish(&from);
    assert_eq!((tree.0.entries().len(), tree.1.len()), (1, 0));
    restore(&to, &tree, false).unwrap();
    assert_is(&to, &tree.0);
}

#[test]
fn content_is_refused_where_there_is_some_already() {
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    make_everything(&from);
    let tree = publish(&from);
    std::fs::create_dir(&to).unwrap();
    std::fs::write(to.join("mine"), "keep").unwrap();
    let error = restore(&to, &tree, false).unwrap_err();
    assert!(
        matches!(error, RestoreError::NotEmpty { .. }) && error.to_string().contains("--force"),
        "{error}"
    );
    assert_eq!(std::fs::read_dir(&to).unwrap().count(), 1);
    let error = restore(&to.join("mine"), &tree, true).unwrap_err();
    assert!(
        matches!(error, RestoreError::NotADirectory { .. }),
        "{error}"
    );
}

#[test]
fn force_makes_it_exactly_the_tree_and_writes_only_what_differs() {
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    make_everything(&from);
    let tree = publish(&from);
    let files = tree.0.files().count() as u64;
    restore(&to, &tree, false).unwrap();
    let inode = |name: &str| to.join(name).symlink_metadata().unwrap().ino();
    let kept = ["a/x", "big", "etc/12"].map(inode);

    // Everything that can be in the way.
    std::fs::write(to.join("etc/5"), "other").unwrap();
    std::fs::write(to.join("etc/6"), noise(99, 42)).unwrap();
    std::fs::remove_file(to.join("a/empty")).unwrap();
    std::fs::create_dir_all(to.join("a/empty/dir/dir")).unwrap();
    std::fs::remove_dir(to.join("empty-dir")).unwrap();
    std::fs::write(to.join("empty-dir"), "a file").unwrap();
    std::fs::remove_file(to.join("a/dangling")).unwrap();
    std::fs::create_dir(to.join("a/dangling")).unwrap();
    std::fs::create_dir_all(to.join("extra/dir")).unwrap();
    std::fs::write(to.join("extra/dir/file"), "extra").unwrap();
    std::fs::write(to.join(".capsule-1-1.partial"), "of an interrupted run").unwrap();
    std::fs::remove_file(to.join("usr/bin/big-three")).unwrap();
    mode(&to.join("etc/13"), 0o777);

    let restored = restore(&to, &tree, true).unwrap();
    assert_is(&to, &tree.0);
    // The two that differ, the one that was a directory, and the one that lost a name.
    assert_eq!(
        (restored.files_written, restored.files_kept),
        (4, files - 4)
    );
    assert_eq!(inode("a/x"), kept[0]);
    assert_eq!(inode("etc/12"), kept[2]);
    assert!(!to.join("extra").exists());

    let again = restore(&to, &tree, true).unwrap();
    assert_eq!(
        (again.files_written, again.files_kept, again.removed),
        (0, files, 0)
    );
    assert_is(&to, &tree.0);
}

#[test]
fn wrong_content_never_gets_a_name() {
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    make_everything(&from);
    let source = scan(&from);
    for name in ["big", "etc/500"] {
        let _ = std::fs::remove_dir_all(&to);
        let mut tree = publish(&from);
        let file = (0..source.file_count())
            .find(|&file| {
                source.file_path(file) == from.join(name)
                    || source.file_path(file) == from.join("a/big-too") && name == "big"
            })
            .unwrap();
        tree.1.0[source.file_range(file).start as usize + 10] ^= 1;
        let error = restore(&to, &tree, false).unwrap_err();
        let path = to.join(source.file_path(file).strip_prefix(&from).unwrap());
        assert!(
            matches!(&error, RestoreError::Damaged { path: named } if *named == path),
            "{error}"
        );
        assert!(!path.exists());
        assert!(!has_leftovers(&to));
    }
}

/// Hands over contents in the pieces given, as zeros where they are.
fn hand_over(
    writer: &mut TreeWriter,
    contents: &[u8],
    pieces: &[usize],
) -> Result<(), RestoreError> {
    let (mut at, mut turn) = (0, 0);
    while at < contents.len() {
        let end = (at + pieces[turn % pieces.len()]).min(contents.len());
        let piece = &contents[at..end];
        if piece.iter().all(|&b| b == 0) {
            writer.zeros(at as u64, piece.len() as u64)?;
        } else {
            writer.data(at as u64, piece)?;
        }
        (at, turn) = (end, turn + 1);
    }
    Ok(())
}

#[test]
fn contents_come_in_order_or_not_at_all() {
    let temp = tempfile::tempdir().unwrap();
    let from = temp.path().join("from");
    make_everything(&from);
    let (listing, contents) = publish(&from);
    let writer = |name: &str| {
        TreeWriter::new(
            &temp.path().join(name),
            listing.clone(),
            &RestoreOptions::default(),
            &(),
        )
        .unwrap()
    };
    let mut early = writer("early");
    early.data(0, &contents.0[..100]).unwrap();
    assert!(matches!(
        early.data(101, &[0]),
        Err(RestoreError::OutOfOrder {
            expected: 100,
            found: 101
        })
    ));
    assert!(
        matches!(early.data(100, &[0]), Err(RestoreError::Failed)),
        "after an error nothing more is taken"
    );
    let mut short = writer("short");
    short.data(0, &contents.0[..100]).unwrap();
    assert!(matches!(
        short.finish(),
        Err(RestoreError::OutOfOrder { expected: 100, .. })
    ));
    let mut long = writer("long");
    hand_over(&mut long, &contents.0, &[1 << 20]).unwrap();
    assert!(matches!(
        long.data(contents.len(), &[0]),
        Err(RestoreError::OutOfOrder { .. })
    ));
    let mut beyond = writer("beyond");
    hand_over(&mut beyond, &contents.0, &[1 << 20]).unwrap();
    assert!(matches!(
        beyond.zeros(contents.len() + 1, 1),
        Err(RestoreError::OutOfOrder { .. })
    ));
    drop(writer("dropped"));
}

#[test]
fn differences_are_named() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("tree");
    make_everything(&dir);
    let (listing, _) = publish(&dir);
    std::fs::write(dir.join("etc/3"), noise(9, 21)).unwrap();
    std::fs::write(dir.join("etc/4"), noise(9, 5)).unwrap();
    std::fs::remove_file(dir.join("absolute")).unwrap();
    std::fs::write(dir.join("extra"), "").unwrap();
    mode(&dir.join("a/x"), 0o600);
    let differences = tree::verify_tree(&listing, &dir).unwrap();
    let has = |path: &str, what: &str| {
        differences
            .iter()
            .any(|d| d.path.as_bytes() == path.as_bytes() && d.what.contains(what))
    };
    assert!(has("etc/3", "content differs"));
    assert!(has("etc/4", "5 bytes instead of 28"));
    assert!(has("absolute", "missing"));
    assert!(has("extra", "not in the listing"));
    assert!(has("a/x", "mode is 0600 instead of 6755"));
    assert!(has("zz-link-to-link", "instead of a hard link"));
}

/// A small tree: contents by number, with empty files, holes, and files around the boundary of "small".
fn small_tree(dir: &Path, files: &[(usize, bool)]) {
    std::fs::create_dir(dir).unwrap();
    for (number, &(len, zero)) in files.iter().enumerate() {
        let content = if zero {
            vec![0; len]
        } else {
            noise(number as u64, len)
        };
        std::fs::write(dir.join(format!("{number:03}")), content).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    /// However the contents are cut into pieces, the same tree results.
    #[test]
    fn any_pieces_make_the_same_tree(
        files in prop::collection::vec((prop_oneof![Just(0_usize), 1..5000_usize, 260_000..264_000_usize, 262_143..262_146_usize], any::<bool>()), 0..12),
        pieces in prop::collection::vec(prop_oneof![1..5000_usize, Just(16_384), 100_000..600_000_usize], 1..6),
    ) {
        let temp = tempfile::tempdir().unwrap();
        let (from, to) = (temp.path().join("from"), temp.path().join("to"));
        small_tree(&from, &files);
        let (listing, contents) = publish(&from);
        let mut writer = TreeWriter::new(&to, listing.clone(), &RestoreOptions::default(), &()).unwrap();
        hand_over(&mut writer, &contents.0, &pieces).unwrap();
        writer.finish().unwrap();
        assert_is(&to, &listing);
        // Contents that are not wanted may be handed over all the same.
        let again = TreeWriter::new(&to, listing.clone(), &RestoreOptions { force: true }, &()).unwrap();
        prop_assert!(again.wanted().is_empty());
        std::fs::write(to.join("extra"), "x").unwrap();
        let mut again = TreeWriter::new(&to, listing.clone(), &RestoreOptions { force: true }, &()).unwrap();
        hand_over(&mut again, &contents.0, &pieces).unwrap();
        prop_assert_eq!(again.finish().unwrap().files_kept, files.len() as u64);
        assert_is(&to, &listing);
        let kinds = listing.entries().iter().filter(|e| matches!(e.kind, EntryKind::File { .. })).count();
        prop_assert_eq!(kinds, files.len());
    }
}
