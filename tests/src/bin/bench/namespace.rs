//! Namespaces of the benchmark's own: a network that has only loopback, where BitTorrent clients meet nobody else, and process
//! ids, so that nothing that was started outlives the benchmark, however that ends.

use std::net::Ipv4Addr;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result};

/// An address that BitTorrent clients do not take for themselves (they refuse 127.0.0.0/8).
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Tells the program that it is inside already.
const INSIDE: &str = "CAPSULE_BENCH_NAMESPACE";

/// Whether this program runs inside.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs this program again inside; returns its exit code.
pub fn enter() -> Result<ExitCode> {
    let me = std::env::current_exe()?;
    // Not `exec`: as the first process of its namespace the program would be deaf to Ctrl-C.
    let script = format!(
        "ip link set lo up && ip address add {ADDRESS}/32 dev lo && \"$0\" \"$@\"; exit $?"
    );
    let mut inside = Command::new("unshare");
    inside.args(["--net", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    inside.args(["sh", "-c", &script]).arg(me);
    inside.args(std::env::args_os().skip(1)).env(INSIDE, "1");
    let mut inside = inside
        .stdin(Stdio::piped())
        .spawn()
        .context("unshare (util-linux) and ip (iproute2) are needed, and root")?;
    // Closed when this program ends, however it does: the sign to stop for the one inside.
    let alive = inside.stdin.take();
    let status = inside.wait()?;
    drop(alive);
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(1)))
}
