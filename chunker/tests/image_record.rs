//! What images tell of change, compared with what QEMU made of them.

mod image_util;

use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use capsule_chunker::image::{ImageRecord, OpenedImage};
use capsule_proto::ranges::{group_bytes, group_count};
use capsule_proto::{GROUP_LEN, GroupRanges};
use image_util::{MIB, create, disk, open, oracle, qemu_io, write};

fn record(opened: &OpenedImage) -> &ImageRecord {
    opened.record.as_ref().expect("it has one")
}

/// Expects that what is not said to be changed is the same; how many groups are said to be.
fn assert_holds_all_changes(changed: &GroupRanges, old: &[u8], new: &[u8], what: &str) -> u64 {
    for group in 0..group_count(new.len() as u64) {
        let bytes = group_bytes(&(group..group + 1), new.len() as u64);
        let bytes = bytes.start as usize..bytes.end as usize;
        if !changed.contains(group) {
            assert_eq!(
                Some(&new[bytes.clone()]),
                old.get(bytes),
                "{what}: group {group}"
            );
        }
    }
    changed.count()
}

/// A raw base and two overlays of given options and sizes; their paths, the top first.
fn chain(dir: &Path, options: &str, sizes: [usize; 3]) -> [PathBuf; 3] {
    let base = write(dir, "base.img", &disk(4, sizes[0]));
    let [middle, top] = ["middle.qcow2", "top.qcow2"].map(|name| dir.join(name));
    let on = |below: &str, format: &str, image: &Path, size: usize| {
        let arguments = ["-o", options, "-b", below, "-F", format];
        create(image, &arguments, &size.to_string());
    };
    on("base.img", "raw", &middle, sizes[1]);
    qemu_io(
        &middle,
        // Compressed data first: at the end of the file it would seem cut off.
        &[
            "write -q -c -P 1 1216k 64k",
            "write -q -P 7 100k 300k",
            "write -q -z 1M 128k",
        ],
    );
    on("middle.qcow2", "qcow2", &top, sizes[2]);
    qemu_io(
        &top,
        &[
            "write -q -P 3 64k 64k",
            "write -q -z 200k 20k",
            "discard -q 320k 64k",
            "write -q -P 5 1536k 512",
        ],
    );
    [top, middle, base]
}

#[test]
fn an_overlay_tells_what_is_its_own() {
    for options in [
        "cluster_size=64k",
        "cluster_size=4k",
        "cluster_size=64k,extended_l2=on",
        "cluster_size=64k,compression_type=zstd",
        "cluster_size=64k,compat=0.10",
    ] {
        let temp = tempfile::tempdir().unwrap();
        let images = chain(temp.path(), options, [5 * MIB, 5 * MIB, 5 * MIB]);
        let opened = open(&images[0]);
        let record = record(&opened);
        let new = oracle(&images[0], "qcow2");
        let middle = oracle(&images[1], "qcow2");
        let base = std::fs::read(&images[2]).unwrap();
        let of_top = record.changed_above(1).unwrap().unwrap();
        let of_both = record.changed_above(2).unwrap().unwrap();
        let top = assert_holds_all_changes(&of_top, &middle, &new, options);
        let both = assert_holds_all_changes(&of_both, &base, &new, options);
        assert!((4..=24).contains(&top), "{options}: {top}");
        assert!(top < both && both <= 60, "{options}: {both}");
        assert_eq!(record.stamps().unwrap().len(), 3);
        if let Some(behind) = record.behind(2).unwrap() {
            image_util::assert_holds(&*behind, &base);
            image_util::assert_holds(&*record.behind(1).unwrap().unwrap(), &middle);
        } else {
            assert!(options.contains("extended") || options.contains("zstd"));
        }
    }
}

#[test]
fn what_lies_beyond_a_shorter_image_is_changed() {
    for sizes in [
        [3 * MIB, 4 * MIB, 5 * MIB],
        [5 * MIB, 2 * MIB, 4 * MIB],
        [4 * MIB, 3 * MIB, 2 * MIB],
        [3 * MIB + 512, 4 * MIB, 4 * MIB],
    ] {
        let temp = tempfile::tempdir().unwrap();
        let images = chain(temp.path(), "cluster_size=64k", sizes);
        let opened = open(&images[0]);
        let new = oracle(&images[0], "qcow2");
        let changed = record(&opened).changed_above(2).unwrap().unwrap();
        let base = std::fs::read(&images[2]).unwrap();
        assert_holds_all_changes(&changed, &base, &new, &format!("{sizes:?}"));
    }
}

#[test]
fn an_image_of_its_own_has_nothing_behind() {
    let temp = tempfile::tempdir().unwrap();
    let raw = write(temp.path(), "disk.img", &disk(1, MIB));
    assert_eq!(record(&open(&raw)).stamps().unwrap().len(), 1);
    let alone = temp.path().join("alone.qcow2");
    create(&alone, &[], "1M");
    assert_eq!(record(&open(&alone)).stamps().unwrap().len(), 1);
}

#[test]
fn a_stamp_tells_files_and_changes_apart() {
    let temp = tempfile::tempdir().unwrap();
    let images = chain(temp.path(), "cluster_size=64k", [MIB * 2; 3]);
    let stamps = |image: &Path| record(&open(image)).stamps().unwrap();
    let before = stamps(&images[0]);
    assert_eq!(before, stamps(&images[0]));
    // The images behind are the same, whether asked for through the overlay or not.
    assert_eq!(before[1..], stamps(&images[1]));
    assert_eq!(before[2..], stamps(&images[2]));
    let moved = temp.path().join("moved.img");
    std::fs::copy(&images[2], &moved).unwrap();
    assert_ne!(before[2], stamps(&moved)[0], "a copy is another file");
    std::thread::sleep(Duration::from_millis(30));
    let mut base = std::fs::OpenOptions::new()
        .write(true)
        .open(&images[2])
        .unwrap();
    base.seek(SeekFrom::Start(MIB as u64)).unwrap();
    let written = SystemTime::now();
    assert!(before[2].settled(written));
    base.write_all(b"changed").unwrap();
    let after = stamps(&images[0]);
    for (before, after) in before.iter().zip(&after) {
        assert_ne!(before, after, "each depends on what is behind it");
        assert!(!after.settled(written));
    }
}

#[test]
fn a_dirty_bitmap_tells_what_was_written() {
    for granularity in ["4k", "64k", "1M"] {
        let temp = tempfile::tempdir().unwrap();
        let image = temp.path().join("disk.qcow2");
        create(&image, &["-o", "cluster_size=64k"], "64M");
        qemu_io(&image, &["write -q -P 1 0 8M", "write -q -P 2 20M 1M"]);
        run!(
            "qemu-img",
            "bitmap",
            "--add",
            "-g",
            granularity,
            &image,
            "since"
        );
        run!("qemu-img", "bitmap", "--add", &image, "other");
        let old = oracle(&image, "qcow2");
        let clean = record(&open(&image)).marked("since").unwrap().unwrap();
        assert!(clean.is_empty(), "{granularity}: {clean:?}");
        qemu_io(
            &image,
            &[
                "write -q -P 3 100k 1k",
                "write -q -z 5M 64k",
                "write -q -P 4 63M 1M",
            ],
        );
        let opened = open(&image);
        let marked = record(&opened).marked("since").unwrap().unwrap();
        let new = oracle(&image, "qcow2");
        let count = assert_holds_all_changes(&marked, &old, &new, granularity);
        assert!((64 + 5..=3 * 64).contains(&count), "{granularity}: {count}");
        // All bits of a part of the bitmap set at once.
        qemu_io(&image, &["write -q -z 0 64M"]);
        let all = record(&open(&image)).marked("since").unwrap().unwrap();
        assert_eq!(all, GroupRanges::all(64 * MIB as u64));
    }
}

#[test]
fn a_bitmap_that_may_lack_changes_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let image = temp.path().join("disk.qcow2");
    create(&image, &[], "1M");
    let why = |image: &Path, name: &str| match record(&open(image)).marked(name) {
        Ok(marked) => panic!("{name}: {marked:?}"),
        Err(error) => error.to_string(),
    };
    assert!(why(&image, "since").contains("it has no dirty bitmaps: add one"));
    run!("qemu-img", "bitmap", "--add", &image, "since");
    let other = why(&image, "other");
    assert!(
        other.contains("no dirty bitmap other; it has: since"),
        "{other}"
    );
    run!("qemu-img", "bitmap", "--disable", &image, "since");
    assert!(why(&image, "since").contains("disabled"));
    run!("qemu-img", "bitmap", "--enable", &image, "since");
    assert!(record(&open(&image)).marked("since").is_ok());
    // Who writes without knowing of bitmaps clears the autoclear bits.
    let bytes = std::fs::read(&image).unwrap();
    let mut unaware = bytes.clone();
    unaware[88..96].fill(0);
    std::fs::write(&image, &unaware).unwrap();
    assert!(why(&image, "since").contains("knows nothing of its dirty bitmaps"));
    let raw = write(temp.path(), "disk.img", &disk(1, MIB));
    assert!(why(&raw, "since").contains("no qcow2 image"));
}

#[test]
fn damaged_lists_of_bitmaps_are_refused_and_nothing_else_happens() {
    let temp = tempfile::tempdir().unwrap();
    let image = temp.path().join("disk.qcow2");
    create(&image, &[], "8M");
    run!("qemu-img", "bitmap", "--add", &image, "since");
    qemu_io(&image, &["write -q -P 3 1M 1M"]);
    let bytes = std::fs::read(&image).unwrap();
    let magic = 0x2385_2875_u32.to_be_bytes();
    let header = bytes
        .windows(4)
        .position(|window| window == magic)
        .expect("the extension")
        + 8;
    let directory_at =
        u64::from_be_bytes(bytes[header + 16..header + 24].try_into().unwrap()) as usize;
    let good = record(&open(&image)).marked("since").unwrap().unwrap();
    assert_eq!(good, GroupRanges::from(64..128));
    let mut refusals = 0;
    for (start, len) in [(header, 24), (directory_at, 32)] {
        for at in start..start + len {
            for value in [0, 0x7f, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] = value;
                std::fs::write(&image, &damaged).unwrap();
                // Nothing but an answer or a refusal, in little memory.
                let opened = capsule_chunker::image::open(&image, &Default::default());
                let marked = opened.map(|opened| record(&opened).marked("since"));
                match marked {
                    Ok(Ok(Some(marked))) => assert!(marked.count() <= 8 * MIB as u64 / GROUP_LEN),
                    _ => refusals += 1,
                }
            }
        }
    }
    assert!(refusals > 40, "{refusals}");
}
