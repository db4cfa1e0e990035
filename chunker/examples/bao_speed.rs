//! Prints what hashing, encoding, decoding and verifying cost, in ns/B of one core and of all.
//!
//! `RAYON_NUM_THREADS=1 cargo run --release -p capsule-chunker --example bao_speed`

use std::hint::black_box;
use std::time::Instant;

use capsule_chunker::bao::{
    Change, TreeHasher, decode_range, encode_range, tree_of, update, verify,
};
use capsule_proto::ranges::Height;
use capsule_proto::{GROUP_LEN, GroupRanges};

/// Bytes hashed, and bytes in an encoded run.
const SIZE: u64 = 256 << 20;
const RUN: u64 = (1 << 20) / GROUP_LEN;

/// Best of some runs: the machine is shared.
fn time(name: &str, bytes: u64, mut run: impl FnMut()) {
    let best = (0..8).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed()
    });
    let best = best.min().unwrap_or_default();
    println!(
        "{name:<34} {:>8.3} ns/B {:>10.3} ms",
        best.as_nanos() as f64 / bytes as f64,
        best.as_secs_f64() * 1e3
    );
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut data = vec![0; SIZE as usize];
    blake3::Hasher::new()
        .update(b"bao_speed")
        .finalize_xof()
        .fill(&mut data);
    let (tree, outboard) = tree_of(&data);
    let file = tempfile::tempfile()?;
    positioned_io::WriteAt::write_all_at(
        &mut &positioned_io::RandomAccessFile::try_new(file.try_clone()?)?,
        0,
        &data,
    )?;
    let outboard_file = tempfile::tempfile()?;
    positioned_io::WriteAt::write_all_at(
        &mut &positioned_io::RandomAccessFile::try_new(outboard_file.try_clone()?)?,
        0,
        &outboard,
    )?;

    time("blake3::hash", SIZE, || {
        black_box(blake3::hash(&data));
    });
    time("TreeHasher, pushes of 1 MiB", SIZE, || {
        let mut hasher = TreeHasher::new();
        data.chunks(1 << 20)
            .for_each(|part| hasher.push(part).expect("memory"));
        black_box(hasher.finish().expect("memory"));
    });
    time("TreeHasher, pushes of 64 KiB", SIZE, || {
        let mut hasher = TreeHasher::new();
        data.chunks(1 << 16)
            .for_each(|part| hasher.push(part).expect("memory"));
        black_box(hasher.finish().expect("memory"));
    });
    // Another position each time: what was hashed before is remembered.
    let mut position = 0;
    time("TreeHasher, zeros", SIZE, || {
        position += SIZE;
        let mut hasher = TreeHasher::new();
        hasher.push_zeros(position).expect("memory");
        black_box(hasher.finish().expect("memory"));
    });

    let runs: Vec<_> = (0..SIZE / GROUP_LEN / RUN)
        .map(|i| i * RUN..(i + 1) * RUN)
        .collect();
    let mut out = Vec::new();
    time("encode 1 MiB runs, from memory", SIZE, || {
        for run in &runs {
            out.clear();
            encode_range(&tree, run.clone(), Height::ROOT, &data, &outboard, &mut out)
                .expect("whole");
        }
    });
    time("encode 1 MiB runs, from files", SIZE, || {
        for run in &runs {
            out.clear();
            encode_range(
                &tree,
                run.clone(),
                Height::ROOT,
                &file,
                &outboard_file,
                &mut out,
            )
            .expect("whole");
        }
    });
    let last = runs[runs.len() - 1].clone();
    time("encode the same 1 MiB run", RUN * GROUP_LEN, || {
        out.clear();
        encode_range(
            &tree,
            last.clone(),
            Height::ROOT,
            &data,
            &outboard,
            &mut out,
        )
        .expect("whole");
    });
    time("decode a 1 MiB run", RUN * GROUP_LEN, || {
        let mut groups = 0;
        decode_range(
            &tree,
            last.clone(),
            Height::ROOT,
            &Vec::new(),
            &out,
            |_, _| {},
            |_, _| groups += 1,
        )
        .expect("right");
        assert_eq!(groups, RUN);
    });
    time("verify, from files", SIZE, || {
        black_box(verify(&tree, &GroupRanges::all(SIZE), &file, &outboard_file).expect("readable"));
    });

    let dirty: GroupRanges = (0..1000).map(|i| i * 16..i * 16 + 1).collect();
    let mut new_outboard = outboard.clone();
    for in_place in [false, true] {
        let change = Change {
            size: SIZE,
            dirty: &dirty,
            zero: &GroupRanges::new(),
            in_place,
        };
        time(
            if in_place {
                "update 1000 groups in place"
            } else {
                "update 1000 groups"
            },
            1000 * GROUP_LEN,
            || {
                black_box(
                    update(&tree, &outboard, &change, &data, &mut new_outboard).expect("readable"),
                );
            },
        );
    }
    Ok(())
}
