//! `capsule export`.

use std::path::PathBuf;
use std::time::Duration;

use capsule_node::control::{CapsuleRef, ComponentInfo, Export, Exported};
use clap::Args;

use super::context::{Context, Output, absolute};
use super::exit::{Exit, shell_word};
use super::format::{duration, plural, rate, size};
use super::output::tell;
use super::style::{Style, printable};
use super::table::fields;

const STOPPED: &str = "the export is not complete; the capsule in the store is untouched";

/// Write a component of a held capsule to a file or directory
///
/// A disk is written raw and sparse, a tree with everything that its listing says; both are verified while they are
/// written. `b3sum` of an exported file prints its component's root hash.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// CHANNEL:VERSION, CHANNEL for its newest, or an id or the first 8 or more digits of one
    #[arg(value_name = "NAME|ID")]
    capsule: String,
    /// The file, or for a tree the directory
    #[arg(long, value_name = "FILE|DIR")]
    to: PathBuf,
    /// Replace an existing file; make a directory that is not empty exactly the tree
    #[arg(long)]
    force: bool,
    /// Which component, of a capsule that has several
    #[arg(long, value_name = "NAME")]
    component: Option<String>,
    #[command(flatten)]
    output: Output,
}

/// Runs the command.
pub fn run(args: ExportArgs, context: &Context) -> Result<(), Exit> {
    let command = Export {
        capsule: CapsuleRef(args.capsule),
        to: absolute(&args.to)?,
        component: args.component,
        force: args.force,
    };
    let exported = context.work(command, args.output, STOPPED)?;
    for warning in &exported.warnings {
        tell(format_args!("note: {}", printable(warning)));
    }
    args.output.print(&exported, render)
}

fn render(exported: &Exported, style: Style) -> String {
    let took = Duration::try_from_secs_f64(exported.seconds).unwrap_or_default();
    let files = exported
        .files
        .map(|files| format!(" in {}", plural(files, "file")))
        .unwrap_or_default();
    fields(
        style,
        &[
            ("exported", component(&exported.component)),
            ("of", exported.capsule.to_string()),
            ("to", shell_word(&exported.to)),
            ("root hash", exported.component.root.to_string()),
            ("content", format!("{}{files}", size(exported.bytes))),
            (
                "took",
                format!("{}, {}", duration(took), rate(exported.bytes, took)),
            ),
        ],
    )
}

/// A component's name, with its kind where that says more.
fn component(component: &ComponentInfo) -> String {
    if component.name == component.kind {
        component.name.clone()
    } else {
        format!("{} ({})", component.name, component.kind)
    }
}
