//! Raw and sparse files, devices, and the formats that QEMU's tools read for us.

mod image_util;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use capsule_chunker::content::ReadError;
use capsule_chunker::image::{self, Format, ImageError, ImageKind, ImageOptions, ReadAs};
use image_util::{assert_holds, disk, open, oracle, refused, set_len, write};

#[test]
fn a_sparse_file_is_read_around_its_holes() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("sparse");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(20 << 20).unwrap();
    file.write_all_at(&disk(1, 70_000), 5 << 20).unwrap();
    file.write_all_at(b"end", (20 << 20) - 3).unwrap();
    let opened = open(&path);
    assert_eq!(
        (opened.kind, opened.format, opened.in_use),
        (ImageKind::File, Format::Raw, false)
    );
    assert!(assert_holds(&*opened.source, &std::fs::read(&path).unwrap()) > 18 << 20);
}

#[test]
fn files_of_boundary_sizes() {
    let temp = tempfile::tempdir().unwrap();
    for len in [0, 1, 511, 512, 4096, 16 << 10, (16 << 10) + 1] {
        let content = vec![0x5a; len];
        assert_holds(
            &*open(&write(temp.path(), "file", &content)).source,
            &content,
        );
    }
}

#[test]
fn the_kind_follows_from_content_not_from_the_name() {
    let temp = tempfile::tempdir().unwrap();
    let mut boot = vec![0; 4096];
    boot[510..512].copy_from_slice(&[0x55, 0xaa]);
    let disk = write(temp.path(), "letter.txt", &boot);
    let file = write(temp.path(), "disk.img", b"not a disk");
    let kind = |path: &Path, read_as| image::open(path, &ImageOptions { read_as }).unwrap().kind;
    assert_eq!(kind(&disk, ReadAs::Auto), ImageKind::Disk);
    assert_eq!(kind(&disk, ReadAs::File), ImageKind::File);
    assert_eq!(kind(&file, ReadAs::Auto), ImageKind::File);
    assert_eq!(kind(&file, ReadAs::Disk), ImageKind::Disk);
}

#[test]
fn a_file_that_changes_is_noticed() {
    let temp = tempfile::tempdir().unwrap();
    let path = write(temp.path(), "file", &[1; 10_000]);
    let opened = open(&path);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"other", 0).unwrap();
    // The kernel's clock ticks every few milliseconds.
    file.set_modified(std::time::SystemTime::now()).unwrap();
    assert!(matches!(
        opened.source.check_unchanged(),
        Err(ReadError::Changed { .. })
    ));
    let opened = open(&path);
    file.set_len(5000).unwrap();
    let error = opened.source.read_at(0, &mut [0; 10_000]).unwrap_err();
    assert!(
        error.to_string().contains("shorter") && error.to_string().contains("file"),
        "{error}"
    );
    assert!(opened.source.check_unchanged().is_err());
}

#[test]
fn other_formats_are_read_through_qemu() {
    let temp = tempfile::tempdir().unwrap();
    let raw = write(temp.path(), "disk.raw", &disk(2, (3 << 20) + 512));
    let formats = [
        (Format::Vmdk, "subformat=monolithicSparse"),
        (Format::Vmdk, "subformat=streamOptimized"),
        (Format::Vmdk, "subformat=twoGbMaxExtentFlat"),
        (Format::Vdi, "static=off"),
        (Format::Vhdx, "subformat=dynamic"),
        (Format::Vpc, "subformat=dynamic"),
        (Format::Vpc, "subformat=fixed"),
        (Format::Qcow, "encryption=off"),
        (Format::Qed, "cluster_size=64k"),
        (Format::Parallels, "cluster_size=1M"),
    ];
    for (format, options) in formats {
        let image = temp.path().join("image");
        run!(
            "qemu-img",
            "convert",
            "-f",
            "raw",
            "-O",
            format.name(),
            "-o",
            options,
            &raw,
            &image
        );
        let opened = open(&image);
        assert_eq!(
            (opened.kind, opened.format),
            (ImageKind::Disk, format),
            "{options}"
        );
        assert_holds(&*opened.source, &oracle(&image, format.name()));
        set_len(&image, 64 << 20);
        assert!(matches!(
            opened.source.check_unchanged(),
            Err(ReadError::Changed { .. })
        ));
        drop(opened);
        assert!(!runs_on(&image), "qemu-nbd ends with the source");
        std::fs::remove_file(image).unwrap();
    }
}

/// Whether some process has this path among its arguments.
fn runs_on(path: &Path) -> bool {
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let mut arguments = processes.filter_map(|p| std::fs::read(p.path().join("cmdline")).ok());
    arguments.any(|args| {
        args.split(|&b| b == 0)
            .any(|arg| arg == path.as_os_str().as_encoded_bytes())
    })
}

#[test]
fn a_damaged_image_is_refused_in_qemus_words() {
    let temp = tempfile::tempdir().unwrap();
    let path = write(temp.path(), "bad.vhdx", b"vhdxfile and nothing else");
    let error = refused(&path);
    assert!(matches!(error, ImageError::Qemu { .. }), "{error}");
    assert!(!runs_on(&path));
}

/// Runs again as a child without the tools in its PATH.
#[test]
fn without_the_tools_the_package_is_named() {
    if let Some(image) = std::env::var_os("CAPSULE_TEST_IMAGE") {
        let error = refused(Path::new(&image)).to_string();
        assert!(error.contains("qemu-utils"), "{error}");
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let image = temp.path().join("disk.vdi");
    run!("qemu-img", "create", "-q", "-f", "vdi", &image, "1M");
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "without_the_tools_the_package_is_named"]);
    let output = child
        .env("CAPSULE_TEST_IMAGE", &image)
        .env("PATH", "/nonexistent")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
}

#[test]
fn what_is_no_file_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let refusal = |path: &Path| refused(path).to_string();
    assert!(refusal(temp.path()).contains("a directory"));
    assert!(refusal(Path::new("/dev/null")).contains("a character device"));
    assert!(refusal(&temp.path().join("missing")).contains("missing"));
}

/// Whatever devices this machine has; none in some containers.
#[test]
fn devices_are_disks_of_the_size_that_the_kernel_says() {
    for device in std::fs::read_dir("/sys/class/block")
        .unwrap()
        .map(Result::unwrap)
    {
        let sectors = std::fs::read_to_string(device.path().join("size")).unwrap();
        let len = sectors.trim().parse::<u64>().unwrap() * 512;
        let path = Path::new("/dev").join(device.file_name());
        let Ok(opened) = image::open(&path, &ImageOptions::default()) else {
            continue;
        };
        assert_eq!(
            (opened.kind, opened.format, opened.source.len()),
            (ImageKind::Disk, Format::Device, len)
        );
        let mut head = vec![1; 4096.min(len as usize)];
        opened.source.read_at(0, &mut head).unwrap();
        let extents: Vec<_> = opened.source.extents().map(Result::unwrap).collect();
        assert_eq!(
            extents
                .iter()
                .map(|e| e.range.end - e.range.start)
                .sum::<u64>(),
            len
        );
        opened.source.check_unchanged().unwrap();
    }
}
