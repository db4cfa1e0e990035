//! Seeds: hashes of some of the short windows of content, chosen by the hash itself, so that equal stretches have equal
//! seeds wherever they lie.
//!
//! A gear hash (as in FastCDC) that moves by two bits a byte forgets a byte after 32: no seed depends on more.

use crate::layer::GEAR;

/// Bytes that a seed depends on.
pub const WINDOW_LEN: usize = 32;

/// A window of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed {
    /// Hash of the window.
    pub hash: u64,
    /// First byte of the window.
    pub at: u64,
}

/// Stretches that are gone through side by side: each step of one hash waits for the step before, but not for other hashes.
const LANES: usize = 4;
/// Length of each.
const LANE_LEN: usize = 1 << 10;

/// Finds the seeds of data that lies at byte `at` of something: one window in `2^bits`.
///
/// In content that repeats itself the same few windows would come all the time: seeds keep a distance of an eighth of that
/// on average between them.
pub fn seeds(data: &[u8], at: u64, bits: u32, mut found: impl FnMut(Seed)) {
    let limit = 1u64 << (64 - bits);
    let distance = 1usize << (bits - 3);
    let mut next = WINDOW_LEN - 1;
    let mut keep = |end: usize, hash: u64| {
        if end >= next {
            next = end + distance;
            found(Seed {
                hash: mix(hash),
                at: at + (end + 1 - WINDOW_LEN) as u64,
            });
        }
    };
    let mut hits: [Vec<(usize, u64)>; LANES] = Default::default();
    let mut start = 0;
    for block in data.chunks_exact(LANES * LANE_LEN) {
        let lane = |n: usize| &block[n * LANE_LEN..][..LANE_LEN];
        let bytes = lane(0).iter().zip(lane(1)).zip(lane(2)).zip(lane(3));
        let mut hashes: [u64; LANES] = std::array::from_fn(|n| before(data, start + n * LANE_LEN));
        for (i, (((a, b), c), d)) in bytes.enumerate() {
            for (hash, byte) in hashes.iter_mut().zip([a, b, c, d]) {
                *hash = step(*hash, *byte);
            }
            let [a, b, c, d] = hashes;
            if a.min(b).min(c.min(d)) < limit {
                for (n, (hits, hash)) in hits.iter_mut().zip(hashes).enumerate() {
                    if hash < limit {
                        hits.push((start + n * LANE_LEN + i, hash));
                    }
                }
            }
        }
        for hits in &mut hits {
            hits.drain(..).for_each(|(end, hash)| keep(end, hash));
        }
        start += block.len();
    }
    let mut hash = before(data, start);
    for (i, byte) in data[start..].iter().enumerate() {
        hash = step(hash, *byte);
        if hash < limit {
            keep(start + i, hash);
        }
    }
}

/// The gear hash one byte on.
fn step(hash: u64, byte: u8) -> u64 {
    (hash << 2).wrapping_add(GEAR[usize::from(byte)])
}

/// The hash of what lies before a byte.
fn before(data: &[u8], at: usize) -> u64 {
    let window = &data[at.saturating_sub(WINDOW_LEN)..at];
    window.iter().fold(0, |hash, byte| step(hash, *byte))
}

/// Spreads what a gear hash knows over all bits: its lower ones hang on the last bytes only, its upper ones are zero here.
const fn mix(hash: u64) -> u64 {
    let hash = (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (hash ^ (hash >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::SmallRng};

    use super::*;

    fn random(seed: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        SmallRng::seed_from_u64(seed).fill_bytes(&mut data);
        data
    }

    fn of(data: &[u8], at: u64) -> Vec<Seed> {
        let mut all = Vec::new();
        seeds(data, at, 8, |seed| all.push(seed));
        all
    }

    #[test]
    fn equal_stretches_have_equal_seeds() {
        let (before, shared) = (random(1, 1000), random(2, 100_000));
        let moved = [before, shared.clone()].concat();
        let (plain, moved) = (of(&shared, 0), of(&moved, 0));
        let common = plain
            .iter()
            .filter(|seed| {
                moved.contains(&Seed {
                    at: seed.at + 1000,
                    ..**seed
                })
            })
            .count();
        assert!((280..500).contains(&plain.len()), "{}", plain.len());
        assert!(common + 2 >= plain.len(), "{common} of {}", plain.len());
    }

    #[test]
    fn a_seed_depends_on_its_window_alone() {
        let data = random(3, 50_000);
        for seed in of(&data, 7) {
            let start = (seed.at - 7) as usize;
            let mut other = random(4, 50_000);
            other[start..start + WINDOW_LEN].copy_from_slice(&data[start..start + WINDOW_LEN]);
            let around = start.saturating_sub(31)..start + WINDOW_LEN;
            let again = of(&other[around.clone()], 7 + around.start as u64);
            // Unless one just before it keeps its distance.
            let near = |other: &Seed| (1..WINDOW_LEN as u64).contains(&(seed.at - other.at));
            assert!(again.contains(&seed) || again.iter().any(near));
        }
    }

    // Side by side they are those that one hash, byte by byte, comes to.
    #[test]
    fn lanes_change_nothing() {
        let all = [random(5, 30_000), random(6, 3).repeat(5000)].concat();
        for len in [0, 31, 32, 4095, 4096, 4097, 20_000, all.len()] {
            let data = &all[..len];
            let (mut hash, mut next, mut plain) = (0, WINDOW_LEN - 1, Vec::new());
            for (i, byte) in data.iter().enumerate() {
                hash = step(hash, *byte);
                if hash >> 56 == 0 && i >= next {
                    next = i + 32;
                    plain.push(Seed {
                        hash: mix(hash),
                        at: 9 + (i + 1 - WINDOW_LEN) as u64,
                    });
                }
            }
            let mut found = Vec::new();
            seeds(data, 9, 8, |seed| found.push(seed));
            assert_eq!(found, plain, "{len}");
        }
    }

    #[test]
    fn repeating_content_floods_nothing() {
        for period in 1..40 {
            let data = random(period, period as usize).repeat(100_000 / period as usize);
            assert!(of(&data, 0).len() <= 100_000 / 32 + 1);
        }
    }
}
