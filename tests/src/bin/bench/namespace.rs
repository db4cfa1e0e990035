//! Namespaces of the benchmark's own: a network that has only loopback, where BitTorrent clients meet nobody else, and process
//! ids and mounts, so that nothing that was started or mounted outlives the benchmark, however that ends.

use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

/// An address that BitTorrent clients do not take for themselves (they refuse 127.0.0.0/8).
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Tells the program that it is inside already.
const INSIDE: &str = "CAPSULE_BENCH_NAMESPACE";

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
pub fn inside() -> Option<Network> {
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
