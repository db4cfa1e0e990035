//! Free space of ext2, ext3 and ext4 as e2fsprogs makes them, to the block as its own tools tell.

mod free_util;

use std::fs::File;
use std::os::unix::fs::FileExt;

use capsule_chunker::free::{FreeError, old_data_in};
use free_util::{MIB, Made, in_pages, run, text, total};

/// Makes a file system, and compares what is found with what `dumpe2fs` and `debugfs` say.
fn check(mib: u64, kind: &str, options: &[&str]) -> Made {
    let made = Made::new(mib, options);
    let space = made.find().unwrap_or_else(|e| panic!("{options:?}: {e}"));
    assert_eq!(space.systems.len(), 1);
    let system = &space.systems[0];
    assert_eq!((system.kind, system.place.partition), (kind, None));
    let (free, journal) = (made.free(), made.journal());
    assert_eq!(system.free, total(&free), "{options:?}");
    assert_eq!(system.journal, total(&journal), "{options:?}");
    let expected = in_pages(&[in_pages(&free), in_pages(&journal)].concat());
    assert!(
        space.ranges == expected,
        "{options:?}: {:?} {expected:?}",
        space.ranges
    );
    made.check_trimmed(&space);
    made
}

#[test]
fn usual_file_systems() {
    check(64, "ext4", &["-t", "ext4"]);
    check(300, "ext4", &["-t", "ext4", "-b", "4096"]);
    check(64, "ext4", &["-t", "ext4", "-b", "1024"]);
    check(64, "ext4", &["-t", "ext4", "-b", "2048"]);
    check(64, "ext3", &["-t", "ext3", "-b", "1024"]);
    check(64, "ext3", &["-t", "ext3", "-b", "4096"]);
    check(64, "ext2", &["-t", "ext2"]);
    check(40, "ext2", &["-t", "ext2", "-r", "0", "-b", "1024"]);
}

#[test]
fn features_that_move_tables() {
    for options in [
        &["-t", "ext4", "-O", "^64bit"][..],
        &["-t", "ext4", "-b", "1024", "-O", "^64bit,^flex_bg"],
        &["-t", "ext4", "-b", "1024", "-O", "meta_bg,^resize_inode"],
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-O",
            "meta_bg,^resize_inode,^flex_bg,^64bit",
        ],
        &["-t", "ext4", "-O", "^has_journal"],
        &["-t", "ext4", "-O", "^metadata_csum,uninit_bg"],
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-O",
            "^metadata_csum,uninit_bg,^flex_bg",
        ],
        &["-t", "ext4", "-O", "^metadata_csum,^uninit_bg"],
        &["-t", "ext4", "-b", "1024", "-O", "sparse_super2"],
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-O",
            "^sparse_super,^resize_inode",
        ],
        &[
            "-t",
            "ext4",
            "-O",
            "metadata_csum_seed,orphan_file,fast_commit",
        ],
        &[
            "-t",
            "ext4",
            "-O",
            "quota,project,mmp,casefold,encrypt,verity,inline_data",
        ],
        &["-t", "ext4", "-I", "128", "-O", "^metadata_csum"],
        &["-t", "ext4", "-b", "1024", "-G", "4", "-g", "2048"],
    ] {
        check(128, "ext4", options);
    }
}

#[test]
fn clusters_of_several_blocks() {
    for options in [
        &["-t", "ext4", "-O", "bigalloc"][..],
        &["-t", "ext4", "-O", "bigalloc", "-C", "16384"],
        &["-t", "ext4", "-b", "1024", "-O", "bigalloc", "-C", "8192"],
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-O",
            "bigalloc,^metadata_csum,uninit_bg",
            "-C",
            "4096",
        ],
    ] {
        check(256, "ext4", options);
    }
}

// Most of its groups were never written: not even their bitmaps.
#[test]
fn large_file_systems_of_which_little_was_written() {
    let made = check(16 << 10, "ext4", &["-t", "ext4"]);
    assert!(run("dumpe2fs", &[text(&made.image)]).contains("BLOCK_UNINIT"));
    check(16 << 10, "ext4", &["-t", "ext4", "-b", "1024"]);
    check(
        16 << 10,
        "ext4",
        &["-t", "ext4", "-O", "bigalloc,^resize_inode"],
    );
}

#[test]
fn what_was_deleted_is_gone() {
    let made = check(64, "ext4", &["-t", "ext4"]);
    let space = made.find().unwrap();
    let source = made.open();
    let old = old_data_in(&*source, &space.ranges).unwrap();
    assert!(old > 40 * MIB, "{old}");
    let copy = free_util::open(&made.dir.path().join("trimmed"));
    assert_eq!(old_data_in(&*copy, &space.ranges).unwrap(), 0);
}

/// A small one, for what is done to it.
fn small() -> Made {
    Made::new(32, &["-t", "ext4", "-b", "4096"])
}

fn dirty(made: &Made) -> &'static str {
    match made.find() {
        Err(FreeError::Dirty { why, place, .. }) => {
            assert_eq!(place.partition, None);
            why
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_was_not_left_in_order_is_refused() {
    let cases = [
        ("feature needs_recovery", "cleanly"),
        ("set_super_value state 0", "cleanly"),
        ("set_super_value state 3", "errors"),
        ("set_super_value state 5", "deleted"),
        ("set_super_value last_orphan 12", "deleted"),
        ("feature orphan_present", "deleted"),
    ];
    for (command, expected) in cases {
        let made = small();
        made.debugfs(&[command]);
        let why = dirty(&made);
        assert!(why.contains(expected), "{command}: {why}");
    }
}

#[test]
fn a_journal_that_is_not_empty_is_refused() {
    for (at, expected) in [(0x1c, "not empty"), (0x20, "error")] {
        let made = small();
        let start = made.journal()[0].start - 4096;
        let file = File::options().write(true).open(&made.image).unwrap();
        file.write_all_at(&5_u32.to_be_bytes(), start + at).unwrap();
        assert!(dirty(&made).contains(expected));
    }
}

#[test]
fn a_journal_that_is_not_understood_is_left_alone() {
    let made = small();
    let (free, start) = (made.free(), made.journal()[0].start - 4096);
    let file = File::options().write(true).open(&made.image).unwrap();
    file.write_all_at(b"nothing", start).unwrap();
    let space = made.find().unwrap();
    assert_eq!(space.systems[0].journal, 0);
    assert_eq!(space.ranges, in_pages(&free));
}

fn damaged(made: &Made) -> String {
    match made.find() {
        Err(FreeError::Damaged { why, .. }) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn tables_that_contradict_one_another_are_refused() {
    let plain = [
        "-t",
        "ext4",
        "-b",
        "4096",
        "-O",
        "^metadata_csum,^uninit_bg",
    ];
    let made = Made::new(32, &plain);
    made.debugfs(&["set_super_value free_blocks_count 77"]);
    assert!(damaged(&made).contains("superblock says 77"));

    let made = Made::new(32, &plain);
    made.debugfs(&["set_bg 0 free_blocks_count 77"]);
    assert!(damaged(&made).contains("descriptor says 77"));

    // A bitmap that gives away what files have, in groups with checksums and without.
    for (options, expected) in [(&plain[..], "free clusters"), (&["-t", "ext4"], "checksum")] {
        let made = Made::new(32, options);
        let said = run("dumpe2fs", &[text(&made.image)]);
        let block_size = free_util::number_after(&said, "Block size:");
        let at = said.split("Block bitmap at ").nth(1).unwrap();
        let at: u64 = at.split([' ', ',']).next().unwrap().parse().unwrap();
        let file = File::options().write(true).open(&made.image).unwrap();
        file.write_all_at(&[0; 64], at * block_size + 128).unwrap();
        assert!(damaged(&made).contains(expected));
    }
}

#[test]
fn features_that_are_not_known_are_refused() {
    let made = Made::new(32, &["-t", "ext4", "-O", "^metadata_csum,^uninit_bg"]);
    made.debugfs(&["set_super_value feature_incompat 0x80000242"]);
    let why = match made.find() {
        Err(FreeError::Unsupported { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    assert!(why.contains("0x80000000"), "{why}");
}

#[test]
fn an_image_that_was_cut_off_is_refused() {
    let made = small();
    for len in [0, 1000, 1024, 2048, 4096, 8192, 1 << 20, (32 << 20) - 4096] {
        let file = File::options().write(true).open(&made.image).unwrap();
        file.set_len(len).unwrap();
        match made.find() {
            Err(FreeError::Damaged { why, .. }) => assert!(why.contains("cut off"), "{why}"),
            Err(FreeError::NoFileSystem { .. }) => assert!(len < 2048),
            other => panic!("{len}: {other:?}"),
        }
        run(
            "mke2fs",
            &[
                "-q",
                "-F",
                "-t",
                "ext4",
                "-b",
                "4096",
                text(&made.image),
                "32M",
            ],
        );
    }
}
