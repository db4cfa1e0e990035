//! `capsule node`: the daemon, run in the foreground.
//!
//! What it does is `capsule_node::daemon`'s; here are its arguments, what it prints when ready, and its log.

use std::io::IsTerminal;
use std::net::SocketAddr;

use capsule_node::daemon::{self, NodeOptions, Ready};
use capsule_node::home::Home;
use clap::Args;
use tracing_subscriber::EnvFilter;

use super::context::Context;
use super::exit::Exit;
use super::output;

/// What is logged where `RUST_LOG` says nothing: ours, and what others find worth a warning.
const DEFAULT_LOG: &str = "warn,capsule=info,capsule_node=info,capsule_swarm=info";

/// Run the node, which serves what it holds and answers the other commands
///
/// Runs until Ctrl-C or SIGTERM. Prints a line `listening ADDR` for each address once it is ready. It logs to standard
/// error; RUST_LOG says how much. Lasting settings are in the home's home.json (node/docs/home.md): listen, quota (bytes),
/// site, lan_discovery, bootstrap. Caps of rates are set with `capsule rates`.
#[derive(Debug, Args)]
pub struct NodeArgs {
    /// Where to listen: IP:PORT, port 0 for any free one; may be given more than once [default: 0.0.0.0:4277, or as
    /// set in home.json]
    #[arg(long = "listen", value_name = "ADDR")]
    listen: Vec<SocketAddr>,
    /// One more address where the fleet may be found, beside the token's: HOST:PORT or a multiaddr; may be given more
    /// than once
    #[arg(long = "bootstrap", value_name = "ADDR", value_parser = super::fleet::address)]
    bootstrap: Vec<String>,
    /// Do not look for the fleet by multicast on the LAN
    #[arg(long)]
    no_lan_discovery: bool,
}

/// Runs the command.
pub fn run(args: NodeArgs, context: &Context) -> Result<(), Exit> {
    log_to_stderr();
    let options = NodeOptions {
        listen: args.listen,
        bootstrap: args.bootstrap,
        lan_discovery: args.no_lan_discovery.then_some(false),
    };
    daemon::run(Home::new(context.home()), options, announce)
        .map_err(|error| Exit::failed(error.to_string()))
}

/// Has this process log to standard error, as much as `RUST_LOG` says.
pub fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_LOG));
    let colours = std::io::stderr().is_terminal() && super::style::colours_wanted();
    tracing_subscriber::fmt()
        // A log on a full disk loses lines; telling so on the same stream would end the thread that has something to say.
        .log_internal_errors(false)
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .init();
}

fn announce(ready: &Ready) {
    for text in &ready.recovered {
        tracing::info!("{text}");
    }
    let lines: String = ready
        .listening
        .iter()
        .map(|address| format!("listening {address}\n"))
        .collect();
    // A node whose starter has gone still serves its peers.
    let _ = output::print(&lines);
}
