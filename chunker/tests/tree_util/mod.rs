//! Helpers for the tests of `tree`: a directory with one of everything, and the whole way round.
#![allow(dead_code, reason = "each test file uses a part")]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;

use capsule_chunker::content::{BytesSource, Content, Source};
use capsule_chunker::tree::{self, RestoreOptions, Restored, ScanOptions, TreeSource};
use capsule_proto::RootHash;
use capsule_proto::listing::Listing;
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps};

/// Walks a directory.
pub fn scan(dir: &Path) -> TreeSource {
    tree::scan(dir, &ScanOptions::default()).unwrap()
}

/// Listing and contents of a directory, read file by file.
pub fn publish(dir: &Path) -> (Arc<Listing>, BytesSource) {
    let source = scan(dir);
    let mut contents = vec![0; source.len() as usize];
    source.read_at(0, &mut contents).unwrap();
    let roots: Vec<RootHash> = (0..source.file_count())
        .map(|file| source.file_range(file))
        .map(|range| RootHash::of(&contents[range.start as usize..range.end as usize]))
        .collect();
    source.check_unchanged().unwrap();
    (
        Arc::new(source.into_listing(&roots).unwrap()),
        BytesSource(contents),
    )
}

/// Restores, with or without force.
pub fn restore(
    dest: &Path,
    tree: &(Arc<Listing>, BytesSource),
    force: bool,
) -> Result<Restored, tree::RestoreError> {
    tree::restore(
        dest,
        tree.0.clone(),
        &tree.1,
        &RestoreOptions { force },
        &(),
    )
}

/// Fails unless a directory is exactly the tree.
pub fn assert_is(dir: &Path, listing: &Listing) {
    let differences = tree::verify_tree(listing, dir).unwrap();
    assert!(
        differences.is_empty(),
        "{}",
        differences
            .iter()
            .map(|d| format!("{d}\n"))
            .collect::<String>()
    );
}

/// Whether the tests may make devices and set owners.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

pub fn mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

pub fn mtime(path: &Path, seconds: i64, nanos: u32) {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: nanos.into(),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// Sets an attribute; false where the file system has none of that kind.
pub fn xattr(path: &Path, name: &str, value: &[u8]) -> bool {
    match rustix::fs::lsetxattr(path, name, value, rustix::fs::XattrFlags::empty()) {
        Ok(()) => true,
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::PERM) => false,
        Err(error) => panic!("{name}: {error}"),
    }
}

/// Reproducible noise.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    use rand::{Rng, SeedableRng};
    let mut bytes = vec![0; len];
    rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// Makes a directory with one of everything that a listing holds.
pub fn make_everything(dir: &Path) {
    std::fs::create_dir(dir).unwrap();
    let at = |name: &str| dir.join(name);
    let deep = format!("deep/{}", "d/".repeat(200));
    for name in ["empty-dir", "etc", "usr/bin", "a", "a-b", &deep] {
        std::fs::create_dir_all(at(name)).unwrap();
    }
    std::fs::write(at("empty"), b"").unwrap();
    std::fs::write(at("a/empty"), b"").unwrap();
    std::fs::write(at("a/x"), noise(1, 5)).unwrap();
    std::fs::write(at("a-b/y"), noise(2, 256 << 10)).unwrap();
    std::fs::write(at(&deep).join("file"), b"deep").unwrap();
    std::fs::write(dir.join(OsStr::from_bytes(b"caf\xe9\n\xff")), b"latin").unwrap();
    std::fs::write(at("zz-last-empty"), b"").unwrap();
    for number in 0..600 {
        std::fs::write(
            at(&format!("etc/{number}")),
            noise(number, number as usize * 7),
        )
        .unwrap();
    }
    std::fs::write(at("big"), noise(3, 3_000_001)).unwrap();
    sparse(&at("sparse"));
    std::fs::File::create(at("all-hole"))
        .unwrap()
        .set_len(10 << 20)
        .unwrap();

    symlink("../nowhere", at("a/dangling")).unwrap();
    symlink("/etc/passwd", at("absolute")).unwrap();
    symlink(OsStr::from_bytes(b"caf\xe9"), at("a/latin")).unwrap();
    std::fs::hard_link(at("big"), at("a/big-too")).unwrap();
    std::fs::hard_link(at("big"), at("usr/bin/big-three")).unwrap();
    std::fs::hard_link(at("absolute"), at("zz-link-to-link")).unwrap();
    rustix::fs::mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    rustix::fs::mknodat(CWD, at("socket"), FileType::Socket, Mode::RUSR, 0).unwrap();
    if is_root() {
        rustix::fs::mknodat(
            CWD,
            at("null"),
            FileType::CharacterDevice,
            Mode::RUSR,
            rustix::fs::makedev(1, 3),
        )
        .unwrap();
        rustix::fs::mknodat(
            CWD,
            at("disk"),
            FileType::BlockDevice,
            Mode::RUSR,
            rustix::fs::makedev(259, 70_000),
        )
        .unwrap();
        std::fs::hard_link(at("null"), at("null-too")).unwrap();
    }
    metadata(dir);
}

/// A file with holes at its beginning, middle and end.
fn sparse(path: &Path) {
    let file = std::fs::File::create(path).unwrap();
    file.write_all_at(&noise(4, 100_000), 1 << 20).unwrap();
    file.write_all_at(b"island", 5 << 20).unwrap();
    file.set_len(8 << 20).unwrap();
}

fn metadata(dir: &Path) {
    let at = |name: &str| dir.join(name);
    if is_root() {
        for (name, id) in [
            ("a/x", 1000),
            ("absolute", 12),
            ("fifo", 65_534),
            ("empty-dir", 4_000_000_000),
            ("usr/bin", 3),
        ] {
            rustix::fs::chownat(
                CWD,
                at(name),
                Some(rustix::fs::Uid::from_raw(id)),
                Some(rustix::fs::Gid::from_raw(id + 1)),
                AtFlags::SYMLINK_NOFOLLOW,
            )
            .unwrap();
        }
        // cap_net_raw, as on ping.
        xattr(
            &at("a/empty"),
            "security.capability",
            &[
                1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            ],
        );
        xattr(&at("absolute"), "trusted.capsule", b"on a link");
        xattr(&at("fifo"), "trusted.capsule", b"on a pipe");
    }
    xattr(&at("a/x"), "user.empty", b"");
    xattr(&at("a/x"), "user.binary", &noise(5, 1000));
    xattr(&at("empty-dir"), "user.dir", b"on a directory");
    // user::rw-, user:1000:r--, group::r--, mask::r--, other::---
    let acl = [
        2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 232, 3, 0, 0, 4, 0, 4, 0, 255, 255,
        255, 255, 16, 0, 4, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255,
    ];
    xattr(&at("etc/7"), "system.posix_acl_access", &acl);
    xattr(&at("etc"), "system.posix_acl_default", &acl);
    for (name, bits) in [
        ("a/x", 0o6755),
        ("a", 0o1777),
        ("etc", 0o2750),
        ("empty", 0o000),
        ("fifo", 0o622),
        ("usr/bin", 0o555),
    ] {
        mode(&at(name), bits);
    }
    mtime(&at("a/x"), 1_700_000_000, 123_456_789);
    mtime(&at("empty"), -5, 999_999_999);
    mtime(&at("a/dangling"), 1, 1);
    mtime(&at("fifo"), 0, 0);
    mtime(&at("a/empty"), 4_000_000_000, 1);
    mtime(&at("a"), 1_000_000, 5);
    mtime(&at("deep"), 2_000_000, 6);
    mtime(dir, 3_000_000, 7);
}
