//! Golden vectors of outboards and range encodings, as printed in `docs/tree.md`.
//!
//! Content: the byte at offset `i` is `i mod 251`. A change that breaks one of these breaks the protocol.

use bao_tree::io::outboard::PreOrderMemOutboard;
use bao_tree::io::sync::encode_ranges_validated;
use bao_tree::{BlockSize, ChunkNum, ChunkRanges};
use capsule_chunker::bao::{decode_range, encode_range, tree_of};
use capsule_proto::RootHash;
use capsule_proto::ranges::Height;

const DOC: &str = include_str!("../docs/tree.md");

/// A row of the document's table of encodings: size, root, hash of the outboard, groups, length and hash of the encoding.
struct Vector {
    size: u64,
    root: RootHash,
    outboard: RootHash,
    groups: std::ops::Range<u64>,
    len: u64,
    encoding: RootHash,
}

fn vectors() -> Vec<Vector> {
    let rows = DOC
        .lines()
        .skip_while(|line| !line.starts_with("| size | root |"))
        .skip(2);
    let rows = rows.take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let cells: Vec<&str> = row
            .trim_matches('|')
            .split('|')
            .map(|cell| cell.trim().trim_matches('`'))
            .collect();
        let [size, root, outboard, groups, len, encoding] = cells[..] else {
            panic!("{row}")
        };
        let (start, end) = groups.split_once("..").unwrap();
        Vector {
            size: size.parse().unwrap(),
            root: root.parse().unwrap(),
            outboard: outboard.parse().unwrap(),
            groups: start.parse().unwrap()..end.parse().unwrap(),
            len: len.parse().unwrap(),
            encoding: encoding.parse().unwrap(),
        }
    })
    .collect()
}

fn content(size: u64) -> Vec<u8> {
    (0..size).map(|i| (i % 251) as u8).collect()
}

#[test]
fn the_documents_vectors_hold() {
    let vectors = vectors();
    assert_eq!(vectors.len(), 9);
    for vector in vectors {
        let content = content(vector.size);
        let (tree, outboard) = tree_of(&content);
        assert_eq!(
            (tree.root, RootHash::of(&outboard)),
            (vector.root, vector.outboard),
            "size {}",
            vector.size
        );
        let mut encoded = Vec::new();
        encode_range(
            &tree,
            vector.groups.clone(),
            Height::ROOT,
            &content,
            &outboard,
            &mut encoded,
        )
        .unwrap();
        assert_eq!(
            (encoded.len() as u64, RootHash::of(&encoded)),
            (vector.len, vector.encoding),
            "{}",
            vector.size
        );
        decode_range(
            &tree,
            vector.groups,
            Height::ROOT,
            &Vec::new(),
            &encoded,
            |_, _| {},
            |_, _| {},
        )
        .unwrap();
    }
}

/// The vectors do not merely pin our own code: bao-tree gives the same.
#[test]
fn bao_tree_gives_the_same() {
    for vector in vectors() {
        let content = content(vector.size);
        let outboard = PreOrderMemOutboard::create(&content, BlockSize::from_chunk_log(4));
        assert_eq!(outboard.root.as_bytes(), vector.root.as_bytes());
        assert_eq!(RootHash::of(&outboard.data), vector.outboard);
        let ranges =
            ChunkRanges::from(ChunkNum(vector.groups.start * 16)..ChunkNum(vector.groups.end * 16));
        let mut encoded = Vec::new();
        encode_ranges_validated(&content[..], &outboard, &ranges, &mut encoded).unwrap();
        assert_eq!(
            RootHash::of(&encoded),
            vector.encoding,
            "{:?} of {}",
            vector.groups,
            vector.size
        );
    }
}

/// The whole outboard of three groups, byte for byte.
#[test]
fn the_documents_outboard_holds() {
    let mut lines = DOC
        .lines()
        .skip_while(|line| !line.starts_with("Outboard of 40,000 bytes"))
        .skip(3);
    let hex: String = lines
        .by_ref()
        .take_while(|line| !line.starts_with("```"))
        .flat_map(str::split_whitespace)
        .collect();
    let (_, outboard) = tree_of(&content(40_000));
    assert_eq!(
        outboard
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>(),
        hex
    );
}
