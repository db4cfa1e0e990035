//! qcow2 images of every kind, compared with what QEMU reads from them.

mod image_util;

use std::path::Path;

use capsule_chunker::content::ReadError;
use capsule_chunker::image::{self, Format, ImageError, ImageKind, ImageOptions, ReadAs};
use image_util::{
    MIB, assert_holds, convert, create, disk, open, oracle, qemu_io, refused, set_len, write,
};

/// Converts a disk with some options, and compares what we read; returns the bytes known to be zero.
fn check(disk: &[u8], options: &str, compress: bool) -> u64 {
    let temp = tempfile::tempdir().unwrap();
    let opened = open(&convert(temp.path(), disk, options, compress));
    assert_eq!(
        (opened.kind, opened.format),
        (ImageKind::Disk, Format::Qcow2)
    );
    assert_holds(&*opened.source, disk)
}

#[test]
fn versions_and_cluster_sizes() {
    let disk = disk(1, 5 * MIB + 3 * 512);
    for options in [
        "compat=0.10",
        "compat=1.1",
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=2M",
        "lazy_refcounts=on",
    ] {
        let zeros = check(&disk, options, false);
        assert!(
            zeros > 0 || options.ends_with("2M"),
            "{options}: unallocated clusters are known to be zero"
        );
    }
}

#[test]
fn compressed_clusters() {
    let disk = disk(2, 3 * MIB + 512);
    for options in [
        "cluster_size=64k",
        "compat=0.10",
        "cluster_size=4k",
        "cluster_size=2M",
    ] {
        check(&disk, options, true);
    }
}

#[test]
fn what_our_reader_lacks_goes_through_qemu() {
    let disk = disk(3, 3 * MIB);
    check(&disk, "compression_type=zstd", true);
    check(&disk, "extended_l2=on,cluster_size=64k", false);
}

#[test]
fn an_empty_disk_and_the_smallest() {
    let temp = tempfile::tempdir().unwrap();
    for (size, len) in [("0", 0), ("512", 512), ("1T", 1_u64 << 40)] {
        let image = temp.path().join(size);
        create(&image, &[], size);
        let opened = open(&image);
        assert_eq!(opened.source.len(), len);
        let extents: Vec<_> = opened.source.extents().map(Result::unwrap).collect();
        assert!(extents.iter().all(|extent| extent.zero));
        assert_eq!(
            extents
                .iter()
                .map(|e| e.range.end - e.range.start)
                .sum::<u64>(),
            len
        );
    }
}

/// A chain of three: a raw base, and two overlays with writes, zeroed and discarded clusters.
fn chain(dir: &Path, sizes: [usize; 3]) -> std::path::PathBuf {
    std::fs::create_dir(dir.join("below")).unwrap();
    write(&dir.join("below"), "base.img", &disk(4, sizes[0]));
    let middle = dir.join("below/middle.qcow2");
    // Names are relative to the image that holds them.
    let base = ["-b", "base.img", "-F", "raw"];
    create(&middle, &base, &sizes[1].to_string());
    qemu_io(
        &middle,
        &[
            "write -q -P 7 100k 300k",
            "write -q -z 1M 128k",
            "write -q -P 9 1500k 1k",
        ],
    );
    let top = dir.join("top.qcow2");
    let below = [
        "-o",
        "cluster_size=4k",
        "-b",
        "below/middle.qcow2",
        "-F",
        "qcow2",
    ];
    create(&top, &below, &sizes[2].to_string());
    qemu_io(
        &top,
        &[
            "write -q -P 3 64k 64k",
            "write -q -z 200k 20k",
            "discard -q 300k 64k",
            "write -q -P 5 1M 4k",
        ],
    );
    top
}

#[test]
fn a_backing_chain_of_three() {
    let same = [2 * MIB, 2 * MIB, 2 * MIB];
    // Overlays larger and smaller than what is behind them, ending within a cluster.
    let grown = [2 * MIB + 512, 2 * MIB + 70 * 1024, 3 * MIB + 1024];
    let shrunk = [3 * MIB + 1536, 2 * MIB + 512, 2 * MIB - 512];
    let wavy = [3 * MIB, 2 * MIB - 100 * 1024, 3 * MIB + 512];
    for sizes in [same, grown, shrunk, wavy] {
        let temp = tempfile::tempdir().unwrap();
        let top = chain(temp.path(), sizes);
        let zeros = assert_holds(&*open(&top).source, &oracle(&top, "qcow2"));
        assert!(zeros > 0, "zeroed clusters are known");
    }
}

#[test]
fn a_resized_image_and_one_with_a_snapshot() {
    let temp = tempfile::tempdir().unwrap();
    let image = convert(temp.path(), &disk(5, 2 * MIB), "compat=1.1", false);
    run!("qemu-img", "snapshot", "-c", "before", &image);
    qemu_io(&image, &["write -q -P 1 0 1M"]);
    assert_holds(&*open(&image).source, &oracle(&image, "qcow2"));
    run!("qemu-img", "snapshot", "-d", "before", &image);
    run!("qemu-img", "resize", "-q", "--shrink", &image, "1500k");
    run!("qemu-img", "resize", "-q", &image, "4M");
    assert_holds(&*open(&image).source, &oracle(&image, "qcow2"));
}

#[test]
fn an_external_data_file() {
    let temp = tempfile::tempdir().unwrap();
    let image = temp.path().join("disk.qcow2");
    let data = temp.path().join("disk.data");
    let option = format!("data_file={}", data.display());
    create(&image, &["-o", &option], "4M");
    qemu_io(&image, &["write -q -P 8 1M 300k"]);
    let opened = open(&image);
    assert_holds(&*opened.source, &oracle(&image, "qcow2"));
    set_len(&data, 5 << 20);
    assert!(
        matches!(opened.source.check_unchanged(), Err(ReadError::Changed { path, .. }) if path.ends_with("disk.data"))
    );
}

#[test]
fn a_change_anywhere_in_the_chain_is_noticed() {
    for changed in ["top.qcow2", "below/middle.qcow2", "below/base.img"] {
        let temp = tempfile::tempdir().unwrap();
        let opened = open(&chain(temp.path(), [2 * MIB; 3]));
        opened.source.check_unchanged().unwrap();
        let path = temp.path().join(changed);
        set_len(&path, 64 << 20);
        let error = opened.source.check_unchanged().unwrap_err();
        assert!(
            matches!(&error, ReadError::Changed { path: named, .. } if *named == path),
            "{error}"
        );
    }
}

#[test]
fn as_a_file_it_is_its_bytes() {
    let temp = tempfile::tempdir().unwrap();
    let image = temp.path().join("disk");
    create(&image, &[], "1M");
    let opened = image::open(
        &image,
        &ImageOptions {
            read_as: ReadAs::File,
        },
    )
    .unwrap();
    assert_eq!((opened.kind, opened.format), (ImageKind::File, Format::Raw));
    assert_holds(&*opened.source, &std::fs::read(&image).unwrap());
}

fn refusal(path: &Path) -> String {
    refused(path).to_string()
}

#[test]
fn what_cannot_be_read_is_refused_with_the_reason() {
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    let secret = "secret,id=s,data=capsule";
    // With LUKS, qemu-img measures how fast the CPU is, which fails on a fast one.
    let aes = "encrypt.format=aes,encrypt.key-secret=s";
    create(&at("aes"), &["--object", secret, "-o", aes], "1M");
    assert!(refusal(&at("aes")).contains("encrypted"));
    let mut luks = std::fs::read(at("aes")).unwrap();
    luks[35] = 2;
    let luks = write(temp.path(), "luks", &luks);
    assert!(refusal(&luks).contains("encrypted"));

    // Without a look at what is behind it.
    let upon = |name: &str, base: &str, format: &str| {
        create(&at(name), &["-u", "-b", base, "-F", format], "1M");
    };
    upon("orphan", "gone.img", "raw");
    assert!(refusal(&at("orphan")).contains("gone.img"));
    upon("a", "b", "qcow2");
    upon("b", "a", "qcow2");
    assert!(refusal(&at("a")).contains("loop"));
    upon("net", "nbd://127.0.0.1:1/x", "raw");
    assert!(refusal(&at("net")).contains("no local file"));
    upon("zero", "/dev/zero", "raw");
    assert!(refusal(&at("zero")).contains("neither a regular file nor a device"));
}

#[test]
fn damaged_headers_and_tables_never_read_as_good_data() {
    let temp = tempfile::tempdir().unwrap();
    let good = convert(temp.path(), &disk(6, MIB), "compat=1.1", false);
    let good = std::fs::read(good).unwrap();
    let bad = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        write(temp.path(), "bad", &bytes)
    };
    for len in [8, 71, 100, 104] {
        refusal(&bad(&|bytes| bytes.truncate(len)));
    }
    // Version, size of clusters, corrupt bit, length of the backing file's name.
    assert!(refusal(&bad(&|bytes| bytes[7] = 9)).contains("version"));
    refusal(&bad(&|bytes| bytes[23] = 63));
    assert!(refusal(&bad(&|bytes| bytes[79] |= 2)).contains("corrupt"));
    assert!(refusal(&bad(&|bytes| (bytes[15], bytes[16]) = (1, 255))).contains("longer than"));
    // A disk of 2^63 bytes.
    assert!(refusal(&bad(&|bytes| bytes[24] = 0x80)).contains("1 PiB"));
    // The table of tables points to nowhere: aligned, but beyond the file.
    let l1 = u64::from_be_bytes(good[40..48].try_into().unwrap()) as usize;
    let path = bad(&|bytes| {
        bytes[l1..l1 + 8].copy_from_slice(&(0x00ff_ffff_ffff_fe01_u64 | 1 << 63).to_be_bytes())
    });
    match image::open(&path, &ImageOptions::default()) {
        Err(ImageError::Read(_)) => {}
        Err(error) => panic!("{error}"),
        Ok(opened) => assert!(opened.source.read_at(0, &mut [0; 4096]).is_err()),
    }
}
