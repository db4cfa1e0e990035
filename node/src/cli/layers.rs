//! `capsule layers`.

use capsule_node::control::{BlobStatus, CapsuleRef, LayerInfo, LayerList, Layers, ReadInfo};
use clap::Args;

use super::context::{Context, Output};
use super::exit::Exit;
use super::format::{percent, plural, size};
use super::list::hash;
use super::style::Style;
use super::table::Table;

/// Show the layers by which a capsule can be come to: from nothing, and from older versions
///
/// Each leads from one content to another, by hash; a pull takes the ways that cost the fewest bytes from what is here.
/// Fetches nothing.
#[derive(Debug, Args)]
pub struct LayersArgs {
    /// CHANNEL:VERSION, CHANNEL for its newest, or an id or the first 8 or more digits of one
    #[arg(value_name = "NAME|ID")]
    capsule: String,
    /// Whole hashes
    #[arg(long)]
    long: bool,
    #[command(flatten)]
    output: Output,
}

/// Runs the command.
pub fn run(args: LayersArgs, context: &Context) -> Result<(), Exit> {
    let found = context.ask(Layers {
        capsule: CapsuleRef(args.capsule),
    })?;
    if found.layers.is_empty() {
        args.output.empty(
            "no layers are known: of a capsule that is not here, they are once its manifest is (`capsule plan`)",
        );
    }
    args.output
        .print(&found, |found, style| render(found, style, args.long))
}

fn render(found: &LayerList, style: Style, long: bool) -> String {
    let mut table = Table::new(&[
        "COMPONENT",
        "OF",
        "FROM",
        "TO",
        ">CONTENT",
        ">TO FETCH",
        "HERE",
    ]);
    for layer in &found.layers {
        let (have, all) = (blobs(layer).map(|b| b.have).sum(), bytes(layer));
        table.row([
            layer.component.clone(),
            layer.space.clone(),
            layer.parent.map_or("nothing".to_owned(), |parent| {
                hash(&parent.to_string(), long)
            }),
            hash(&layer.target.to_string(), long),
            size(layer.target_size),
            size(all),
            percent(have, all),
        ]);
    }
    let reads: String = found.reads.iter().map(read).collect();
    table.render(style) + &reads
}

fn read(read: &ReadInfo) -> String {
    let ReadInfo {
        component,
        space,
        layers,
        own,
    } = read;
    let own = match own {
        0 => String::new(),
        own => format!(", {} of them made here and told to nobody", own),
    };
    let layers = plural(*layers as u64, "layer");
    format!("{component} ({space}) is read here through {layers}{own}\n")
}

fn blobs(layer: &LayerInfo) -> impl Iterator<Item = &BlobStatus> {
    [Some(&layer.index), layer.pack.as_ref()]
        .into_iter()
        .flatten()
}

fn bytes(layer: &LayerInfo) -> u64 {
    blobs(layer).map(|blob| blob.size).sum()
}
