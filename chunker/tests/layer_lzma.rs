//! Frames of LZMA and patches: what is packed comes back, and what is damaged or dishonest is refused, with no more memory than
//! the index allows.

mod layer_support;

use capsule_chunker::layer::codec::{
    Compressor, Decoder, FrameFault, Packed, Step, lzma_against, patch,
};
use capsule_proto::FrameHash;
use capsule_proto::index::{Codec, Frame};
use layer_support::{program, random, text};
use proptest::prelude::*;

/// Decodes a frame that says of itself what a publisher would.
fn decode(
    codec: Codec,
    packed: &[u8],
    references: &[u8],
    content: &[u8],
) -> Result<Vec<u8>, FrameFault> {
    decode_as(
        codec,
        packed,
        references,
        content.len(),
        FrameHash::of(content),
    )
}

fn decode_as(
    codec: Codec,
    packed: &[u8],
    references: &[u8],
    len: usize,
    hash: FrameHash,
) -> Result<Vec<u8>, FrameFault> {
    let frame = Frame {
        pack_offset: 0,
        pack_len: packed.len() as u32,
        len: len as u32,
        codec,
        hash,
        depth: 0,
        references: Vec::new(),
        spans: Vec::new(),
    };
    let read = |buf: &mut [u8]| {
        buf.copy_from_slice(packed);
        Ok::<_, FrameFault>(())
    };
    Decoder::default().decode(&frame, read, references)
}

fn lzma(content: &[u8]) -> Vec<u8> {
    lzma_against(content, &[]).unwrap()
}

/// Old content with a change in every 50 bytes, and something new in its middle; and the steps that make it.
fn edited(old: &[u8]) -> (Vec<u8>, Vec<Step>) {
    let middle = old.len() / 2;
    let fresh = random(7, 300);
    let mut new = [&old[..middle], &fresh, &old[middle + 100..]].concat();
    new.iter_mut()
        .step_by(50)
        .for_each(|byte| *byte = byte.wrapping_add(3));
    let steps = vec![
        Step {
            over: middle as u32,
            new: 300,
            seek: 100,
        },
        Step {
            over: (old.len() - middle - 100) as u32,
            new: 0,
            seek: 0,
        },
    ];
    (new, steps)
}

#[test]
fn the_highest_effort_takes_lzma_where_it_is_worth_it() {
    // Numbers of four bytes, each of its own kind.
    let content: Vec<u8> = random(1, 200_000)
        .chunks(4)
        .flat_map(|bytes| [bytes[0], bytes[1] & 31, 64 + (bytes[2] & 3), 200])
        .collect();
    let mut compressor = Compressor::new(19).with_lzma(true);
    let Packed::Lzma(packed) = compressor.compress(&content).unwrap() else {
        panic!("they are smaller as LZMA");
    };
    let Packed::Zstd(zstd) = Compressor::new(19).compress(&content).unwrap() else {
        panic!("they compress");
    };
    assert!(packed.len() < zstd.len() - zstd.len() / 32);
    assert_eq!(
        decode(Codec::Lzma, &packed, &[], &content).unwrap(),
        content
    );
    for content in [random(2, 50_000), vec![0; 50_000]] {
        let packed = compressor.compress(&content).unwrap();
        assert!(!matches!(packed, Packed::Lzma(_)), "{packed:?}");
    }
}

#[test]
fn references_serve_as_dictionary() {
    let old = random(3, 100_000);
    let (new, _) = edited(&old);
    let packed = lzma_against(&new, &old).unwrap();
    assert!(packed.len() < new.len() / 10, "{}", packed.len());
    let decoded = decode(Codec::LzmaReferences, &packed, &old, &new);
    assert_eq!(decoded.unwrap(), new);
    // Other references make other content, if any.
    let other = random(4, 100_000);
    assert!(decode(Codec::LzmaReferences, &packed, &other, &new).is_err());
    assert!(decode(Codec::LzmaReferences, &packed, &old[..50_000], &new).is_err());
}

#[test]
fn a_patch_makes_what_its_steps_say() {
    let old = random(5, 100_000);
    let (new, steps) = edited(&old);
    let (codec, packed) = patch(&new, &old, &steps).unwrap().unwrap();
    assert_eq!(codec, Codec::Patch);
    assert!(packed.len() < 3000, "{}", packed.len());
    assert_eq!(decode(Codec::Patch, &packed, &old, &new).unwrap(), new);
    // More steps than content are not worth a patch.
    let step = Step {
        over: 1,
        new: 0,
        seek: 0,
    };
    assert_eq!(patch(&new[..10], &old, &[step; 10]).unwrap(), None);
}

/// The program, another in which functions have grown, and the steps that make it, function by function.
fn rebuilt(functions: usize) -> (Vec<u8>, Vec<u8>, Vec<Step>) {
    let (old, new) = (program(functions, 0), program(functions, 16));
    let step = |function: usize| Step {
        over: 200,
        new: if function % 3 == 1 { 16 } else { 0 },
        seek: 0,
    };
    (old, new, (0..functions).map(step).collect())
}

#[test]
fn a_patch_of_code_foretells_distances() {
    let (old, new, steps) = rebuilt(300);
    let (codec, packed) = patch(&new, &old, &steps).unwrap().unwrap();
    assert_eq!(codec, Codec::CodePatch);
    assert_eq!(decode(codec, &packed, &old, &new).unwrap(), new);
    // There are 1500, and most of them changed.
    assert!(packed.len() < 1500, "{}", packed.len());
    // As another codec it is other content, and so it is with other references.
    assert!(decode(Codec::Patch, &packed, &old, &new).is_err());
    let other = program(300, 8);
    assert!(decode(codec, &packed, &other[..old.len()], &new).is_err());
    assert!(decode(codec, &packed, &old[..old.len() - 1], &new).is_err());
}

/// What `proto/docs/index.md` says, number by number.
#[test]
fn a_patch_of_code_by_hand() {
    // Two calls and a jump on a condition: of 100, 100 and 101 places behind the distance; then a call that is cut off.
    let old = [
        0xe8, 100, 0, 0, 0, 0xe8, 95, 0, 0, 0, 0x0f, 0x85, 90, 0, 0, 0, 0xe8, 0, 0,
    ];
    // The first call's target has moved by 300: its distance is 400, but 100 is foretold. The second's is at its place. The jump's
    // is one byte further: of it is known that it lies in the same page.
    let difference = [0, 44, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 7];
    let new = [
        0xe8, 144, 1, 0, 0, 0xe8, 139, 1, 0, 0, 0x0f, 0x85, 134, 1, 0, 0, 0xe8, 5, 0, 7,
    ];
    let packed = by_hand(&[19, 1, 0], &difference);
    assert_eq!(decode(Codec::CodePatch, &packed, &old, &new).unwrap(), new);
}

#[test]
fn lzma_that_is_not_what_the_index_says_is_refused() {
    let content = text(1, 1000);
    let (packed, hash) = (lzma(&content), FrameHash::of(&content));
    let fault = |packed: &[u8], len| {
        decode_as(Codec::Lzma, packed, &[], len, hash).expect_err("it is refused")
    };
    assert!(decode(Codec::Lzma, &packed, &[], &content).is_ok());
    // Shorter and longer than claimed, cut off, empty; with a first byte that is never there, or too large a model.
    for len in [1, 999, 1001, 16 << 20] {
        assert!(matches!(fault(&packed, len), FrameFault::Lzma(_)), "{len}");
    }
    for len in 0..packed.len() {
        assert!(matches!(fault(&packed[..len], 1000), FrameFault::Lzma(_)));
    }
    let with = |at: usize, byte: u8| {
        let mut packed = packed.clone();
        packed[at] = byte;
        packed
    };
    assert!(matches!(fault(&with(1, 1), 1000), FrameFault::Lzma(_)));
    for properties in [8, 9 + 4, 225, 255] {
        let why = fault(&with(0, properties), 1000);
        assert!(matches!(why, FrameFault::Lzma(_)), "{properties}: {why}");
    }
    let longer = [&packed[..], b"behind"].concat();
    assert_eq!(
        fault(&longer, 1000),
        FrameFault::Trailing {
            packed: longer.len(),
            used: packed.len()
        }
    );
    // A bomb makes no byte beyond the claimed length.
    assert!(matches!(
        fault(&lzma(&vec![0; 16 << 20]), 1000),
        FrameFault::Lzma(_)
    ));
    let other = lzma(&text(2, 1000));
    assert!(matches!(fault(&other, 1000), FrameFault::Hash { .. }));
}

/// A patch by hand.
fn by_hand(control: &[u8], bytes: &[u8]) -> Vec<u8> {
    assert!(control.len() < 128);
    let stream = lzma(&[control, bytes].concat());
    [&[control.len() as u8][..], &stream].concat()
}

#[test]
fn steps_that_lead_astray_are_refused() {
    let (old, bytes) = ([1u8; 10], [1u8; 20]);
    for codec in [Codec::Patch, Codec::CodePatch] {
        lead_astray(codec, &old, &bytes);
    }
}

fn lead_astray(codec: Codec, old: &[u8], bytes: &[u8]) {
    let made = |control: &[u8]| {
        let hash = FrameHash::of(&[[2u8; 10], [1u8; 10]].concat());
        decode_as(codec, &by_hand(control, bytes), old, 20, hash)
    };
    assert!(made(&[10, 10, 0]).is_ok());
    // The last move leads nowhere: nothing is read there.
    assert!(made(&[10, 10, 0x99]).is_err());
    assert!(made(&[10, 10, 9]).is_ok());
    assert!(made(&[5, 0, 0, 5, 10, 0]).is_ok());
    let wrong: [&[u8]; 10] = [
        // They end too soon.
        &[],
        &[10, 9, 0],
        &[10, 10],
        // They go on too long, by new bytes, by bytes over old ones, or behind the end.
        &[10, 11, 0],
        &[0, 15, 0, 10, 0, 0],
        &[10, 10, 0, 0, 0, 0],
        // They leave the references: too many bytes, behind their end, before their start.
        &[11, 9, 0],
        &[5, 10, 2, 5, 0, 0],
        &[0, 10, 1, 10, 0, 0],
        // A number of more than 32 bits.
        &[0xff, 0xff, 0xff, 0xff, 0x7f, 0, 0],
    ];
    for control in wrong {
        let why = made(control).unwrap_err();
        assert!(matches!(why, FrameFault::Steps(_)), "{control:?}: {why}");
    }
    // More steps than content, and none at all.
    let why = decode_as(
        codec,
        &by_hand(&[0; 21], bytes),
        old,
        20,
        FrameHash([0; 16]),
    );
    assert!(matches!(why, Err(FrameFault::Steps(_))));
    let why = decode_as(codec, &[], old, 20, FrameHash([0; 16]));
    assert!(matches!(why, Err(FrameFault::Steps(_))));
    let why = decode_as(codec, &[3], old, 20, FrameHash([0; 16]));
    assert!(matches!(why, Err(FrameFault::Lzma(_))));
}

proptest! {
    #[test]
    fn any_content_comes_back(content in prop::collection::vec(0..4u8, 1..3000), old in prop::collection::vec(0..4u8, 1..3000)) {
        let packed = lzma_against(&content, &old).unwrap();
        prop_assert_eq!(decode(Codec::LzmaReferences, &packed, &old, &content).unwrap(), content.clone());
        let packed = lzma(&content);
        prop_assert_eq!(decode(Codec::Lzma, &packed, &[], &content).unwrap(), content);
    }

    // Nothing panics, nor is anything taken for what it is not.
    #[test]
    fn damage_is_noticed(seed: u64, at: prop::sample::Index, flip in 1..=255u8, kind in 0..4usize) {
        let (old, new, steps) = if kind == 3 {
            rebuilt(15)
        } else {
            let old = text(seed, 3000);
            let (new, steps) = edited(&old);
            (old, new, steps)
        };
        let (codec, mut packed) = match kind {
            0 => (Codec::Lzma, lzma(&new)),
            1 => (Codec::LzmaReferences, lzma_against(&new, &old).unwrap()),
            _ => patch(&new, &old, &steps).unwrap().unwrap(),
        };
        prop_assert_eq!(codec == Codec::CodePatch, kind == 3);
        let at = at.index(packed.len());
        packed[at] ^= flip;
        if let Ok(decoded) = decode(codec, &packed, &old, &new) {
            prop_assert!(decoded == new);
        }
    }

    #[test]
    fn noise_is_refused(packed in prop::collection::vec(any::<u8>(), 0..600), zero: bool, len in 1..5000usize, kind in 0..4usize) {
        let codec = [Codec::Lzma, Codec::LzmaReferences, Codec::Patch, Codec::CodePatch][kind];
        let mut packed = packed;
        // What begins as a stream does gets further.
        if zero && packed.len() > 3 {
            packed[..3].copy_from_slice(if kind >= 2 { &[3, 0x5d, 0] } else { &[0x5d, 0, 1] });
        }
        prop_assert!(decode_as(codec, &packed, &text(1, 500), len, FrameHash([0; 16])).is_err());
    }
}
