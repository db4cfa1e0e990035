//! Distances in x86 code: calls, jumps, and data that is named by its distance from the instruction.
//!
//! When code is built again, what was inserted moves all behind it, so each distance to something that moved otherwise has
//! another value. But whoever names the same target is off by what that moved: where one such distance was made, the others are
//! foretold. What is foretold follows from the old content and what was made so far; so nothing is written down for it, and any
//! bytes, code or not, come back. See "Patch of code" in `proto/docs/index.md`.

/// Targets and pages that are remembered, as a power of two.
const TABLE_BITS: u32 = 16;
/// Targets in one page mostly moved alike.
const PAGE_BITS: u32 = 12;
/// Spreads targets over their table: 2^32 divided by the golden ratio.
const SPREAD: u32 = 0x9e37_79b1;
/// Length of a distance, in bytes.
const DISTANCE_LEN: usize = 4;

/// Which way a stretch is gone through.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// From content to its difference.
    Subtract,
    /// And back.
    Add,
}

/// How far targets moved from old to new content, as far as it is known. Places and distances are modulo 2^32.
pub(super) struct Moves {
    /// By hash, the last target there, and how far it moved.
    targets: Vec<Option<(u32, u32)>>,
    /// How far the last target in a page moved.
    pages: Vec<Option<u32>>,
}

impl Moves {
    /// Nothing is known.
    pub(super) fn new() -> Self {
        Self {
            targets: vec![None; 1 << TABLE_BITS],
            pages: vec![None; 1 << TABLE_BITS],
        }
    }

    /// Turns bytes at place `new` into their difference to the old ones that lie under them, which begin at place `old`; or back.
    pub(super) fn pass(
        &mut self,
        way: Way,
        bytes: &mut [u8],
        under: &[u8],
        new: usize,
        old: usize,
    ) {
        let mut done = 0;
        for at in distances(under) {
            bytewise(way, &mut bytes[done..at], &under[done..at]);
            done = at + DISTANCE_LEN;
            let (given, was) = (distance(&bytes[at..]), distance(&under[at..]));
            let here = (new + at) as u32;
            let target = ((old + at) as u32).wrapping_add(was);
            let foretold = match self.moved(target) {
                Some(moved) => target.wrapping_add(moved).wrapping_sub(here),
                None => was,
            };
            bytewise(way, &mut bytes[at..done], &foretold.to_le_bytes());
            let is = match way {
                Way::Subtract => given,
                Way::Add => distance(&bytes[at..]),
            };
            self.learn(target, here.wrapping_add(is).wrapping_sub(target));
        }
        bytewise(way, &mut bytes[done..], &under[done..]);
    }

    fn moved(&self, target: u32) -> Option<u32> {
        match self.targets[slot(target)] {
            Some((known, moved)) if known == target => Some(moved),
            _ => self.pages[page(target)],
        }
    }

    fn learn(&mut self, target: u32, moved: u32) {
        self.targets[slot(target)] = Some((target, moved));
        self.pages[page(target)] = Some(moved);
    }
}

fn slot(target: u32) -> usize {
    (target.wrapping_mul(SPREAD) >> (32 - TABLE_BITS)) as usize
}

fn page(target: u32) -> usize {
    (target >> PAGE_BITS) as usize % (1 << TABLE_BITS)
}

/// Bytes whose difference is that of each by itself.
pub(super) fn bytewise(way: Way, bytes: &mut [u8], under: &[u8]) {
    let pairs = bytes.iter_mut().zip(under);
    match way {
        Way::Subtract => pairs.for_each(|(byte, old)| *byte = byte.wrapping_sub(*old)),
        Way::Add => pairs.for_each(|(byte, old)| *byte = byte.wrapping_add(*old)),
    }
}

/// Where in old bytes distances lie, if these are code.
fn distances(under: &[u8]) -> impl Iterator<Item = usize> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        while at + DISTANCE_LEN < under.len() {
            let behind = opcode_len(under[at], under[at + 1]).map(|len| at + len);
            if let Some(found) = behind.filter(|found| found + DISTANCE_LEN <= under.len()) {
                at = found + DISTANCE_LEN;
                return Some(found);
            }
            at += 1;
        }
        None
    })
}

/// Bytes before the distance, where these two are of an instruction with one.
const fn opcode_len(first: u8, second: u8) -> Option<usize> {
    match first {
        // Calls and jumps.
        0xe8 | 0xe9 => Some(1),
        // Jumps on a condition.
        0x0f if second & 0xf0 == 0x80 => Some(2),
        // Data beside a register: add, sub, two cmp, movsxd, test, two mov, lea, and what has no register.
        0x03 | 0x2b | 0x39 | 0x3b | 0x63 | 0x85 | 0x89 | 0x8b | 0x8d | 0xff
            if second & 0xc7 == 0x05 =>
        {
            Some(2)
        }
        _ => None,
    }
}

fn distance(bytes: &[u8]) -> u32 {
    let bytes = bytes[..DISTANCE_LEN].try_into();
    u32::from_le_bytes(bytes.expect("four bytes"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What is left of new bytes over old ones.
    fn difference(new: &[u8], old: &[u8]) -> Vec<u8> {
        let mut bytes = new.to_vec();
        Moves::new().pass(Way::Subtract, &mut bytes, old, 0, 0);
        bytes
    }

    #[test]
    fn whoever_names_a_target_that_moved_is_foretold() {
        // A call, a jump on a condition, and a load, all of what lies at 1000, and a call of what lies beside it.
        let code = |moved: u32| {
            let mut code = Vec::new();
            for (opcode, target) in [
                (&[0xe8][..], 1000),
                (&[0x0f, 0x84], 1000),
                (&[0x48, 0x8b, 0x05], 1000),
                (&[0xe9], 1016),
            ] {
                code.extend_from_slice(opcode);
                let from = code.len() as u32;
                code.extend_from_slice(&(target + moved - from).to_le_bytes());
            }
            code
        };
        let mut left = difference(&code(0x12345), &code(0));
        let (was, is) = (999u32.to_le_bytes(), (999u32 + 0x12345).to_le_bytes());
        let first: Vec<u8> = is
            .iter()
            .zip(&was)
            .map(|(is, was)| is.wrapping_sub(*was))
            .collect();
        assert_eq!(left[1..5], first);
        left[1..5].fill(0);
        assert!(left.iter().all(|byte| *byte == 0), "{left:?}");
        // What nothing is known of is taken to lie where it did.
        assert!(difference(&code(0), &code(0)).iter().all(|byte| *byte == 0));
    }

    #[test]
    fn only_whole_distances_are_found() {
        let found = |bytes: &[u8]| distances(bytes).collect::<Vec<_>>();
        assert_eq!(found(&[0xe8, 0, 0, 0, 0]), [1]);
        assert_eq!(found(&[0xe8, 0xe8, 0xe8, 0xe8, 0xe8, 0xe8]), [1]);
        assert_eq!(found(&[0x0f, 0x8f, 0, 0, 0, 0]), [2]);
        assert_eq!(found(&[0x8b, 0x3d, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0]), [2, 7]);
        let none: [&[u8]; 7] = [
            &[],
            &[0xe8],
            &[0xe8, 0, 0, 0],
            &[0x0f, 0x8f, 0, 0, 0],
            &[0x0f, 0x90, 0, 0, 0, 0],
            &[0x8b, 0x45, 0, 0, 0, 0],
            &[0x90; 100],
        ];
        none.iter()
            .for_each(|bytes| assert!(found(bytes).is_empty(), "{bytes:?}"));
    }

    /// Bytes that are much like code: opcodes anywhere, also inside of distances and at the ends.
    fn codelike() -> impl Strategy<Value = Vec<u8>> {
        let opcodes = vec![0xe8, 0xe9, 0x0f, 0x84, 0x8b, 0x05, 0x8d, 0x00, 0xff];
        let byte = prop_oneof![prop::sample::select(opcodes), any::<u8>()];
        prop::collection::vec(byte, 0..300)
    }

    proptest! {
        #[test]
        fn any_bytes_come_back(stretches in prop::collection::vec((codelike(), codelike(), 0..1usize << 24, 0..1usize << 24), 1..5)) {
            let (mut there, mut back) = (Moves::new(), Moves::new());
            for (new, old, new_at, old_at) in stretches {
                let len = new.len().min(old.len());
                let (new, old) = (&new[..len], &old[..len]);
                let mut bytes = new.to_vec();
                there.pass(Way::Subtract, &mut bytes, old, new_at, old_at);
                back.pass(Way::Add, &mut bytes, old, new_at, old_at);
                prop_assert_eq!(&bytes, new);
            }
        }
    }
}
