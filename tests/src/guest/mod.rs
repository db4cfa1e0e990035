//! The guest that tests of machines boot: Debian's kernel for clouds and a busybox, with a root shell on the serial console.
//!
//! `make.sh` makes it of packages that apt-get downloads, once, in the target directory: it is made again where that script or the guest's `init`
//! changes. It boots in 3 to 6 seconds under emulation. On the kernel's command line, `without=MODULE` makes a guest without that driver.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process_group};

const SCRIPT: &str = include_str!("make.sh");
const INIT: &str = include_str!("init");
/// Its kernel's command line.
pub const APPEND: &str = "console=ttyS0 quiet panic=-1";
/// So long making it may take: two packages are downloaded.
const MAKING: Duration = Duration::from_secs(300);
const PAUSE: Duration = Duration::from_millis(100);

/// What boots it.
#[derive(Debug)]
pub struct Guest {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial ramdisk, which is all that it has.
    pub initrd: PathBuf,
}

/// The guest, which is made where it is not there.
///
/// # Panics
/// Where it cannot be made: what is missing.
pub fn guest() -> &'static Guest {
    static GUEST: OnceLock<Guest> = OnceLock::new();
    GUEST.get_or_init(|| {
        let place = place();
        let guest = Guest {
            kernel: place.join("vmlinuz"),
            initrd: place.join("initrd"),
        };
        let scratch = place.parent().expect("it lies in a directory");
        fs::create_dir_all(scratch).expect("the target directory can be written");
        // Several programs of tests may want it at the same time.
        let _lock = lock(&scratch.join("guest.lock"));
        if !place.exists() {
            make(scratch, &place);
        }
        guest
    })
}

/// A directory that is named after what the guest is made by.
fn place() -> PathBuf {
    let me = std::env::current_exe().expect("the running program has a path");
    let mut above = me.ancestors();
    let profile = above.find(|dir| dir.join(".cargo-lock").exists() || dir.join("deps").is_dir());
    let target = profile.and_then(Path::parent);
    let target = target.expect("the running program lies in a target directory");
    let hash = blake3::hash([SCRIPT, INIT].concat().as_bytes());
    target
        .join("tmp")
        .join(format!("guest-{}", &hash.to_hex()[..16]))
}

fn lock(path: &Path) -> File {
    let file = File::create(path).expect("the target directory can be written");
    let until = Instant::now() + MAKING;
    while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        assert!(Instant::now() < until, "another makes the guest for ever");
        std::thread::sleep(PAUSE);
    }
    file
}

/// Makes it beside its place, and renames it when it is whole.
fn make(scratch: &Path, place: &Path) {
    let new = tempfile::tempdir_in(scratch).expect("a temporary directory can be made");
    let at = |name: &str| new.path().join(name);
    fs::create_dir(at("work")).expect("it is ours");
    fs::write(at("make.sh"), SCRIPT).expect("the disk has room");
    fs::write(at("init"), INIT).expect("the disk has room");
    let said = File::create(at("said")).expect("the disk has room");
    let mut script = Command::new("sh");
    script.arg(at("make.sh")).arg(new.path());
    script.stdin(Stdio::null()).stdout(Stdio::null());
    // A group of its own, so that all of it can be ended.
    std::os::unix::process::CommandExt::process_group(&mut script, 0);
    let mut script = script.stderr(said).spawn().expect("sh runs");
    let until = Instant::now() + MAKING;
    let ended = loop {
        match script.try_wait().expect("the process is ours") {
            Some(status) => break Some(status),
            None if Instant::now() > until => break None,
            None => std::thread::sleep(PAUSE),
        }
    };
    if ended.is_none() {
        let _ended = kill_process_group(Pid::from_child(&script), Signal::KILL);
        let _reaped = script.wait();
    }
    assert!(
        ended.is_some_and(|status| status.success()),
        "the guest of the tests cannot be made ({ended:?}): {}",
        fs::read_to_string(at("said")).unwrap_or_default()
    );
    fs::remove_dir_all(at("work")).expect("it is ours");
    fs::rename(new.path(), place).expect("nobody else makes it");
}
