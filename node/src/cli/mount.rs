//! `capsule mount`.

use std::path::PathBuf;

use capsule_node::control::{CapsuleRef, Mount, Mounted};
use clap::Args;

use super::context::{Context, Output, Wanted, absolute};
use super::exit::{Exit, shell_word};
use super::format::size;
use super::style::Style;
use super::table::fields;

/// Show a capsule as files in a directory, fetched as they are read
///
/// A tree is shown as it is, a disk or file under its component's name. Only manifest, indexes and listings are fetched at first;
/// what a program reads then comes before everything else. It is read-only, and ends with Ctrl-C or `fusermount3 -u DIR`.
#[derive(Debug, Args)]
pub struct MountArgs {
    /// CHANNEL:VERSION, CHANNEL for its newest, or an id or the first 8 or more digits of one
    #[arg(value_name = "NAME|ID")]
    capsule: String,
    /// Where: a directory that there is
    #[arg(value_name = "DIR")]
    at: PathBuf,
    #[command(flatten)]
    wanted: Wanted,
    #[command(flatten)]
    output: Output,
}

/// Runs the command.
pub fn run(args: MountArgs, context: &Context) -> Result<(), Exit> {
    let command = Mount {
        capsule: CapsuleRef(args.capsule),
        at: absolute(&args.at)?,
        component: args.wanted.component,
        wait: args.wanted.wait,
    };
    let output = args.output;
    context.serve(command, output, |mounted| output.print(mounted, render))
}

fn render(mounted: &Mounted, style: Style) -> String {
    let bytes = mounted
        .components
        .iter()
        .map(|component| component.content_size);
    let names = mounted
        .components
        .iter()
        .map(|component| component.name.as_str());
    fields(
        style,
        &[
            ("mounted", names.collect::<Vec<_>>().join(", ")),
            ("of", mounted.capsule.to_string()),
            ("content", size(bytes.sum())),
            ("at", shell_word(&mounted.at)),
        ],
    )
}
