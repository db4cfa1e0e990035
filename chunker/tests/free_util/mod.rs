//! Helpers for the tests of `free`: file systems made by e2fsprogs, which also say what is right.
#![allow(dead_code, reason = "each test file uses a part")]

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use capsule_chunker::content::{Content, Source};
use capsule_chunker::free::{self, FreeError, FreeSpace, Trimmed};
use capsule_chunker::image::{self, ImageOptions, ReadAs};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tempfile::TempDir;

pub const MIB: u64 = 1 << 20;

/// Runs a tool of e2fsprogs, util-linux or fdisk; these tests do not pass without them. Gives what it printed.
pub fn run(tool: &str, args: &[&str]) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    let output = Command::new(tool)
        .args(args)
        .env("PATH", path)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{tool} is needed: {e}; tests/run installs it"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{tool} {args:?}: {said} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// A file system in a file, with files in it and what was left of others.
pub struct Made {
    pub dir: TempDir,
    pub image: PathBuf,
}

impl Made {
    /// Makes one of so many MiB, full of old noise, with the options of `mke2fs`; a sparse file where that is too much.
    pub fn new(mib: u64, options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk");
        let file = File::create_new(&image).unwrap();
        file.set_len(mib * MIB).unwrap();
        let old = noise(1, MIB as usize);
        for at in 0..mib.min(128) {
            file.write_all_at(&old, at * MIB).unwrap();
        }
        let files = dir.path().join("files");
        std::fs::create_dir_all(files.join("sub")).unwrap();
        for number in 0..20 {
            let name = format!("sub/file{number}");
            let len = 500 + number as usize * 7919;
            std::fs::write(files.join(name), noise(1000 + number, len)).unwrap();
        }
        std::fs::write(files.join("large"), noise(2000, 3_000_000)).unwrap();
        std::fs::write(files.join("gone"), noise(2001, 2_000_000)).unwrap();
        let made = Self { dir, image };
        let (from, to) = (text(&files).to_owned(), text(&made.image).to_owned());
        // Not to be discarded: what lay there before is what trimming is about.
        let fixed = ["-q", "-F", "-E", "nodiscard", "-d", &from];
        run("mke2fs", &[&fixed[..], options, &[&to]].concat());
        made.debugfs(&["rm gone", "rm sub/file7", "rm sub/file8"]);
        // Quotas are not kept by `debugfs`.
        if options.iter().any(|option| option.contains("quota")) {
            let mut repair = Command::new("e2fsck");
            let repair = repair.args(["-f", "-y", text(&made.image)]);
            assert_eq!(repair.output().unwrap().status.code(), Some(1));
        }
        made
    }

    pub fn debugfs(&self, commands: &[&str]) {
        for command in commands {
            run("debugfs", &["-w", "-R", command, text(&self.image)]);
        }
    }

    pub fn open(&self) -> Box<dyn Source> {
        open(&self.image)
    }

    pub fn find(&self) -> Result<FreeSpace, FreeError> {
        free::find(&*self.open(), &())
    }

    /// The free blocks by `dumpe2fs`, in bytes.
    pub fn free(&self) -> Vec<Range<u64>> {
        let said = run("dumpe2fs", &[text(&self.image)]);
        let block_size = number_after(&said, "Block size:");
        // Of several blocks in a cluster it tells the first.
        let last_of = match said.contains("Cluster size:") {
            true => number_after(&said, "Cluster size:"),
            false => block_size,
        };
        let lists = said
            .lines()
            .filter_map(|line| line.strip_prefix("  Free blocks: "));
        let runs = lists
            .flat_map(|list| list.split(", "))
            .filter(|run| !run.is_empty());
        runs.map(|run| {
            let (first, last) = run.split_once('-').unwrap_or((run, run));
            let number = |text: &str| text.trim().parse::<u64>().unwrap();
            number(first) * block_size..number(last) * block_size + last_of
        })
        .collect()
    }

    /// The journal's blocks but the first by `debugfs`, in bytes.
    pub fn journal(&self) -> Vec<Range<u64>> {
        let said = run("dumpe2fs", &["-h", text(&self.image)]);
        if !said.contains("Journal inode:") {
            return Vec::new();
        }
        let block_size = number_after(&said, "Block size:");
        let said = run("debugfs", &["-R", "stat <8>", text(&self.image)]);
        let lists = said
            .split("BLOCKS:\n")
            .nth(1)
            .or(said.split("EXTENTS:\n").nth(1));
        let lists = lists.unwrap().lines().next().unwrap();
        // `(12-267):37-292`; blocks of maps are marked by letters.
        let runs = lists
            .split(", ")
            .filter(|run| run.as_bytes()[1].is_ascii_digit());
        runs.filter_map(|run| {
            let (file, disk) = run.split_once("):").unwrap();
            let ends = |text: &str| {
                let (first, last) = text.split_once('-').unwrap_or((text, text));
                first.parse::<u64>().unwrap()..last.parse::<u64>().unwrap() + 1
            };
            let (file, disk) = (ends(&file[1..]), ends(disk));
            // The first block stays.
            let start = disk.start + u64::from(file.start == 0);
            (start < disk.end).then_some(start * block_size..disk.end * block_size)
        })
        .collect()
    }

    /// Writes the trimmed disk to a file, and checks it with `e2fsck` and against the files.
    pub fn check_trimmed(&self, space: &FreeSpace) -> PathBuf {
        let source = self.open();
        let trimmed = Trimmed::new(&*source, space.ranges.clone());
        let copy = self.dir.path().join("trimmed");
        write_out(&trimmed, &copy);
        run("e2fsck", &["-f", "-n", text(&copy)]);
        self.check_files(text(&copy));
        copy
    }

    /// Compares all files in a file system with what was put there.
    pub fn check_files(&self, image: &str) {
        let out = self.dir.path().join("dumped");
        std::fs::create_dir_all(&out).unwrap();
        run(
            "debugfs",
            &["-R", &format!("rdump / {}", text(&out)), image],
        );
        let files = self.dir.path().join("files");
        for gone in ["gone", "sub/file7", "sub/file8"] {
            assert!(!out.join(gone).exists());
            let _ = std::fs::remove_file(files.join(gone));
        }
        let _ = std::fs::remove_dir(out.join("lost+found"));
        run("diff", &["-r", text(&files), text(&out)]);
        std::fs::remove_dir_all(&out).unwrap();
    }
}

pub fn number_after(text: &str, label: &str) -> u64 {
    let rest = text
        .split(label)
        .nth(1)
        .unwrap_or_else(|| panic!("{label} in {text}"));
    rest.split_whitespace().next().unwrap().parse().unwrap()
}

pub fn open(image: &Path) -> Box<dyn Source> {
    let options = ImageOptions {
        read_as: ReadAs::Disk,
    };
    image::open(image, &options).unwrap().source
}

/// Writes a source sparsely.
pub fn write_out(source: &dyn Source, to: &Path) {
    let file = File::create(to).unwrap();
    file.set_len(source.len()).unwrap();
    let mut buf = vec![0; MIB as usize];
    for extent in source.extents() {
        let extent = extent.unwrap();
        if extent.zero {
            continue;
        }
        let mut at = extent.range.start;
        while at < extent.range.end {
            let part = &mut buf[..MIB.min(extent.range.end - at) as usize];
            source.read_at(at, part).unwrap();
            file.write_all_at(part, at).unwrap();
            at += part.len() as u64;
        }
    }
}

/// Ranges as they should be found: joined, of whole pages.
pub fn in_pages(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut sorted = ranges.to_vec();
    sorted.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in sorted {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(range),
        }
    }
    let pages = joined
        .into_iter()
        .map(|range| range.start.next_multiple_of(4096)..range.end / 4096 * 4096);
    pages.filter(|range| range.start < range.end).collect()
}

/// Part of a disk, for the truth about it.
pub fn shifted(ranges: &[Range<u64>], by: u64) -> Vec<Range<u64>> {
    ranges
        .iter()
        .map(|range| range.start + by..range.end + by)
        .collect()
}

/// Bytes of ranges.
pub fn total(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// Copies a file into another at a place.
pub fn copy_into(from: &Path, to: &Path, at: u64) {
    let file = File::options().write(true).open(to).unwrap();
    file.write_all_at(&std::fs::read(from).unwrap(), at)
        .unwrap();
}

/// Whether some bytes of content are all zero.
pub fn is_zero(content: &dyn Content, range: Range<u64>) -> bool {
    let mut buf = vec![1; (range.end - range.start) as usize];
    content.read_at(range.start, &mut buf).unwrap();
    buf.iter().all(|byte| *byte == 0)
}
