//! Trees against slow oracles: `blake3::hash` for roots, bao-tree for outboards and encodings.

use std::ops::Range;

use bao_tree::io::outboard::PreOrderMemOutboard;
use bao_tree::io::sync::encode_ranges_validated;
use bao_tree::{BlockSize, ChunkNum, ChunkRanges};
use capsule_chunker::bao::{
    Change, ContentHasher, DecodeError, EncodeError, PAIR_LEN, RootHasher, Tree, TreeHasher,
    UpdateError, ZERO_SPAN, decode_range, encode_range, encoded_len, outboard_len, tree_of, update,
    verify,
};
use capsule_proto::ranges::{Height, MAX_CONTENT_LEN, group_bytes, group_count};
use capsule_proto::{GROUP_LEN, GroupRanges, RootHash};
use positioned_io::{RandomAccessFile, WriteAt};
use proptest::prelude::*;

/// Sizes at which something about a tree's shape changes, and their neighbours.
fn boundary_sizes() -> Vec<u64> {
    let mut sizes = vec![0];
    for base in [1, 1024, 2048, GROUP_LEN - 1024]
        .into_iter()
        .chain((0..7).map(|log| GROUP_LEN << log))
    {
        sizes.extend([base - 1, base, base + 1]);
    }
    for groups in [3, 5, 6, 7, 9, 12, 15, 17, 31, 33] {
        sizes.extend([
            groups * GROUP_LEN - 1,
            groups * GROUP_LEN,
            groups * GROUP_LEN + 1,
        ]);
    }
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// Content that looks random and depends on its seed.
fn content(size: u64, seed: u64) -> Vec<u8> {
    let mut content = vec![0; size as usize];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut content);
    content
}

/// The oracle: root by plain BLAKE3, outboard by bao-tree.
fn oracle(content: &[u8]) -> (Tree, Vec<u8>) {
    let theirs = PreOrderMemOutboard::create(content, BlockSize::from_chunk_log(4));
    let root = RootHash::from_bytes(blake3::hash(content).into());
    assert_eq!(root.as_bytes(), theirs.root.as_bytes());
    (
        Tree {
            root,
            size: content.len() as u64,
        },
        theirs.data,
    )
}

/// An outboard of which nothing is there.
const NOTHING: Vec<u8> = Vec::new();

/// The oracle's encoding of a run of groups.
fn oracle_encoding(content: &[u8], groups: &Range<u64>) -> Vec<u8> {
    let outboard = PreOrderMemOutboard::create(content, BlockSize::from_chunk_log(4));
    let ranges = ChunkRanges::from(ChunkNum(groups.start * 16)..ChunkNum(groups.end * 16));
    let mut encoded = Vec::new();
    encode_ranges_validated(content, &outboard, &ranges, &mut encoded).unwrap();
    encoded
}

fn encode(
    tree: &Tree,
    groups: Range<u64>,
    content: &[u8],
    outboard: &[u8],
) -> Result<Vec<u8>, EncodeError> {
    let mut out = b"before".to_vec();
    let result = encode_range(tree, groups, Height::ROOT, &content, &outboard, &mut out);
    let encoded = out.split_off(6);
    assert_eq!(out, b"before");
    assert!(result.is_ok() || encoded.is_empty());
    result.map(|()| encoded)
}

/// Decodes into a sparse outboard and sparse content (`None` where nothing came).
fn decode(
    tree: &Tree,
    groups: Range<u64>,
    encoded: &[u8],
) -> (Result<(), DecodeError>, Vec<u8>, Vec<Option<u8>>) {
    let mut outboard = vec![0; outboard_len(tree.size) as usize];
    let mut content = vec![None; tree.size as usize];
    let parents = |offset: u64, pair: &[u8; PAIR_LEN]| {
        outboard[offset as usize..][..PAIR_LEN].copy_from_slice(pair)
    };
    let leaves = |offset: u64, data: &[u8]| {
        content[offset as usize..][..data.len()]
            .iter_mut()
            .zip(data)
            .for_each(|(to, from)| *to = Some(*from));
    };
    (
        decode_range(
            tree,
            groups,
            Height::ROOT,
            &NOTHING,
            encoded,
            parents,
            leaves,
        ),
        outboard,
        content,
    )
}

/// Sizes around boundaries, and any others.
fn size() -> impl Strategy<Value = u64> {
    prop_oneof![prop::sample::select(boundary_sizes()), 0..70 * GROUP_LEN]
}

/// Content of some size, and a run of its groups.
fn size_and_run() -> impl Strategy<Value = (u64, Range<u64>)> {
    (
        size(),
        any::<prop::sample::Index>(),
        any::<prop::sample::Index>(),
    )
        .prop_map(|(size, start, len)| {
            let count = group_count(size);
            let start = start.index(count as usize) as u64;
            (
                size,
                start..start + 1 + len.index((count - start) as usize) as u64,
            )
        })
}

#[test]
fn roots_and_outboards_at_every_boundary() {
    for size in boundary_sizes() {
        let content = content(size, size);
        let expected = oracle(&content);
        assert_eq!(tree_of(&content), expected, "size {size}");
        let mut hasher = TreeHasher::new();
        hasher.push(&content).unwrap();
        assert_eq!(hasher.size(), size);
        assert_eq!(hasher.finish().unwrap(), expected, "size {size}");
        // And in small uneven pushes.
        let mut hasher = TreeHasher::new();
        content
            .chunks(5000)
            .for_each(|part| hasher.push(part).unwrap());
        assert_eq!(hasher.finish().unwrap(), expected, "size {size}");
        for portion in [5000, usize::MAX] {
            let mut hasher = RootHasher::new();
            content
                .chunks(portion)
                .for_each(|part| hasher.push(part).unwrap());
            assert_eq!(hasher.finish().unwrap(), expected.0.root, "size {size}");
        }
    }
}

#[test]
fn roots_of_sparse_content_need_no_outboard() {
    let span = ZERO_SPAN * GROUP_LEN;
    // Bytes of data, of zeros, of data: whole spans alone, at the start, in the middle and at the end.
    let shapes = [
        (0, span, 0),
        (0, span - 1, 0),
        (0, span + 1, 0),
        (0, 2 * span, 0),
        (0, 3 * span, 5),
        (1, 2 * span, 0),
        (span, span, 0),
        (span, span, 1),
        (3 * GROUP_LEN, 3 * span, 3 * GROUP_LEN),
    ];
    for (before, zeros, after) in shapes {
        let (before, after) = (content(before, 1), content(after, 2));
        let mut hasher = RootHasher::new();
        hasher.push(&before).unwrap();
        hasher.push_zeros(zeros).unwrap();
        hasher.push(&after).unwrap();
        let all = [before, vec![0; zeros as usize], after].concat();
        assert_eq!(
            hasher.finish().unwrap(),
            RootHash::of(&all),
            "{} zeros of {}",
            zeros,
            all.len()
        );
    }
}

#[test]
fn whole_and_single_encodings_at_every_boundary() {
    for size in boundary_sizes() {
        let content = content(size, size);
        let (tree, outboard) = oracle(&content);
        let count = group_count(size);
        for groups in [0..count, 0..1, count - 1..count, count / 2..count] {
            let encoded = encode(&tree, groups.clone(), &content, &outboard).unwrap();
            assert_eq!(
                encoded,
                oracle_encoding(&content, &groups),
                "{groups:?} of {size}"
            );
            let (result, _, decoded) = decode(&tree, groups.clone(), &encoded);
            assert_eq!(result, Ok(()));
            let bytes = group_bytes(&groups, size);
            for (i, byte) in decoded.iter().enumerate() {
                assert_eq!(*byte, bytes.contains(&(i as u64)).then(|| content[i]));
            }
        }
    }
}

#[test]
fn runs_outside_the_content_are_refused() {
    let content = content(3 * GROUP_LEN + 1, 0);
    let (tree, outboard) = tree_of(&content);
    #[expect(clippy::reversed_empty_ranges)]
    for groups in [0..0, 2..1, 0..5, 4..5, 0..u64::MAX] {
        assert!(matches!(
            encode(&tree, groups.clone(), &content, &outboard),
            Err(EncodeError::OutOfRange { size, .. }) if size == tree.size
        ));
        let result = decode_range(
            &tree,
            groups,
            Height::ROOT,
            &NOTHING,
            &[],
            |_, _| {},
            |_, _| {},
        );
        assert!(matches!(result, Err(DecodeError::OutOfRange { .. })));
    }
    // A size from nowhere does not overflow anything.
    let huge = Tree {
        size: u64::MAX,
        ..tree
    };
    let result = decode_range(
        &huge,
        0..1,
        Height::ROOT,
        &NOTHING,
        &[],
        |_, _| {},
        |_, _| {},
    );
    assert!(matches!(result, Err(DecodeError::OutOfRange { .. })));
}

#[test]
fn content_beyond_the_largest_size_is_refused() {
    let mut hasher = TreeHasher::new();
    hasher.push(&[1]).unwrap();
    assert!(hasher.push_zeros(MAX_CONTENT_LEN).is_err());
    assert_eq!(hasher.finish().unwrap().0, oracle(&[1]).0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Data and zeros in any order and portion.
    #[test]
    fn pushes_of_any_portion(parts in prop::collection::vec((any::<bool>(), 0u64..5 * GROUP_LEN), 0..12)) {
        let (mut hasher, mut rooter) = (TreeHasher::new(), RootHasher::new());
        let mut all = Vec::new();
        for (i, (zero, len)) in parts.into_iter().enumerate() {
            if zero {
                hasher.push_zeros(len).unwrap();
                rooter.push_zeros(len).unwrap();
                all.resize(all.len() + len as usize, 0);
            } else {
                let data = content(len, i as u64);
                hasher.push(&data).unwrap();
                rooter.push(&data).unwrap();
                all.extend(data);
            }
        }
        let expected = oracle(&all);
        prop_assert_eq!(rooter.finish().unwrap(), expected.0.root);
        prop_assert_eq!(hasher.finish().unwrap(), expected);
    }

    #[test]
    fn encodings_are_those_of_bao_tree((size, groups) in size_and_run(), seed in any::<u64>()) {
        let content = content(size, seed);
        let (tree, outboard) = tree_of(&content);
        let encoded = encode(&tree, groups.clone(), &content, &outboard).unwrap();
        prop_assert_eq!(&encoded, &oracle_encoding(&content, &groups));
        prop_assert_eq!(encoded.len() as u64, encoded_len(size, &groups, Height::ROOT));
        let (result, sparse, decoded) = decode(&tree, groups.clone(), &encoded);
        prop_assert_eq!(result, Ok(()));
        // What was decoded is enough to serve the same run, and each part of it, again.
        // What was not decoded is wrong in each byte: a last group may have only one.
        let decoded = decoded.iter().zip(&content);
        let decoded: Vec<u8> = decoded.map(|(byte, right)| byte.unwrap_or(!right)).collect();
        prop_assert_eq!(encode(&tree, groups.clone(), &decoded, &sparse).unwrap(), encoded);
        for part in [groups.start..groups.start + 1, groups.end - 1..groups.end] {
            prop_assert_eq!(encode(&tree, part.clone(), &decoded, &sparse).unwrap(), oracle_encoding(&content, &part));
        }
        let wanted = GroupRanges::from(groups.clone());
        prop_assert_eq!(&verify(&tree, &wanted, &content, &outboard).unwrap(), &wanted);
        prop_assert_eq!(
            verify(&tree, &GroupRanges::all(size), &decoded, &sparse).unwrap(),
            GroupRanges::from(groups)
        );
    }

    /// A flipped bit is found in its place, and nothing wrong is handed out before.
    #[test]
    fn flipped_bits_are_found(
        (size, groups) in size_and_run(), at in any::<prop::sample::Index>(), bit in 0u8..8,
    ) {
        let content = content(size, 1);
        let (tree, outboard) = tree_of(&content);
        let mut encoded = encode(&tree, groups.clone(), &content, &outboard).unwrap();
        if encoded.is_empty() {
            return Ok(());
        }
        let at = at.index(encoded.len());
        encoded[at] ^= 1 << bit;
        let (result, pairs, data) = decode(&tree, groups.clone(), &encoded);
        match result {
            Err(DecodeError::Mismatch { group }) => prop_assert!(groups.contains(&group)),
            Err(DecodeError::Pair { groups: below }) => {
                prop_assert!(below.start < groups.end && groups.start < below.end);
            }
            other => prop_assert!(false, "{other:?}"),
        }
        let (whole, _) = pairs.as_chunks::<PAIR_LEN>();
        let (right, _) = outboard.as_chunks::<PAIR_LEN>();
        prop_assert!(whole.iter().zip(right).all(|(got, right)| *got == [0; PAIR_LEN] || got == right));
        prop_assert!(data.iter().zip(&content).all(|(got, right)| got.is_none_or(|got| got == *right)));
    }

    /// Who holds some groups needs fewer pairs for others, and none twice; without what came with those it accepts nothing.
    #[test]
    fn what_is_known_is_left_out(
        (size, groups) in size_and_run(), held in prop::collection::vec(any::<prop::sample::Index>(), 0..8), bit in any::<prop::sample::Index>(),
    ) {
        let content = content(size, 3);
        let (tree, outboard) = tree_of(&content);
        let mut known = vec![0; outboard_len(size) as usize];
        let mut ranges = GroupRanges::new();
        for at in held {
            let group = at.index(group_count(size) as usize) as u64;
            ranges.insert(group..group + 1);
            let encoded = oracle_encoding(&content, &(group..group + 1));
            let parents = |offset: u64, pair: &[u8; PAIR_LEN]| known[offset as usize..][..PAIR_LEN].copy_from_slice(pair);
            decode_range(&tree, group..group + 1, Height::ROOT, &NOTHING, &encoded, parents, |_, _| {}).unwrap();
        }
        let height = Height::known(size, &groups, &ranges);
        prop_assert!(height.spans(&groups));
        let mut encoded = Vec::new();
        encode_range(&tree, groups.clone(), height, &&content[..], &&outboard[..], &mut encoded).unwrap();
        let whole = oracle_encoding(&content, &groups);
        prop_assert_eq!(encoded.len() as u64, encoded_len(size, &groups, height));
        // What is left out is what came before: the pairs at the head.
        let left_out = (whole.len() - encoded.len()) / PAIR_LEN;
        prop_assert_eq!(&whole[left_out * PAIR_LEN..], &encoded[..]);
        let mut fresh = 0;
        let count = |offset: u64, _: &[u8; PAIR_LEN]| {
            fresh += u64::from(known[offset as usize..][..PAIR_LEN] == [0; PAIR_LEN]);
        };
        decode_range(&tree, groups.clone(), height, &known, &encoded, count, |_, _| {}).unwrap();
        if groups.end - groups.start == 1 && !ranges.contains_run(&groups) {
            prop_assert_eq!(fresh as usize * PAIR_LEN + group_bytes(&groups, size).count(), encoded.len());
        }
        if left_out > 0 {
            let lost = decode_range(&tree, groups.clone(), height, &NOTHING, &encoded, |_, _| panic!("a pair"), |_, _| panic!("data"));
            prop_assert_eq!(lost, Err(DecodeError::Unknown { groups: groups.clone() }));
        }
        if !encoded.is_empty() {
            let at = bit.index(encoded.len());
            encoded[at] ^= 1;
            let wrong = decode_range(&tree, groups, height, &known, &encoded, |_, _| {}, |_, _| {});
            let is_found = matches!(wrong, Err(DecodeError::Pair { .. } | DecodeError::Mismatch { .. }));
            prop_assert!(is_found, "{wrong:?}");
        }
    }

    #[test]
    fn encodings_of_another_length_are_refused_whole((size, groups) in size_and_run(), cut in 1usize..200) {
        let content = content(size, 2);
        let (tree, outboard) = tree_of(&content);
        let mut encoded = encode(&tree, groups.clone(), &content, &outboard).unwrap();
        let expected = encoded.len() as u64;
        let nothing = |encoded: &[u8]| {
            decode_range(&tree, groups.clone(), Height::ROOT, &NOTHING, encoded, |_, _| panic!("a pair"), |_, _| panic!("data")).unwrap_err()
        };
        if let Some(found) = encoded.len().checked_sub(cut) {
            prop_assert_eq!(
                nothing(&encoded[..found]),
                DecodeError::Truncated { groups: groups.clone(), expected, found: found as u64 }
            );
        }
        encoded.extend(vec![0; cut]);
        prop_assert_eq!(nothing(&encoded), DecodeError::TrailingBytes { groups: groups.clone(), extra: cut as u64 });
    }

    /// A provider notices its own damage, and `verify` finds exactly what is not damaged.
    #[test]
    fn local_damage_is_found(
        size in 1u64..70 * GROUP_LEN,
        data_at in any::<prop::sample::Index>(),
        pair_at in any::<prop::sample::Index>(),
        damage_pair in any::<bool>(),
    ) {
        let mut content = content(size, 3);
        let (tree, mut outboard) = tree_of(&content);
        let data_at = data_at.index(content.len());
        let group = data_at as u64 / GROUP_LEN;
        content[data_at] ^= 0x10;
        let all = 0..group_count(size);
        let result = encode(&tree, all.clone(), &content, &outboard);
        let found = matches!(result, Err(EncodeError::Damaged { group: found }) if found == group);
        prop_assert!(found);
        let mut expected = GroupRanges::all(size);
        expected.remove(group..group + 1);
        prop_assert_eq!(&verify(&tree, &GroupRanges::all(size), &content, &outboard).unwrap(), &expected);

        if damage_pair && !outboard.is_empty() {
            let at = pair_at.index(outboard.len());
            outboard[at] ^= 1;
            let verified = verify(&tree, &GroupRanges::all(size), &content, &outboard).unwrap();
            // Of each group, what can be encoded alone is what verifies.
            for group in all {
                match encode(&tree, group..group + 1, &content, &outboard) {
                    Ok(_) => prop_assert!(verified.contains(group)),
                    Err(EncodeError::Damaged { .. }) => prop_assert!(!verified.contains(group)),
                    Err(EncodeError::Pair { offset, .. }) => {
                        prop_assert_eq!(offset, (at - at % PAIR_LEN) as u64);
                        prop_assert!(!verified.contains(group));
                    }
                    Err(other) => prop_assert!(false, "{other}"),
                }
            }
        }
    }

    /// Edits, growth and truncation, in place where that is possible.
    #[test]
    fn updates_agree_with_hashing_anew(
        old_size in size(),
        new_size in prop_oneof![Just(None), size().prop_map(Some)],
        edits in prop::collection::vec((any::<prop::sample::Index>(), 1usize..3 * GROUP_LEN as usize, any::<bool>()), 0..5),
    ) {
        let new_size = new_size.unwrap_or(old_size);
        let old = content(old_size, 4);
        let mut new = old.clone();
        new.extend(content(new_size.saturating_sub(old_size), 5));
        new.truncate(new_size as usize);
        let (mut dirty, mut zero) = (GroupRanges::new(), GroupRanges::new());
        for (at, len, zeros) in edits {
            if new.is_empty() {
                break;
            }
            let at = at.index(new.len());
            let end = (at + len).min(new.len());
            new[at..end].iter_mut().for_each(|byte| *byte = if zeros { 0 } else { *byte ^ 0xFF });
            dirty.insert(at as u64 / GROUP_LEN..(end as u64).div_ceil(GROUP_LEN));
        }
        for group in 0..group_count(new_size) {
            let bytes = group_bytes(&(group..group + 1), new_size);
            if new[bytes.start as usize..bytes.end as usize].iter().all(|byte| *byte == 0) {
                zero.insert(group..group + 1);
            }
        }
        let (old_tree, old_outboard) = tree_of(&old);
        let mut change = Change { size: new_size, dirty: &dirty, zero: &zero, in_place: false };
        let mut outboard = Vec::new();
        let tree = update(&old_tree, &old_outboard, &change, &Unread { content: &new, zero: &zero }, &mut outboard).unwrap();
        prop_assert_eq!((tree, outboard), oracle(&new));

        change.in_place = true;
        let mut outboard = old_outboard.clone();
        let result = update(&old_tree, &old_outboard, &change, &new, &mut outboard);
        if group_count(old_size) == group_count(new_size) {
            prop_assert_eq!((result.unwrap(), outboard), oracle(&new));
        } else {
            let refused = matches!(result, Err(UpdateError::NotInPlace { .. }));
            prop_assert!(refused);
        }
    }
}

/// Content whose zero groups must not be read.
struct Unread<'a> {
    content: &'a [u8],
    zero: &'a GroupRanges,
}

impl positioned_io::ReadAt for Unread<'_> {
    fn read_at(&self, pos: u64, buf: &mut [u8]) -> std::io::Result<usize> {
        let end = (pos + buf.len() as u64).min(self.content.len() as u64);
        assert!(
            !self
                .zero
                .intersects(&capsule_proto::ranges::groups_touching(&(pos..end)))
        );
        self.content.read_at(pos, buf)
    }
}

#[test]
fn an_update_does_not_believe_the_old_outboard() {
    let old = content(40 * GROUP_LEN, 6);
    let (tree, outboard) = tree_of(&old);
    let dirty = GroupRanges::from(20..21);
    let change = Change {
        size: tree.size,
        dirty: &dirty,
        zero: &GroupRanges::new(),
        in_place: false,
    };
    for at in (0..outboard.len()).step_by(PAIR_LEN) {
        let mut damaged = outboard.clone();
        damaged[at] ^= 1;
        match update(&tree, &damaged, &change, &old, &mut Vec::new()) {
            Ok(new) => assert_eq!(new, tree),
            Err(UpdateError::Pair { offset, .. }) => assert_eq!(offset, at as u64),
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn an_update_reports_content_that_ends_early() {
    let old = content(4 * GROUP_LEN, 7);
    let (tree, outboard) = tree_of(&old);
    let none = GroupRanges::new();
    let change = Change {
        size: 6 * GROUP_LEN,
        dirty: &none,
        zero: &none,
        in_place: false,
    };
    let result = update(&tree, &outboard, &change, &old, &mut Vec::new());
    assert!(matches!(result, Err(UpdateError::Data { group: 4, .. })));
}

#[test]
fn a_file_serves_as_storage_and_is_updated_in_place() {
    let mut data = content(9 * GROUP_LEN + 5, 8);
    let storage = RandomAccessFile::try_new(tempfile::tempfile().unwrap()).unwrap();
    let mut hasher = TreeHasher::with_storage(storage);
    hasher.push(&data).unwrap();
    let (tree, outboard) = hasher.finish().unwrap();
    data[30_000] ^= 1;
    let dirty = GroupRanges::from(1..2);
    let change = Change {
        size: tree.size,
        dirty: &dirty,
        zero: &GroupRanges::new(),
        in_place: true,
    };
    let new = update(&tree, &outboard, &change, &data, &mut &outboard).unwrap();
    let (expected, _) = oracle(&data);
    assert_eq!(new, expected);
    let all = 0..group_count(new.size);
    let mut encoded = Vec::new();
    encode_range(
        &new,
        all.clone(),
        Height::ROOT,
        &data,
        &outboard,
        &mut encoded,
    )
    .unwrap();
    assert_eq!(encoded, oracle_encoding(&data, &all));
}

/// Content with zero spans: five spans of which only some groups of the second and last are data, and a short end.
fn spanned() -> (Vec<u8>, Vec<(Range<u64>, bool)>) {
    let span = ZERO_SPAN * GROUP_LEN;
    let data_at = span + 100 * GROUP_LEN + 7;
    let parts = vec![
        (0..data_at, false),
        (data_at..data_at + 50_000, true),
        (data_at + 50_000..4 * span + 9, false),
        (4 * span + 9..4 * span + 900_000, true),
    ];
    let mut all = vec![0; 4 * span as usize + 900_000];
    for (part, is_data) in &parts {
        if *is_data {
            all[part.start as usize..part.end as usize]
                .copy_from_slice(&content(part.end - part.start, part.start));
        }
    }
    (all, parts)
}

#[test]
fn zero_spans_leave_holes_and_are_served_all_the_same() {
    let (content, parts) = spanned();
    let mut hasher = TreeHasher::new();
    for (part, is_data) in parts {
        if is_data {
            hasher
                .push(&content[part.start as usize..part.end as usize])
                .unwrap();
        } else {
            hasher.push_zeros(part.end - part.start).unwrap();
        }
    }
    let (tree, outboard) = hasher.finish().unwrap();
    let (expected, full) = oracle(&content);
    assert_eq!((tree, outboard.len()), (expected, full.len()));
    let (pairs, _) = outboard.as_chunks::<PAIR_LEN>();
    let (full_pairs, _) = full.as_chunks::<PAIR_LEN>();
    let holes = pairs.iter().filter(|pair| **pair == [0; PAIR_LEN]).count() as u64;
    assert_eq!(holes, 3 * (ZERO_SPAN - 1));
    assert!(
        pairs
            .iter()
            .zip(full_pairs)
            .all(|(ours, theirs)| *ours == [0; PAIR_LEN] || ours == theirs)
    );

    for groups in [
        0..1,
        5..70,
        ZERO_SPAN - 1..ZERO_SPAN + 1,
        2 * ZERO_SPAN + 513..2 * ZERO_SPAN + 514,
    ] {
        let encoded = encode(&tree, groups.clone(), &content, &outboard).unwrap();
        assert_eq!(
            encoded,
            encode(&tree, groups.clone(), &content, &full).unwrap()
        );
        assert_eq!(decode(&tree, groups, &encoded).0, Ok(()));
    }
    let all = GroupRanges::all(tree.size);
    assert_eq!(verify(&tree, &all, &content, &outboard).unwrap(), all);
    // A hole where data stands is not taken for zeros.
    let mut damaged = outboard.clone();
    let at = damaged.len() - PAIR_LEN;
    damaged[at..].fill(0);
    let last = group_count(tree.size) - 2;
    assert!(matches!(
        encode(&tree, last..last + 1, &content, &damaged),
        Err(EncodeError::Pair { .. })
    ));
}

#[test]
fn spans_come_and_go_with_updates() {
    let (mut content, _) = spanned();
    let zero_spans = |content: &[u8]| -> GroupRanges {
        let (groups, _) = content.as_chunks::<{ GROUP_LEN as usize }>();
        groups
            .iter()
            .enumerate()
            .filter(|(_, group)| group.iter().all(|b| *b == 0))
            .map(|(i, _)| i as u64..i as u64 + 1)
            .collect()
    };
    let empty = tree_of(&[]);
    let dirty = GroupRanges::new();
    let zero = zero_spans(&content);
    let change = Change {
        size: content.len() as u64,
        dirty: &dirty,
        zero: &zero,
        in_place: false,
    };
    let mut outboard = Vec::new();
    let tree = update(&empty.0, &empty.1, &change, &content, &mut outboard).unwrap();
    assert_eq!(tree, oracle(&content).0);

    // Data into one hole; another span of data becomes a hole.
    let span = (ZERO_SPAN * GROUP_LEN) as usize;
    content[2 * span + 70_000] = 1;
    content[span..2 * span].fill(0);
    let zero = zero_spans(&content);
    let dirty: GroupRanges = [
        ZERO_SPAN..2 * ZERO_SPAN,
        2 * ZERO_SPAN + 4..2 * ZERO_SPAN + 5,
    ]
    .into_iter()
    .collect();
    let (expected, full) = oracle(&content);
    for in_place in [false, true] {
        let change = Change {
            size: content.len() as u64,
            dirty: &dirty,
            zero: &zero,
            in_place,
        };
        let mut new_outboard = if in_place {
            outboard.clone()
        } else {
            Vec::new()
        };
        assert_eq!(
            update(&tree, &outboard, &change, &content, &mut new_outboard).unwrap(),
            expected
        );
        assert_eq!(new_outboard.len(), full.len());
        // The span that was cleared has a hole now, and everything verifies.
        let pair = new_outboard.as_chunks::<PAIR_LEN>().0[ZERO_SPAN as usize + 5];
        assert_eq!(pair, [0; PAIR_LEN]);
        let all = GroupRanges::all(expected.size);
        assert_eq!(
            verify(&expected, &all, &content, &new_outboard).unwrap(),
            all
        );
    }

    // Cut inside a hole: what is left of it stays one.
    let cut = 10 * GROUP_LEN as usize + 3;
    let none = GroupRanges::new();
    let change = Change {
        size: cut as u64,
        dirty: &none,
        zero: &none,
        in_place: false,
    };
    let mut short = Vec::new();
    let tree = update(&tree, &outboard, &change, &&content[..cut], &mut short).unwrap();
    assert_eq!(tree, oracle(&content[..cut]).0);
    assert_eq!(
        encode(&tree, 3..7, &content[..cut], &short).unwrap(),
        oracle_encoding(&content[..cut], &(3..7))
    );
}

#[test]
fn a_huge_run_of_zeros_has_the_right_root() {
    let size = (40 * ZERO_SPAN + 3) * GROUP_LEN + 77;
    let mut plain = blake3::Hasher::new();
    let zeros = vec![0; 1 << 20];
    let mut left = size;
    while left > 0 {
        let part = left.min(zeros.len() as u64);
        plain.update(&zeros[..part as usize]);
        left -= part;
    }
    // Twice, in a file and in memory, with the spans' values remembered the second time.
    for _ in 0..2 {
        let storage = RandomAccessFile::try_new(tempfile::tempfile().unwrap()).unwrap();
        let mut hasher = TreeHasher::with_storage(storage);
        hasher.push_zeros(5).unwrap();
        hasher.push_zeros(size - 5).unwrap();
        assert_eq!(hasher.size(), size);
        assert_eq!(
            hasher.finish().unwrap().0.root.as_bytes(),
            plain.finalize().as_bytes()
        );
    }
    let mut hasher = TreeHasher::new();
    hasher.push_zeros(size).unwrap();
    assert_eq!(hasher.finish().unwrap().1.len() as u64, outboard_len(size));
}

/// Storage that fails names the place.
#[test]
fn failing_storage_is_reported() {
    struct Full;
    impl positioned_io::ReadAt for Full {
        fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<usize> {
            Ok(0)
        }
    }
    impl WriteAt for Full {
        fn write_at(&mut self, _: u64, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut hasher = TreeHasher::with_storage(Full);
    hasher.push(&content(2 * GROUP_LEN, 9)).unwrap();
    let Err(error) = hasher.finish() else {
        panic!("no error")
    };
    assert_eq!(error.to_string(), "cannot access the outboard at byte 0");
}
