//! Namespaces of a program's own, for the lab and the benchmarks: a network that has only loopback, where BitTorrent clients meet
//! nobody else, and process ids and mounts, so that nothing that was started or mounted outlives the program, however that ends.
//!
//! ```text
//! the program, as started: enter()             waits, and holds a pipe
//!   sh, first process of the namespaces        all in them ends with it
//!     the program again: network() is some     works; ends what it started when the pipe closes (stop)
//! ```

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// An address that BitTorrent clients do not take for themselves (they refuse 127.0.0.0/8).
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Tells the program that it is inside already.
const INSIDE: &str = "CAPSULE_INSIDE";

/// What a program inside has for a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// Loopback and nothing else.
    Own,
    /// That of the machine, to fetch packages; no servers are started there.
    Machine,
}

impl Network {
    fn name(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Machine => "machine",
        }
    }
}

/// Whether this program runs inside, and with which network.
pub fn network() -> Option<Network> {
    let network = std::env::var_os(INSIDE)?;
    let machine = network == Network::Machine.name();
    Some(if machine {
        Network::Machine
    } else {
        Network::Own
    })
}

/// Runs this program again inside; returns its exit code.
pub fn enter(network: Network) -> Result<u8> {
    let me = std::env::current_exe()?;
    let (set_up, own) = match network {
        Network::Own => (
            format!("ip link set lo up && ip address add {ADDRESS}/32 dev lo && "),
            &["--net"][..],
        ),
        Network::Machine => (String::new(), &[][..]),
    };
    // Not `exec`: as the first process of its namespace the program would be deaf to Ctrl-C.
    let script = format!("{set_up}\"$0\" \"$@\"; exit $?");
    let mut inside = Command::new("unshare");
    // With processes of their own, mounts are too.
    inside.args(own);
    inside.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    inside.args(["sh", "-c", &script]).arg(me);
    inside
        .args(std::env::args_os().skip(1))
        .env(INSIDE, network.name());
    let mut inside = inside
        .stdin(Stdio::piped())
        .spawn()
        .context("unshare (util-linux) and ip (iproute2) are needed, and root")?;
    // Closed when this program ends, however it does: the sign to stop for the one inside.
    let alive = inside.stdin.take();
    let status = inside.wait()?;
    drop(alive);
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.unwrap_or(1))
}

/// Mounts memory on a directory, until the program ends or unmounts it: one disk under many nodes would be what is measured.
pub fn mount_memory(dir: &Path) -> Result<()> {
    let mut mount = Command::new("mount");
    mount
        .args(["-t", "tmpfs", "-o", "size=80%", "tmpfs"])
        .arg(dir);
    let output = mount.stdin(Stdio::null()).output();
    let output = output.context("mount (util-linux) is needed, and root")?;
    ensure!(
        output.status.success(),
        "mounting memory on {}: {}",
        dir.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Mounts a directory on itself, until the program ends or unmounts it: with it goes all that was mounted below, even where whoever serves
/// that has ended without notice.
pub fn mount_itself(dir: &Path) -> Result<()> {
    let mut mount = Command::new("mount");
    mount.arg("--bind").args([dir, dir]);
    let output = mount.stdin(Stdio::null()).output();
    let output = output.context("mount (util-linux) is needed, and root")?;
    ensure!(
        output.status.success(),
        "mounting {} on itself: {}",
        dir.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Takes away what was mounted on a directory, if something was.
pub fn unmount(dir: &Path) {
    let mut unmount = Command::new("umount");
    unmount.arg("--lazy").arg(dir);
    unmount
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // Nothing may be mounted there; and all mounts end with the program.
    let _ = unmount.status();
}
