//! `capsule nbd`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use capsule_node::control::{CapsuleRef, Nbd, Serving};
use clap::Args;

use super::context::{Context, Output, Wanted, absolute};
use super::exit::Exit;
use super::format::{duration, size};
use super::style::Style;
use super::table::fields;

/// Serve a disk of a capsule as a network block device, fetched as it is read
///
/// Only its manifest and indexes are fetched at first; what a client reads then comes before everything else, from as many
/// machines as have it. It is read-only, works with QEMU, nbdinfo, nbdcopy and the kernel's client, and ends with Ctrl-C.
#[derive(Debug, Args)]
pub struct NbdArgs {
    /// CHANNEL:VERSION, CHANNEL for its newest, or an id or the first 8 or more digits of one
    #[arg(value_name = "NAME|ID")]
    capsule: String,
    /// At this Unix socket, which only this user may use
    #[arg(long, value_name = "PATH", required_unless_present = "listen")]
    socket: Option<PathBuf>,
    /// At this address and port instead; whoever can connect to it can read the disk
    #[arg(long, value_name = "ADDRESS", conflicts_with = "socket")]
    listen: Option<SocketAddr>,
    /// Fetch all of it first, and serve it from a file: faster for who reads much, for as much room as its data take
    #[arg(long)]
    whole: bool,
    #[command(flatten)]
    wanted: Wanted,
    #[command(flatten)]
    output: Output,
}

/// Runs the command.
pub fn run(args: NbdArgs, context: &Context) -> Result<(), Exit> {
    let command = Nbd {
        capsule: CapsuleRef(args.capsule),
        socket: args.socket.as_deref().map(absolute).transpose()?,
        listen: args.listen,
        component: args.wanted.component,
        wait: args.wanted.wait,
        whole: args.whole,
    };
    let output = args.output;
    context.serve(command, output, |serving| output.print(serving, render))
}

fn render(serving: &Serving, style: Style) -> String {
    let component = &serving.component;
    let mut rows = vec![
        (
            "serving",
            format!("{} ({})", component.name, component.kind),
        ),
        ("of", serving.capsule.to_string()),
        ("size", size(component.size)),
        ("at", serving.uri.clone()),
    ];
    if let (Some(bytes), Some(seconds)) = (serving.whole_bytes, serving.whole_seconds) {
        let took = duration(Duration::from_secs_f64(seconds));
        rows.push(("written out", format!("{} in {took}", size(bytes))));
    }
    fields(style, &rows)
}
