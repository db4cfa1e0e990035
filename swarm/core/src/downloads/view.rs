//! What one peer holds of one blob, and which open pieces to ask it for.
//!
//! A peer that holds all of the blob (a seeder) needs no list: every open piece is a candidate, and
//! the piece map has those by rarity already. For the others the view keeps a list of candidates that
//! is cleaned when looked at, so that a piece's change of state costs nothing per peer.

use std::ops::Range;

use capsule_proto::ranges::GroupRanges;
use rand::RngExt;
use rand::rngs::SmallRng;

use super::pieces::{PieceMap, PieceState};
use crate::spans;

/// How many candidates are looked at for the rarest: the chance that none of them is among the rarest
/// sixth is 5 %, and exactness would cost an update per peer for every have of every other peer.
const SAMPLE: usize = 16;

/// Set of small numbers.
#[derive(Clone, Debug, Default)]
struct Bits(Vec<u64>);

impl Bits {
    fn new(len: u32) -> Self {
        Self(vec![0; (len as usize).div_ceil(64)])
    }

    fn get(&self, bit: u32) -> bool {
        self.0
            .get(bit as usize / 64)
            .is_some_and(|word| word & (1 << (bit % 64)) != 0)
    }

    fn set(&mut self, bit: u32, on: bool) {
        if let Some(word) = self.0.get_mut(bit as usize / 64) {
            *word = *word & !(1 << (bit % 64)) | u64::from(on) << (bit % 64);
        }
    }
}

/// One peer's part in one blob.
#[derive(Clone, Debug)]
pub(crate) struct View {
    have: GroupRanges,
    seeder: bool,
    /// Pieces of which a peer that is no seeder holds something.
    pieces: Bits,
    /// Of these, pieces of which it holds all.
    whole: Bits,
    /// Pieces in `candidates`.
    listed: Bits,
    /// All open pieces of which it holds open groups, and some others.
    candidates: Vec<u32>,
    /// Where the last request to it ended: a long piece is asked for in order.
    pub(crate) cursor: u64,
}

impl View {
    /// A peer that holds nothing of the blob yet.
    pub(crate) fn new(map: &PieceMap) -> Self {
        let pieces = map.geometry().pieces();
        Self {
            have: GroupRanges::new(),
            seeder: false,
            pieces: Bits::new(pieces),
            whole: Bits::new(pieces),
            listed: Bits::new(pieces),
            candidates: Vec::new(),
            cursor: u64::MAX,
        }
    }

    pub(crate) fn have(&self) -> &GroupRanges {
        &self.have
    }

    /// Whether the peer holds all of the blob.
    pub(crate) fn is_seeder(&self) -> bool {
        self.seeder
    }

    /// The peer holds more.
    pub(crate) fn add(&mut self, map: &mut PieceMap, ranges: &GroupRanges) {
        let all = 0..map.geometry().groups();
        if self.seeder {
            return;
        }
        for run in ranges.runs() {
            let run = run.start..run.end.min(all.end);
            self.have.insert(run.clone());
            for piece in map.geometry().pieces_touching(&run) {
                if !self.pieces.get(piece) {
                    self.pieces.set(piece, true);
                    map.add_partial(piece);
                }
                if !self.whole.get(piece) {
                    let whole = self.have.contains_run(&map.geometry().groups_of(piece));
                    self.whole.set(piece, whole);
                }
                self.list(map, piece);
            }
        }
        if self.have.contains_run(&all) {
            self.leave(map);
            self.seeder = true;
        }
    }

    /// The peer holds less.
    pub(crate) fn remove(&mut self, map: &mut PieceMap, ranges: &GroupRanges) {
        let left = self.have.difference(ranges);
        self.leave(map);
        *self = Self::new(map);
        self.add(map, &left);
    }

    /// Takes its pieces out of the counts of the map.
    pub(crate) fn leave(&mut self, map: &mut PieceMap) {
        if !self.seeder {
            (0..map.geometry().pieces())
                .filter(|&piece| self.pieces.get(piece))
                .for_each(|p| map.remove_partial(p));
        }
        (self.pieces, self.whole) = (Bits::default(), Bits::default());
        self.listed = Bits::default();
        self.candidates = Vec::new();
    }

    /// A piece may have become a candidate: something of it is open again, or held by the peer now.
    pub(crate) fn list(&mut self, map: &PieceMap, piece: u32) {
        if map.state(piece) == PieceState::Open && self.pieces.get(piece) && !self.listed.get(piece)
        {
            self.listed.set(piece, true);
            self.candidates.push(piece);
        }
    }

    /// The first open groups of a piece that the peer holds.
    pub(crate) fn first_open(&self, map: &PieceMap, piece: u32) -> Option<Range<u64>> {
        spans::first_in_both(map.open(), &self.have, map.geometry().groups_of(piece))
    }

    /// Whether it holds open groups of a piece. Of most it holds all, where no search is needed.
    fn is_candidate(&self, map: &PieceMap, piece: u32) -> bool {
        map.state(piece) == PieceState::Open
            && (self.whole.get(piece) || self.first_open(map, piece).is_some())
    }

    /// About the rarest candidate of a peer that is no seeder, ties broken at random.
    pub(crate) fn rarest_candidate(&mut self, map: &PieceMap, rng: &mut SmallRng) -> Option<u32> {
        let mut best: Option<(u16, u32)> = None;
        let mut looked = 0;
        while looked < SAMPLE && !self.candidates.is_empty() {
            let at = rng.random_range(0..self.candidates.len());
            let piece = self.candidates[at];
            if !self.is_candidate(map, piece) {
                // Paid for by the listing of it.
                self.candidates.swap_remove(at);
                self.listed.set(piece, false);
                continue;
            }
            let rarity = map.partial(piece);
            if best.is_none_or(|(least, _)| rarity < least) {
                best = Some((rarity, piece));
            }
            looked += 1;
        }
        best.map(|(_, piece)| piece)
    }
}

#[cfg(test)]
mod tests {
    use capsule_proto::ranges::GROUP_LEN;
    use rand::SeedableRng;

    use super::*;
    use crate::PieceGeometry;

    fn map(groups: u64) -> PieceMap {
        let geometry = PieceGeometry::of(groups * GROUP_LEN);
        PieceMap::new(geometry, &GroupRanges::new(), &(0..groups).into())
    }

    #[test]
    fn the_rarest_of_few_candidates_is_found() {
        let mut map = map(10);
        let mut rng = SmallRng::seed_from_u64(1);
        let mut views = [View::new(&map), View::new(&map)];
        views[0].add(&mut map, &(0..9).into());
        views[1].add(&mut map, &(0..8).into());
        assert_eq!(views[0].rarest_candidate(&map, &mut rng), Some(8));
        map.take(&(8..9));
        assert!(
            views[0]
                .rarest_candidate(&map, &mut rng)
                .is_some_and(|piece| piece < 8)
        );
    }

    #[test]
    fn counts_follow_what_comes_and_goes() {
        let mut map = map(10);
        let mut view = View::new(&map);
        view.add(&mut map, &(2..5).into());
        view.remove(&mut map, &(3..4).into());
        let counts = |map: &PieceMap| (0..10).map(|piece| map.partial(piece)).collect::<Vec<_>>();
        assert_eq!(counts(&map), [0, 0, 1, 0, 1, 0, 0, 0, 0, 0]);
        view.add(&mut map, &(0..10).into());
        assert!(view.is_seeder());
        assert_eq!(counts(&map), [0; 10]);
        view.remove(&mut map, &(0..9).into());
        assert!(!view.is_seeder());
        assert_eq!(counts(&map), [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn released_pieces_are_candidates_again() {
        let mut map = map(4);
        let mut rng = SmallRng::seed_from_u64(1);
        let mut view = View::new(&map);
        view.add(&mut map, &(1..2).into());
        map.take(&(1..2));
        assert_eq!(view.rarest_candidate(&map, &mut rng), None);
        map.release(&(1..2));
        view.list(&map, 1);
        assert_eq!(view.rarest_candidate(&map, &mut rng), Some(1));
    }
}
