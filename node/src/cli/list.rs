//! `capsule ls` and `capsule show`.

use capsule_node::control::{
    BlobStatus, CapsuleRef, ComponentInfo, Holding, LayerInfo, Listed, ListedCapsule, Ls, Show,
    Shown,
};
use capsule_proto::name::Channel;
use clap::Args;

use super::context::{Context, Output, now};
use super::exit::Exit;
use super::format::{ago, date, percent, short, size};
use super::style::Style;
use super::table::{Table, fields};

/// List capsules: those that this node holds, and those that it knows by name
#[derive(Debug, Args)]
pub struct LsArgs {
    /// Only this channel
    channel: Option<Channel>,
    /// Only what is here, complete or not
    #[arg(long)]
    held: bool,
    /// Whole capsule ids
    #[arg(long)]
    long: bool,
    #[command(flatten)]
    output: Output,
}

/// Show all about one capsule: names, components, layers, holders
///
/// Fetches nothing. What is not here yet is shown as far as records tell.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// CHANNEL:VERSION, CHANNEL for its newest, or an id or the first 8 or more digits of one
    #[arg(value_name = "NAME|ID")]
    capsule: String,
    /// Whole hashes
    #[arg(long)]
    long: bool,
    #[command(flatten)]
    output: Output,
}

/// Runs `ls`.
pub fn ls(args: LsArgs, context: &Context) -> Result<(), Exit> {
    let listed = context.ask(Ls {
        channel: args.channel,
        held: args.held,
    })?;
    if listed.capsules.is_empty() {
        args.output
            .empty("no capsules: names arrive from connected peers; `capsule publish` makes one");
    }
    args.output.print(&listed, |listed, style| {
        render_list(listed, style, args.long, now())
    })
}

/// Runs `show`.
pub fn show(args: ShowArgs, context: &Context) -> Result<(), Exit> {
    let shown = context.ask(Show {
        capsule: CapsuleRef(args.capsule),
    })?;
    args.output
        .print(&shown, |shown, style| render_shown(shown, style, args.long))
}

fn render_list(listed: &Listed, style: Style, long: bool, now: u64) -> String {
    let mut table = Table::new(&[
        "NAME",
        "CAPSULE",
        "KIND",
        ">SIZE",
        ">STORED",
        "HERE",
        "PINNED BY",
        "NAMED",
        "NOTE",
    ]);
    for capsule in &listed.capsules {
        table.row([
            names(capsule),
            hash(&capsule.capsule.to_string(), long),
            capsule.kinds.join(", "),
            capsule.content_bytes.map(size).unwrap_or_default(),
            size(capsule.stored_bytes),
            holding(capsule.holding).to_owned(),
            capsule.pins.join(", "),
            capsule
                .issued
                .map(|issued| ago(issued, now))
                .unwrap_or_default(),
            if capsule.conflict {
                "two capsules have this name".to_owned()
            } else {
                String::new()
            },
        ]);
    }
    if listed.capsules.is_empty() {
        String::new()
    } else {
        table.render(style)
    }
}

fn names(capsule: &ListedCapsule) -> String {
    if capsule.names.is_empty() {
        "-".to_owned()
    } else {
        capsule.names.join(", ")
    }
}

fn render_shown(shown: &Shown, style: Style, long: bool) -> String {
    let summary = fields(
        style,
        &[
            ("capsule", shown.capsule.to_string()),
            ("here", holding(shown.holding).to_owned()),
            ("content", shown.content_bytes.map(size).unwrap_or_default()),
            ("stored", size(shown.stored_bytes)),
            ("pinned by", shown.pins.join(", ")),
            ("added", shown.added.map(date).unwrap_or_default()),
        ],
    );
    let mut sections = vec![summary];
    if !shown.names.is_empty() {
        let mut table = Table::new(&["NAME", ">SEQUENCE", "SIGNED", "EXPIRES", "BY", "NOTE"]);
        for name in &shown.names {
            let notes = [
                (name.newest, "newest"),
                (name.conflict, "another capsule has this name"),
            ];
            table.row([
                name.name.clone(),
                name.sequence.to_string(),
                date(name.issued),
                name.expires.map(date).unwrap_or_default(),
                hash(&name.signer, long),
                notes
                    .iter()
                    .filter(|(holds, _)| *holds)
                    .map(|(_, note)| *note)
                    .collect::<Vec<_>>()
                    .join(", "),
            ]);
        }
        sections.push(table.render(style));
    }
    if !shown.components.is_empty() {
        let mut table = Table::new(&["COMPONENT", "KIND", ">SIZE", "ROOT HASH"]);
        for part in &shown.components {
            table.row([
                part.name.clone(),
                part.kind.clone(),
                size(part.content_size),
                part.root.to_string(),
            ]);
        }
        sections.push(table.render(style));
    }
    if !shown.layers.is_empty() {
        sections.push(layers(shown, style, long));
    }
    if !shown.holders.is_empty() {
        let mut table = Table::new(&["HELD BY", "NAME", "HOLDS"]);
        for holder in &shown.holders {
            let holds = if holder.complete {
                "complete"
            } else {
                "partial"
            };
            table.row([
                holder.peer.clone(),
                holder.name.clone().unwrap_or_default(),
                holds.to_owned(),
            ]);
        }
        sections.push(table.render(style));
    }
    sections.join("\n")
}

fn layers(shown: &Shown, style: Style, long: bool) -> String {
    let mut table = Table::new(&[
        "LAYER OF", "FROM", ">CONTENT", "INDEX", ">BYTES", "PACK", ">BYTES", "HERE",
    ]);
    let bytes = |blob: &BlobStatus| (hash(&blob.root.to_string(), long), size(blob.size));
    for layer in &shown.layers {
        let (index, index_size) = bytes(&layer.index);
        let (pack, pack_size) = layer.pack.as_ref().map(bytes).unwrap_or_default();
        let blobs = || {
            [Some(&layer.index), layer.pack.as_ref()]
                .into_iter()
                .flatten()
        };
        let (have, all) = (
            blobs().map(|blob| blob.have).sum(),
            blobs().map(|blob| blob.size).sum(),
        );
        table.row([
            target(layer, &shown.components),
            layer.parent.map_or("nothing".to_owned(), |parent| {
                hash(&parent.to_string(), long)
            }),
            size(layer.target_size),
            index,
            index_size,
            pack,
            pack_size,
            // Another way was cheaper, or a tree's listing came as it is.
            if have == 0 && shown.holding == Holding::Complete {
                "not needed".to_owned()
            } else {
                percent(have, all)
            },
        ]);
    }
    table.render(style)
}

/// What a layer makes: of a tree, its listing or its files' contents.
fn target(layer: &LayerInfo, components: &[ComponentInfo]) -> String {
    let of_tree = components
        .iter()
        .any(|part| part.name == layer.component && part.kind == "tree");
    match (of_tree, layer.space.as_str()) {
        (false, _) => layer.component.clone(),
        (true, "stream") => format!("{}: listing", layer.component),
        (true, space) => format!("{}: {space}", layer.component),
    }
}

/// How much is here, in a word.
pub const fn holding(holding: Holding) -> &'static str {
    match holding {
        Holding::Complete => "complete",
        Holding::Partial => "partial",
        Holding::Absent => "no",
    }
}

pub(super) fn hash(text: &str, long: bool) -> String {
    if long {
        text.to_owned()
    } else {
        short(text).to_owned()
    }
}

#[cfg(test)]
mod tests {
    use capsule_proto::{CapsuleId, RootHash};

    use super::*;

    #[test]
    fn a_list_has_a_line_a_capsule_and_nothing_when_empty() {
        let capsule = ListedCapsule {
            capsule: CapsuleId(RootHash::of(b"x")),
            names: vec!["lab:2".into(), "lab:1".into()],
            holding: Holding::Absent,
            content_bytes: None,
            stored_bytes: 0,
            kinds: Vec::new(),
            pins: Vec::new(),
            conflict: false,
            issued: Some(1000),
            added: None,
        };
        let text = render_list(
            &Listed {
                capsules: vec![capsule],
            },
            Style::PLAIN,
            false,
            1000 + 7200,
        );
        let id = short(&RootHash::of(b"x").to_string()).to_owned();
        let expected = format!(
            "NAME          CAPSULE       STORED  HERE  NAMED\nlab:2, lab:1  {id}     0 B  no    2 h ago\n"
        );
        assert_eq!(text, expected);
        assert_eq!(
            render_list(
                &Listed {
                    capsules: Vec::new()
                },
                Style::PLAIN,
                false,
                0
            ),
            ""
        );
    }
}
