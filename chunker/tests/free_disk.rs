//! Free space of whole disks: partition tables, several file systems, what else lies there.

mod free_util;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use capsule_chunker::content::BytesSource;
use capsule_chunker::free::{self, FreeError, FreeSpace, Trimmed, data_in};
use free_util::{MIB, Made, copy_into, in_pages, is_zero, noise, open, run, shifted, text};
use tempfile::TempDir;

/// A disk with a partition table by `sfdisk`, all else of it noise.
struct Disk {
    dir: TempDir,
    image: PathBuf,
}

impl Disk {
    fn new(mib: u64, table: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk");
        std::fs::write(&image, noise(5, (mib * MIB) as usize)).unwrap();
        File::options()
            .write(true)
            .open(&image)
            .unwrap()
            .write_all_at(&[0; 4096], 0)
            .unwrap();
        let disk = Self { dir, image };
        disk.partition(table);
        disk
    }

    fn partition(&self, table: &str) {
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
        let child = Command::new("sfdisk")
            .args([
                "-q",
                "--no-reread",
                "--no-tell-kernel",
                "-w",
                "never",
                "-W",
                "never",
            ])
            .arg(&self.image)
            .env("PATH", path)
            .stdin(Stdio::piped())
            .spawn();
        let mut child = child.expect("sfdisk is needed: tests/run installs it");
        let mut stdin = child.stdin.take().unwrap();
        std::io::Write::write_all(&mut stdin, table.as_bytes()).unwrap();
        drop(stdin);
        assert!(child.wait().unwrap().success(), "{table}");
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(&self.image).unwrap();
        file.write_all_at(bytes, at).unwrap();
    }

    fn find(&self) -> Result<FreeSpace, FreeError> {
        free::find(&*open(&self.image), &())
    }
}

/// What should be found of a file system that was put at a place of a disk.
fn expected(made: &Made, at: u64) -> Vec<Range<u64>> {
    let free = in_pages(&shifted(&made.free(), at));
    let journal = in_pages(&shifted(&made.journal(), at));
    in_pages(&[free, journal].concat())
}

/// A disk whose second and a later partition are file systems, the first FAT and another swap.
fn check(table: &str, places: [(u32, u64); 2], fat: u64, swap: u64) {
    let first = Made::new(40, &["-t", "ext4"]);
    let second = Made::new(24, &["-t", "ext3", "-b", "1024"]);
    let disk = Disk::new(100, table);
    copy_into(&first.image, &disk.image, places[0].1);
    copy_into(&second.image, &disk.image, places[1].1);
    disk.write(fat, &[0; 1024]);
    disk.write(fat + 0x52, b"FAT32   ");
    disk.write(swap, &[0; 4096]);
    disk.write(swap + 4086, b"SWAPSPACE2");
    let space = disk.find().unwrap();
    let found: Vec<_> = space
        .systems
        .iter()
        .map(|system| (system.place.partition.unwrap(), system.place.offset))
        .collect();
    assert_eq!(found, places);
    assert_eq!(space.systems[1].kind, "ext3");
    let others: Vec<_> = space
        .others
        .iter()
        .map(|other| (other.place.offset, other.what))
        .collect();
    assert_eq!(others, [(fat, "a FAT file system"), (swap, "swap space")]);
    let ranges = [
        expected(&first, places[0].1),
        expected(&second, places[1].1),
    ]
    .concat();
    assert_eq!(space.ranges, ranges);

    // All but the free space is as it was, and each file system whole.
    let source = open(&disk.image);
    let trimmed = Trimmed::new(&*source, space.ranges.clone());
    assert_eq!(data_in(&trimmed, &space.ranges).unwrap(), 0);
    let copy = disk.dir.path().join("trimmed");
    free_util::write_out(&trimmed, &copy);
    assert!(!is_zero(&*open(&copy), 99 * MIB..100 * MIB));
    for ((_, at), made) in places.into_iter().zip([&first, &second]) {
        let part = made.dir.path().join("part");
        let part_len = made.image.metadata().unwrap().len();
        let all = open(&copy);
        let mut bytes = vec![0; part_len as usize];
        all.read_at(at, &mut bytes).unwrap();
        std::fs::write(&part, bytes).unwrap();
        run("e2fsck", &["-f", "-n", text(&part)]);
        made.check_files(text(&part));
    }
}

#[test]
fn partitions_of_an_mbr() {
    let table = "label: dos\nstart=2048, size=8MiB, type=c\nstart=20480, size=40MiB, type=83\n\
                 start=104448, size=45MiB, type=5\nstart=106496, size=2MiB, type=82\nstart=114688, size=24MiB, type=83\n";
    // Logical partitions are counted from 5.
    check(table, [(2, 10 * MIB), (6, 56 * MIB)], MIB, 52 * MIB);
}

#[test]
fn partitions_of_a_gpt() {
    let table = "label: gpt\nstart=2048, size=8MiB, type=uefi\nstart=20480, size=40MiB\n\
                 start=104448, size=2MiB, type=swap\nstart=114688, size=24MiB\n";
    check(table, [(2, 10 * MIB), (4, 56 * MIB)], MIB, 51 * MIB);
}

const ONE: &str = "label: gpt\nstart=2048, size=40MiB\n";

fn disk_with_one() -> (Made, Disk) {
    let made = Made::new(40, &["-t", "ext4"]);
    let disk = Disk::new(50, ONE);
    copy_into(&made.image, &disk.image, MIB);
    (made, disk)
}

#[test]
fn the_copy_at_the_end_is_taken_where_a_gpt_is_damaged() {
    let (made, disk) = disk_with_one();
    disk.write(1024 + 40, b"x");
    assert_eq!(disk.find().unwrap().ranges, expected(&made, MIB));
    // Both.
    disk.write(50 * MIB - 512 + 60, b"xyz");
    let error = disk.find().unwrap_err();
    assert!(matches!(error, FreeError::Table { .. }), "{error}");
}

#[test]
fn errors_name_the_partition() {
    let (made, disk) = disk_with_one();
    made.debugfs(&["set_super_value state 0"]);
    copy_into(&made.image, &disk.image, MIB);
    assert_eq!(
        disk.find().unwrap_err().to_string(),
        "the ext4 file system in partition 1 (at byte 1048576) was not unmounted cleanly, or is mounted"
    );
}

#[test]
fn a_disk_without_ext_says_what_there_is() {
    let disk = Disk::new(20, "label: dos\nstart=2048, size=10MiB, type=7\n");
    disk.write(MIB, b"\xeb\x52\x90NTFS    ");
    assert_eq!(
        disk.find().unwrap_err().to_string(),
        "no ext2, ext3 or ext4 file system was found on this disk (there is an NTFS file system in partition 1 (at byte \
         1048576)), so nothing is known to be free"
    );
    let nothing = free::find(&BytesSource(vec![0; 10_000]), &()).unwrap_err();
    assert!(
        matches!(nothing, FreeError::NoFileSystem { .. }),
        "{nothing}"
    );
}

#[test]
fn remnants_are_refused() {
    // A disk that was one file system, and was partitioned then.
    let made = Made::new(40, &["-t", "ext4"]);
    let disk = Disk {
        image: made.image.clone(),
        dir: tempfile::tempdir().unwrap(),
    };
    disk.partition("label: dos\nstart=2048, size=10MiB, type=83\n");
    let error = disk.find().unwrap_err();
    assert!(matches!(error, FreeError::Ambiguous { .. }), "{error}");

    // A member of a RAID that was a file system.
    let (_, disk) = disk_with_one();
    disk.write(MIB + 4096, &0xa92b_4efc_u32.to_le_bytes());
    let error = disk.find().unwrap_err().to_string();
    assert!(error.contains("a member of a RAID"), "{error}");
}

#[test]
fn partitions_that_overlap_are_refused() {
    let (_, disk) = disk_with_one();
    // By hand: no tool makes such a table.
    let mut table = [0; 512];
    for (number, (start, count)) in [(2048_u32, 81920_u32), (60000, 30000)]
        .into_iter()
        .enumerate()
    {
        let entry = &mut table[446 + 16 * number..][..16];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&start.to_le_bytes());
        entry[12..].copy_from_slice(&count.to_le_bytes());
    }
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    disk.write(0, &table);
    let error = disk.find().unwrap_err().to_string();
    assert!(
        error.contains("shares its bytes with partition 2"),
        "{error}"
    );
}

#[test]
fn logical_partitions_without_end_are_refused() {
    let disk = Disk::new(
        8,
        "label: dos\nstart=2048, size=4MiB, type=5\nstart=4096, size=1MiB, type=83\n",
    );
    let mut table = [0; 512];
    table[446 + 4] = 0x83;
    table[446 + 8..446 + 16].copy_from_slice(&[1, 0, 0, 0, 1, 0, 0, 0]);
    table[462 + 4] = 0x05;
    table[462 + 12] = 1;
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    disk.write(MIB, &table);
    let error = disk.find().unwrap_err();
    assert!(matches!(error, FreeError::Table { .. }), "{error}");
}
