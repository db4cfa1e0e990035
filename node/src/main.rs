//! The `capsule` program: the daemon and the command line that talks to it.
//!
//! Here only the entry. Commands live in `cli`, the demonstration in `demo`, everything that they ask for in the
//! library beside (`capsule_node`).

mod cli;
mod demo;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match cli::run(cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(exit) => exit.report(),
    }
}
