//! What can be published, by real processes: disk images as their virtual disks, block devices, directories around the node.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use capsule_tests::short::{run, text};
use capsule_tests::{Fleet, data};

/// A sparse disk image with some data.
fn raw_disk(path: &Path) {
    let file = fs::File::create(path).unwrap();
    file.set_len(48 << 20).unwrap();
    use std::os::unix::fs::FileExt;
    file.write_all_at(&data::noise(1, 3_000_000), 1 << 20)
        .unwrap();
    file.write_all_at(&data::prose(2, 2_000_000), 30 << 20)
        .unwrap();
}

#[test]
fn a_qcow2_is_published_as_its_disk_or_as_its_bytes() {
    let fleet = Fleet::of(2);
    let (raw, image) = (fleet.path("disk.raw"), fleet.path("disk.qcow2"));
    raw_disk(&raw);
    run(
        "qemu-img",
        &["convert", "-O", "qcow2", "-c", text(&raw), text(&image)],
    );
    let disk = fleet[0].publish(&image, "disk:1");
    assert_eq!(disk["components"][0]["kind"], "disk");
    let bytes = fleet[0].json(&["publish", text(&image), "--name", "bytes:1", "--as", "file"]);
    for (name, published, original) in [("disk:1", &disk, &raw), ("bytes:1", &bytes, &image)] {
        let copy = fleet.path("copy");
        fleet[1].ok(&["pull", name]);
        fleet[1].ok(&["export", name, "--to", text(&copy)]);
        assert!(
            fs::read(&copy).unwrap() == fs::read(original).unwrap(),
            "{name}"
        );
        let root = blake3::hash(&fs::read(original).unwrap()).to_hex();
        assert_eq!(published["components"][0]["root"], root.as_str());
        if name == "disk:1" {
            assert!(
                copy.metadata().unwrap().blocks() * 512 < 20 << 20,
                "holes stay holes"
            );
        }
        fs::remove_file(&copy).unwrap();
    }
}

/// A file as a block device.
struct Loop(String);

impl Loop {
    fn of(file: &Path) -> Self {
        Self(
            run("losetup", &["--find", "--show", text(file)])
                .trim()
                .to_owned(),
        )
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_published_as_what_it_holds() {
    assert!(
        rustix::process::geteuid().is_root(),
        "loop devices take root: run the tests as root"
    );
    let fleet = Fleet::of(1);
    let (raw, copy) = (fleet.path("disk.raw"), fleet.path("copy"));
    raw_disk(&raw);
    let device = Loop::of(&raw);
    let published = fleet[0].publish(Path::new(&device.0), "disk:1");
    assert_eq!(published["components"][0]["kind"], "disk");
    assert_eq!(published["content_bytes"], 48 << 20);
    assert!(published["zero_bytes"].as_u64().unwrap() > 40 << 20);
    fleet[0].ok(&["export", "disk:1", "--to", text(&copy)]);
    assert!(fs::read(&copy).unwrap() == fs::read(&raw).unwrap());
    // The image file holds the same.
    let same = fleet[0].json(&["publish", text(&raw), "--name", "disk:2", "--as", "disk"]);
    assert_eq!(same["capsule"], published["capsule"]);
}

#[test]
fn a_directory_around_the_nodes_home_is_published_without_it() {
    let fleet = Fleet::of(1);
    let dir = fleet[0].home().parent().unwrap().to_owned();
    let home = fleet[0].home().file_name().unwrap().to_owned();
    fs::write(dir.join("file"), "beside the home").unwrap();
    let published = fleet[0].publish(&dir, "around:1");
    let warning = published["warnings"][0].as_str().unwrap();
    assert!(warning.contains("is left out"), "{warning}");
    let copy: PathBuf = fleet.path("copy-of-all");
    fleet[0].ok(&["export", "around:1", "--to", text(&copy)]);
    assert!(copy.join("file").exists() && !copy.join(home).exists());
    fs::remove_dir_all(&copy).unwrap();

    let said = fleet[0].fails(1, &["publish", text(fleet[0].home()), "--name", "home:1"]);
    assert!(said.contains("belongs to this node itself"), "{said}");
}
