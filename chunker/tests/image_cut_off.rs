//! Copies of qcow2 images that are not whole: refused, never read as zeros.

mod image_util;

use std::path::Path;

use capsule_chunker::content::ReadError;
use capsule_chunker::image::ImageError;
use image_util::{MIB, assert_holds, convert, create, open, oracle, qemu_io, refused, set_len};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(1).fill_bytes(&mut bytes);
    bytes
}

/// Half of every cluster compresses, so that each is stored compressed.
fn text_and_noise(len: usize) -> Vec<u8> {
    let mut bytes = noise(len);
    for cluster in bytes.chunks_mut(64 << 10) {
        let half = cluster.len() / 2;
        cluster[..half].fill(b'c');
    }
    bytes
}

fn cut(path: &Path, len: u64) {
    assert!(len <= std::fs::metadata(path).unwrap().len());
    set_len(path, len);
}

fn u64_at(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap())
}

/// Where the L1 table is, and the first L2 table.
fn tables(image: &Path) -> (u64, u64) {
    let bytes = std::fs::read(image).unwrap();
    let l1 = u64_at(&bytes, 40);
    (l1, u64_at(&bytes, l1) & 0x00ff_ffff_ffff_fe00)
}

/// Expects that opening `image` names `file` as cut off at its length.
fn assert_cut_off(image: &Path, file: &Path) {
    let len = std::fs::metadata(file).unwrap().len();
    match refused(image) {
        ImageError::Read(ReadError::Format { path, offset, why }) => {
            assert_eq!((path.as_path(), offset), (file, len), "{why}");
            assert!(why.contains("cut off") && why.contains("copy it again"));
            assert!(why.contains(&format!("it has {len}: ")), "{why}");
        }
        error => panic!("{len} bytes: {error}"),
    }
}

#[test]
fn a_cut_at_a_table_or_in_the_data() {
    for (options, cluster) in [
        ("cluster_size=64k", 65536),
        ("cluster_size=4k", 4096),
        ("compat=0.10", 65536),
        ("extended_l2=on", 65536),
    ] {
        let temp = tempfile::tempdir().unwrap();
        let image = convert(temp.path(), &noise(3 * MIB + 1536), options, false);
        open(&image);
        let len = std::fs::metadata(&image).unwrap().len();
        let (l1, l2) = tables(&image);
        // The disk ends 1536 bytes into its last cluster, where the file may end too.
        let needed = (len - 1) / cluster * cluster + 1536;
        let mut cuts = [
            needed - 1,
            needed - 1536,
            len / 2 + 1000,
            len / 2,
            l2 + 8,
            l2,
            l1 + 7,
            l1,
            5000,
        ];
        cuts.sort_unstable_by(|a, b| b.cmp(a));
        for at in cuts {
            cut(&image, at);
            assert_cut_off(&image, &image);
        }
    }
}

#[test]
fn a_cut_in_compressed_data() {
    for options in [
        "cluster_size=64k",
        "cluster_size=2M",
        "compression_type=zstd",
    ] {
        let temp = tempfile::tempdir().unwrap();
        let disk = text_and_noise(3 * MIB);
        let image = convert(temp.path(), &disk, options, true);
        assert_holds(&*open(&image).source, &disk);
        let len = std::fs::metadata(&image).unwrap().len();
        let data = tables(&image).1 + 8;
        for at in [len - 1, len - 512, data + (len - data) / 2, data] {
            cut(&image, at);
            assert_cut_off(&image, &image);
        }
    }
}

#[test]
fn a_file_that_ends_within_a_sector_of_compressed_data() {
    let temp = tempfile::tempdir().unwrap();
    let image = temp.path().join("image");
    create(&image, &[], "1M");
    // Written so, and not to be told from a cut.
    qemu_io(&image, &["write -q -c -P 3 0 64k"]);
    assert_cut_off(&image, &image);
    let error = refused(&image).to_string();
    assert!(error.contains("qemu-img convert"), "{error}");
    // The way out.
    let whole = temp.path().join("whole");
    run!(
        "qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", &image, &whole
    );
    let mut expected = vec![0; MIB];
    expected[..64 << 10].fill(3);
    assert_holds(&*open(&whole).source, &expected);
}

#[test]
fn an_end_within_the_last_cluster_behind_the_disk_s_end() {
    let temp = tempfile::tempdir().unwrap();
    let disk = noise(MIB + 1536);
    let image = convert(temp.path(), &disk, "cluster_size=64k", false);
    let len = std::fs::metadata(&image).unwrap().len();
    cut(&image, len - 65536 + 1536);
    assert_holds(&*open(&image).source, &disk);
    // A larger disk sees more of that cluster.
    run!("qemu-img", "resize", "-q", &image, "2M");
    cut(&image, len - 65536 + 1536);
    assert_cut_off(&image, &image);
}

#[test]
fn clusters_that_are_never_read_need_not_be_there() {
    // Allocated, and then zeroed where they lie.
    let temp = tempfile::tempdir().unwrap();
    let image = convert(temp.path(), &noise(MIB), "cluster_size=64k", false);
    qemu_io(&image, &["write -q -z 512k 512k"]);
    let expected = oracle(&image, "qcow2");
    let len = std::fs::metadata(&image).unwrap().len();
    cut(&image, len - MIB as u64 / 2);
    assert_holds(&*open(&image).source, &expected);

    // Of one cluster in extended tables, only the first subclusters.
    let image = temp.path().join("subclusters");
    create(&image, &["-o", "extended_l2=on,cluster_size=64k"], "1M");
    qemu_io(&image, &["write -q -P 8 512k 3k"]);
    assert_holds(&*open(&image).source, &oracle(&image, "qcow2"));
    let len = std::fs::metadata(&image).unwrap().len();
    cut(&image, len - 512);
    assert_cut_off(&image, &image);
}

#[test]
fn preallocated_tables() {
    let temp = tempfile::tempdir().unwrap();
    let image = temp.path().join("image");
    create(&image, &["-o", "preallocation=metadata"], "3000k");
    assert_holds(&*open(&image).source, &oracle(&image, "qcow2"));
}

#[test]
fn any_file_of_the_image() {
    let temp = tempfile::tempdir().unwrap();
    let base = convert(temp.path(), &noise(MIB), "cluster_size=64k", false);
    let top = temp.path().join("top");
    let below = base.to_str().unwrap();
    create(&top, &["-b", below, "-F", "qcow2"], "1M");
    cut(&base, MIB as u64);
    assert_cut_off(&top, &base);

    let (image, data) = (temp.path().join("image"), temp.path().join("data"));
    let option = format!("data_file={}", data.display());
    create(&image, &["-o", &option], "4M");
    qemu_io(&image, &["write -q -P 8 1M 300k", "write -q -P 7 0 1k"]);
    open(&image);
    cut(&data, MIB as u64 + 200_000);
    assert_cut_off(&image, &data);
    cut(&data, 0);
    assert_cut_off(&image, &data);
}

#[test]
fn a_disk_of_many_tables() {
    let temp = tempfile::tempdir().unwrap();
    let image = temp.path().join("image");
    create(&image, &[], "8G");
    qemu_io(&image, &["write -q -P 1 0 64k", "write -q -P 2 8000M 64k"]);
    let opened = open(&image);
    let mut last = [0; 4096];
    opened.source.read_at(8000 << 20, &mut last).unwrap();
    assert_eq!(last, [2; 4096]);
    let len = std::fs::metadata(&image).unwrap().len();
    cut(&image, len - 65536);
    assert_cut_off(&image, &image);
}
