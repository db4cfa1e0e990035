//! What others do to a tree while it is read or written, and what we may not do.

mod tree_util;

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use capsule_chunker::content::{Content, ReadError, Source};
use capsule_chunker::tree::{
    self, RestoreError, RestoreOptions, ScanError, ScanOptions, TreeWriter,
};
use capsule_proto::listing::{EntryKind, EntryPath};
use tree_util::{assert_is, is_root, make_everything, mode, noise, publish, restore, scan};

/// A directory outside, and a fingerprint of all that must not change in it.
fn outside(dir: &Path) -> impl Fn() -> Vec<(String, Vec<u8>, u32, i64)> + use<> {
    let dir = dir.join("outside");
    std::fs::create_dir_all(dir.join("sub")).unwrap();
    std::fs::write(dir.join("secret"), "secret").unwrap();
    std::fs::write(dir.join("sub/file"), "file").unwrap();
    mode(&dir.join("secret"), 0o600);
    move || {
        ["", "secret", "sub", "sub/file"]
            .map(|name| {
                let path = dir.join(name);
                let stat = path.metadata().unwrap();
                (
                    name.to_owned(),
                    std::fs::read(path).unwrap_or_default(),
                    stat.mode(),
                    stat.mtime_nsec(),
                )
            })
            .to_vec()
    }
}

#[test]
fn links_in_the_destination_are_replaced_not_followed() {
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    let outside = outside(temp.path());
    let before = outside();
    make_everything(&from);
    let tree = publish(&from);
    std::fs::create_dir(&to).unwrap();
    // In place of directories, of files, of an entry without content; and beside them.
    for (name, target) in [
        ("a", "../outside"),
        ("etc", "../outside/sub"),
        ("usr", "/"),
        ("big", "../outside/secret"),
    ] {
        symlink(target, to.join(name)).unwrap();
    }
    symlink("../outside", to.join("extra")).unwrap();
    symlink("../outside/secret", to.join("fifo")).unwrap();
    // Names of one file, in and out.
    std::fs::hard_link(temp.path().join("outside/secret"), to.join("empty")).unwrap();
    let restored = restore(&to, &tree, true).unwrap();
    assert_is(&to, &tree.0);
    assert_eq!(outside(), before);
    assert!(restored.removed >= 4);
}

#[test]
fn a_file_with_names_outside_is_replaced_even_if_it_is_right() {
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    std::fs::create_dir(&from).unwrap();
    std::fs::write(from.join("file"), "same").unwrap();
    mode(&from.join("file"), 0o4755);
    let tree = publish(&from);
    std::fs::create_dir(&to).unwrap();
    std::fs::write(temp.path().join("outside"), "same").unwrap();
    mode(&temp.path().join("outside"), 0o600);
    std::fs::hard_link(temp.path().join("outside"), to.join("file")).unwrap();
    assert_eq!(restore(&to, &tree, true).unwrap().files_written, 1);
    assert_is(&to, &tree.0);
    assert_eq!(
        temp.path().join("outside").metadata().unwrap().mode() & 0o7777,
        0o600
    );
}

/// Another process swaps a directory for a link, over and over, while trees are restored into it.
#[test]
fn a_race_never_leads_outside() {
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    let outside = outside(temp.path());
    std::fs::create_dir_all(from.join("d/sub")).unwrap();
    for number in 0..50 {
        std::fs::write(from.join(format!("d/{number}")), noise(number, 100)).unwrap();
        std::fs::write(from.join(format!("d/sub/{number}")), noise(number, 100)).unwrap();
    }
    std::fs::write(from.join("d/secret"), "other").unwrap();
    let tree = publish(&from);
    let before = outside();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // Failures are part of the game.
                let _ = std::fs::rename(to.join("d"), to.join("away"));
                let _ = symlink("../outside", to.join("d"));
                let _ = std::fs::remove_file(to.join("d"));
                let _ = std::fs::rename(to.join("away"), to.join("d"));
            }
        });
        for _ in 0..12 {
            // It may fail, or succeed if the racer was slow.
            let _ = restore(&to, &tree, true);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(outside(), before);
    let _ = std::fs::remove_file(to.join("d"));
    restore(&to, &tree, true).unwrap();
    assert_is(&to, &tree.0);
}

#[test]
fn a_tree_that_changes_while_it_is_read_is_noticed() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("tree");
    let tick = || std::thread::sleep(std::time::Duration::from_millis(10));
    let changed = |change: &dyn Fn(), name: &str| {
        let _ = std::fs::remove_dir_all(&dir);
        make_everything(&dir);
        let source = scan(&dir);
        source.check_unchanged().unwrap();
        tick();
        change();
        let error = source.check_unchanged().unwrap_err();
        assert!(
            matches!(&error, ReadError::Changed { path, .. } if *path == dir.join(name)),
            "{name}: {error}"
        );
    };
    let file = |name: &str| {
        std::fs::OpenOptions::new()
            .write(true)
            .open(dir.join(name))
            .unwrap()
    };
    changed(&|| file("a/x").write_all_at(b"!", 0).unwrap(), "a/x");
    changed(&|| mode(&dir.join("a/x"), 0o600), "a/x");
    changed(&|| std::fs::write(dir.join("a-b/new"), "").unwrap(), "a-b");
    changed(&|| std::fs::write(dir.join("etc/new"), "").unwrap(), "etc");

    make_everything(&{
        std::fs::remove_dir_all(&dir).unwrap();
        dir.clone()
    });
    let source = scan(&dir);
    let range = |name: &str| {
        let found = (0..source.file_count()).find(|&at| source.file_path(at) == dir.join(name));
        source.file_range(found.unwrap())
    };
    tick();
    file("a-b/y").set_len(1000).unwrap();
    file("etc/9").write_all_at(b"!", 0).unwrap();
    std::fs::remove_file(dir.join("etc/10")).unwrap();
    std::fs::remove_file(dir.join("etc/11")).unwrap();
    symlink("/etc/passwd", dir.join("etc/11")).unwrap();
    for name in ["a-b/y", "etc/9", "etc/10", "etc/11"] {
        let range = range(name);
        let mut whole = vec![0; (range.end - range.start) as usize];
        let error = source.read_at(range.start, &mut whole).unwrap_err();
        assert!(
            matches!(&error, ReadError::Changed { path, .. } if *path == dir.join(name)),
            "{name}: {error}"
        );
    }
    // Parts of files are compared at the last one.
    let y = range("a-b/y");
    assert!(source.read_at(y.start + 500, &mut [0; 600]).is_err());
}

/// A small file system of its own on a directory, until dropped. Only root can.
struct Mounted(PathBuf);

impl Mounted {
    fn new(dir: &Path) -> Self {
        std::fs::create_dir(dir).unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .arg(dir)
            .status()
            .unwrap();
        assert!(status.success(), "root mounts a tmpfs");
        Self(dir.into())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

// Names that only a temporary file of ours would have are names like others.
#[test]
fn a_tree_may_hold_names_like_those_of_files_in_the_making() {
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    std::fs::create_dir(&from).unwrap();
    for number in 0..300 {
        let name = format!(".capsule-{}-{number}.partial", std::process::id());
        std::fs::write(from.join(name), format!("taken {number}")).unwrap();
        std::fs::write(from.join(format!("z{number}")), format!("own {number}")).unwrap();
    }
    let tree = publish(&from);
    for _ in 0..4 {
        restore(&to, &tree, false).unwrap();
        assert_is(&to, &tree.0);
        std::fs::remove_dir_all(&to).unwrap();
    }
}

#[test]
fn a_path_is_left_out_with_all_below_it() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("from");
    make_everything(&dir);
    let options = ScanOptions {
        without: Some(EntryPath::new("a").unwrap()),
        ..ScanOptions::default()
    };
    let all = tree::scan(&dir, &ScanOptions::default()).unwrap();
    let some = tree::scan(&dir, &options).unwrap();
    let is_below = |path: &EntryPath| path.names().next() == Some(b"a");
    let kept = all.entries().iter().filter(|entry| !is_below(&entry.path));
    let paths = |entry: &capsule_proto::listing::Entry| entry.path.clone();
    assert_eq!(
        some.entries().iter().map(paths).collect::<Vec<_>>(),
        kept.map(paths).collect::<Vec<_>>()
    );
    assert!(some.entries().len() < all.entries().len());
}

#[test]
fn trees_end_at_other_file_systems_if_asked() {
    let temp = tempfile::tempdir().unwrap();
    let options = ScanOptions {
        one_file_system: true,
        ..ScanOptions::default()
    };
    std::fs::write(temp.path().join("file"), "here").unwrap();
    assert!(matches!(
        tree::scan(&temp.path().join("file"), &options),
        Err(ScanError::NotADirectory { .. })
    ));
    assert!(
        tree::scan(&temp.path().join("missing"), &options)
            .unwrap_err()
            .to_string()
            .contains("missing")
    );
    if !is_root() {
        return;
    }
    let mounted = Mounted::new(&temp.path().join("other"));
    std::fs::write(mounted.0.join("file"), "there").unwrap();
    let paths = |options: &ScanOptions| tree::scan(temp.path(), options).unwrap().entries().len();
    assert_eq!((paths(&options), paths(&ScanOptions::default())), (3, 4));
    // Nor does removing what is too much reach another file system.
    let empty = temp.path().join("other-empty");
    std::fs::create_dir(&empty).unwrap();
    let tree = publish(&empty);
    let error = restore(temp.path(), &tree, true).unwrap_err();
    assert!(matches!(error, RestoreError::NotRemoved { .. }), "{error}");
    assert!(mounted.0.join("file").exists());
}

#[test]
fn cancelling_stops_a_restore() {
    struct Stop;
    impl capsule_chunker::content::Progress for Stop {
        fn cancelled(&self) -> bool {
            true
        }
    }
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    make_everything(&from);
    let tree = publish(&from);
    let cancelled = tree::restore(
        &to,
        tree.0.clone(),
        &tree.1,
        &RestoreOptions::default(),
        &Stop,
    );
    assert!(matches!(cancelled, Err(RestoreError::Cancelled)));
    restore(&to, &tree, true).unwrap();
    let compare = TreeWriter::new(&to, tree.0.clone(), &RestoreOptions { force: true }, &Stop);
    assert!(matches!(compare, Err(RestoreError::Cancelled)));
    assert_is(&to, &tree.0);
}

#[test]
fn a_full_disk_is_an_error_that_names_the_file() {
    if !is_root() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    std::fs::create_dir(&from).unwrap();
    std::fs::write(from.join("fits"), noise(1, 100_000)).unwrap();
    std::fs::write(from.join("too-large"), noise(2, 3 << 20)).unwrap();
    let tree = publish(&from);
    let mounted = Mounted::new(&to);
    let error = restore(&to, &tree, false).unwrap_err().to_string();
    assert!(
        error.contains("too-large") && error.contains("make room"),
        "{error}"
    );
    assert!(scan(&mounted.0).entries().iter().all(|entry| {
        ["", "fits"]
            .map(str::as_bytes)
            .contains(&entry.path.as_bytes())
    }));
}

/// Runs this test again as a user without rights, from a copy that this user may execute.
fn as_nobody(test: &str, temp: &Path) {
    let exe = temp.join("test");
    std::fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    mode(temp, 0o755);
    mode(&exe, 0o755);
    let mut child = Command::new("setpriv");
    child
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&exe)
        .args(["--exact", test, "--nocapture"]);
    let output = child
        .env("CAPSULE_TEST_DIR", temp)
        .current_dir(temp)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn without_rights_what_cannot_be_is_counted() {
    let Some(dir) = std::env::var_os("CAPSULE_TEST_DIR") else {
        if !is_root() {
            return;
        }
        let temp = tempfile::tempdir().unwrap();
        make_everything(&temp.path().join("from"));
        let (listing, contents) = publish(&temp.path().join("from"));
        std::fs::write(temp.path().join("listing"), listing.encode()).unwrap();
        std::fs::write(temp.path().join("contents"), &contents.0).unwrap();
        std::fs::create_dir(temp.path().join("work")).unwrap();
        mode(&temp.path().join("work"), 0o777);
        return as_nobody("without_rights_what_cannot_be_is_counted", temp.path());
    };
    let dir = Path::new(&dir);
    // One file of the tree has no mode at all.
    let error = tree::scan(&dir.join("from"), &ScanOptions::default()).unwrap_err();
    assert!(
        matches!(error, ScanError::Unreadable { .. }) && error.to_string().contains("root"),
        "{error}"
    );

    let listing =
        capsule_proto::listing::Listing::decode(&std::fs::read(dir.join("listing")).unwrap())
            .unwrap();
    let contents =
        capsule_chunker::content::BytesSource(std::fs::read(dir.join("contents")).unwrap());
    let tree = (Arc::new(listing), contents);
    let to = dir.join("work/to");
    let restored = restore(&to, &tree, false).unwrap();
    // Nearly all belong to root, the three devices and their link are not made.
    assert_eq!(restored.devices_skipped, 3);
    assert!(restored.owners_skipped > 600 && restored.xattrs_skipped > 0);
    assert_eq!(restored.warnings().len(), 3);
    let x = to.join("a/x").metadata().unwrap();
    assert_eq!(x.mode() & 0o7777, 0o755, "no set-id bits for another owner");
    assert_eq!(std::fs::read(to.join("big")).unwrap().len(), 3_000_001);
    // Once more, into directories that deny writing.
    std::fs::set_permissions(to.join("etc"), std::fs::Permissions::from_mode(0o500)).unwrap();
    let again = restore(&to, &tree, true).unwrap();
    // The file that we may not read is written again.
    assert_eq!(again.files_written, 1);
    let entries = tree
        .0
        .entries()
        .iter()
        .filter(|e| !matches!(e.kind, EntryKind::HardLink { .. }))
        .count() as u64;
    assert!(again.owners_skipped <= entries);
    assert!(tree.1.len() > 0);
}
