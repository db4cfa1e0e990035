//! Images that tell what changed: overlays upon what was published or exported here, and dirty bitmaps. What they do not mark is not
//! read, and what is published is what QEMU sees.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use capsule_tests::short::{number, run, text};
use capsule_tests::{Fleet, Node, data};
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// Length of the disks, most of it noise: what reading it costs is plain to see.
const DISK: u64 = 64 * MIB;
/// Changes within the clock's tick of the file's times are not told apart; so much later they are.
const TICK: Duration = Duration::from_millis(40);

/// A raw disk of noise.
fn disk(path: &Path, seed: u64) {
    let file = File::create_new(path).unwrap();
    file.set_len(DISK).unwrap();
    let noise = data::noise(seed, 56 << 20);
    file.write_all_at(&noise, 4 * MIB).unwrap();
    std::thread::sleep(TICK);
}

/// An overlay of an image beside it.
fn overlay(of: &Path, format: &str, name: &str) -> PathBuf {
    let image = of.with_file_name(name);
    let behind = of.file_name().unwrap().to_str().unwrap();
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            behind,
            "-F",
            format,
            text(&image),
        ],
    );
    image
}

fn write(image: &Path, commands: &[&str]) {
    for command in commands {
        run("qemu-io", &["-f", "qcow2", "-c", command, text(image)]);
    }
    std::thread::sleep(TICK);
}

/// What QEMU reads from an image.
fn root(image: &Path) -> String {
    let raw = image.with_extension("oracle");
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            text(image),
            text(&raw),
        ],
    );
    let root = blake3::hash(&fs::read(&raw).unwrap()).to_hex();
    fs::remove_file(raw).unwrap();
    root.to_string()
}

/// Publishes an image, and compares its root with what QEMU reads; the answer, and what the daemon read for it.
fn publish(node: &Node, image: &Path, name: &str, options: &[&str]) -> (Value, u64) {
    let before = bytes_read(node);
    let args = [&["publish", text(image), "--name", name], options].concat();
    let published = node.json(&args);
    let read = bytes_read(node) - before;
    let trims = options.contains(&"--trim");
    if !trims && image.extension().is_some_and(|kind| kind == "qcow2") {
        assert_eq!(published["components"][0]["root"], root(image), "{name}");
    }
    (published, read)
}

/// All that a daemon has read so far, by the system's account.
fn bytes_read(node: &Node) -> u64 {
    let pid = node.pid().as_raw_nonzero();
    let account = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    let line = account
        .lines()
        .find_map(|line| line.strip_prefix("rchar: "));
    line.unwrap().parse().unwrap()
}

#[test]
fn an_overlay_is_read_where_it_is_its_own() {
    let fleet = Fleet::of(1);
    let (node, base) = (&fleet[0], fleet.path("base.raw"));
    disk(&base, 1);
    publish(node, &base, "lab:1", &["--as", "disk"]);
    let top = overlay(&base, "raw", "top.qcow2");
    write(&top, &["write -q -P 3 10M 1M", "write -q -z 20M 256k"]);
    let (second, read) = publish(node, &top, "lab:2", &[]);
    assert_eq!(second["parent"], "lab:1");
    assert!(
        number(&second, "unread_bytes") >= DISK - 2 * MIB,
        "{second:#}"
    );
    assert!(number(&second, "inherited_bytes") >= DISK - 2 * MIB);
    assert!(number(&second, "pack_bytes") < 64 << 10, "{second:#}");

    // Another upon that; what was published of the overlay is known too.
    let next = overlay(&top, "qcow2", "next.qcow2");
    write(&next, &["write -q -P 4 30M 1M"]);
    let (third, _) = publish(node, &next, "lab:3", &[]);
    let unread = number(&third, "unread_bytes");
    assert!((DISK - MIB - MIB / 2..DISK).contains(&unread), "{third:#}");

    // Histories branch: the second overlay of the base, published against the newest.
    let branch = overlay(&base, "raw", "branch.qcow2");
    write(&branch, &["write -q -P 5 40M 1M"]);
    let (fourth, _) = publish(node, &branch, "lab:4", &[]);
    assert_eq!(fourth["parent"], "lab:3");
    assert!(
        number(&fourth, "unread_bytes") >= DISK - 2 * MIB,
        "{fourth:#}"
    );

    // Everything is read where that is asked for, or the image behind was changed since.
    write(&next, &["write -q -P 6 31M 1M"]);
    let (fifth, all) = publish(node, &next, "lab:5", &["--checksum"]);
    assert_eq!(number(&fifth, "unread_bytes"), 0);
    assert!(
        all > read + 48 * MIB,
        "{read} bytes, and {all} of everything"
    );
    let file = File::options().write(true).open(&base).unwrap();
    file.write_all_at(b"changed behind the overlay's back", 50 * MIB)
        .unwrap();
    let (sixth, _) = publish(node, &branch, "lab:6", &[]);
    assert_eq!(number(&sixth, "unread_bytes"), 0);
    assert_ne!(sixth["capsule"], fourth["capsule"]);
}

#[test]
fn an_overlay_of_an_exported_disk_is_known_where_it_was_exported() {
    let fleet = Fleet::of(2);
    let (publisher, node) = (&fleet[0], &fleet[1]);
    let original = fleet.path("original.raw");
    disk(&original, 2);
    publish(publisher, &original, "lab:1", &["--as", "disk"]);
    node.ok(&["pull", "lab:1"]);
    let base = fleet.path("base.raw");
    node.ok(&["export", "lab:1", "--to", text(&base)]);
    let top = overlay(&base, "raw", "top.qcow2");
    write(&top, &["write -q -P 3 10M 1M"]);
    let (second, _) = publish(publisher, &top, "lab:2", &[]);
    assert_eq!(number(&second, "unread_bytes"), 0, "exported elsewhere");
    node.ok(&["pull", "lab:2"]);
    let third = overlay(&top, "qcow2", "third.qcow2");
    write(&third, &["write -q -P 3 11M 1M"]);
    // A node that may not publish knows; so the publisher exports for itself.
    let own = fleet.path("own.raw");
    publisher.ok(&["export", "lab:2", "--to", text(&own)]);
    let upon = overlay(&own, "raw", "upon.qcow2");
    write(&upon, &["write -q -P 7 12M 512k"]);
    let (third, _) = publish(publisher, &upon, "lab:3", &[]);
    assert!(number(&third, "unread_bytes") >= DISK - MIB, "{third:#}");
    // What changed is all that is decoded and hashed again where it is pulled.
    let before = bytes_read(node);
    node.ok(&["pull", "lab:3"]);
    let read = bytes_read(node) - before;
    assert!(read < 16 * MIB, "{read}");
    let copy = fleet.path("copy.raw");
    node.ok(&["export", "lab:3", "--to", text(&copy)]);
    let exported = blake3::hash(&fs::read(copy).unwrap()).to_hex();
    assert_eq!(third["components"][0]["root"], exported.as_str());
}

#[test]
fn a_trimmed_overlay_is_the_same_as_if_it_was_read() {
    let fleet = Fleet::of(1);
    let (node, base) = (&fleet[0], fleet.path("base.raw"));
    let file = File::create_new(&base).unwrap();
    file.set_len(DISK).unwrap();
    // Old data in what becomes free space.
    file.write_all_at(&data::noise(3, DISK as usize), 0)
        .unwrap();
    run("mkfs.ext4", &["-q", "-F", "-E", "nodiscard", text(&base)]);
    std::thread::sleep(TICK);
    let steps = |image: &Path, files: &[&str]| {
        let mut commands = Vec::new();
        for name in files {
            let source = image.with_file_name(name);
            fs::write(&source, data::noise(name.len() as u64, 3 << 20)).unwrap();
            commands.push((source, format!("/{name}")));
        }
        commands
    };
    for (number_of_round, was_trimmed) in [true, false].into_iter().enumerate() {
        let channel = format!("lab{number_of_round}");
        let trim: &[&str] = if was_trimmed { &["--trim"] } else { &[] };
        publish(node, &base, &format!("{channel}:1"), trim);
        let top = overlay(&base, "raw", &format!("{channel}.qcow2"));
        // A file is written and another removed by a program that works on the image's file system.
        let raw = fleet.path(&format!("{channel}.raw"));
        fs::copy(&base, &raw).unwrap();
        for (source, name) in steps(&raw, &["one", "three"]) {
            let command = format!("write {} {name}", text(&source));
            run("debugfs", &["-w", "-R", &command, text(&raw)]);
        }
        run("debugfs", &["-w", "-R", "rm /one", text(&raw)]);
        apply(&base, &raw, &top);
        let (trimmed, _) = publish(node, &top, &format!("{channel}:2"), &["--trim"]);
        assert!(number(&trimmed, "unread_bytes") > 0, "{trimmed:#}");
        let all = ["--trim", "--checksum", "--no-parent"];
        let (whole, _) = publish(node, &top, &format!("{channel}w:2"), &all);
        assert_eq!(
            trimmed["components"][0]["root"], whole["components"][0]["root"],
            "trimmed before: {was_trimmed}"
        );
    }
}

/// Writes to an overlay where a disk differs from the one behind it.
fn apply(base: &Path, now: &Path, overlay: &Path) {
    const STEP: usize = 1 << 20;
    let (base, new) = (fs::read(base).unwrap(), fs::read(now).unwrap());
    let piece = overlay.with_extension("piece");
    for (at, (old, new)) in base.chunks(STEP).zip(new.chunks(STEP)).enumerate() {
        if old != new {
            fs::write(&piece, new).unwrap();
            let at = at * STEP;
            let command = format!("write -q -s {} {at} {}", text(&piece), new.len());
            run("qemu-io", &["-f", "qcow2", "-c", &command, text(overlay)]);
        }
    }
    std::thread::sleep(TICK);
}

#[test]
fn a_dirty_bitmap_tells_what_to_read_and_a_wrong_one_is_noticed() {
    let fleet = Fleet::of(1);
    let (node, raw) = (&fleet[0], fleet.path("disk.raw"));
    disk(&raw, 4);
    let image = fleet.path("disk.qcow2");
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            text(&raw),
            text(&image),
        ],
    );
    let bitmap = |command: &str| run("qemu-img", &["bitmap", command, text(&image), "since"]);
    let (first, _) = publish(node, &image, "lab:1", &["--bitmap", "since"]);
    let warning = first["warnings"][0].as_str().unwrap();
    assert!(warning.contains("no older version"), "{warning}");
    bitmap("--add");
    write(&image, &["write -q -P 3 10M 1M"]);
    let (second, _) = publish(node, &image, "lab:2", &["--bitmap", "since"]);
    assert!(
        number(&second, "unread_bytes") >= DISK - 2 * MIB,
        "{second:#}"
    );

    // It was not cleared: more is read, and it is right.
    write(&image, &["write -q -P 4 12M 1M"]);
    let (third, _) = publish(node, &image, "lab:3", &["--bitmap", "since"]);
    let unread = number(&third, "unread_bytes");
    assert!(
        (DISK - 4 * MIB..=DISK - 2 * MIB).contains(&unread),
        "{third:#}"
    );

    // The newest version is another image's: nothing tells what differs from that.
    publish(node, &raw, "lab:3a", &["--as", "disk"]);
    let (other, _) = publish(node, &image, "lab:3b", &["--bitmap", "since"]);
    let warning = other["warnings"][0].as_str().unwrap();
    assert!(
        warning.contains("last published of this image"),
        "{warning}"
    );
    assert_eq!(number(&other, "unread_bytes"), 0);

    // Cleared too late: what was written before is not marked.
    write(&image, &["write -q -P 5 30M 20M"]);
    bitmap("--clear");
    write(&image, &["write -q -P 6 12M 1M"]);
    let args = ["publish", text(&image), "--name", "lab:4"];
    let refused = node.fails(1, &[&args[..], &["--bitmap", "since"]].concat());
    assert!(
        refused.contains("does not mark all that changed"),
        "{refused}"
    );
    assert!(refused.contains("leave out --bitmap"), "{refused}");
    publish(node, &image, "lab:4", &[]);

    for (what, wanted) in [
        (vec!["--bitmap", "other"], "no dirty bitmap other"),
        (vec!["--bitmap", "since", "--as", "file"], "no qcow2 image"),
    ] {
        let refused = node.fails(1, &[&args[..3], &["lab:5"], &what].concat());
        assert!(refused.contains(wanted), "{refused}");
    }
    let home = fleet.path("directory");
    fs::create_dir(&home).unwrap();
    let refused = node.fails(
        1,
        &[
            "publish",
            text(&home),
            "--name",
            "lab:6",
            "--bitmap",
            "since",
        ],
    );
    assert!(refused.contains("is a directory"), "{refused}");
}
