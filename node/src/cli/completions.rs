//! `capsule completions`.

use clap::{Args, CommandFactory};
use clap_complete::{Shell, generate};

use super::Cli;
use super::exit::Exit;
use super::output;

/// Print a script that completes capsule's commands in a shell
///
/// For bash: capsule completions bash > ~/.local/share/bash-completion/completions/capsule
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Runs the command.
pub fn run(args: CompletionsArgs) -> Result<(), Exit> {
    let mut script = Vec::new();
    generate(args.shell, &mut Cli::command(), "capsule", &mut script);
    output::print(&String::from_utf8_lossy(&script))
}
