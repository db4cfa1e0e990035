//! Helpers for the tests of `image`: fixtures made by QEMU's tools, which also serve as the oracle.
#![allow(dead_code, reason = "each test file uses a part")]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use capsule_chunker::content::Source;
use capsule_chunker::image::{self, ImageError, ImageOptions, OpenedImage};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

pub const MIB: usize = 1 << 20;

/// Runs a tool of QEMU's. These tests do not pass without them.
pub fn run(tool: &str, args: &[&OsStr]) -> Output {
    let output = Command::new(tool).args(args).output();
    let output =
        output.unwrap_or_else(|e| panic!("{tool}: {e}; install the Debian package qemu-utils"));
    assert!(
        output.status.success(),
        "{tool} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// `run!("qemu-img", "create", path)` with arguments of any string type.
#[macro_export]
macro_rules! run {
    ($tool:expr, $($arg:expr),* $(,)?) => {
        $crate::image_util::run($tool, &[$(AsRef::<std::ffi::OsStr>::as_ref(&$arg)),*])
    };
}

/// Makes an empty qcow2 image with some arguments of `qemu-img create`, such as `["-o", "cluster_size=4k"]`.
pub fn create(image: &Path, arguments: &[&str], size: &str) {
    let mut all: Vec<&OsStr> = ["create", "-q", "-f", "qcow2"].map(OsStr::new).into();
    all.extend(arguments.iter().map(OsStr::new));
    all.extend([image.as_os_str(), OsStr::new(size)]);
    run("qemu-img", &all);
}

/// Makes a qcow2 image of a disk's bytes; both lie in a directory, as `disk.raw` and `disk.qcow2`.
pub fn convert(dir: &Path, disk: &[u8], options: &str, compress: bool) -> PathBuf {
    let (raw, image) = (write(dir, "disk.raw", disk), dir.join("disk.qcow2"));
    let compress = if compress { "-c" } else { "-q" };
    run!(
        "qemu-img", "convert", "-f", "raw", "-O", "qcow2", compress, "-o", options, &raw, &image
    );
    image
}

/// Runs commands of qemu-io on a qcow2 image.
pub fn qemu_io(image: &Path, commands: &[&str]) {
    for command in commands {
        run!("qemu-io", "-f", "qcow2", "-c", command, image);
    }
}

/// The virtual disk as QEMU sees it.
pub fn oracle(image: &Path, format: &str) -> Vec<u8> {
    let raw = image.with_extension("oracle");
    run!(
        "qemu-img", "convert", "-f", format, "-O", "raw", image, &raw
    );
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

/// A raw disk of `len` bytes: noise, text, zeros, in runs of odd lengths.
pub fn disk(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut disk = Vec::with_capacity(len);
    while disk.len() < len {
        let run = rng.random_range(1..300_000).min(len - disk.len());
        let at = disk.len();
        disk.resize(at + run, 0);
        match rng.random_range(0..3) {
            0 => rng.fill_bytes(&mut disk[at..]),
            1 => disk[at..]
                .iter_mut()
                .enumerate()
                .for_each(|(i, b)| *b = b"capsule "[i % 8]),
            _ => {}
        }
    }
    disk
}

/// Writes a file in a directory.
pub fn write(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Cuts a file, or lengthens it by a hole.
pub fn set_len(path: &Path, len: u64) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(len).unwrap();
}

/// Opens an image with the defaults.
pub fn open(path: &Path) -> OpenedImage {
    image::open(path, &ImageOptions::default())
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Expects that an image cannot be opened with the defaults; why.
pub fn refused(path: &Path) -> ImageError {
    match image::open(path, &ImageOptions::default()) {
        Ok(_) => panic!("{} was opened", path.display()),
        Err(error) => error,
    }
}

/// Reads a source in every way, and compares it with what it should hold; returns the bytes known to be zero.
pub fn assert_holds(source: &dyn Source, expected: &[u8]) -> u64 {
    assert_eq!(source.len(), expected.len() as u64);
    let (mut at, mut zeros) = (0, 0);
    for extent in source.extents() {
        let extent = extent.unwrap();
        assert_eq!(extent.range.start, at, "no gaps");
        assert!(!extent.range.is_empty());
        let bytes = &expected[extent.range.start as usize..extent.range.end as usize];
        if extent.zero {
            assert!(
                bytes.iter().all(|&b| b == 0),
                "{extent:?} is said to be zero"
            );
            zeros += bytes.len() as u64;
        } else {
            let mut read = vec![1; bytes.len()];
            source.read_at(at, &mut read).unwrap();
            assert!(read == bytes, "{extent:?} differs");
        }
        at = extent.range.end;
    }
    assert_eq!(at, source.len());
    let mut rng = StdRng::seed_from_u64(7);
    for _ in 0..200 {
        let start = rng.random_range(0..=expected.len());
        let end = (start + rng.random_range(0..200_000)).min(expected.len());
        let mut read = vec![1; end - start];
        source.read_at(start as u64, &mut read).unwrap();
        assert!(read == expected[start..end], "{start}..{end} differs");
    }
    assert!(source.read_at(source.len(), &mut [0]).is_err());
    source.check_unchanged().unwrap();
    zeros
}
