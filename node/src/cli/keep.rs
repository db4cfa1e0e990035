//! `capsule pin`, `unpin`, `gc` and `rm`: what stays in the store.

use capsule_node::control::{CapsuleRef, Collected, Gc, Pin, Pinned, Removed, Rm, Unpin};
use clap::Args;

use super::context::{Context, Output};
use super::exit::Exit;
use super::format::{plural, size};
use super::style::Style;

/// Keep a capsule from being collected
#[derive(Debug, Args)]
pub struct PinArgs {
    #[command(flatten)]
    which: Which,
}

/// Take the pin of `capsule pin`, or that of having published it, away
#[derive(Debug, Args)]
pub struct UnpinArgs {
    #[command(flatten)]
    which: Which,
}

#[derive(Debug, Args)]
struct Which {
    /// CHANNEL:VERSION, CHANNEL for its newest, or an id or the first 8 or more digits of one
    #[arg(value_name = "NAME|ID")]
    capsule: String,
    #[command(flatten)]
    output: Output,
}

/// Remove from the store what no pinned capsule needs
#[derive(Debug, Args)]
pub struct GcArgs {
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    output: Output,
}

/// Remove a capsule from this node
///
/// What other capsules here need stays, and so does its name in the fleet.
#[derive(Debug, Args)]
pub struct RmArgs {
    /// Even if it is pinned
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    which: Which,
}

/// Runs `pin`.
pub fn pin(args: PinArgs, context: &Context) -> Result<(), Exit> {
    let Which { capsule, output } = args.which;
    output.print(
        &context.ask(Pin {
            capsule: CapsuleRef(capsule),
            machine: None,
        })?,
        render_pinned,
    )
}

/// Runs `unpin`.
pub fn unpin(args: UnpinArgs, context: &Context) -> Result<(), Exit> {
    let Which { capsule, output } = args.which;
    output.print(
        &context.ask(Unpin {
            capsule: CapsuleRef(capsule),
            machine: None,
        })?,
        render_unpinned,
    )
}

/// Runs `gc`.
pub fn gc(args: GcArgs, context: &Context) -> Result<(), Exit> {
    args.output.print(
        &context.ask(Gc {
            dry_run: args.dry_run,
        })?,
        render_collected,
    )
}

/// Runs `rm`.
pub fn rm(args: RmArgs, context: &Context) -> Result<(), Exit> {
    let Which { capsule, output } = args.which;
    output.print(
        &context.ask(Rm {
            capsule: CapsuleRef(capsule),
            force: args.force,
        })?,
        render_removed,
    )
}

fn render_pinned(pinned: &Pinned, _: Style) -> String {
    let now = if pinned.changed { "now" } else { "already" };
    let pins = pinned.pins.join(", ");
    format!("{} is {now} pinned (by {pins})\n", pinned.capsule)
}

fn render_unpinned(unpinned: &Pinned, _: Style) -> String {
    let capsule = unpinned.capsule;
    match (unpinned.changed, unpinned.pins.as_slice()) {
        (true, []) => format!("{capsule} is no longer pinned: `capsule gc` removes it\n"),
        (false, []) => format!("{capsule} was not pinned\n"),
        (_, pins) => {
            let mut ends: Vec<String> = pins
                .iter()
                .map(|pin| match pin.strip_prefix("machine:") {
                    Some(machine) => format!("`capsule machine rm {machine}`"),
                    None => "`capsule unfollow`".to_owned(),
                })
                .collect();
            ends.dedup();
            let (pins, ends) = (pins.join(", "), ends.join(", "));
            format!("{capsule} is still pinned (by {pins}): what ends that is {ends}\n")
        }
    }
}

fn render_collected(collected: &Collected, _: Style) -> String {
    let verb = if collected.dry_run {
        "would remove"
    } else {
        "removed"
    };
    let capsules: String = collected
        .capsules
        .iter()
        .map(|capsule| format!("{verb} capsule {capsule}\n"))
        .collect();
    let amounts = Amounts {
        blobs: collected.blobs,
        punched: collected.punched,
        punched_bytes: collected.punched_bytes,
        bytes: collected.bytes,
        busy: collected.busy,
    };
    if collected.capsules.is_empty() && amounts.is_nothing() {
        return "nothing to remove: pinned capsules need all that is here\n".to_owned();
    }
    capsules + &amounts.render(verb)
}

fn render_removed(removed: &Removed, _: Style) -> String {
    format!("removed capsule {}\n", removed.capsule)
        + &Amounts {
            blobs: removed.blobs,
            punched: removed.punched,
            punched_bytes: removed.punched_bytes,
            bytes: removed.bytes,
            busy: removed.busy,
        }
        .render("removed")
}

/// How much went, or would.
struct Amounts {
    blobs: u64,
    punched: u64,
    punched_bytes: u64,
    bytes: u64,
    busy: u64,
}

impl Amounts {
    const fn is_nothing(&self) -> bool {
        self.blobs == 0 && self.punched == 0 && self.busy == 0
    }

    fn render(&self, verb: &str) -> String {
        let mut text = format!(
            "{verb} {}, {}",
            plural(self.blobs, "blob"),
            size(self.bytes)
        );
        if self.punched > 0 {
            let (bytes, blobs) = (size(self.punched_bytes), plural(self.punched, "blob"));
            text += &format!("; {bytes} of that from {blobs} of which the rest is needed");
        }
        if self.busy > 0 {
            text += &format!("; {} in use stayed", plural(self.busy, "blob"));
        }
        text + "\n"
    }
}

#[cfg(test)]
mod tests {
    use capsule_proto::{CapsuleId, RootHash};

    use super::*;

    #[test]
    fn what_stays_pinned_is_told_with_the_way_out() {
        let capsule = CapsuleId(RootHash::of(b"x"));
        let unpinned = |changed, pins: &[&str]| {
            let pins = pins.iter().map(ToString::to_string).collect();
            let text = render_unpinned(
                &Pinned {
                    capsule,
                    changed,
                    pins,
                },
                Style::PLAIN,
            );
            text.strip_prefix(&capsule.to_string()).unwrap().to_owned()
        };
        assert_eq!(
            unpinned(true, &[]),
            " is no longer pinned: `capsule gc` removes it\n"
        );
        assert_eq!(unpinned(false, &[]), " was not pinned\n");
        for changed in [true, false] {
            assert_eq!(
                unpinned(changed, &["follow:lab"]),
                " is still pinned (by follow:lab): what ends that is `capsule unfollow`\n"
            );
            assert_eq!(
                unpinned(changed, &["follow:lab", "machine:me"]),
                " is still pinned (by follow:lab, machine:me): what ends that is `capsule unfollow`, `capsule machine rm me`\n"
            );
        }
    }

    #[test]
    fn nothing_to_collect_is_said_so() {
        let collected = Collected {
            dry_run: false,
            capsules: Vec::new(),
            blobs: 0,
            punched: 0,
            punched_bytes: 0,
            bytes: 0,
            busy: 0,
        };
        assert!(render_collected(&collected, Style::PLAIN).starts_with("nothing to remove"));
    }

    #[test]
    fn a_dry_run_says_would() {
        let capsule = CapsuleId(RootHash::of(b"x"));
        let collected = Collected {
            dry_run: true,
            capsules: vec![capsule],
            blobs: 3,
            punched: 0,
            punched_bytes: 0,
            bytes: 2048,
            busy: 1,
        };
        assert_eq!(
            render_collected(&collected, Style::PLAIN),
            format!(
                "would remove capsule {capsule}\nwould remove 3 blobs, 2.00 KiB; 1 blob in use stayed\n"
            )
        );
        let punched = Collected {
            dry_run: false,
            capsules: Vec::new(),
            blobs: 0,
            punched: 2,
            punched_bytes: 2048,
            bytes: 2048,
            busy: 0,
        };
        assert_eq!(
            render_collected(&punched, Style::PLAIN),
            "removed 0 blobs, 2.00 KiB; 2.00 KiB of that from 2 blobs of which the rest is needed\n"
        );
    }
}
