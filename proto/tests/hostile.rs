//! Input that is cut, flipped, stretched or made up: decoders refuse it, or it is as good as what they encode.
//!
//! Memory is counted: no decoder takes more than a fixed multiple of its input, whatever the input claims.

mod samples;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use capsule_proto::RootHash;
use capsule_proto::codec::{DecodeError, Writer};
use capsule_proto::credential::{Credential, FleetKey, Revoked, Token};
use capsule_proto::index::{Directory, Index};
use capsule_proto::listing::Listing;
use capsule_proto::manifest::Manifest;
use capsule_proto::record::SignedRecord;
use capsule_proto::wire::{
    Control, DataHeader, FrameHeader, Greeting, MAX_CONTROL_LEN, Status, Verdict, WireError,
};
use proptest::prelude::*;
use samples::signed::{FLEET_SECRET, NOW, fleet};
use samples::{Case, Encoding, all, read_golden};

/// Memory that a decoder may take for each byte of input: the shortest item of a list is two bytes, the largest value
/// that one becomes 120 bytes, and a growing list holds its old and its new items for a moment.
const PER_BYTE: usize = 200;
/// Memory that a decoder may take for any input: two pages of an index, with what their columns hold.
const BASE: usize = 8 << 20;

struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(change: isize) {
    LIVE.set(LIVE.get() + change);
    PEAK.set(PEAK.get().max(LIVE.get()));
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs a decoder and checks what it takes at most.
fn bounded<T>(input_len: usize, decode: impl FnOnce() -> T) -> T {
    PEAK.set(LIVE.get());
    let before = LIVE.get();
    let result = decode();
    let taken = (PEAK.get() - before) as usize;
    assert!(
        taken <= BASE + input_len * PER_BYTE,
        "{taken} bytes of memory for {input_len} of input"
    );
    result
}

fn reencode(case: &dyn Case, bytes: &[u8]) -> Result<Vec<u8>, String> {
    bounded(bytes.len(), || case.reencode(bytes))
}

fn flips(bytes: &[u8]) -> impl Iterator<Item = (usize, Vec<u8>)> + '_ {
    (0..bytes.len() * 8).map(|bit| {
        let mut flipped = bytes.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        (bit, flipped)
    })
}

#[test]
fn what_is_cut_off_is_refused() {
    for case in all() {
        let golden = case.golden();
        for len in 0..golden.len() {
            let result = reencode(&*case, &golden[..len]);
            // Protobuf has no end of its own: frames and the handshake say how long a message is.
            let may_decode =
                case.encoding() == Encoding::Pinned && !case.file().starts_with("token");
            assert!(
                result.is_err() || may_decode,
                "{} cut to {len} bytes",
                case.file()
            );
        }
    }
}

#[test]
fn what_is_flipped_is_refused_or_another_canonical_value() {
    for case in all() {
        for (bit, flipped) in flips(&case.golden()) {
            let result = reencode(&*case, &flipped);
            if let (Ok(encoded), Encoding::Canonical) = (result, case.encoding()) {
                assert_eq!(encoded, flipped, "{} with bit {bit} flipped", case.file());
            }
        }
    }
}

#[test]
fn what_follows_the_end_is_refused() {
    for case in all() {
        let file = case.file();
        if case.encoding() != Encoding::Pinned {
            for extra in [&[0][..], &[1], &case.golden()] {
                let result = reencode(&*case, &[&case.golden()[..], extra].concat());
                assert!(result.is_err(), "{file} and {} bytes", extra.len());
            }
        }
    }
}

#[test]
fn other_formats_and_versions_are_refused_by_name() {
    for file in [
        "manifest-file.hex",
        "listing-all.hex",
        "index-plain.hex",
        "record-name.hex",
        "credential.hex",
    ] {
        let case = all().into_iter().find(|case| case.file() == file).unwrap();
        for at in 0..5 {
            let mut other = case.golden();
            other[at] += 1;
            let error = reencode(&*case, &other).unwrap_err();
            assert!(error.contains("format version 1"), "{file}: {error}");
        }
    }
}

#[test]
fn a_flipped_token_is_refused_or_the_same() {
    let text = String::from_utf8(read_golden("token.txt")).unwrap();
    for (bit, flipped) in flips(text.as_bytes()) {
        let Ok(flipped) = String::from_utf8(flipped) else {
            continue;
        };
        if let Ok(token) = Token::parse(&flipped, NOW) {
            // Letters count in either case.
            assert_eq!(token.to_string(), text, "bit {bit}");
        }
    }
}

#[test]
fn no_flipped_signature_or_signed_byte_verifies() {
    let revoked = Revoked::default();
    let golden = read_golden("credential.hex");
    let verify = |bytes: &[u8]| {
        Credential::decode(bytes).is_ok_and(|it| it.verify(&fleet(), NOW, &revoked).is_ok())
    };
    assert!(verify(&golden));
    for (bit, flipped) in flips(&golden) {
        assert!(!verify(&flipped), "credential with bit {bit} flipped");
    }
    for case in all()
        .into_iter()
        .filter(|case| case.file().starts_with("record-"))
    {
        let golden = case.golden();
        let verify = |bytes: &[u8]| {
            SignedRecord::decode(bytes).is_ok_and(|it| it.verify(&fleet(), NOW, &revoked).is_ok())
        };
        assert!(verify(&golden), "{}", case.file());
        // Each bit of the first record; one bit of each byte of the others, as they begin alike.
        let step = if case.file() == "record-layer.hex" {
            1
        } else {
            9
        };
        for (bit, flipped) in flips(&golden).step_by(step) {
            assert!(!verify(&flipped), "{} with bit {bit} flipped", case.file());
        }
    }
}

#[test]
fn a_record_of_another_fleet_does_not_count() {
    let record = SignedRecord::decode(&read_golden("record-name.hex")).unwrap();
    assert_ne!([9; 32], FLEET_SECRET);
    let other = FleetKey::from_secret([9; 32]).fleet();
    assert!(record.verify(&other, NOW, &Revoked::default()).is_err());
}

// A count or a length that nothing follows: refused before memory is taken for it.
#[test]
fn lengths_beyond_the_input_or_the_bound_are_refused() {
    for claimed in [
        1 << 10,
        1 << 20,
        u64::from(u32::MAX),
        u64::MAX >> 1,
        u64::MAX,
    ] {
        for magic in [b"CAPM", b"CAPT", b"CAPI", b"CAPR", b"CAPC"] {
            let mut w = Writer::with_header(magic, 1);
            w.varint(claimed);
            let bytes = w.finish();
            bounded(bytes.len(), || {
                assert!(Manifest::decode(&bytes).is_err());
                assert!(Listing::decode(&bytes).is_err());
                assert!(Index::decode(&bytes).is_err());
                assert!(SignedRecord::decode(&bytes).is_err());
                assert!(Credential::decode(&bytes).is_err());
            });
        }
    }
    let too_long = vec![0; MAX_CONTROL_LEN + 1];
    assert!(matches!(
        Control::decode(&too_long),
        Err(WireError::TooLong { .. })
    ));
    assert!(FrameHeader::decode(&[0xff, 0xff, 0xff, 0xff, 1]).is_err());
    assert!(FrameHeader::decode(&[0, 16, 0, 1, 0]).is_err());
    assert!(DataHeader::decode(&[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 65, 0]).is_err());
}

// Every control message that protobuf can pack most tightly: two bytes an item.
#[test]
fn many_tiny_items_in_a_message_take_bounded_memory() {
    for kind in 1..=13 {
        for item in [[0x0a, 0], [0x12, 0], [0x1a, 0], [0x18, 1]] {
            let items = item.repeat(MAX_CONTROL_LEN / 2 - 4);
            let mut w = Writer::default();
            w.u8(kind << 3 | 2);
            w.bytes(&items);
            let message = w.finish();
            assert!(message.len() <= MAX_CONTROL_LEN);
            // What the kind does not know, it skips; a thousand times more ids, runs or peers than allowed, it refuses.
            let decoded = bounded(message.len(), || Control::decode(&message));
            let known = matches!((kind, item[0]), (1 | 2, 0x1a | 0x12) | (7..=10, 0x0a));
            assert!(decoded.is_err() || !known, "kind {kind}, items {item:?}");
        }
    }
}

/// An index of a stream of zeros, of the given pages of runs (counts and bytes).
fn index_of(pages: &[(u32, Vec<u8>)], target_size: u64) -> Vec<u8> {
    let mut body = Writer::default();
    body.u8(0);
    body.u8(0);
    body.hash(&RootHash::of(b"zeros"));
    body.varint(target_size);
    body.varint(0);
    body.varint(pages.len() as u64);
    let mut step = 0;
    for (count, page) in pages {
        body.varint(step);
        body.varint((*count).into());
        body.varint(page.len() as u64);
        step = (*count).into();
    }
    body.varint(0);
    let mut index = Writer::with_header(b"CAPI", 1);
    index.bytes(body.as_bytes());
    pages.iter().for_each(|(_, page)| index.raw(page));
    index.finish()
}

/// The columns of runs of one zero byte each.
fn zero_runs(count: usize) -> Vec<u8> {
    [vec![0; count], vec![0; count], vec![1; count]].concat()
}

fn compress(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 3).unwrap()
}

#[test]
fn pages_that_unfold_beyond_their_bound_are_refused() {
    let good = compress(&zero_runs(9));
    assert_eq!(
        Index::decode(&index_of(&[(9, good.clone())], 9))
            .unwrap()
            .runs
            .len(),
        9
    );
    let refused = |page: Vec<u8>, why: &str| {
        let index = index_of(&[(9, page)], 9);
        let error = bounded(index.len(), || Index::decode(&index)).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    };
    refused(
        compress(&vec![0; (1 << 20) + 1]),
        "does not decompress within its bound",
    );
    refused(
        compress(&vec![0; 1 << 30]),
        "does not decompress within its bound",
    );
    // Within the bound, but more than the runs take.
    refused(compress(&vec![0; 1 << 20]), "run");
    refused(
        compress(&[zero_runs(9), vec![0]].concat()),
        "1 bytes follow",
    );
    refused(good.repeat(2), "not one zstd frame");
    refused([&good[..], &[0]].concat(), "not one zstd frame");
    refused(good[..good.len() - 1].to_vec(), "not one zstd frame");
    refused(zero_runs(9), "not one zstd frame");
    refused(vec![], "not one zstd frame");
}

// A directory of a hundred kilobytes may claim runs for gigabytes of memory: whole, it is refused at once.
#[test]
fn an_index_too_large_to_decode_whole_is_refused_before_it_is() {
    let page = (4096, compress(&zero_runs(4096)));
    let index = index_of(&vec![page; 9000], 4096 * 9000);
    let error = bounded(index.len(), || Index::decode(&index)).unwrap_err();
    assert!(matches!(error, DecodeError::OutOfBounds { .. }), "{error}");
    // Page by page it can be read.
    let directory = Directory::decode(&index).unwrap();
    let entry = directory.run_pages()[8999];
    let bytes = &index[entry.at as usize..][..entry.len as usize];
    assert_eq!(
        directory
            .decode_runs(8999, bytes)
            .unwrap()
            .last()
            .unwrap()
            .end(),
        4096 * 9000
    );
}

#[test]
fn bytes_that_nothing_mentions_are_refused() {
    let page = compress(&zero_runs(9));
    for (target_size, pages) in [
        (10, vec![(9, page.clone())]),
        (1, vec![]),
        (8, vec![(9, page)]),
    ] {
        assert!(
            Index::decode(&index_of(&pages, target_size)).is_err(),
            "{target_size}"
        );
    }
}

/// Gives the bytes to every decoder.
fn decode_as_everything(bytes: &[u8]) {
    bounded(bytes.len(), || {
        drop((
            Manifest::decode(bytes),
            Listing::decode(bytes),
            Index::decode(bytes),
        ))
    });
    bounded(bytes.len(), || {
        drop((Directory::needed(bytes), Directory::decode(bytes)))
    });
    bounded(bytes.len(), || {
        drop((SignedRecord::decode(bytes), Credential::decode(bytes)))
    });
    bounded(bytes.len(), || {
        drop((
            Greeting::decode(bytes),
            Verdict::decode(bytes),
            Status::decode(bytes),
        ))
    });
    bounded(bytes.len(), || drop(Control::decode(bytes)));
    bounded(bytes.len(), || {
        drop(Token::parse(&String::from_utf8_lossy(bytes), NOW))
    });
    if let Some(header) = bytes.first_chunk() {
        drop(FrameHeader::decode(header));
    }
    if let Some(header) = bytes.first_chunk() {
        drop(DataHeader::decode(header));
    }
    // The pages of whatever directory it has, with whatever bytes.
    if let Ok(directory) = Directory::decode(bytes) {
        (0..directory.run_pages().len().min(4))
            .for_each(|page| drop(directory.decode_runs(page, bytes)));
        (0..directory.frame_pages().len().min(4))
            .for_each(|page| drop(directory.decode_frames(page, bytes)));
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_harm_no_decoder(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        decode_as_everything(&bytes);
        for magic in [b"CAPM", b"CAPT", b"CAPI", b"CAPR", b"CAPC", b"CAPK"] {
            decode_as_everything(&[&magic[..], &[1], &bytes].concat());
        }
    }

    // Past the compression, the columns themselves.
    #[test]
    fn arbitrary_columns_harm_no_page(columns in prop::collection::vec(0u8..4, 0..200), count in 1u32..40) {
        let index = index_of(&[(count, compress(&columns))], 1 << 20);
        decode_as_everything(&index);
    }

    // Several golden vectors' parts put together, which come further than noise does.
    #[test]
    fn spliced_vectors_harm_no_decoder(
        from in any::<prop::sample::Index>(),
        to in any::<prop::sample::Index>(),
        cut in any::<prop::sample::Index>(),
        paste in any::<prop::sample::Index>(),
        middle in prop::collection::vec(any::<u8>(), 0..8),
    ) {
        let cases = all();
        let (from, to) = (from.get(&cases).golden(), to.get(&cases).golden());
        let (head, tail) = (&from[..cut.index(from.len() + 1)], &to[paste.index(to.len() + 1)..]);
        decode_as_everything(&[head, &middle, tail].concat());
    }
}
