//! Two updates that should cost nearly nothing: none at all, and a little in a very large image.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use capsule_chunker::layer::encode::Effort;
use capsule_tests::data;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::Found;
use super::ours::{Lab, Way, ours};
use crate::process::Deadline;

/// The very large image, and the data in it.
pub const VAST: u64 = 64 << 30;
const ISLANDS: u64 = 64;
const ISLAND: usize = 4 << 20;
/// Its edits.
pub const EDITS: usize = 1000;
const EDIT: u64 = 4096;

/// Publishes an image again that has not changed, under a new name; also tells how long reading and hashing it takes.
pub fn republish(image: &Path, deadline: &Deadline) -> Result<(Found, f64)> {
    let lab = Lab::start(deadline)?;
    lab.publish(image, 1, Way::of(Effort::Fast))?;
    lab.pull(1)?;
    let hashing = read_and_hash(image)?;
    let (published, make) = lab.publish(image, 2, Way::of(Effort::Default))?;
    let (pulled, bytes, apply) = lab.pull(2)?;
    let found = Found {
        bytes,
        make: Some(make),
        apply: Some(apply),
        ours: Some(ours(&published, &pulled)),
    };
    Ok((found, hashing))
}

/// Seconds that reading and hashing a file takes, on all cores.
fn read_and_hash(path: &Path) -> Result<f64> {
    let started = Instant::now();
    let mut file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let (mut hasher, mut buffer) = (blake3::Hasher::new(), vec![0; 16 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            len => hasher.update_rayon(&buffer[..len]),
        };
    }
    hasher.finalize();
    Ok(started.elapsed().as_secs_f64())
}

/// Edits a very large sparse image at a thousand places.
pub fn scattered(dir: &Path, deadline: &Deadline) -> Result<Found> {
    let image: PathBuf = dir.join("vast.img");
    let file = File::create(&image)?;
    file.set_len(VAST)?;
    for island in 0..ISLANDS {
        file.write_all_at(&data::prose(island, ISLAND), island * (VAST / ISLANDS))?;
    }
    let lab = Lab::start(deadline)?;
    lab.publish(&image, 1, Way::of(Effort::Fast))?;
    lab.pull(1)?;
    let mut rng = SmallRng::seed_from_u64(6);
    for edit in 0..EDITS {
        let at = rng.random_range(0..VAST / EDIT) * EDIT;
        file.write_all_at(&data::noise(1 << 32 | edit as u64, EDIT as usize), at)?;
    }
    let (published, make) = lab.publish(&image, 2, Way::of(Effort::Default))?;
    let (pulled, bytes, apply) = lab.pull(2)?;
    std::fs::remove_file(&image)?;
    Ok(Found {
        bytes,
        make: Some(make),
        apply: Some(apply),
        ours: Some(ours(&published, &pulled)),
    })
}
