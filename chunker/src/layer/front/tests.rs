#![expect(
    clippy::single_range_in_vec_init,
    reason = "one range is read, or taken"
)]

use capsule_proto::RootHash;
use capsule_proto::index::{IndexHeader, Reference, Run, Space};

use super::*;
use crate::bao::{Tree, TreeHasher};
use crate::content::BytesSource;

/// Where a run lies, in which frame, and from where on.
type Lies = (u64, u64, u32, u32);

/// Frames of so many bytes each, stored in these lengths, the content in their order; `references` are pairs of frames, `repeats` runs behind them.
fn index(len: u32, stored: &[u32], references: &[(u32, u32)], repeats: &[RunFrom]) -> Index {
    let mut builder = IndexBuilder::new();
    for (id, pack_len) in (0..).zip(stored) {
        let to = references.iter().filter(|(from, _)| *from == id);
        let references: Vec<_> = to
            .map(|(_, to)| Reference {
                to: ReferenceTo::Frame(*to),
                offset: 0,
                len,
            })
            .collect();
        let frame = Frame {
            pack_offset: builder.pack_len(),
            pack_len: *pack_len,
            len,
            codec: match references.is_empty() {
                true => Codec::Zstd,
                false => Codec::ZstdReferences,
            },
            hash: FrameHash::of(&[id as u8]),
            depth: u8::from(!references.is_empty()),
            references,
            spans: Vec::new(),
        };
        builder.push_frame(frame).unwrap();
    }
    let frames = (0..stored.len() as u32).map(|id| RunFrom::Frame { id, offset: 0 });
    let mut start = 0;
    for from in frames.chain(repeats.iter().copied()) {
        let len = match from {
            RunFrom::Frame { offset, .. } => u64::from(len - offset),
            _ => len.into(),
        };
        builder.push_run(Run { start, len, from }).unwrap();
        start += len;
    }
    let header = IndexHeader {
        space: Space::Stream,
        parent: None,
        target: RootHash::of(b"target"),
        target_size: start,
        sources: Vec::new(),
    };
    Index::decode(&builder.finish(&header)).unwrap()
}

/// Makes all new frames.
fn made(front: &Front, content: &[u8]) -> Vec<NewFrame> {
    let source = BytesSource(content);
    let (tree, outboard) = hashes(content);
    let hashed = Hashed {
        tree,
        outboard: &outboard,
    };
    front.make(&source, &hashed, true, &()).unwrap()
}

fn hashes(content: &[u8]) -> (Tree, Vec<u8>) {
    let mut hasher = TreeHasher::with_storage(Vec::new());
    hasher.push(content).unwrap();
    hasher.finish().unwrap()
}

fn lie(index: &Index) -> Vec<Lies> {
    let lies = index.runs.iter().map(|run| match run.from {
        RunFrom::Frame { id, offset } => (run.start, run.len, id, offset),
        _ => (run.start, run.len, u32::MAX, 0),
    });
    lies.collect()
}

/// What the new frames take of the content.
fn taken(front: &Front) -> Vec<Vec<Range<u64>>> {
    let of_frame = |pieces: &Vec<Piece>| pieces.iter().map(Piece::content).collect();
    front.new.iter().map(of_frame).collect()
}

#[test]
fn pages_lie_in_front_then_short_frames_then_what_is_left() {
    // Frame 4 is short, and refers to 1.
    let before = index(10, &[8, 8, 8, 8, 1], &[(4, 1)], &[]);
    // In frame 1, which comes in any case; in 2; all of 3; of 4.
    let reads = [40..50, 26..27, 25..26, 12..13, 30..40, 7..7];
    let front = Front::of(&before, &reads, 100).unwrap();
    assert_eq!(taken(&front), [vec![25..27], vec![20..25, 27..30]]);
    let order: Vec<_> = front.order().collect();
    // 3 is read as a whole, and moves.
    let expected = [
        Next::New(0),
        Next::Kept(1),
        Next::Kept(3),
        Next::Kept(4),
        Next::New(1),
        Next::Kept(0),
    ];
    assert_eq!(order, expected);
    let content: Vec<u8> = (0..50).collect();
    let new = made(&front, &content);
    assert_eq!(new[0].bytes, [25, 26]);
    assert_eq!(new[1].bytes, [20, 21, 22, 23, 24, 27, 28, 29]);
    assert_eq!(front.pack_len(&before, &new), 10 + 8 + 8 + 1 + 8);
    let after = Index::decode(&front.index(&before, &new).unwrap()).unwrap();
    let expected = [
        (0, 10, 5, 0),
        (10, 10, 1, 0),
        (20, 5, 4, 0),
        (25, 2, 0, 0),
        (27, 3, 4, 5),
        (30, 10, 2, 0),
        (40, 10, 3, 0),
    ];
    assert_eq!(lie(&after), expected);
    assert_eq!(after.frames[3].references[0].to, ReferenceTo::Frame(1));
    assert_eq!(after.frames[0].hash, FrameHash::of(&[25, 26]));
    assert_eq!(after.frames[3].hash, before.frames[4].hash);
    assert_eq!(after.directory.header(), before.directory.header());
    // Now they are in front.
    assert_eq!(Front::of(&after, &reads, 100), None);
}

#[test]
fn what_the_content_has_several_times_is_taken_once() {
    let again = |id, offset| RunFrom::Frame { id, offset };
    let repeats = [again(0, 4), RunFrom::Zero, again(0, 0), again(1, 8)];
    let before = index(10, &[9, 9], &[], &repeats);
    // 20..26 are bytes 4 to 10 of frame 0; 36..46 all of it.
    let front = Front::of(&before, &[22..24, 42..43, 2..3], 100).unwrap();
    let content: Vec<u8> = (0..20)
        .chain(4..10)
        .chain([0; 10])
        .chain(0..10)
        .chain(18..20)
        .collect();
    assert_eq!(content.len() as u64, before.directory.header().target_size);
    assert_eq!(taken(&front), [vec![2..3, 6..8], vec![0..2, 3..6, 8..10]]);
    let new = made(&front, &content);
    let after = Index::decode(&front.index(&before, &new).unwrap()).unwrap();
    assert_eq!(after.frames.len(), 3, "frame 0 is gone");
    let decoded: [Vec<u8>; 3] = [
        new[0].bytes.clone(),
        new[1].bytes.clone(),
        (10..20).collect(),
    ];
    let mut read = Vec::new();
    for (_, len, id, offset) in lie(&after) {
        match decoded.get(id as usize) {
            Some(frame) => read.extend(&frame[offset as usize..offset as usize + len as usize]),
            None => read.extend(vec![0; len as usize]),
        }
    }
    assert_eq!(read, content);
}

#[test]
fn a_frame_that_others_refer_to_and_one_that_is_long_stay_beside_what_is_taken_from_them() {
    // Of 2 something is left; 0 is only referred to when all of it is read; 1 refers, and more than its length is not read.
    let before = index(10, &[9, 9, 9], &[(1, 0)], &[]);
    let front = Front::of(&before, &[0..8, 13..14, 23..24], 100).unwrap();
    let expected = [vec![0..8, 13..14, 23..24], vec![20..23, 24..30]];
    assert_eq!(taken(&front), expected);
    assert_eq!(front.kept, [0, 1]);
    let content: Vec<u8> = (0..30).collect();
    let new = made(&front, &content);
    let after = Index::decode(&front.index(&before, &new).unwrap()).unwrap();
    assert_eq!(after.frames[3].references[0].to, ReferenceTo::Frame(2));
    let expected = [(0, 8, 0, 0), (8, 2, 2, 8), (10, 3, 3, 0), (13, 1, 0, 8)];
    assert_eq!(lie(&after)[..4], expected);
    let long = MAX_APART + 1;
    let before = index(long, &[long, long], &[], &[]);
    let front = Front::of(&before, &[3..4], 100).unwrap();
    assert_eq!(taken(&front), [vec![3..4]]);
    assert_eq!(front.kept, [0, 1]);
}

#[test]
fn what_is_read_nearly_whole_stays_whole_and_so_does_what_refers_and_is_not_longer() {
    let kept = |stored: u32, references: &[(u32, u32)], end: u64| {
        let before = index(80, &[9, stored], references, &[]);
        Front::of(&before, &[80..end], 100).is_none_or(|front| front.new.is_empty())
    };
    assert!(kept(80, &[], 80 + 70));
    assert!(!kept(80, &[], 80 + 69));
    assert!(kept(30, &[(1, 0)], 80 + 30));
    assert!(!kept(30, &[(1, 0)], 80 + 29));
    assert!(!kept(30, &[], 80 + 30));
}

#[test]
fn what_the_content_has_very_often_is_not_cut_up() {
    let again = RunFrom::Frame { id: 0, offset: 1 };
    let before = index(1000, &[1000, 1000], &[], &vec![again; 200]);
    let reads: Vec<_> = (0..20).map(|n| 40 * n..40 * n + 1).collect();
    assert_eq!(Front::of(&before, &reads, 100), None);
    assert!(Front::of(&before, &reads[..1], 100).is_some());
}

#[test]
fn new_frames_of_what_is_read_first_are_bounded() {
    let before = index(1000, &[1000, 1000, 1000], &[], &[]);
    let front = Front::of(&before, &[500..2500], 400).unwrap();
    let expected = [
        vec![500..900],
        vec![900..1000, 2000..2300],
        vec![2300..2500],
        vec![0..500],
        vec![2500..3000],
    ];
    assert_eq!(taken(&front), expected);
    assert_eq!(front.kept, [1], "all of it is read");
    let new = made(&front, &[7; 3000]);
    let after = Index::decode(&front.index(&before, &new).unwrap()).unwrap();
    let expected = [
        (0, 500, 4, 0),
        (500, 400, 0, 0),
        (900, 100, 1, 0),
        (1000, 1000, 3, 0),
        (2000, 300, 1, 100),
        (2300, 200, 2, 0),
        (2500, 500, 5, 0),
    ];
    assert_eq!(lie(&after), expected);
}

#[test]
fn what_is_fetched_of_it_is_counted_in_chunk_groups() {
    const LEN: u32 = 5000;
    let before = index(LEN, &[LEN; 100], &[], &[]);
    let content: Vec<u8> = (0..100 * LEN)
        .map(|at| (at.wrapping_mul(at) >> 7) as u8)
        .collect();
    let at = |frame: u64| u64::from(LEN) * frame..u64::from(LEN) * frame + 1;
    // Bytes 50,000 to 55,000 lie in group 3; 100,000 to 105,000 in 6; 115,000 to 120,000 in 7.
    let front = Front::of(&before, &[at(10), at(20), at(23)], 4096).unwrap();
    assert_eq!(front.scattered(), 3 * GROUP_LEN);
    let new = made(&front, &content);
    assert_eq!(front.together(&before, &new), GROUP_LEN);
}

#[test]
fn what_is_not_what_was_hashed_is_not_taken() {
    let before = index(1000, &[1000, 1000], &[], &[]);
    let front = Front::of(&before, &[500..510], 4096).unwrap();
    let mut content = vec![7; 2000];
    let (tree, outboard) = hashes(&content);
    content[1500] = 8;
    let hashed = Hashed {
        tree,
        outboard: &outboard,
    };
    let made = front.make(&BytesSource(&content), &hashed, false, &());
    assert!(
        matches!(made, Err(EncodeError::Changed { offset: 0 })),
        "{made:?}"
    );
}

#[test]
fn what_is_in_front_stays() {
    let before = index(10, &[1, 1, 9, 9], &[], &[]);
    let of = |reads: &[Range<u64>]| Front::of(&before, reads, 100);
    assert_eq!(of(&[]), None);
    assert_eq!(of(&[0..5, 10..20]), None, "the first two are short");
    assert_eq!(of(&[40..50]), None, "beyond the end");
    assert!(of(&[10..20]).is_some());
    assert!(of(&[20..21]).is_some());
    // Ranges that lie within each other.
    assert_eq!(of(&[0..20, 5..6, 13..14]), None);
}
