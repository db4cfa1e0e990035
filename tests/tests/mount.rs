//! `capsule mount`: capsules as files that are read while they come, by the programs that people have.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use capsule_tests::serving::{Serving, packs};
use capsule_tests::short::{run, text};
use capsule_tests::{Fleet, Node, data};

/// No step of a test takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A capsule that is mounted, until it is dropped.
struct Mounted {
    serving: Serving,
    at: PathBuf,
}

impl Mounted {
    fn start(node: &Node, name: &str, at: &Path) -> Self {
        fs::create_dir_all(at).unwrap();
        Self {
            serving: Serving::start(node, &["mount", name, text(at)]),
            at: at.to_owned(),
        }
    }

    /// Ends it as Ctrl-C does.
    fn stop(mut self) {
        self.serving.stop();
        is_gone(&self.at);
    }
}

fn is_gone(at: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while fs::read_to_string("/proc/mounts")
        .unwrap()
        .contains(text(at))
    {
        assert!(Instant::now() < deadline, "it stays mounted");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A tree with some of all.
fn tree(at: &Path) {
    fs::create_dir_all(at.join("dir/sub")).unwrap();
    fs::write(at.join("dir/large"), data::noise(1, 8 << 20)).unwrap();
    fs::write(at.join("dir/sub/small"), "small\n").unwrap();
    fs::write(at.join("empty"), "").unwrap();
    fs::hard_link(at.join("dir/sub/small"), at.join("same")).unwrap();
    symlink("dir/sub/small", at.join("to")).unwrap();
    fs::set_permissions(at.join("empty"), fs::Permissions::from_mode(0o4751)).unwrap();
    run(
        "setfattr",
        &["-n", "user.note", "-v", "noted", text(&at.join("empty"))],
    );
    for number in 0..3000 {
        fs::write(at.join(format!("dir/sub/{number}")), format!("{number}")).unwrap();
    }
}

#[test]
fn a_tree_that_is_elsewhere_is_shown_as_it_is() {
    let fleet = Fleet::of(2);
    let (source, at) = (fleet.path("source"), fleet.path("shown"));
    tree(&source);
    fleet[0].ok(&["publish", text(&source), "--name", "home:1"]);
    let mounted = Mounted::start(&fleet[1], "home", &at);
    assert_eq!(mounted.serving.answer["name"], "home:1");
    // Names, owners, modes, times, lengths: without a byte of any file.
    let list = ["-printf", "%P %y %m %U %G %n %s %l %T@\n"];
    let sorted = |at: &Path| {
        let found = run("find", &[&[text(at)], &list[..]].concat());
        let mut lines: Vec<String> = found.lines().map(str::to_owned).collect();
        lines.sort();
        // Directories' lengths are the file system's own.
        lines.iter_mut().for_each(|line| {
            let mut fields: Vec<&str> = line.split(' ').collect();
            if fields[1] == "d" {
                fields[6] = "-";
            }
            *line = fields.join(" ");
        });
        lines
    };
    assert_eq!(sorted(&at), sorted(&source));
    let before = packs(&fleet[1]);
    assert!(before < 1 << 20, "{before} bytes came for names alone");
    let inode = |path: &str| fs::metadata(at.join(path)).unwrap().ino();
    assert_eq!(inode("same"), inode("dir/sub/small"));
    let empty = at.join("empty");
    let noted = ["--only-values", "-n", "user.note", text(&empty)];
    assert_eq!(run("getfattr", &noted), "noted");
    // A small file takes little, though a large one lies beside it.
    assert_eq!(fs::read_to_string(at.join("to")).unwrap(), "small\n");
    assert!(packs(&fleet[1]) < 4 << 20);
    run("diff", &["-r", text(&source), text(&at)]);
    let refused = fs::write(at.join("new"), "x").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    mounted.stop();
    assert_eq!(fs::read_dir(&at).unwrap().count(), 0);
}

#[test]
fn a_disk_is_shown_as_a_file_until_somebody_unmounts_it() {
    let mut fleet = Fleet::of(2);
    let (image, at) = (fleet.path("disk.img"), fleet.path("shown"));
    fs::write(&image, data::noise(3, 20 << 20)).unwrap();
    fleet[0].ok(&["publish", text(&image), "--name", "lab:1", "--as", "disk"]);
    let mut mounted = Mounted::start(&fleet[1], "lab:1", &at);
    let name = mounted.serving.answer["components"][0]["name"]
        .as_str()
        .unwrap();
    let shown = at.join(name);
    assert_eq!(fs::metadata(&shown).unwrap().len(), 20 << 20);
    assert_eq!(packs(&fleet[1]), 0, "nobody read anything");
    // Who reads waits until somebody has what is read.
    let address = fleet[0].address().to_owned();
    fleet[0].stop();
    let (from, to) = (image.clone(), shown.clone());
    let reader = std::thread::spawn(move || run("cmp", &[text(&from), text(&to)]));
    std::thread::sleep(Duration::from_secs(1));
    assert!(!reader.is_finished(), "nobody has it");
    fleet[0].start_on(&address);
    reader.join().unwrap();
    run("umount", &[text(&at)]);
    is_gone(&at);
    let deadline = Instant::now() + PATIENCE;
    while !mounted.serving.is_over() {
        assert!(Instant::now() < deadline, "the command goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_node_that_stops_leaves_nothing_mounted() {
    let mut fleet = Fleet::new();
    let (source, at) = (fleet.path("source"), fleet.path("shown"));
    tree(&source);
    fleet[0].ok(&["publish", text(&source), "--name", "home:1"]);
    let mounted = Mounted::start(&fleet[0], "home:1", &at);
    assert!(at.join("dir").is_dir());
    fleet[0].stop();
    is_gone(&at);
    drop(mounted);
    // What cannot be shown there is refused with the reason.
    fleet[0].start();
    let file = fleet.path("file");
    fs::write(&file, "").unwrap();
    let refused = fleet[0].fails(1, &["mount", "home:1", text(&file)]);
    assert!(refused.contains("is not a directory"), "{refused}");
    let nowhere = fleet.path("nowhere");
    let refused = fleet[0].fails(1, &["mount", "home:1", text(&nowhere)]);
    assert!(refused.contains("make the directory first"), "{refused}");
}
