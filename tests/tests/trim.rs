//! `publish --trim` by real processes, with file systems that the kernel itself wrote: what is deleted does not travel, what
//! is there does, and whatever is not beyond doubt is refused.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use capsule_tests::short::{number, run, text};
use capsule_tests::{Fleet, Node, data};
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// Where the partition with the file system begins, and how long it is.
const PART: u64 = 4 * MIB;
const PART_LEN: u64 = 60 * MIB;

/// The file system of a disk, mounted until dropped; its loop device goes with it.
struct Mounted(PathBuf);

impl Mounted {
    fn of(disk: &Path, at: &Path) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "mounting takes root: run the tests as root"
        );
        fs::create_dir_all(at).unwrap();
        let options = format!("loop,offset={PART},sizelimit={PART_LEN}");
        run(
            "mount",
            &["-t", "ext4", "-o", &options, text(disk), text(at)],
        );
        Self(at.to_owned())
    }

    fn write(&self, name: &str, content: &[u8]) {
        let file = File::create(self.0.join(name)).unwrap();
        file.write_all_at(content, 0).unwrap();
        file.sync_all().unwrap();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.0).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            let _ = Command::new("umount").arg("-l").arg(&self.0).status();
            assert!(std::thread::panicking(), "it cannot be unmounted");
        }
    }
}

/// A disk with two partitions: what looks like FAT, and ext4 in use, from which 12 MiB were deleted.
fn used_disk(fleet: &Fleet) -> PathBuf {
    let disk = fleet.path("disk.raw");
    File::create_new(&disk).unwrap().set_len(66 * MIB).unwrap();
    let table = fleet.path("table");
    fs::write(
        &table,
        "label: gpt\nstart=2048, size=2MiB, type=uefi\nstart=8192, size=60MiB\n",
    )
    .unwrap();
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    let status = Command::new("sfdisk")
        .args(["-q", "--no-reread", "--no-tell-kernel"])
        .arg(&disk)
        .env("PATH", path)
        .stdin(File::open(&table).unwrap())
        .status();
    assert!(status.expect("sfdisk is needed: run tests/run").success());
    let file = File::options().write(true).open(&disk).unwrap();
    file.write_all_at(b"FAT32   ", MIB + 0x52).unwrap();
    let options = format!("offset={PART},nodiscard");
    run(
        "mkfs.ext4",
        &["-q", "-F", "-E", &options, text(&disk), "60M"],
    );
    let mounted = Mounted::of(&disk, &fleet.path("mounted"));
    mounted.write("kept", &data::noise(1, 3_000_000));
    mounted.write("gone", &data::noise(2, 12 << 20));
    for number in 0..50 {
        mounted.write(&format!("small{number}"), &data::prose(number, 5000));
    }
    fs::remove_file(mounted.0.join("gone")).unwrap();
    disk
}

fn publish(node: &Node, disk: &Path, name: &str, more: &[&str]) -> Value {
    node.json(&[&["publish", text(disk), "--name", name], more].concat())
}

fn pull(node: &Node, name: &str) -> u64 {
    number(&node.json(&["pull", name]), "fetched_bytes")
}

/// The file system of a disk passes its check, mounts, and holds the same files as another's.
fn check_same(fleet: &Fleet, disk: &Path, original: &Path) {
    let part = fleet.path("part");
    let mut bytes = vec![0; PART_LEN as usize];
    File::open(disk)
        .unwrap()
        .read_exact_at(&mut bytes, PART)
        .unwrap();
    fs::write(&part, bytes).unwrap();
    run("e2fsck", &["-f", "-n", text(&part)]);
    let theirs = Mounted::of(disk, &fleet.path("theirs"));
    let ours = Mounted::of(original, &fleet.path("ours"));
    run("diff", &["-r", text(&ours.0), text(&theirs.0)]);
}

#[test]
fn what_was_deleted_does_not_travel() {
    let fleet = Fleet::of(2);
    let disk = used_disk(&fleet);
    let told = fleet[0].run(&["publish", text(&disk), "--name", "whole:1"]);
    assert_eq!(told.code, Some(0), "{told:?}");
    assert!(
        told.stderr.contains("of old data: --trim leaves it out"),
        "{told:?}"
    );
    let plain = publish(&fleet[0], &disk, "whole:1", &[]);
    let saves = number(&plain, "trimmable_bytes");
    assert!(saves.abs_diff(12 << 20) < 3 << 20, "{plain:#}");
    assert_eq!(number(&plain, "trimmed_bytes"), 0);
    let trimmed = publish(&fleet[0], &disk, "lab:1", &["--trim"]);
    assert!(number(&trimmed, "trimmed_bytes") >= 12 << 20, "{trimmed:#}");
    assert_eq!(trimmed["trimmable_bytes"], Value::Null);
    assert_eq!(trimmed["content_bytes"], 66 << 20);
    let warning = trimmed["warnings"][0].as_str().unwrap();
    assert!(
        warning.contains("a FAT file system in partition 1"),
        "{warning}"
    );

    let (whole, lab) = (pull(&fleet[1], "whole:1"), pull(&fleet[1], "lab:1"));
    assert!(whole > lab + (11 << 20), "{whole} {lab}");
    assert!(lab < 4 << 20, "{lab}");
    let copy = fleet.path("copy");
    fleet[1].ok(&["export", "lab:1", "--to", text(&copy)]);
    // Nothing of what was deleted, and of the first partition everything.
    let bytes = fs::read(&copy).unwrap();
    let gone = data::noise(2, 4096);
    assert!(!bytes.chunks(1024).any(|part| part == &gone[1024..2048]));
    assert_eq!(&bytes[MIB as usize + 0x52..][..5], b"FAT32");
    // Content is what counts: the copy, published as it is, is the same capsule.
    let again = publish(&fleet[0], &copy, "again:1", &[]);
    assert_eq!(again["capsule"], trimmed["capsule"]);
    assert_eq!(again["trimmable_bytes"], Value::Null);
    check_same(&fleet, &copy, &disk);
}

#[test]
fn updates_of_trimmed_disks_are_smaller() {
    let fleet = Fleet::of(2);
    let disk = used_disk(&fleet);
    publish(&fleet[0], &disk, "whole:1", &[]);
    publish(&fleet[0], &disk, "lab:1", &["--trim"]);
    for name in ["whole:1", "lab:1"] {
        pull(&fleet[1], name);
    }
    {
        let mounted = Mounted::of(&disk, &fleet.path("mounted"));
        mounted.write("new", &data::noise(3, 500_000));
        mounted.write("passing", &data::noise(4, 8 << 20));
        fs::remove_file(mounted.0.join("passing")).unwrap();
        fs::remove_file(mounted.0.join("small7")).unwrap();
    }
    publish(&fleet[0], &disk, "whole:2", &[]);
    let second = publish(&fleet[0], &disk, "lab:2", &["--trim"]);
    assert_eq!(second["parent"], "lab:1");
    let (whole, lab) = (pull(&fleet[1], "whole:2"), pull(&fleet[1], "lab:2"));
    assert!(whole > 8 << 20, "{whole}");
    assert!((500_000..800_000).contains(&lab), "{lab}");
    let copy = fleet.path("copy");
    fleet[1].ok(&["export", "lab:2", "--to", text(&copy)]);
    check_same(&fleet, &copy, &disk);
}

#[test]
fn a_mounted_or_broken_file_system_is_refused() {
    let fleet = Fleet::of(1);
    let disk = used_disk(&fleet);
    let refused = |more: &[&str]| {
        fleet[0].fails(
            1,
            &[&["publish", text(&disk), "--name", "lab:1"], more].concat(),
        )
    };
    {
        let _mounted = Mounted::of(&disk, &fleet.path("mounted"));
        let said = refused(&["--trim"]);
        assert!(
            said.contains("the ext4 file system in partition 2 (at byte 4194304) was not unmounted cleanly")
                && said.contains("hint: unmount it or shut its machine down, or run `e2fsck -p` on it; or publish without --trim"),
            "{said}"
        );
    }
    let said = refused(&["--trim", "--as", "file"]);
    assert!(
        said.contains("published as a file") && said.contains("leave out --trim"),
        "{said}"
    );

    // Without the flag nothing is in the way, and nothing is said.
    let file = File::options().read(true).write(true).open(&disk).unwrap();
    file.write_all_at(&[0x80], PART + 1024 + 0x63).unwrap();
    let said = refused(&["--trim"]);
    assert!(said.contains("features that are not known"), "{said}");
    let plain = publish(&fleet[0], &disk, "lab:1", &[]);
    assert_eq!(plain["trimmable_bytes"], Value::Null);
}

#[test]
fn what_has_no_file_system_cannot_be_trimmed() {
    let fleet = Fleet::of(1);
    let refused = |path: &Path, more: &[&str]| {
        fleet[0].fails(
            1,
            &[&["publish", text(path), "--name", "lab:1", "--trim"], more].concat(),
        )
    };
    let path = fleet.path("file");
    fs::write(&path, data::prose(1, 10_240)).unwrap();
    let said = refused(&path, &[]);
    assert!(
        said.contains("not a disk by its content") && said.contains("--as disk"),
        "{said}"
    );
    let said = refused(&path, &["--as", "disk"]);
    assert!(
        said.contains("no ext2, ext3 or ext4 file system was found")
            && said.contains("hint: publish it without --trim"),
        "{said}"
    );
    let dir = fleet.path("dir");
    fs::create_dir(&dir).unwrap();
    let said = refused(&dir, &[]);
    assert!(
        said.contains("a directory") && said.contains("hint: leave out --trim"),
        "{said}"
    );
}
