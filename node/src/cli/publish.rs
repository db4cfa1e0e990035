//! `capsule publish`.

use std::path::PathBuf;
use std::time::Duration;

use capsule_chunker::layer::encode::Effort;
use capsule_node::control::{CapsuleRef, Publish, PublishAs, Published, Rebase, Rebased};
use capsule_node::home::parse_expiry;
use capsule_proto::name::CapsuleName;
use clap::{Args, ValueEnum};

use super::context::{Context, Output, absolute, now};
use super::exit::Exit;
use super::format::{duration, parse_size, rate, size};
use super::output::tell;
use super::style::{Style, printable};
use super::table::{Table, fields};

const STOPPED: &str = "nothing was published";
/// Bounds of the longest frame: the encoder's.
const MIN_FRAME_MAX: u32 = 4 << 10;
const MAX_FRAME_MAX: u32 = 16 << 20;

/// Publish a file, disk image, device or directory as a version of a channel
///
/// The content is read, compressed and hashed once; other machines then fetch it from this node and from each other.
/// A qcow2 or other disk image is published as its virtual disk, a directory as a tree with owners, modes, times,
/// links and extended attributes. Publishing the same content again under the same name changes nothing; other
/// content under a name that is taken is refused.
#[derive(Debug, Args)]
pub struct PublishArgs {
    /// What to publish
    #[arg(required_unless_present = "rebase")]
    path: Option<PathBuf>,
    /// The name it gets: CHANNEL:VERSION, such as lab:2026-11
    #[arg(long, value_name = "CHANNEL:VERSION", value_parser = versioned_name, required_unless_present = "rebase")]
    name: Option<CapsuleName>,
    /// Instead of a path: add layers from nothing to a capsule that is published and here, for machines that have no older
    /// version. Its id stays
    #[arg(long, value_name = "CAPSULE", conflicts_with_all = ["path", "name", "read_as", "one_file_system", "trim", "parent", "no_parent", "checksum", "bitmap", "expires"])]
    rebase: Option<String>,
    /// How to take the content; from what it is, when not given
    #[arg(long = "as", value_name = "KIND")]
    read_as: Option<Kind>,
    /// How hard to compress: zstd level 1, 3 or 19; max with LZMA too, which is slower to read
    #[arg(long, value_enum, default_value_t = Strength::Default)]
    effort: Strength,
    /// Longest frame, 4K to 16M: smaller ones read faster at random places, larger ones compress better. Given, frames
    /// also refer to no others of their layer, as they may at max [default: what suits the content]
    #[arg(long, value_name = "SIZE", value_parser = frame_max)]
    frame_max: Option<u32>,
    /// For a directory: leave out what other file systems are mounted below it
    #[arg(long)]
    one_file_system: bool,
    /// The version that this one is published against: machines that have it fetch only what differs [default: the
    /// channel's newest that is here]
    #[arg(long, value_name = "CAPSULE", conflicts_with = "no_parent")]
    parent: Option<String>,
    /// Publish against no other version: larger, but machines need nothing else for it
    #[arg(long)]
    no_parent: bool,
    /// Read everything: of a directory also files whose length and time of modification are the parent's, of an overlay also
    /// what it has from the image behind it
    #[arg(long)]
    checksum: bool,
    /// For a qcow2 image: read only what this dirty bitmap of it marks, which began when the parent was published
    #[arg(long, value_name = "NAME", conflicts_with_all = ["checksum", "no_parent"])]
    bitmap: Option<String>,
    /// For a disk: leave out free space of ext2, ext3 and ext4 file systems, and old content of their journals
    #[arg(long)]
    trim: bool,
    /// Until when the name holds: 90d, 1y, or a date such as 2027-01-31; without end, when not given
    #[arg(long, value_name = "WHEN", value_parser = |text: &str| parse_expiry(text, now()))]
    expires: Option<u64>,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    /// The bytes as they lie
    File,
    /// The virtual disk of an image, or the bytes of a raw image or device
    Disk,
    /// A directory with all that is below it
    Tree,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Strength {
    Fast,
    Default,
    Max,
}

impl From<Strength> for Effort {
    fn from(strength: Strength) -> Self {
        match strength {
            Strength::Fast => Self::Fast,
            Strength::Default => Self::Default,
            Strength::Max => Self::Max,
        }
    }
}

/// A name with its version.
///
/// # Errors
/// It is none.
pub fn versioned_name(text: &str) -> Result<CapsuleName, String> {
    let name: CapsuleName = text.parse().map_err(|error| format!("{error}"))?;
    match name.version {
        Some(_) => Ok(name),
        None => Err(format!(
            "{text:?} has no version: write CHANNEL:VERSION, such as {text}:1"
        )),
    }
}

fn frame_max(text: &str) -> Result<u32, String> {
    let bytes = u32::try_from(parse_size(text)?).ok();
    bytes
        .filter(|bytes| (MIN_FRAME_MAX..=MAX_FRAME_MAX).contains(bytes))
        .ok_or_else(|| format!("a frame cannot be {text} long: write 4K to 16M"))
}

/// Runs the command.
pub fn run(args: PublishArgs, context: &Context) -> Result<(), Exit> {
    let effort = args.effort.into();
    if let Some(capsule) = args.rebase {
        let command = Rebase {
            capsule: CapsuleRef(capsule),
            effort,
            frame_max: args.frame_max,
        };
        let rebased = context.work(command, args.output, "nothing was added")?;
        return args.output.print(&rebased, render_rebased);
    }
    let (Some(path), Some(name)) = (args.path, args.name) else {
        unreachable!("clap requires both");
    };
    let command = Publish {
        path: absolute(&path)?,
        name,
        read_as: match args.read_as {
            None => PublishAs::Auto,
            Some(Kind::File) => PublishAs::File,
            Some(Kind::Disk) => PublishAs::Disk,
            Some(Kind::Tree) => PublishAs::Tree,
        },
        effort,
        frame_max: args.frame_max,
        one_file_system: args.one_file_system,
        expires: args.expires,
        parent: args.parent.map(CapsuleRef),
        no_parent: args.no_parent,
        checksum: args.checksum,
        bitmap: args.bitmap,
        trim: args.trim,
    };
    let published = context.work(command, args.output, STOPPED)?;
    for warning in &published.warnings {
        tell(format_args!("note: {}", printable(warning)));
    }
    if let Some(bytes) = published.trimmable_bytes {
        let bytes = size(bytes);
        tell(format_args!(
            "note: free space holds about {bytes} of old data: --trim leaves it out"
        ));
    }
    args.output.print(&published, render)?;
    args.output.next(format_args!(
        "`capsule pull {}` fetches it on another machine of the fleet",
        published.name
    ));
    Ok(())
}

fn render_rebased(rebased: &Rebased, style: Style) -> String {
    let name = style.bold(&rebased.name);
    if rebased.unchanged {
        return format!("{name} has these layers already: nothing was added\n");
    }
    format!(
        "{name} can be fetched from nothing on: {} in {}\n",
        size(rebased.pack_bytes + rebased.index_bytes),
        duration(Duration::try_from_secs_f64(rebased.seconds).unwrap_or_default())
    )
}

fn render(published: &Published, style: Style) -> String {
    let id = published.capsule.to_string();
    if published.unchanged {
        return format!(
            "{} already is {id}: nothing to do\n",
            style.bold(&published.name)
        );
    }
    let mut components = Table::new(&["COMPONENT", "KIND", ">SIZE", "ROOT HASH"]);
    for part in &published.components {
        components.row([
            part.name.clone(),
            part.kind.clone(),
            size(part.content_size),
            part.root.to_string(),
        ]);
    }
    let took = Duration::try_from_secs_f64(published.seconds).unwrap_or_default();
    let content = published.content_bytes;
    let mut parts = vec![size(content)];
    if published.zero_bytes > 0 {
        parts.push(format!("{} of it zero", size(published.zero_bytes)));
    }
    if published.trimmed_bytes > 0 {
        parts.push(format!("{} trimmed", size(published.trimmed_bytes)));
    }
    if published.repeated_bytes > 0 {
        parts.push(format!("{} repeated", size(published.repeated_bytes)));
    }
    if let Some(parent) = &published.parent {
        let same = published.inherited_bytes + published.copied_bytes;
        parts.push(format!("{} as in {}", size(same), printable(parent)));
    }
    if published.unread_bytes > 0 {
        parts.push(format!("{} not read", size(published.unread_bytes)));
    }
    let blobs = published.pack_bytes + published.index_bytes;
    let percent = |whole: u64| blobs as f64 * 100.0 / whole.max(1) as f64;
    let share = match content {
        0 => String::new(),
        _ => format!(" ({:.1} % of it)", percent(content)),
    };
    let known = [
        published.zero_bytes,
        published.repeated_bytes,
        published.inherited_bytes,
        published.copied_bytes,
    ];
    let new = content.saturating_sub(known.iter().sum());
    let mut facts = vec![
        ("published", published.name.clone()),
        ("capsule", id),
        ("content", parts.join(", ")),
        ("to fetch", size(blobs) + &share),
        (
            "took",
            format!("{}, {}", duration(took), rate(content, took)),
        ),
    ];
    if new > 0 {
        let encoded = format!(
            "{} of new content, to {:.1} %, {}",
            size(new),
            percent(new),
            rate(new, took)
        );
        facts.insert(3, ("encoded", encoded));
    }
    let summary = fields(style, &facts);
    summary + "\n" + &components.render(style)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_to_publish_needs_a_version() {
        assert!(versioned_name("lab:1").is_ok());
        assert!(versioned_name("lab").unwrap_err().contains("lab:1"));
        assert!(versioned_name("lab:").is_err());
    }

    #[test]
    fn a_longest_frame_is_within_the_bounds_of_frames() {
        assert_eq!(frame_max("4K"), Ok(4 << 10));
        assert_eq!(frame_max("16M"), Ok(16 << 20));
        for wrong in ["0", "4095", "16777217", "5G"] {
            assert!(
                frame_max(wrong).unwrap_err().contains("4K to 16M"),
                "{wrong}"
            );
        }
    }

    #[test]
    fn a_summary_tells_what_others_will_fetch() {
        let published = Published {
            capsule: capsule_proto::CapsuleId(capsule_proto::RootHash::of(b"x")),
            name: "lab:1".into(),
            unchanged: false,
            components: Vec::new(),
            content_bytes: 4 << 20,
            zero_bytes: 0,
            trimmed_bytes: 2 << 20,
            trimmable_bytes: None,
            repeated_bytes: 1 << 20,
            parent: Some("lab:0".into()),
            inherited_bytes: 1 << 20,
            copied_bytes: 0,
            referring_bytes: 0,
            unread_bytes: 0,
            pack_bytes: 1 << 20,
            index_bytes: 0,
            seconds: 2.0,
            warnings: Vec::new(),
        };
        let text = render(&published, Style::PLAIN);
        assert!(
            text.contains("encoded    2.00 MiB of new content, to 50.0 %, 1.00 MiB/s\n"),
            "{text}"
        );
        assert!(
            text.contains("to fetch   1.00 MiB (25.0 % of it)\n"),
            "{text}"
        );
        assert!(
            text.contains(
                "content    4.00 MiB, 2.00 MiB trimmed, 1.00 MiB repeated, 1.00 MiB as in lab:0\n"
            ),
            "{text}"
        );
        let again = render(
            &Published {
                unchanged: true,
                ..published
            },
            Style::PLAIN,
        );
        assert!(again.ends_with("nothing to do\n"));
    }
}
