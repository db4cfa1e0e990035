//! The piece map of one blob: which groups are wanted, held, open or in flight, and how rare each piece is.
//!
//! Invariant: every piece is in exactly one [`PieceState`], which follows from the sets of groups; and
//! the rarity buckets hold exactly the open pieces. Who holds which piece is the business of the views,
//! which request covers which groups that of the flights.

use std::ops::Range;

use capsule_proto::ranges::GroupRanges;

use crate::PieceGeometry;
use crate::spans;

/// Where a piece stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PieceState {
    /// Nothing of it is wanted.
    Unwanted,
    /// Something of it is wanted, not held and in no request.
    Open,
    /// All that is wanted of it and not held is in requests.
    Active,
    /// All that is wanted of it is held.
    Held,
}

#[derive(Clone, Debug)]
struct Piece {
    state: PieceState,
    /// Connected peers that hold some, but not all, of the blob, and something of this piece.
    partial: u16,
    /// Where it lies in its bucket, if open.
    at: u32,
}

/// Wanted, held and open groups of one blob, and its open pieces by rarity.
#[derive(Clone, Debug)]
pub(crate) struct PieceMap {
    geometry: PieceGeometry,
    pieces: Vec<Piece>,
    /// `buckets[n]`: the open pieces with `n` partial providers, in no order.
    buckets: Vec<Vec<u32>>,
    want: GroupRanges,
    held: GroupRanges,
    /// Wanted and not held.
    lacking: GroupRanges,
    /// Lacking and in no request.
    open: GroupRanges,
    lacking_groups: u64,
}

impl PieceMap {
    pub(crate) fn new(geometry: PieceGeometry, have: &GroupRanges, want: &GroupRanges) -> Self {
        let all = GroupRanges::from(0..geometry.groups());
        let piece = Piece {
            state: PieceState::Unwanted,
            partial: 0,
            at: 0,
        };
        let mut map = Self {
            geometry,
            pieces: vec![piece; geometry.pieces() as usize],
            buckets: vec![Vec::new()],
            want: GroupRanges::new(),
            held: have.intersection(&all),
            lacking: GroupRanges::new(),
            open: GroupRanges::new(),
            lacking_groups: 0,
        };
        map.extend_want(want);
        map
    }

    pub(crate) fn geometry(&self) -> &PieceGeometry {
        &self.geometry
    }

    pub(crate) fn held(&self) -> &GroupRanges {
        &self.held
    }

    pub(crate) fn want(&self) -> &GroupRanges {
        &self.want
    }

    pub(crate) fn open(&self) -> &GroupRanges {
        &self.open
    }

    pub(crate) fn lacking(&self) -> &GroupRanges {
        &self.lacking
    }

    /// Whether all that is wanted is held.
    pub(crate) fn is_complete(&self) -> bool {
        self.lacking_groups == 0
    }

    pub(crate) fn state(&self, piece: u32) -> PieceState {
        self.pieces[piece as usize].state
    }

    /// How many partial providers hold something of the piece.
    pub(crate) fn partial(&self, piece: u32) -> u16 {
        self.pieces[piece as usize].partial
    }

    /// Open pieces by their number of partial providers, rarest first.
    pub(crate) fn buckets(&self) -> &[Vec<u32>] {
        &self.buckets
    }

    /// Whether some open piece is held by no partial provider.
    pub(crate) fn has_unspread(&self) -> bool {
        !self.buckets[0].is_empty()
    }

    /// Wants more; returns the pieces touched.
    pub(crate) fn extend_want(&mut self, more: &GroupRanges) -> Vec<u32> {
        let more = more.intersection(&GroupRanges::from(0..self.geometry.groups()));
        let fresh = more.difference(&self.want).difference(&self.held);
        self.want.union_with(&more);
        self.lacking.union_with(&fresh);
        self.open.union_with(&fresh);
        self.lacking_groups += fresh.count();
        let mut touched: Vec<u32> = more
            .runs()
            .iter()
            .flat_map(|run| self.geometry.pieces_touching(run))
            .collect();
        touched.dedup();
        touched.iter().for_each(|&piece| self.refresh(piece));
        touched
    }

    /// The run goes into a request.
    pub(crate) fn take(&mut self, run: &Range<u64>) {
        self.open.remove(run.clone());
        self.refresh_all(run);
    }

    /// The run is in no request any more: what is lacking of it is open again.
    pub(crate) fn release(&mut self, run: &Range<u64>) {
        let parts: Vec<_> = spans::overlaps(&self.lacking, run.clone()).collect();
        parts.into_iter().for_each(|part| self.open.insert(part));
        self.refresh_all(run);
    }

    /// The run is verified and stored; returns how many of its groups were not held before.
    pub(crate) fn receive(&mut self, run: &Range<u64>) -> Vec<Range<u64>> {
        let run = run.start..run.end.min(self.geometry.groups());
        let fresh = spans::gaps(&self.held, run.clone());
        let lacked: u64 = spans::overlaps(&self.lacking, run.clone())
            .map(|r| spans::len(&r))
            .sum();
        self.lacking_groups -= lacked;
        self.held.insert(run.clone());
        self.lacking.remove(run.clone());
        self.open.remove(run.clone());
        self.refresh_all(&run);
        fresh
    }

    /// One more partial provider holds something of the piece.
    pub(crate) fn add_partial(&mut self, piece: u32) {
        self.move_bucket(piece, |partial| partial + 1);
    }

    /// One partial provider less.
    pub(crate) fn remove_partial(&mut self, piece: u32) {
        self.move_bucket(piece, |partial| partial - 1);
    }

    fn move_bucket(&mut self, piece: u32, change: impl FnOnce(u16) -> u16) {
        let open = self.state(piece) == PieceState::Open;
        if open {
            self.leave_bucket(piece);
        }
        let entry = &mut self.pieces[piece as usize];
        entry.partial = change(entry.partial);
        if open {
            self.enter_bucket(piece);
        }
    }

    fn refresh_all(&mut self, run: &Range<u64>) {
        self.geometry
            .pieces_touching(run)
            .for_each(|piece| self.refresh(piece));
    }

    /// Brings a piece's state in line with the sets.
    fn refresh(&mut self, piece: u32) {
        let state = self.state_by_sets(piece);
        let old = std::mem::replace(&mut self.pieces[piece as usize].state, state);
        match (old == PieceState::Open, state == PieceState::Open) {
            (false, true) => self.enter_bucket(piece),
            (true, false) => self.leave_bucket(piece),
            _ => {}
        }
    }

    fn state_by_sets(&self, piece: u32) -> PieceState {
        let groups = self.geometry.groups_of(piece);
        if self.open.intersects(&groups) {
            PieceState::Open
        } else if self.lacking.intersects(&groups) {
            PieceState::Active
        } else if self.want.intersects(&groups) {
            PieceState::Held
        } else {
            PieceState::Unwanted
        }
    }

    /// Whether states follow from the sets, and exactly the open pieces are in the buckets, each in that of its rarity.
    pub(crate) fn audit(&self) -> Result<(), String> {
        if self.lacking != self.want.difference(&self.held)
            || self.lacking_groups != self.lacking.count()
        {
            return Err("lacking is not what is wanted and not held".into());
        }
        let mut open = 0;
        for piece in 0..self.geometry.pieces() {
            let entry = &self.pieces[piece as usize];
            if entry.state != self.state_by_sets(piece) {
                return Err(format!("piece {piece} is not {:?}", entry.state));
            }
            if entry.state == PieceState::Open {
                open += 1;
                let bucket = self.buckets.get(usize::from(entry.partial));
                if bucket.and_then(|bucket| bucket.get(entry.at as usize)) != Some(&piece) {
                    return Err(format!("piece {piece} is not in its bucket"));
                }
            }
        }
        let listed: usize = self.buckets.iter().map(Vec::len).sum();
        if listed != open {
            return Err(format!("{listed} pieces are in buckets, {open} are open"));
        }
        Ok(())
    }

    fn enter_bucket(&mut self, piece: u32) {
        let entry = &mut self.pieces[piece as usize];
        let rarity = usize::from(entry.partial);
        if self.buckets.len() <= rarity {
            self.buckets.resize_with(rarity + 1, Vec::new);
        }
        entry.at = self.buckets[rarity].len() as u32;
        self.buckets[rarity].push(piece);
    }

    fn leave_bucket(&mut self, piece: u32) {
        let entry = &self.pieces[piece as usize];
        let (rarity, at) = (usize::from(entry.partial), entry.at);
        let bucket = &mut self.buckets[rarity];
        bucket.swap_remove(at as usize);
        if let Some(&moved) = bucket.get(at as usize) {
            self.pieces[moved as usize].at = at;
        }
    }
}

#[cfg(test)]
mod tests {
    use capsule_proto::ranges::GROUP_LEN;
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Take(u64, u64),
        Release(u64, u64),
        Receive(u64, u64),
        Want(u64, u64),
        Partial(u32, bool),
    }

    const GROUPS: u64 = 5000;

    fn step() -> impl Strategy<Value = Step> {
        let run = || (0..GROUPS, 1u64..70);
        prop_oneof![
            run().prop_map(|(s, l)| Step::Take(s, l)),
            run().prop_map(|(s, l)| Step::Release(s, l)),
            run().prop_map(|(s, l)| Step::Receive(s, l)),
            run().prop_map(|(s, l)| Step::Want(s, l)),
            (0u32..1250, any::<bool>()).prop_map(|(p, up)| Step::Partial(p, up)),
        ]
    }

    /// What the sets say of a piece, group by group.
    fn slow_state(map: &PieceMap, piece: u32) -> PieceState {
        let mut state = PieceState::Unwanted;
        for group in map.geometry.groups_of(piece) {
            if map.open.contains(group) {
                return PieceState::Open;
            }
            if map.lacking.contains(group) {
                state = PieceState::Active;
            } else if map.want.contains(group) && state == PieceState::Unwanted {
                state = PieceState::Held;
            }
        }
        state
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn a_piece_is_in_exactly_one_state_and_bucket(
            have in 0..GROUPS,
            want in 0..GROUPS,
            steps in prop::collection::vec(step(), 0..60),
        ) {
            let geometry = PieceGeometry::of(GROUPS * GROUP_LEN);
            let mut map = PieceMap::new(geometry, &(0..have).into(), &(want..GROUPS).into());
            for step in steps {
                match step {
                    Step::Take(s, l) => {
                        if let Some(run) = spans::overlaps(&map.open.clone(), s..(s + l).min(GROUPS)).next() {
                            map.take(&run);
                        }
                    }
                    Step::Release(s, l) => map.release(&(s..(s + l).min(GROUPS))),
                    Step::Receive(s, l) => { map.receive(&(s..(s + l).min(GROUPS))); }
                    Step::Want(s, l) => { map.extend_want(&(s..s + l).into()); }
                    Step::Partial(p, true) => map.add_partial(p),
                    Step::Partial(p, false) => if map.partial(p) > 0 { map.remove_partial(p) },
                }
            }
            prop_assert_eq!(map.lacking_groups, map.want.difference(&map.held).count());
            prop_assert_eq!(&map.lacking, &map.want.difference(&map.held));
            prop_assert!(map.open.difference(&map.lacking).is_empty());
            let mut listed = 0;
            for piece in 0..geometry.pieces() {
                let state = map.state(piece);
                prop_assert_eq!(state, slow_state(&map, piece));
                if state == PieceState::Open {
                    let entry = &map.pieces[piece as usize];
                    prop_assert_eq!(map.buckets[usize::from(entry.partial)][entry.at as usize], piece);
                    listed += 1;
                }
            }
            prop_assert_eq!(listed, map.buckets.iter().map(Vec::len).sum::<usize>());
        }
    }
}
