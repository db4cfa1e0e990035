//! Generated data: the same for the same seed, on every machine.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;

use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};

/// Incompressible bytes.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// Bytes that compress about as well as programs do: words of a small vocabulary.
pub fn prose(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let words: Vec<Vec<u8>> = (0..4096)
        .map(|word| noise(seed ^ word, 2 + (word % 11) as usize))
        .collect();
    let mut bytes = Vec::with_capacity(len + 16);
    while bytes.len() < len {
        // Low words are likelier, as in language.
        let word =
            rng.random_range(0..words.len()) * rng.random_range(0..words.len()) / words.len();
        bytes.extend_from_slice(&words[word]);
    }
    bytes.truncate(len);
    bytes
}

/// Writes a file of incompressible bytes without holding it in memory.
pub fn noise_file(path: &Path, seed: u64, len: u64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut file =
        BufWriter::with_capacity(1 << 20, File::create(path).expect("the file can be made"));
    let mut piece = vec![0; 1 << 20];
    let mut left = len;
    while left > 0 {
        let now = left.min(piece.len() as u64) as usize;
        rng.fill_bytes(&mut piece[..now]);
        file.write_all(&piece[..now]).expect("the disk has room");
        left -= now as u64;
    }
    file.flush().expect("the disk has room");
}

/// Makes a directory tree with a bit of everything: many small files, some large, nested directories, a sparse file, links,
/// odd names, odd modes.
pub fn tree(dir: &Path, seed: u64, bytes: u64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    fs::create_dir_all(dir).expect("the directory can be made");
    let mut left = bytes;
    let mut number = 0;
    while left > 0 {
        let parent = dir
            .join(format!("d{}", number % 7))
            .join(format!("e{}", number % 3));
        fs::create_dir_all(&parent).expect("the directory can be made");
        let len = match number % 10 {
            0 => rng.random_range(100_000..2_000_000),
            1 => 0,
            _ => rng.random_range(1..20_000),
        }
        .min(left);
        let content = if number % 4 == 0 {
            noise(seed + number, len as usize)
        } else {
            prose(seed + number, len as usize)
        };
        let path = parent.join(format!("f{number}"));
        fs::write(&path, content).expect("the disk has room");
        fs::set_permissions(
            &path,
            fs::Permissions::from_mode(if number % 5 == 0 { 0o755 } else { 0o644 }),
        )
        .expect("it is ours");
        left -= len;
        number += 1;
    }
    let sparse = File::create(dir.join("sparse")).expect("the file can be made");
    sparse.set_len(8 << 20).expect("the file is ours");
    sparse
        .write_all_at(b"an island", 5 << 20)
        .expect("the disk has room");
    symlink("d0/e0/f0", dir.join("link")).expect("the link can be made");
    symlink("/nonexistent/elsewhere", dir.join("dangling")).expect("the link can be made");
    fs::hard_link(dir.join("d0/e0/f0"), dir.join("hard")).expect("the link can be made");
    fs::write(dir.join("ein Name mit Blank\nund Zeile"), b"odd").expect("the disk has room");
    fs::create_dir(dir.join("empty")).expect("the directory can be made");
}

/// Whether two directory trees are the same in names, kinds, contents, modes, times and link targets; the first difference else.
pub fn compare_trees(left: &Path, right: &Path) -> Result<(), String> {
    use std::os::unix::fs::MetadataExt;
    let (a, b) = (meta(left)?, meta(right)?);
    let traits = |m: &fs::Metadata| (m.mode(), m.uid(), m.gid(), m.mtime(), m.mtime_nsec());
    if traits(&a) != traits(&b) {
        return Err(format!(
            "{} and {} differ: {:?}, {:?}",
            left.display(),
            right.display(),
            traits(&a),
            traits(&b)
        ));
    }
    if a.is_symlink() {
        return if fs::read_link(left).ok() == fs::read_link(right).ok() {
            Ok(())
        } else {
            Err(format!("link {}", left.display()))
        };
    }
    if a.is_file() {
        return if fs::read(left).ok() == fs::read(right).ok() {
            Ok(())
        } else {
            Err(format!("content of {}", left.display()))
        };
    }
    let names = |dir: &Path| {
        let mut names: Vec<_> = fs::read_dir(dir)
            .expect("the directory is ours")
            .flatten()
            .map(|e| e.file_name())
            .collect();
        names.sort();
        names
    };
    let (mut here, there) = (names(left), names(right));
    if here != there {
        return Err(format!("names in {}: {here:?}, {there:?}", left.display()));
    }
    here.drain(..)
        .try_for_each(|name| compare_trees(&left.join(&name), &right.join(&name)))
}

fn meta(path: &Path) -> Result<fs::Metadata, String> {
    fs::symlink_metadata(path).map_err(|error| format!("{}: {error}", path.display()))
}
