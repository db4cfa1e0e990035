//! Updates: whatever the new content has in common with the old, what is encoded comes back; and what is common costs little.

mod layer_support;

use std::num::NonZeroUsize;
use std::sync::Arc;

use capsule_chunker::bao::{changed_groups, tree_of};
use capsule_chunker::content::{BytesSource, Content, Extent};
use capsule_chunker::delta::{Known, Outline, Similar};
use capsule_chunker::layer::encode::{
    Against, Effort, EncodeError, EncodeOptions, Hashed, Outputs, encode_update,
};
use capsule_chunker::layer::{Cuts, Tally};
use capsule_proto::RootHash;
use capsule_proto::index::{Codec, Index, RunFrom, SourceKind, Space};
use layer_support::*;
use proptest::prelude::*;
use rand::{RngExt, SeedableRng, rngs::SmallRng};

/// A change of old content.
#[derive(Clone, Debug)]
enum Edit {
    Overwrite(prop::sample::Index, Stretch),
    Insert(prop::sample::Index, Stretch),
    Remove(prop::sample::Index, usize),
    /// What lies at one place comes to another.
    Move(prop::sample::Index, prop::sample::Index, usize),
    /// Every so many bytes one differs.
    Sprinkle(prop::sample::Index, usize, usize),
}

fn edits(max: usize) -> impl Strategy<Value = Vec<Edit>> {
    let place = any::<prop::sample::Index>;
    let len = || {
        prop_oneof![
            0..100usize,
            0..20_000usize,
            (0..20usize).prop_map(|n| n * 4096)
        ]
    };
    let stretch = || {
        prop_oneof![
            (len(), any::<bool>()).prop_map(|(len, hole)| Stretch::Zeros { len, hole }),
            (len(), 9..12u64).prop_map(|(len, seed)| Stretch::Random { len, seed }),
            (len(), 9..12u64).prop_map(|(len, seed)| Stretch::Text { len, seed }),
        ]
    };
    let edit = prop_oneof![
        (place(), stretch()).prop_map(|(at, stretch)| Edit::Overwrite(at, stretch)),
        (place(), stretch()).prop_map(|(at, stretch)| Edit::Insert(at, stretch)),
        (place(), len()).prop_map(|(at, len)| Edit::Remove(at, len)),
        (place(), place(), len()).prop_map(|(from, to, len)| Edit::Move(from, to, len)),
        (place(), len(), 50..5000usize).prop_map(|(at, len, every)| Edit::Sprinkle(at, len, every)),
    ];
    prop::collection::vec(edit, 0..max)
}

fn edited(old: &[u8], edits: &[Edit], pages: bool) -> Vec<u8> {
    let mut new = old.to_vec();
    let place = |at: &prop::sample::Index, len: usize| {
        let at = at.index(len + 1);
        if pages { at - at % 4096 } else { at }
    };
    for edit in edits {
        let range = |at: usize, len: usize, of: usize| at..(at + len).min(of);
        match edit {
            Edit::Overwrite(at, stretch) => {
                let bytes = TestSource::made_of(std::slice::from_ref(stretch)).bytes;
                let range = range(place(at, new.len()), bytes.len(), new.len());
                new.splice(range, bytes);
            }
            Edit::Insert(at, stretch) => {
                let at = place(at, new.len());
                new.splice(
                    at..at,
                    TestSource::made_of(std::slice::from_ref(stretch)).bytes,
                );
            }
            Edit::Remove(at, len) => {
                let at = place(at, new.len());
                new.drain(range(at, *len, new.len()));
            }
            Edit::Move(from, to, len) => {
                let from = range(place(from, old.len()), *len, old.len());
                let to = place(to, new.len());
                let to = range(to, from.len(), new.len());
                new.splice(to, old[from].iter().copied());
            }
            Edit::Sprinkle(at, len, every) => {
                let at = place(at, new.len());
                let range = range(at, *len, new.len());
                new[range]
                    .iter_mut()
                    .step_by(*every)
                    .for_each(|byte| *byte ^= 1);
            }
        }
    }
    new
}

fn update_options(cuts: Cuts, frame_max: u32) -> EncodeOptions {
    EncodeOptions {
        effort: Effort::Default,
        ..options(cuts, frame_max, 2)
    }
}

/// An update of a stream from its old content: only changed groups are looked at.
fn update_stream(old: &[u8], new: &TestSource, options: &EncodeOptions) -> Update {
    let outline = outline_of(old, &new.bytes);
    make_update(
        new,
        &outline,
        &[old_source(old, SourceKind::Parent, Space::Stream)],
        true,
        options,
    )
}

fn outline_of(old: &[u8], new: &[u8]) -> Outline {
    let ((old_tree, old_outboard), (tree, outboard)) = (tree_of(old), tree_of(new));
    let changed = changed_groups((&old_tree, &old_outboard), (&tree, &outboard)).unwrap();
    Outline::of_groups(tree.size, &changed)
}

/// Encodes what a source has now, though other bytes were hashed.
fn reread(old: &[u8], hashed: &[u8], now: TestSource) -> Result<Vec<u8>, EncodeError> {
    let outline = outline_of(old, hashed);
    let (tree, outboard) = tree_of(hashed);
    let sources = [old_source(old, SourceKind::Parent, Space::Stream)];
    let against = Against {
        hashed: Some(Hashed {
            tree,
            outboard: &outboard,
        }),
        outline: &outline,
        sources: &sources,
        similar: &Similar::nothing(),
        in_place: true,
    };
    let mut pack = Vec::new();
    let outputs = Outputs {
        pack: &mut pack,
        pack_outboard: Vec::new(),
        content_outboard: Vec::<u8>::new(),
    };
    let options = update_options(Cuts::Pages, 256 << 10);
    encode_update(&now, &against, &options, outputs, &())?;
    Ok(pack)
}

/// What fails elsewhere is not taken for a change of the content, however much was read by then.
#[test]
fn a_pack_that_cannot_be_written_is_told_as_that() {
    struct Full;
    impl std::io::Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (old, new) = (random(1, 4096), random(2, (40 << 20) + 5000));
    let (tree, outboard) = tree_of(&new);
    let sources = [old_source(&old, SourceKind::Parent, Space::Stream)];
    let against = Against {
        hashed: Some(Hashed {
            tree,
            outboard: &outboard,
        }),
        outline: &Outline::unknown(new.len() as u64),
        sources: &sources,
        similar: &Similar::nothing(),
        in_place: true,
    };
    let outputs = Outputs {
        pack: &mut Full,
        pack_outboard: Vec::new(),
        content_outboard: Vec::<u8>::new(),
    };
    let options = update_options(Cuts::Bytes, 1 << 20);
    let encoded = encode_update(&TestSource::new(new), &against, &options, outputs, &());
    let error = encoded.map(|_| ()).unwrap_err();
    assert!(matches!(error, EncodeError::Pack { .. }), "{error}");
}

#[test]
fn what_is_not_what_was_hashed_is_refused() {
    let old = random(1, 40 << 20);
    let mut new = old.clone();
    for at in [0, 5 << 20, 20 << 20] {
        new[at..at + 100_000].copy_from_slice(&random(at as u64 + 2, 100_000));
    }
    new.truncate(new.len() - 12_345);
    new.extend(vec![0; 9 << 20]);
    new.extend(random(7, 5000));
    assert!(reread(&old, &new, TestSource::new(new.clone())).is_ok());
    // Zeros that nobody reads are not compared either.
    let mut holed = TestSource::new(new.clone());
    let hole = 41 << 20..(47 << 20) + 3;
    assert!(
        new[hole.start as usize..hole.end as usize]
            .iter()
            .all(|byte| *byte == 0)
    );
    let end = new.len() as u64;
    let extent = |range, zero| Extent { range, zero };
    holed.extents = vec![
        extent(0..hole.start, false),
        extent(hole.clone(), true),
        extent(hole.end..end, false),
    ];
    assert!(reread(&old, &new, holed).is_ok());
    // One byte, in the first group, in the midst, in the last.
    for at in [0, (5 << 20) + 99_999, new.len() - 1] {
        let mut now = new.clone();
        now[at] ^= 1;
        let error = reread(&old, &new, TestSource::new(now)).unwrap_err();
        let EncodeError::Changed { offset } = error else {
            panic!("{error}")
        };
        assert_eq!(offset, (at - at % (16 << 10)) as u64);
    }
}

fn check(update: Update, sources: Vec<Vec<u8>>, plain: &[u8], seed: u64) -> Index {
    let index = Index::decode(&update.index).unwrap();
    let tally = Tally::of(Arc::new(update.index.clone())).unwrap();
    let sum = tally.zero + tally.inherited + tally.copied + tally.framed;
    assert_eq!(sum, plain.len() as u64);
    assert_eq!(tally.new + tally.referring, update.pack.len() as u64);
    let copied = index
        .runs
        .iter()
        .filter(|run| matches!(run.from, RunFrom::Copy { .. }));
    assert_eq!(tally.copied, copied.map(|run| run.len).sum::<u64>());
    let sources = sources
        .into_iter()
        .map(|bytes| Arc::new(BytesSource(bytes)) as Arc<dyn Content>)
        .collect();
    let content = open(update.index, update.pack, sources).unwrap();
    check_ranges(&content, plain, seed, 8);
    let (restored, root) = restore_all(&content, 3).unwrap();
    assert!(restored == plain);
    assert_eq!(root, RootHash::of(plain));
    index
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn updated_streams_come_back(
        stretches in stretches(12),
        edits in edits(8),
        pages: bool,
        frame_max in prop::sample::select(vec![4096u32, 65_536, 1 << 20]),
        seed: u64,
    ) {
        let old = TestSource::made_of(&stretches).bytes;
        let new = edited(&old, &edits, pages);
        // Nothing leads from a content to itself.
        prop_assume!(old != new);
        let cuts = if pages { Cuts::Pages } else { Cuts::Bytes };
        let update = update_stream(&old, &TestSource::new(new.clone()), &update_options(cuts, frame_max));
        check(update, vec![old], &new, seed);
    }

    #[test]
    fn changed_groups_are_those_that_differ(stretches in stretches(6), edits in edits(4)) {
        let old = TestSource::made_of(&stretches).bytes;
        let new = edited(&old, &edits, false);
        let ((old_tree, old_outboard), (tree, outboard)) = (tree_of(&old), tree_of(&new));
        let changed = changed_groups((&old_tree, &old_outboard), (&tree, &outboard)).unwrap();
        let group = |bytes: &[u8], group: usize| bytes.chunks(16 << 10).nth(group).map(<[u8]>::to_vec);
        let one = old.len().min(new.len()) <= 16 << 10 && old.len().max(new.len()) > 16 << 10;
        for number in 0..new.len().div_ceil(16 << 10) {
            let same = group(&old, number) == group(&new, number);
            let counts = changed.contains_run(&(number as u64..number as u64 + 1));
            prop_assert!(counts != same || (one && counts), "group {}", number);
        }
    }

    // Files that are known, wherever they lie, are not read; the others are found by their content.
    #[test]
    fn updated_trees_come_back(
        files in prop::collection::vec((0..60_000usize, 0..6u64, any::<bool>()), 0..24),
        dropped in prop::collection::vec(any::<bool>(), 24),
        added in prop::collection::vec((0..60_000usize, 20..24u64), 0..6),
        touched in prop::collection::vec(any::<bool>(), 24),
        seed: u64,
    ) {
        let made = |len: usize, seed: u64, is_text: bool| if is_text { text(seed, len) } else { random(seed, len) };
        let mut old = Vec::new();
        let mut outline = Outline::default();
        let (mut new, mut parts) = (Vec::new(), Vec::new());
        let mut unread = Vec::new();
        for (i, (len, seed, is_text)) in files.iter().enumerate() {
            let mut file = made(*len, *seed, *is_text);
            let offset = old.len() as u64;
            old.extend(&file);
            if i < added.len() {
                let extra = random(added[i].1, added[i].0);
                outline.push(extra.len() as u64, None);
                parts.push(extra.len() as u64);
                new.extend(extra);
            }
            if dropped[i] {
                continue;
            }
            if touched[i] && !file.is_empty() {
                let at = file.len() / 2;
                file.insert(at, 7);
                outline.push(file.len() as u64, None);
            } else {
                let known = if offset == new.len() as u64 { Known::Inherited } else { Known::Copy { source: 0, offset } };
                outline.push(file.len() as u64, Some(known));
                unread.push(new.len() as u64..(new.len() + file.len()) as u64);
            }
            parts.push(file.len() as u64);
            new.extend(file);
        }
        let mut source = TestSource::new(new.clone());
        source.parts = Some(parts);
        let sources = [old_source(&old, SourceKind::Parent, Space::Contents)];
        let update = make_update(&source, &outline, &sources, false, &update_options(Cuts::Bytes, 1 << 20));
        prop_assert_eq!(source.bytes_read.load(std::sync::atomic::Ordering::Relaxed), outline.unknown_len());
        let index = check(update, vec![old], &new, seed);
        let framed: u64 = index.runs.iter().filter(|run| matches!(run.from, RunFrom::Frame { .. })).map(|run| run.len).sum();
        prop_assert!(framed <= outline.unknown_len());
    }
}

#[test]
fn what_is_common_costs_little() {
    let old = random(1, 3 << 20);
    let with = |new: Vec<u8>, cuts| {
        let update = update_stream(
            &old,
            &TestSource::new(new.clone()),
            &update_options(cuts, 256 << 10),
        );
        let len = update.len();
        check(update, vec![old.clone()], &new, 1);
        len
    };
    // Moved by a byte: no group is the same.
    let moved = [&[1], &old[..]].concat();
    assert!(with(moved, Cuts::Bytes) < 2_000);
    let moved = [&random(2, 4096), &old[..]].concat();
    assert!(with(moved, Cuts::Pages) < 4096 + 2_000);
    // One byte in every page, everywhere.
    let mut sprinkled = old.clone();
    sprinkled
        .iter_mut()
        .step_by(4096)
        .for_each(|byte| *byte ^= 1);
    let len = with(sprinkled, Cuts::Pages);
    assert!(len < 30_000, "{len}");
    let shuffled = {
        let mut pages: Vec<&[u8]> = old.chunks(4096).collect();
        let mut rng = SmallRng::seed_from_u64(3);
        for i in (1..pages.len()).rev() {
            pages.swap(i, rng.random_range(0..=i));
        }
        pages.concat()
    };
    let len = with(shuffled, Cuts::Pages);
    assert!(len < 8_000, "{len}");
}

#[test]
fn scattered_edits_cost_tens_of_bytes_each() {
    let old = random(1, 16 << 20);
    let mut new = old.clone();
    let edits = (0..new.len()).step_by(100 << 10);
    edits.clone().for_each(|at| new[at] ^= 1);
    let count = edits.count();
    let update = update_stream(
        &old,
        &TestSource::new(new.clone()),
        &update_options(Cuts::Pages, 256 << 10),
    );
    let len = update.len();
    check(update, vec![old], &new, 1);
    assert!(len < 100 * count, "{len} bytes for {count} edits");
}

/// As compiled again: the same instructions, and among them addresses that moved by one of a few distances.
#[test]
fn what_differs_in_small_numbers_everywhere_becomes_a_difference() {
    let addresses = |len: usize| {
        let blocks = (0..len - 128).step_by(128);
        blocks.flat_map(|block| [0, 24, 48].map(|at| block + at))
    };
    let mut old = random(1, 600_000);
    for at in addresses(old.len()) {
        let address = 0x0040_0000 + (at as u32 * 7) % 0x0010_0000;
        old[at..at + 4].copy_from_slice(&address.to_le_bytes());
    }
    let mut new = old.clone();
    for at in addresses(new.len()) {
        let address = u32::from_le_bytes(new[at..at + 4].try_into().unwrap());
        let moved = address + 0x120 + (address >> 18 & 1) * 0x40;
        new[at..at + 4].copy_from_slice(&moved.to_le_bytes());
    }
    new.splice(..0, random(2, 100));
    let at_effort = |effort| {
        let options = EncodeOptions {
            effort,
            ..options(Cuts::Bytes, 1 << 20, 2)
        };
        update_stream(&old, &TestSource::new(new.clone()), &options)
    };
    let (fast, update) = (at_effort(Effort::Fast), at_effort(Effort::Default));
    assert!(
        update.len() * 2 < fast.len(),
        "{} of {}",
        update.len(),
        fast.len()
    );
    let update_len = update.len();
    let index = check(update, vec![old.clone()], &new, 1);
    let differences = index.frames.iter();
    let differences = differences.filter(|frame| frame.codec == Codec::Difference);
    assert!(differences.count() >= 2);

    // At the highest effort, patches.
    let max = at_effort(Effort::Max);
    assert!(max.len() < update_len, "{} of {update_len}", max.len());
    let index = check(max, vec![old], &new, 1);
    let mut patches = index.frames.iter();
    assert!(patches.any(|frame| frame.codec == Codec::Patch));
}

#[test]
fn code_that_moved_is_told_by_its_moves() {
    let (old, new) = (program(2000, 0), program(2000, 16));
    let at_max = EncodeOptions {
        effort: Effort::Max,
        ..options(Cuts::Bytes, 4 << 20, 2)
    };
    let update = update_stream(&old, &TestSource::new(new.clone()), &at_max);
    // There are 10,000 distances, and most of them changed.
    assert!(update.len() < 10_000, "{}", update.len());
    let index = check(update, vec![old], &new, 1);
    let mut frames = index.frames.iter();
    assert!(frames.any(|frame| frame.codec == Codec::CodePatch));
}

#[test]
fn several_sources_are_read() {
    let (one, two, fresh) = (random(1, 300_000), random(2, 300_000), random(3, 100_000));
    let new = [&two[100_000..], &fresh[..], &one[..200_000]].concat();
    let sources = [
        old_source(&one, SourceKind::Parent, Space::Stream),
        old_source(&two, SourceKind::ParentCapsule, Space::Stream),
    ];
    let source = TestSource::new(new.clone());
    let outline = Outline::unknown(new.len() as u64);
    let update = make_update(
        &source,
        &outline,
        &sources,
        true,
        &update_options(Cuts::Bytes, 256 << 10),
    );
    assert!(update.len() < 101_000, "{}", update.len());
    check(update, vec![one, two], &new, 1);
}

#[test]
fn the_result_does_not_depend_on_threads() {
    let old = [text(1, 2_000_000), random(2, 9_000_000)].concat();
    let mut new = old.clone();
    new.splice(1_000_000..1_000_100, text(3, 50_000));
    new.splice(5_000_000..5_000_000, random(4, 70_000));
    let source = TestSource::new(new);
    let with = |threads: usize| {
        let options = EncodeOptions {
            threads: NonZeroUsize::new(threads).unwrap(),
            ..update_options(Cuts::Bytes, 256 << 10)
        };
        update_stream(&old, &source, &options)
    };
    let (one, many) = (with(1), with(4));
    assert!(one.index == many.index && one.pack == many.pack);
}
