//! The command line: one file a command or small group of commands, whose doc comments are their help.
//!
//! A command reads its arguments, asks the daemon ([`capsule_node::control`]) and prints the answer: for people as
//! tables, with `--json` as the answer itself. Results go to standard output, everything else to standard error. What
//! the commands mean is the daemon's; keys and exit codes are documented in `node/docs/cli.md`.
//!
//! | file | what lives there |
//! |---|---|
//! | `fleet`, `node`, `publish`, `list`, `pull`, `export`, `verify`, `status`, `rates`, `keep`, `completions` | commands |
//! | `context` | what every command has: the home, `--json`, asking the daemon |
//! | `exit`, `interrupt` | how commands end: exit codes, hints; Ctrl-C |
//! | `output`, `progress` | standard output; bars and lines on standard error |
//! | `format`, `table`, `style` | quantities, columns, colours |

mod completions;
mod context;
#[cfg(test)]
mod documented;
pub mod exit;
mod export;
mod fleet;
pub mod format;
pub mod interrupt;
mod keep;
mod layers;
mod list;
mod machine;
mod mount;
mod nbd;
mod node;
pub mod output;
pub mod progress;
mod publish;
mod pull;
mod rates;
mod status;
pub mod style;
pub mod table;
mod verify;

use std::path::PathBuf;

use capsule_node::home::Home;
use clap::{Parser, Subcommand};

use crate::demo;
use context::Context;
use exit::Exit;

const AFTER_HELP: &str = "\
First steps: `capsule fleet init`, `capsule node` and `capsule fleet invite` on one machine; `capsule join TOKEN` and \
`capsule node` on the others; then `publish`, `pull`, `export`.

Exit codes: 0 done, 1 failed, 2 wrong arguments, 3 no node is running for this home, 130 stopped by Ctrl-C.";

/// Moves the state of computers, as named, verified, immutable capsules, to many machines at once
///
/// A publisher makes a new version; each machine fetches what it lacks from many peers in parallel, every byte verified
/// as it arrives. `capsule demo` shows it on this machine, with no set-up at all.
#[derive(Debug, Parser)]
#[command(name = "capsule", version, max_term_width = 100, after_help = AFTER_HELP)]
pub struct Cli {
    /// The node's directory: keys, membership, store [default: $CAPSULE_HOME, or capsule in the user's data directory]
    #[arg(long, value_name = "DIR", global = true, help_heading = "Home")]
    home: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::DemoArgs),
    #[command(subcommand)]
    Fleet(fleet::FleetCommand),
    Join(fleet::JoinArgs),
    Node(node::NodeArgs),
    Publish(publish::PublishArgs),
    Ls(list::LsArgs),
    Show(list::ShowArgs),
    Layers(layers::LayersArgs),
    Plan(pull::PlanArgs),
    Pull(pull::PullArgs),
    Follow(pull::FollowArgs),
    Unfollow(pull::UnfollowArgs),
    Export(export::ExportArgs),
    Nbd(nbd::NbdArgs),
    Mount(mount::MountArgs),
    #[command(subcommand)]
    Machine(machine::MachineCommand),
    Verify(verify::VerifyArgs),
    Status(status::StatusArgs),
    Peers(status::PeersArgs),
    Hashes(status::HashesArgs),
    Rates(rates::RatesArgs),
    Pin(keep::PinArgs),
    Unpin(keep::UnpinArgs),
    Gc(keep::GcArgs),
    Rm(keep::RmArgs),
    Completions(completions::CompletionsArgs),
}

/// Runs the command that the arguments name.
///
/// # Errors
/// How it ended, if not well.
pub fn run(cli: Cli) -> Result<(), Exit> {
    // These two have no home.
    let command = match cli.command {
        Command::Demo(_) if cli.home.is_some() => {
            let message =
                "the demo makes homes of its own, in a temporary directory: leave out --home";
            return Err(Exit::Usage(message.to_owned()));
        }
        Command::Demo(args) => return demo::run(&args),
        Command::Completions(args) => return completions::run(args),
        command => command,
    };
    // Whole, as it is told to the node and in hints, which are followed elsewhere.
    let home = context::absolute(&cli.home.map_or_else(Home::default_dir, Ok)?)?;
    let context = Context::new(home);
    match command {
        Command::Fleet(command) => fleet::fleet(command, &context),
        Command::Join(args) => fleet::join(args, &context),
        Command::Node(args) => node::run(args, &context),
        Command::Publish(args) => publish::run(args, &context),
        Command::Ls(args) => list::ls(args, &context),
        Command::Show(args) => list::show(args, &context),
        Command::Layers(args) => layers::run(args, &context),
        Command::Plan(args) => pull::plan(args, &context),
        Command::Pull(args) => pull::pull(args, &context),
        Command::Follow(args) => pull::follow(args, &context),
        Command::Unfollow(args) => pull::unfollow(args, &context),
        Command::Export(args) => export::run(args, &context),
        Command::Nbd(args) => nbd::run(args, &context),
        Command::Mount(args) => mount::run(args, &context),
        Command::Machine(command) => machine::run(command, &context),
        Command::Verify(args) => verify::run(args, &context),
        Command::Status(args) => status::status(args, &context),
        Command::Peers(args) => status::peers(args, &context),
        Command::Hashes(args) => status::hashes(args, &context),
        Command::Rates(args) => rates::run(args, &context),
        Command::Pin(args) => keep::pin(args, &context),
        Command::Unpin(args) => keep::unpin(args, &context),
        Command::Gc(args) => keep::gc(args, &context),
        Command::Rm(args) => keep::rm(args, &context),
        // Both returned above.
        Command::Demo(_) | Command::Completions(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_hold_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_help_without_errors_of_grammar() {
        let mut cli = Cli::command();
        cli.build();
        let mut open: Vec<&clap::Command> = cli.get_subcommands().collect();
        while let Some(command) = open.pop() {
            if command.get_name() == "help" {
                continue;
            }
            let about = command
                .get_about()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(
                !about.is_empty() && !about.ends_with('.'),
                "{}: {about:?}",
                command.get_name()
            );
            for arg in command.get_arguments() {
                assert!(
                    arg.get_help().is_some(),
                    "{} {}",
                    command.get_name(),
                    arg.get_id()
                );
            }
            open.extend(command.get_subcommands());
        }
    }

    #[test]
    fn the_home_may_stand_before_or_after_the_command() {
        for args in [
            ["capsule", "--home", "/h", "status"],
            ["capsule", "status", "--home", "/h"],
        ] {
            assert_eq!(Cli::try_parse_from(args).unwrap().home, Some("/h".into()));
        }
    }
}
