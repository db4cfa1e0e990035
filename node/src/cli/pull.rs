//! `capsule plan`, `pull`, `follow` and `unfollow`.

use std::path::PathBuf;
use std::time::Duration;

use capsule_node::control::{
    CapsuleRef, Follow, Followed, Plan, Planned, PlannedComponent, Pull, Pulled, Unfollow,
    Unfollowed,
};
use capsule_proto::name::Channel;
use clap::Args;

use super::context::{Context, Output, absolute};
use super::exit::Exit;
use super::format::{duration, parse_duration, plural, rate, size};
use super::style::Style;
use super::table::{Table, fields};

const STOPPED: &str = "what was verified is kept, and the same command goes on from there";

/// Say exactly what a pull would fetch, without fetching it
///
/// Fetches only manifest and indexes, which it needs to know; a pull does not fetch them again.
#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    which: Which,
}

/// Fetch a capsule from whoever has it, verify it and keep it
///
/// Every byte is verified as it arrives, from many peers at once; then each component is checked against its root
/// hash. Ctrl-C stops the transfer and keeps what is verified; the same command resumes it.
#[derive(Debug, Args)]
pub struct PullArgs {
    #[command(flatten)]
    which: Which,
}

#[derive(Debug, Args)]
struct Which {
    /// CHANNEL:VERSION, CHANNEL for its newest, or an id or the first 8 or more digits of one
    #[arg(value_name = "NAME|ID")]
    capsule: String,
    /// How long to wait for the name to be known and for somebody who has the content, such as 5m [default: 10s for the
    /// name, 30s for the content]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    wait: Option<Duration>,
    /// Look for what is wanted in local data too, and fetch only what is not found: an image, a device, a directory, or a
    /// capsule. All capsules that are here are looked at anyway
    #[arg(long, value_name = "PATH|CAPSULE")]
    like: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// Pull each new version of a channel by itself from now on, and keep the newest two
#[derive(Debug, Args)]
pub struct FollowArgs {
    /// The channel, such as lab
    channel: Channel,
    #[command(flatten)]
    output: Output,
}

/// Follow a channel no longer; what was pulled stays until `capsule gc`
#[derive(Debug, Args)]
pub struct UnfollowArgs {
    /// The channel
    channel: Channel,
    #[command(flatten)]
    output: Output,
}

/// Runs `plan`.
pub fn plan(args: PlanArgs, context: &Context) -> Result<(), Exit> {
    let Which {
        capsule,
        wait,
        like,
        output,
    } = args.which;
    let (like_path, like_capsule) = like_of(like)?;
    let command = Plan {
        capsule: CapsuleRef(capsule),
        wait: wait.map(|wait| wait.as_secs()),
        like_path,
        like_capsule,
    };
    output.print(&context.work(command, output, STOPPED)?, render_plan)
}

/// Runs `pull`.
pub fn pull(args: PullArgs, context: &Context) -> Result<(), Exit> {
    let Which {
        capsule,
        wait,
        like,
        output,
    } = args.which;
    let (like_path, like_capsule) = like_of(like)?;
    let command = Pull {
        capsule: CapsuleRef(capsule),
        wait: wait.map(|wait| wait.as_secs()),
        like_path,
        like_capsule,
    };
    let pulled = context.work(command, output, STOPPED)?;
    output.print(&pulled, render_pull)?;
    let capsule = pulled
        .name
        .clone()
        .unwrap_or_else(|| pulled.capsule.to_string());
    output.next(format_args!(
        "`capsule export {capsule} --to PATH` writes it out"
    ));
    Ok(())
}

/// A path where there is one of that name, else a capsule.
fn like_of(like: Option<PathBuf>) -> Result<(Option<PathBuf>, Option<CapsuleRef>), Exit> {
    Ok(match like {
        Some(like) if like.exists() => (Some(absolute(&like)?), None),
        Some(like) => (None, Some(CapsuleRef(like.to_string_lossy().into_owned()))),
        None => (None, None),
    })
}

/// Runs `follow`.
pub fn follow(args: FollowArgs, context: &Context) -> Result<(), Exit> {
    args.output.print(
        &context.ask(Follow {
            channel: args.channel,
        })?,
        render_follow,
    )
}

/// Runs `unfollow`.
pub fn unfollow(args: UnfollowArgs, context: &Context) -> Result<(), Exit> {
    args.output.print(
        &context.ask(Unfollow {
            channel: args.channel,
        })?,
        render_unfollow,
    )
}

fn render_plan(plan: &Planned, style: Style) -> String {
    let summary = fields(
        style,
        &[
            ("name", plan.name.clone().unwrap_or_default()),
            ("capsule", plan.capsule.to_string()),
            ("content", exactly(plan.content_bytes)),
            ("here", exactly(plan.have_bytes)),
            ("to fetch", exactly(plan.fetch_bytes)),
            (
                "planning",
                format!(
                    "fetched {} in {}",
                    exactly(plan.planning_bytes),
                    duration(seconds(plan.seconds))
                ),
            ),
        ],
    );
    summary + "\n" + &components(&plan.components, style)
}

fn render_pull(pulled: &Pulled, style: Style) -> String {
    let name = pulled.name.clone().unwrap_or_default();
    if pulled.unchanged {
        let what = if name.is_empty() {
            pulled.capsule.to_string()
        } else {
            name
        };
        return format!("{} is here already, complete\n", style.bold(&what));
    }
    let (fetch, check) = (seconds(pulled.fetch_seconds), seconds(pulled.check_seconds));
    let packs = pulled.fetched_bytes.saturating_sub(pulled.planning_bytes);
    let summary = fields(
        style,
        &[
            ("name", name),
            ("capsule", pulled.capsule.to_string()),
            ("content", exactly(pulled.content_bytes)),
            ("here before", exactly(pulled.had_bytes)),
            ("fetched", exactly(pulled.fetched_bytes)),
            (
                "took",
                format!(
                    "{}: fetching {} ({}), checking {}",
                    duration(seconds(pulled.seconds)),
                    duration(fetch),
                    rate(packs, fetch),
                    duration(check)
                ),
            ),
        ],
    );
    let mut text = summary;
    if !pulled.by_peer.is_empty() {
        let mut table = Table::new(&["FROM", "NAME", ">BYTES"]);
        for peer in &pulled.by_peer {
            table.row([
                peer.peer.clone(),
                peer.name.clone().unwrap_or_default(),
                size(peer.bytes),
            ]);
        }
        text += "\n";
        text += &table.render(style);
    }
    text
}

fn components(components: &[PlannedComponent], style: Style) -> String {
    let mut table = Table::new(&[
        "COMPONENT",
        "KIND",
        ">SIZE",
        "WAY",
        ">HERE",
        ">FOUND",
        ">TO FETCH",
    ]);
    for planned in components {
        let way = match planned.layers {
            0 => planned.way.clone(),
            layers => plural(layers as u64, "layer"),
        };
        table.row([
            planned.component.name.clone(),
            planned.component.kind.clone(),
            size(planned.component.content_size),
            way,
            size(planned.have),
            size(planned.found),
            size(planned.fetch),
        ]);
    }
    table.render(style) + &reasons(components, style)
}

/// What the layers that are to be fetched consist of; nothing where there are none.
fn reasons(components: &[PlannedComponent], style: Style) -> String {
    let mut table = Table::new(&["LAYERS TO", ">AS IT WAS", ">COPIED", ">AGAINST OLD", ">NEW"]);
    let mut any = false;
    for planned in components {
        let (content, packs) = (
            planned.inherited + planned.copied,
            planned.referring + planned.new,
        );
        if content + packs > 0 {
            any = true;
            table.row([
                planned.component.name.clone(),
                size(planned.inherited),
                size(planned.copied),
                size(planned.referring),
                size(planned.new),
            ]);
        }
    }
    if any {
        format!("\n{}", table.render(style))
    } else {
        String::new()
    }
}

fn render_follow(followed: &Followed, style: Style) -> String {
    let channel = style.bold(&followed.channel);
    let now = if followed.new {
        "now followed"
    } else {
        "followed already"
    };
    match &followed.newest {
        Some(newest) => format!("{channel} is {now}; its newest version is {newest}\n"),
        None => format!("{channel} is {now}; no version of it is known yet\n"),
    }
}

fn render_unfollow(unfollowed: &Unfollowed, style: Style) -> String {
    let channel = style.bold(&unfollowed.channel);
    if unfollowed.followed {
        format!("{channel} is followed no longer\n")
    } else {
        format!("{channel} was not followed\n")
    }
}

/// For plans to be compared with pulls: every byte, and what that is.
fn exactly(bytes: u64) -> String {
    if bytes < 1024 {
        size(bytes)
    } else {
        format!("{} ({bytes} bytes)", size(bytes))
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use capsule_proto::{CapsuleId, RootHash};

    use super::*;

    #[test]
    fn a_plan_prints_exact_bytes() {
        let plan = Planned {
            capsule: CapsuleId(RootHash::of(b"x")),
            name: Some("lab:1".into()),
            components: Vec::new(),
            have_bytes: 0,
            fetch_bytes: 1_048_577,
            planning_bytes: 300,
            content_bytes: 4 << 20,
            seconds: 0.1,
        };
        let text = render_plan(&plan, Style::PLAIN);
        assert!(
            text.contains("to fetch  1.00 MiB (1048577 bytes)\n"),
            "{text}"
        );
        assert!(
            text.contains("planning  fetched 300 B in 100 ms\n"),
            "{text}"
        );
    }

    #[test]
    fn following_tells_the_newest_version() {
        let followed = Followed {
            channel: "lab".into(),
            new: true,
            newest: Some("lab:3".into()),
        };
        assert_eq!(
            render_follow(&followed, Style::PLAIN),
            "lab is now followed; its newest version is lab:3\n"
        );
    }
}
