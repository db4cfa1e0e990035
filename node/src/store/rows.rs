//! The values of the database's tables: one type and one encoding each, versioned and bounded.
//!
//! The encodings are documented byte by byte in `node/docs/store.md` and pinned by the vectors at the
//! end of this file. Tables, keys and transactions are in `meta`.

use std::ops::Range;

use capsule_proto::codec::{DecodeError, Reader, Writer};
use capsule_proto::ranges::{MAX_CONTENT_LEN, MAX_RUNS, group_count};
use capsule_proto::{GroupRanges, RootHash};

/// A value of a table.
pub(super) trait Row: Sized {
    /// The table, for messages.
    const TABLE: &'static str;
    /// Version of the encoding, its first byte.
    const VERSION: u8 = 1;
    fn write(&self, out: &mut Writer);
    fn read(input: &mut Reader<'_>) -> Result<Self, DecodeError>;

    fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.u8(Self::VERSION);
        self.write(&mut out);
        out.finish()
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Reader::new(bytes);
        if input.u8("row version")? != Self::VERSION {
            return Err(DecodeError::Format {
                what: Self::TABLE,
                version: Self::VERSION,
            });
        }
        let row = Self::read(&mut input)?;
        input.finish()?;
        Ok(row)
    }
}

/// What a blob is, for people and for reports; the store treats all alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BlobKind {
    /// A capsule's manifest.
    Manifest,
    /// A directory tree's listing.
    Listing,
    /// A layer's index.
    Index,
    /// A layer's pack.
    Pack,
    /// Anything else.
    Other,
}

/// What is durably present of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BlobRow {
    pub kind: BlobKind,
    /// In bytes.
    pub size: u64,
    pub ranges: GroupRanges,
}

/// One layer that a component is read through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LayerBlobs {
    /// Root hash of its index.
    pub index: RootHash,
    /// Root hash of its pack; none where the layer has no frames.
    pub pack: Option<RootHash>,
}

/// How a component's bytes are produced: the layers, the one that starts from nothing first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ComponentRecipe {
    /// At least one, at most [`MAX_LAYERS`].
    pub layers: Vec<LayerBlobs>,
}

/// Longest chain of layers in a recipe: far beyond the depth at which a node materialises.
pub const MAX_LAYERS: usize = 1024;

/// A component that is served by decoding it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Component {
    /// Bytes of its content.
    pub size: u64,
    /// How to read it.
    pub recipe: ComponentRecipe,
}

/// A component's row: what is registered, less what was found damaged since.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ComponentRow {
    pub component: Component,
    pub ranges: GroupRanges,
}

/// A capsule that this node holds or is fetching.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldCapsule {
    /// Whether all of its components are here.
    pub complete: bool,
    /// When it was added, in seconds since 1970.
    pub added: u64,
}

/// Who wants a capsule kept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum PinOrigin {
    /// The user said so.
    User,
    /// It was published here.
    Publication,
    /// The node follows this channel.
    Follow(String),
    /// This machine stands on it.
    Machine(String),
}

/// A channel that the node follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Follow {
    /// How many of its newest versions are kept pinned.
    pub keep: u32,
    /// Since when, in seconds since 1970.
    pub since: u64,
}

/// A peer that is not talked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ban {
    /// Why, for people; cut to [`MAX_REASON_LEN`] bytes when stored.
    pub reason: String,
    /// Until when, in seconds since 1970; `None`: for good.
    pub until: Option<u64>,
}

/// Longest reason of a ban, in bytes: a line for people.
pub const MAX_REASON_LEN: usize = 1024;

pub(super) fn write_ranges(ranges: &GroupRanges, out: &mut Writer) {
    let mut end = 0;
    out.list(ranges.runs(), |out, run| {
        out.varint(run.start - end);
        out.varint(run.end - run.start);
        end = run.end;
    });
}

pub(super) fn read_ranges(input: &mut Reader<'_>, size: u64) -> Result<GroupRanges, DecodeError> {
    let (start, groups) = (input.at(), group_count(size));
    let mut end = 0;
    let runs = input.list("runs of groups", MAX_RUNS, 2, |input| {
        let first = end + input.varint("gap before a run", groups - end)?;
        end = first + input.varint("length of a run", groups - first)?;
        Ok(Range { start: first, end })
    })?;
    GroupRanges::from_runs(runs)
        .map_err(|_| input.invalid("runs of groups", start, "the runs are not a set"))
}

/// Writes layers as rows hold them.
pub fn write_layers(layers: &[LayerBlobs], out: &mut Writer) {
    out.list(layers, |out, layer| {
        out.hash(&layer.index);
        out.option(layer.pack.as_ref(), Writer::hash);
    });
}

/// Reads them.
pub fn read_layers(input: &mut Reader<'_>) -> Result<Vec<LayerBlobs>, DecodeError> {
    input.list("layers", MAX_LAYERS, 33, |input| {
        Ok(LayerBlobs {
            index: input.hash("index")?,
            pack: input.option("pack", |input| input.hash("pack"))?,
        })
    })
}

/// The largest part of a set that a row holds: its longest runs. Less presence than there is, is always true.
pub(super) fn bounded(ranges: GroupRanges) -> GroupRanges {
    if ranges.runs().len() <= MAX_RUNS {
        return ranges;
    }
    let mut runs = ranges.runs().to_vec();
    runs.sort_by_key(|run| std::cmp::Reverse(run.end - run.start));
    runs.truncate(MAX_RUNS);
    runs.sort_by_key(|run| run.start);
    GroupRanges::from_runs(runs).unwrap_or_default()
}

impl BlobKind {
    const ALL: [Self; 5] = [
        Self::Manifest,
        Self::Listing,
        Self::Index,
        Self::Pack,
        Self::Other,
    ];
}

impl Row for BlobRow {
    const TABLE: &'static str = "blobs";

    fn write(&self, out: &mut Writer) {
        out.u8(self.kind as u8);
        out.varint(self.size);
        write_ranges(&self.ranges, out);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let at = input.at();
        let kind = *BlobKind::ALL
            .get(usize::from(input.u8("kind")?))
            .ok_or_else(|| input.invalid("kind", at, "no such kind of blob"))?;
        let size = input.varint("size", MAX_CONTENT_LEN)?;
        Ok(Self {
            kind,
            size,
            ranges: read_ranges(input, size)?,
        })
    }
}

impl Row for ComponentRow {
    const TABLE: &'static str = "components";

    fn write(&self, out: &mut Writer) {
        out.varint(self.component.size);
        write_layers(&self.component.recipe.layers, out);
        write_ranges(&self.ranges, out);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let size = input.varint("size", MAX_CONTENT_LEN)?;
        let layers = read_layers(input)?;
        let component = Component {
            size,
            recipe: ComponentRecipe { layers },
        };
        Ok(Self {
            component,
            ranges: read_ranges(input, size)?,
        })
    }
}

impl Row for HeldCapsule {
    const TABLE: &'static str = "capsules";

    fn write(&self, out: &mut Writer) {
        out.u8(self.complete.into());
        out.varint(self.added);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            complete: input.u8("complete")? == 1,
            added: input.varint("time", u64::MAX)?,
        })
    }
}

impl Row for Follow {
    const TABLE: &'static str = "follows";

    fn write(&self, out: &mut Writer) {
        out.varint(self.keep.into());
        out.varint(self.since);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let keep = input.varint("versions to keep", u32::MAX.into())? as u32;
        Ok(Self {
            keep,
            since: input.varint("time", u64::MAX)?,
        })
    }
}

impl Row for Ban {
    const TABLE: &'static str = "bans";

    fn write(&self, out: &mut Writer) {
        let end = self.reason.floor_char_boundary(MAX_REASON_LEN);
        let reason: String = self.reason[..end]
            .chars()
            .filter(|c| !c.is_control())
            .collect();
        out.bytes(reason.as_bytes());
        out.option(self.until, Writer::varint);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let reason = input.text("reason", MAX_REASON_LEN)?;
        Ok(Self {
            reason,
            until: input.option("until", |input| input.varint("time", u64::MAX))?,
        })
    }
}

impl PinOrigin {
    /// The second half of a pin's key: `user`, `publication` or `follow:CHANNEL`.
    pub(super) fn key(&self) -> String {
        match self {
            Self::User => "user".into(),
            Self::Publication => "publication".into(),
            Self::Follow(channel) => format!("follow:{channel}"),
            Self::Machine(name) => format!("machine:{name}"),
        }
    }

    pub(super) fn from_key(key: &str) -> Option<Self> {
        match key {
            "user" => Some(Self::User),
            "publication" => Some(Self::Publication),
            other => match other.split_once(':')? {
                ("follow", channel) => Some(Self::Follow(channel.into())),
                ("machine", name) => Some(Self::Machine(name.into())),
                _ => None,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use capsule_proto::GROUP_LEN;
    use proptest::prelude::*;

    use super::*;

    fn round_trip<R: Row + Debug + PartialEq>(row: &R) {
        let bytes = row.encode();
        assert_eq!(R::decode(&bytes).as_ref(), Ok(row));
        for len in 0..bytes.len() {
            assert!(
                R::decode(&bytes[..len]).is_err(),
                "{} cut to {len}",
                R::TABLE
            );
        }
        assert!(R::decode(&[&bytes[..], &[0]].concat()).is_err());
        assert!(R::decode(&[&[R::VERSION + 1], &bytes[1..]].concat()).is_err());
    }

    #[test]
    fn rows_round_trip_and_are_pinned() {
        let ranges: GroupRanges = [0..2, 5..9].into_iter().collect();
        let row = BlobRow {
            kind: BlobKind::Pack,
            size: 9 * GROUP_LEN,
            ranges: ranges.clone(),
        };
        // Version, kind, size (0x24000), two runs: gap 0 length 2, gap 3 length 4.
        assert_eq!(row.encode(), [1, 3, 0x80, 0x80, 0x09, 2, 0, 2, 3, 4]);
        round_trip(&row);
        let hash = |n| RootHash::from_bytes([n; 32]);
        let layers = vec![
            LayerBlobs {
                index: hash(1),
                pack: Some(hash(2)),
            },
            LayerBlobs {
                index: hash(3),
                pack: None,
            },
        ];
        let recipe = ComponentRecipe { layers };
        let row = ComponentRow {
            component: Component {
                size: 9 * GROUP_LEN,
                recipe,
            },
            ranges,
        };
        // Version, size, two layers: index and pack, index alone; then the ranges.
        let layers = [&[2][..], &[1; 32], &[1], &[2; 32], &[3; 32], &[0]].concat();
        let ranges = [2, 0, 2, 3, 4];
        assert_eq!(
            row.encode(),
            [&[1, 0x80, 0x80, 0x09], &layers[..], &ranges].concat()
        );
        round_trip(&row);
        let held = HeldCapsule {
            complete: true,
            added: 300,
        };
        assert_eq!(held.encode(), [1, 1, 0xac, 0x02]);
        round_trip(&held);
        let follow = Follow { keep: 2, since: 1 };
        assert_eq!(follow.encode(), [1, 2, 1]);
        round_trip(&follow);
        let ban = Ban {
            reason: "lied".into(),
            until: Some(7),
        };
        assert_eq!(ban.encode(), [1, 4, b'l', b'i', b'e', b'd', 1, 7]);
        round_trip(&ban);
        for origin in [
            PinOrigin::User,
            PinOrigin::Publication,
            PinOrigin::Follow("lab".into()),
        ] {
            assert_eq!(PinOrigin::from_key(&origin.key()), Some(origin));
        }
    }

    #[test]
    fn what_lies_beyond_the_blob_is_refused() {
        let row = BlobRow {
            kind: BlobKind::Other,
            size: 9 * GROUP_LEN,
            ranges: GroupRanges::from(0..10),
        };
        assert!(BlobRow::decode(&row.encode()).is_err());
        let kind = BlobRow {
            ranges: GroupRanges::new(),
            ..row
        };
        let mut bytes = kind.encode();
        bytes[1] = 5;
        assert!(BlobRow::decode(&bytes).is_err());
    }

    #[test]
    fn too_many_runs_keep_the_longest() {
        let count = MAX_RUNS as u64 + 10;
        let ranges: GroupRanges = (0..count)
            .map(|i| i * 4..i * 4 + if i % 7 == 0 { 3 } else { 1 })
            .collect();
        let kept = bounded(ranges.clone());
        assert_eq!(kept.runs().len(), MAX_RUNS);
        assert!(kept.difference(&ranges).is_empty());
        assert!(
            ranges
                .difference(&kept)
                .runs()
                .iter()
                .all(|run| run.end - run.start == 1)
        );
        round_trip_large(kept, count);
    }

    fn round_trip_large(ranges: GroupRanges, count: u64) {
        let row = BlobRow {
            kind: BlobKind::Pack,
            size: count * 4 * GROUP_LEN,
            ranges,
        };
        assert_eq!(BlobRow::decode(&row.encode()), Ok(row));
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = BlobRow::decode(&bytes);
            let _ = ComponentRow::decode(&bytes);
            let _ = Ban::decode(&bytes);
        }
    }
}
