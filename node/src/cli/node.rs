//! `capsule node`.

use std::net::SocketAddr;

use clap::Args;

use super::context::Context;
use super::exit::Exit;

/// Run the node: serves what it holds, pulls what it is told to, and answers the other commands
#[derive(Debug, Args)]
pub struct NodeArgs {
    /// Where to listen: IP:PORT, port 0 for any free one; may be given more than once
    #[arg(long = "listen", value_name = "ADDR")]
    listen: Vec<SocketAddr>,
}

/// Runs the command.
pub fn run(args: NodeArgs, context: &Context) -> Result<(), Exit> {
    let _ = (args.listen, context);
    Err(Exit::failed("not there yet"))
}
