//! `capsule nbd`: disks that are read while they come, by the clients that people have.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use capsule_proto::RootHash;
use capsule_proto::index::Space;
use capsule_tests::serving::{Serving, packs};
use capsule_tests::shelf::{Shelf, encoded};
use capsule_tests::short::{number, run, text};
use capsule_tests::{Fleet, Node, data};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const DISK: u64 = 64 * MIB;
/// No step of a test takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A disk with 24 MiB of noise, and as much that compresses, between zeros.
fn disk(path: &Path) {
    let file = File::create_new(path).unwrap();
    file.set_len(DISK).unwrap();
    file.write_all_at(&data::noise(1, 24 << 20), 4 * MIB)
        .unwrap();
    let line = |at: u32| format!("line {at} of a text, which compresses\n");
    let lines: String = (0..).map(line).take(700_000).collect();
    file.write_all_at(&lines.as_bytes()[..24 << 20], 32 * MIB)
        .unwrap();
}

/// A disk that is served, until it is dropped.
struct Served {
    serving: Serving,
    socket: PathBuf,
}

impl Served {
    fn start(node: &Node, name: &str, socket: &Path) -> Self {
        Self {
            serving: Serving::start(node, &["nbd", name, "--socket", text(socket)]),
            socket: socket.to_owned(),
        }
    }

    fn uri(&self) -> &str {
        self.serving.answer["uri"].as_str().unwrap()
    }

    /// Ends it as Ctrl-C does.
    fn stop(mut self) {
        self.serving.stop();
        let deadline = Instant::now() + PATIENCE;
        while self.socket.exists() {
            assert!(Instant::now() < deadline, "the socket stays");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn same(one: &Path, other: &Path) {
    let hash = |path: &Path| blake3::hash(&fs::read(path).unwrap());
    assert_eq!(hash(one), hash(other));
}

#[test]
fn a_disk_that_is_elsewhere_is_read_as_it_comes() {
    let fleet = Fleet::of(2);
    let image = fleet.path("disk.img");
    disk(&image);
    let publish = ["publish", text(&image), "--name", "lab:1", "--as", "disk"];
    let published = fleet[0].json(&[&publish[..], &["--frame-max", "65536"]].concat());
    let all = number(&published, "pack_bytes");
    let socket = fleet.path("disk sock");
    let served = Served::start(&fleet[1], "lab:1", &socket);
    assert_eq!(served.serving.answer["name"], "lab:1");
    assert_eq!(served.serving.answer["component"]["size"], DISK);
    assert_eq!(packs(&fleet[1]), 0, "nobody read anything");
    let size = run("nbdinfo", &["--size", served.uri()]);
    assert_eq!(size.trim(), DISK.to_string());

    // A little of it takes a little, zeros nothing.
    let read = |command: &str| {
        let args = ["-r", "-f", "raw", "-c", command, served.uri()];
        assert!(!run("qemu-io", &args).contains("failed"), "{command}");
    };
    read("read -P 0 0 4M");
    assert_eq!(packs(&fleet[1]), 0);
    read("read 20M 64k");
    let little = packs(&fleet[1]);
    assert!((60_000..1 << 20).contains(&little), "{little} bytes came");
    let map = run("nbdinfo", &["--map", "--json", served.uri()]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let holes = map.as_array().unwrap().iter();
    let holes = holes.filter(|extent| extent["type"] == 3);
    let zeros: u64 = holes.map(|extent| number(extent, "length")).sum();
    assert_eq!(zeros, 16 * MIB);

    // All of it, by several clients at a time.
    let copies = [fleet.path("copy1"), fleet.path("copy2")];
    std::thread::scope(|scope| {
        scope.spawn(|| run("nbdcopy", &[served.uri(), text(&copies[0])]));
        scope.spawn(|| {
            let convert = ["convert", "-f", "raw", "-O", "raw"];
            let ends = [served.uri(), text(&copies[1])];
            run("qemu-img", &[&convert[..], &ends].concat())
        });
    });
    copies.iter().for_each(|copy| same(&image, copy));
    served.stop();

    // Nothing comes twice, and what came is served to others.
    let pulled = fleet[1].json(&["pull", "lab:1"]);
    assert!(number(&pulled, "fetched_bytes") < 100_000, "{pulled:#}");
    assert_eq!(packs(&fleet[1]), all);
    // What is held is read without anybody.
    let mut fleet = fleet;
    fleet[0].stop();
    let served = Served::start(&fleet[1], "lab:1", &fleet.path("again"));
    let again = fleet.path("copy3");
    run("nbdcopy", &[served.uri(), text(&again)]);
    same(&image, &again);
    served.stop();
}

#[test]
fn reads_wait_until_somebody_has_what_is_read() {
    let mut fleet = Fleet::of(2);
    let image = fleet.path("disk.img");
    disk(&image);
    fleet[0].json(&["publish", text(&image), "--name", "lab:1", "--as", "disk"]);
    let served = Served::start(&fleet[1], "lab:1", &fleet.path("sock"));
    let address = fleet[0].address().to_owned();
    fleet[0].stop();
    let uri = served.uri().to_owned();
    let copy = fleet.path("copy");
    let (copied, reading) = (copy.clone(), Instant::now());
    let reader = std::thread::spawn(move || run("nbdcopy", &[&uri, text(&copied)]));
    std::thread::sleep(Duration::from_secs(2));
    assert!(!reader.is_finished(), "nobody has it");
    fleet[0].start_on(&address);
    reader.join().unwrap();
    assert!(reading.elapsed() < PATIENCE);
    same(&image, &copy);
    served.stop();
}

#[test]
fn what_the_disk_has_damaged_comes_again() {
    let mut fleet = Fleet::of(2);
    let image = fleet.path("disk.img");
    disk(&image);
    fleet[0].json(&["publish", text(&image), "--name", "lab:1", "--as", "disk"]);
    fleet[1].json(&["pull", "lab:1"]);
    let held = fleet[1].json(&["hashes"]);
    let mut held = held["hashes"].as_array().unwrap().iter();
    let pack = held.find(|blob| blob["kind"] == "pack").unwrap();
    let root = pack["root"].as_str().unwrap();
    fleet[1].stop();
    let file = fleet[1].blob_file(root);
    let file = File::options().read(true).write(true).open(file).unwrap();
    // Of what is stored as it is, and of what is compressed.
    for at in [MIB, file.metadata().unwrap().len() - MIB] {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }
    fleet[1].start();
    fleet[1].wait_for_peers(1);
    let served = Served::start(&fleet[1], "lab:1", &fleet.path("sock"));
    let copy = fleet.path("copy");
    run("nbdcopy", &[served.uri(), text(&copy)]);
    same(&image, &copy);
    served.stop();
    let verified = fleet[1].json(&["verify"]);
    assert_eq!(number(&verified, "damaged_bytes"), 0, "{verified:#}");
}

/// Any publisher may say that a layer leads somewhere. Where a pull finds out that it does not, who reads while it comes would not.
#[test]
fn layers_of_who_publishes_elsewhere_are_not_read() {
    let mut fleet = Fleet::new();
    let token = fleet.invite(&["--channel", "lab"]);
    fleet.join(&token);
    let image = fleet.path("disk.img");
    fs::write(&image, data::noise(5, 300_000)).unwrap();
    let published = fleet[1].json(&["publish", text(&image), "--name", "lab:1"]);
    let root: RootHash = published["components"][0]["root"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    let token = fleet.invite(&["--channel", "other"]);
    let mut shelf = Shelf::of(&token, 7);
    // Far smaller than the right one.
    let target = (Space::Stream, root, 300_000);
    shelf.layer(target, encoded(&[7; 300_000], root));
    let _foreign = shelf.open();
    let deadline = Instant::now() + PATIENCE;
    while number(&fleet[0].json(&["plan", "lab:1"]), "fetch_bytes") > 100_000 {
        assert!(Instant::now() < deadline, "its record does not come");
        std::thread::sleep(Duration::from_millis(100));
    }
    let served = Served::start(&fleet[0], "lab:1", &fleet.path("sock"));
    let copy = fleet.path("copy");
    run("nbdcopy", &[served.uri(), text(&copy)]);
    same(&image, &copy);
    served.stop();
}

#[test]
fn what_cannot_be_served_is_refused_with_the_reason() {
    let fleet = Fleet::new();
    let dir = fleet.path("dir");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("file"), "content").unwrap();
    fleet[0].ok(&["publish", text(&dir), "--name", "tree:1"]);
    let socket = fleet.path("sock");
    let refused = |args: &[&str]| fleet[0].fails(1, &[&["nbd"], args].concat());
    let at = ["--socket", text(&socket)];
    assert!(refused(&[&["tree:1"], &at[..]].concat()).contains("is a directory tree"));
    let unknown = refused(&[&["nothing:1", "--wait", "0"], &at[..]].concat());
    assert!(unknown.contains("nothing:1"), "{unknown}");
    fs::write(&socket, "").unwrap();
    let taken = refused(&[&["tree:1"], &at[..]].concat());
    assert!(taken.contains("something is there"), "{taken}");
    assert_eq!(fs::read(&socket).unwrap(), b"", "it is left alone");
}
