//! `capsule verify`.

use std::time::Duration;

use capsule_node::control::{CapsuleRef, Verified, Verify};
use clap::Args;

use super::context::{Context, Output};
use super::exit::Exit;
use super::format::{duration, plural, rate, size};
use super::style::Style;
use super::table::Table;

const STOPPED: &str = "what was not read yet is not verified";

/// Read what is held again and compare it with its hashes
///
/// Damaged ranges stop counting as held at once; `--repair` fetches them again from peers. Exits 1 if damage remains.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Only this capsule; everything in the store, when not given
    #[arg(value_name = "NAME|ID")]
    capsule: Option<String>,
    /// Fetch what is damaged again
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    output: Output,
}

/// Runs the command.
pub fn run(args: VerifyArgs, context: &Context) -> Result<(), Exit> {
    let command = Verify {
        capsule: args.capsule.map(CapsuleRef),
        repair: args.repair,
    };
    let verified = context.work(command, args.output, STOPPED)?;
    args.output.print(&verified, render)?;
    let left = verified
        .damaged_bytes
        .saturating_sub(verified.repaired_bytes);
    if left == 0 {
        return Ok(());
    }
    let hint = if args.repair {
        "somebody who has it whole must be connected: `capsule peers` lists who is"
    } else {
        "`capsule ls --held` tells what is partial now; `capsule pull` fetches again what it lacks"
    };
    Err(Exit::failed(format!("{} of what this node held are damaged", size(left))).or_hint(hint))
}

fn render(verified: &Verified, style: Style) -> String {
    let took = Duration::try_from_secs_f64(verified.seconds).unwrap_or_default();
    let read = format!(
        "{}, {}, read in {} ({})",
        plural(verified.checked, "blob"),
        size(verified.checked_bytes),
        duration(took),
        rate(verified.checked_bytes, took)
    );
    if verified.damaged.is_empty() {
        return format!("{} {read}\n", style.green("all verified:"));
    }
    let mut table = Table::new(&["DAMAGED", "KIND", ">BYTES", ">REPAIRED"]);
    for damage in &verified.damaged {
        table.row([
            damage.root.to_string(),
            damage.kind.clone(),
            damage.bytes.to_string(),
            damage.repaired.to_string(),
        ]);
    }
    format!(
        "{} {read}\n\n{}",
        style.red("damage found:"),
        table.render(style)
    )
}
