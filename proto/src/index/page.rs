//! Pages of an index: columns of numbers, compressed by zstd.
//!
//! A column holds one field of all runs or frames of the page; like beside like is what compresses.

use super::{
    Codec, Frame, FramePageEntry, IndexHeader, MAX_FRAME_LEN, MAX_FRAME_PACK_LEN,
    MAX_REFERENCE_BYTES, MAX_REFERENCES, MAX_SPANS, Reference, ReferenceTo, Run, RunFrom,
    RunPageEntry, Span,
};

use crate::codec::{DecodeError, Reader, Writer};
use crate::ranges::MAX_CONTENT_LEN;
use zstd::zstd_safe;

/// Most runs in a page: about 16 KiB compressed.
pub(super) const MAX_RUNS_PER_PAGE: u32 = 4096;
/// Most frames in a page: about 20 KiB compressed, most of it hashes.
pub(super) const MAX_FRAMES_PER_PAGE: u32 = 1024;
/// Longest page, compressed or not.
pub(super) const MAX_PAGE_LEN: usize = 1 << 20;
/// Most references and spans in a page, so that a full page stays below [`MAX_PAGE_LEN`].
pub(super) const MAX_DETAILS_PER_PAGE: usize = 16_384;
const LEVEL: i32 = 9;
/// The rule that a gap breaks.
pub(super) const UNMENTIONED: &str =
    "bytes are not mentioned, and the parent, if any, does not reach so far";

type Result<T> = std::result::Result<T, DecodeError>;

pub(super) fn compress(columns: &[Writer]) -> Vec<u8> {
    // Kept apart by the decoder's knowledge of the counts: no lengths between columns.
    let mut plain = Vec::new();
    columns
        .iter()
        .for_each(|column| plain.extend_from_slice(column.as_bytes()));
    zstd::bulk::compress(&plain, LEVEL).expect("compressing in memory does not fail")
}

fn decompress(bytes: &[u8], what: &'static str) -> Result<Vec<u8>> {
    if zstd_safe::find_frame_compressed_size(bytes) != Ok(bytes.len()) {
        return Err(DecodeError::Invalid {
            what,
            at: 0,
            why: "the page is not one zstd frame",
        });
    }
    // The decompressor stops at the bound, whatever the page claims.
    zstd::bulk::decompress(bytes, MAX_PAGE_LEN).map_err(|_| DecodeError::Invalid {
        what,
        at: 0,
        why: "the page does not decompress within its bound",
    })
}

pub(super) fn encode_runs(runs: &[Run]) -> Vec<u8> {
    let [mut kinds, mut gaps, mut lens, mut froms] = <[Writer; 4]>::default();
    let mut next = runs[0].start;
    let mut last = Last::default();
    for run in runs {
        gaps.varint(run.start - next);
        lens.varint(run.len);
        next = run.end();
        match run.from {
            RunFrom::Zero => kinds.u8(0),
            RunFrom::Copy { source, offset } => {
                kinds.u8(1);
                froms.varint(source.into());
                froms.signed(offset as i64 - last.copy_end as i64);
                last.copy_end = offset + run.len;
            }
            RunFrom::Frame { id, offset } => {
                kinds.u8(2);
                froms.signed(i64::from(id) - last.next_frame);
                froms.varint(offset.into());
                last.next_frame = i64::from(id) + 1;
            }
        }
    }
    compress(&[kinds, gaps, lens, froms])
}

/// What the next copy or frame most likely continues.
#[derive(Default)]
struct Last {
    copy_end: u64,
    next_frame: i64,
}

pub(super) fn decode_runs(
    bytes: &[u8],
    entry: &RunPageEntry,
    end: u64,
    header: &IndexHeader,
    frame_count: u64,
) -> Result<Vec<Run>> {
    let plain = decompress(bytes, "run page")?;
    let mut r = Reader::new(&plain);
    let count = entry.count as usize;
    let kinds = r.raw(count, "run kinds")?.to_vec();
    let column = |r: &mut Reader<'_>, what| {
        (0..count)
            .map(|_| r.varint(what, MAX_CONTENT_LEN))
            .collect::<Result<Vec<_>>>()
    };
    let gaps = column(&mut r, "run gaps")?;
    let lens = column(&mut r, "run lengths")?;
    let mut next = entry.start;
    let mut last = Last::default();
    let mut runs = Vec::with_capacity(count);
    for ((kind, gap), len) in kinds.into_iter().zip(gaps).zip(lens) {
        let at = r.at();
        let start = next + gap;
        next = start + len;
        if len == 0 || next > end || (runs.is_empty() && gap != 0) {
            return Err(r.invalid(
                "run",
                at,
                "runs are not empty, sorted, and within their page's part of the target",
            ));
        }
        if gap > 0 && start > header.inherited_len() {
            return Err(r.invalid("run", at, UNMENTIONED));
        }
        runs.push(Run {
            start,
            len,
            from: decode_from(&mut r, kind, len, header, frame_count, &mut last)?,
        });
    }
    if next < end && end > header.inherited_len() {
        return Err(r.invalid("run page", r.at(), UNMENTIONED));
    }
    r.finish()?;
    Ok(runs)
}

fn decode_from(
    r: &mut Reader<'_>,
    kind: u8,
    len: u64,
    header: &IndexHeader,
    frame_count: u64,
    last: &mut Last,
) -> Result<RunFrom> {
    let at = r.at();
    match kind {
        0 => Ok(RunFrom::Zero),
        1 => {
            let source = r.varint("source", u16::MAX.into())? as u16;
            let offset = last.copy_end.checked_add_signed(r.signed("copy offset")?);
            match (header.sources.get(usize::from(source)), offset) {
                (Some(of), Some(offset))
                    if offset.checked_add(len).is_some_and(|end| end <= of.size) =>
                {
                    last.copy_end = offset + len;
                    Ok(RunFrom::Copy { source, offset })
                }
                _ => Err(r.invalid("copy", at, "it reads outside of its source")),
            }
        }
        2 => {
            let id = last
                .next_frame
                .checked_add(r.signed("frame id")?)
                .and_then(|id| u64::try_from(id).ok());
            let offset = r.varint("offset in a frame", MAX_FRAME_LEN)?;
            match id {
                Some(id) if id < frame_count && offset + len <= MAX_FRAME_LEN => {
                    last.next_frame = id as i64 + 1;
                    Ok(RunFrom::Frame {
                        id: id as u32,
                        offset: offset as u32,
                    })
                }
                _ => Err(r.invalid("frame run", at, "it reads outside of the layer's frames")),
            }
        }
        _ => Err(r.invalid("run kind", at, "kinds are 0 to 2")),
    }
}

pub(super) fn encode_frames(first: u32, frames: &[Frame]) -> Vec<u8> {
    let [
        mut codecs,
        mut depths,
        mut lens,
        mut pack_lens,
        mut counts,
        mut references,
        mut spans,
        mut hashes,
    ] = <[Writer; 8]>::default();
    let mut last_end = 0;
    for (id, frame) in (first..).zip(frames) {
        codecs.u8(codec_tag(frame.codec));
        depths.u8(frame.depth);
        lens.varint(frame.len.into());
        pack_lens.varint(frame.pack_len.into());
        counts.varint(frame.references.len() as u64);
        counts.varint(frame.spans.len() as u64);
        hashes.raw(&frame.hash.0);
        for reference in &frame.references {
            references.varint(match reference.to {
                ReferenceTo::Source(source) => u64::from(source) << 1,
                ReferenceTo::Frame(earlier) => u64::from(id - earlier) << 1 | 1,
            });
            references.signed(reference.offset as i64 - last_end as i64);
            references.varint(reference.len.into());
            last_end = reference.offset + u64::from(reference.len);
        }
        for span in &frame.spans {
            spans.varint(span.len.into());
            hashes.raw(&span.hash.0);
        }
    }
    compress(&[
        codecs, depths, lens, pack_lens, counts, references, spans, hashes,
    ])
}

/// The columns of a frame page whose length follows from the number of frames.
struct FrameColumns {
    codecs: Vec<u8>,
    depths: Vec<u8>,
    lens: Vec<u64>,
    pack_lens: Vec<u64>,
    counts: Vec<(usize, usize)>,
}

pub(super) fn decode_frames(
    bytes: &[u8],
    entry: &FramePageEntry,
    header: &IndexHeader,
) -> Result<Vec<Frame>> {
    let plain = decompress(bytes, "frame page")?;
    let mut r = Reader::new(&plain);
    let columns = FrameColumns::decode(&mut r, entry.count as usize)?;
    let mut last_end = 0;
    let references = (entry.first..)
        .zip(&columns.counts)
        .map(|(id, &(count, _))| decode_references(&mut r, id, count, header, &mut last_end))
        .collect::<Result<Vec<_>>>()?;
    let span_lens = columns
        .counts
        .iter()
        .map(|&(_, count)| {
            (0..count)
                .map(|_| r.varint("span length", MAX_FRAME_LEN))
                .collect()
        })
        .collect::<Result<Vec<Vec<_>>>>()?;
    let mut pack_offset = entry.pack_offset;
    let mut frames = Vec::with_capacity(columns.codecs.len());
    for (i, (references, span_lens)) in references.into_iter().zip(span_lens).enumerate() {
        let hash = r.frame_hash("frame hash")?;
        let spans = span_lens
            .into_iter()
            .map(|len| {
                Ok(Span {
                    len: len as u32,
                    hash: r.frame_hash("span hash")?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let frame = Frame {
            pack_offset,
            pack_len: columns.pack_lens[i] as u32,
            len: columns.lens[i] as u32,
            codec: decode_codec(&r, columns.codecs[i])?,
            hash,
            depth: columns.depths[i],
            references,
            spans,
        };
        frame
            .check(entry.first + i as u32)
            .map_err(|why| r.invalid("frame", r.at(), why))?;
        pack_offset += u64::from(frame.pack_len);
        frames.push(frame);
    }
    if pack_offset != entry.pack_offset + entry.pack_len {
        return Err(r.invalid(
            "frame page",
            0,
            "the frames' lengths do not add up to the directory's",
        ));
    }
    r.finish()?;
    Ok(frames)
}

impl FrameColumns {
    fn decode(r: &mut Reader<'_>, count: usize) -> Result<Self> {
        let codecs = r.raw(count, "frame codecs")?.to_vec();
        let depths = r.raw(count, "frame depths")?.to_vec();
        let column = |r: &mut Reader<'_>, what, bound| {
            (0..count)
                .map(|_| r.varint(what, bound))
                .collect::<Result<Vec<_>>>()
        };
        let lens = column(r, "frame lengths", MAX_FRAME_LEN)?;
        let pack_lens = column(r, "frame pack lengths", MAX_FRAME_PACK_LEN)?;
        let mut details = 0;
        let counts = (0..count)
            .map(|_| {
                let at = r.at();
                let references = r.varint("references of a frame", MAX_REFERENCES as u64)? as usize;
                let spans = r.varint("spans of a frame", MAX_SPANS as u64)? as usize;
                details += references + spans;
                if details > MAX_DETAILS_PER_PAGE {
                    return Err(r.invalid(
                        "frame page",
                        at,
                        "it has more references and spans than a page may",
                    ));
                }
                Ok((references, spans))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            codecs,
            depths,
            lens,
            pack_lens,
            counts,
        })
    }
}

fn decode_references(
    r: &mut Reader<'_>,
    id: u32,
    count: usize,
    header: &IndexHeader,
    last_end: &mut u64,
) -> Result<Vec<Reference>> {
    let mut total = 0;
    (0..count)
        .map(|_| {
            let at = r.at();
            let tag = r.varint("reference", u64::MAX >> 1)?;
            let offset = last_end.checked_add_signed(r.signed("reference offset")?);
            let len = r.varint("reference length", MAX_REFERENCE_BYTES)?;
            let (to, bound) = if tag & 1 == 0 {
                let source = header.sources.get((tag >> 1) as usize);
                (
                    ReferenceTo::Source((tag >> 1) as u16),
                    source.map(|source| source.size),
                )
            } else {
                let earlier = u64::from(id).checked_sub(tag >> 1).filter(|_| tag > 1);
                (
                    ReferenceTo::Frame(earlier.unwrap_or_default() as u32),
                    earlier.map(|_| MAX_FRAME_LEN),
                )
            };
            total += len;
            let end = offset.and_then(|offset| offset.checked_add(len));
            match (offset, end, bound) {
                (Some(offset), Some(end), Some(bound))
                    if len > 0 && end <= bound && total <= MAX_REFERENCE_BYTES =>
                {
                    *last_end = end;
                    Ok(Reference {
                        to,
                        offset,
                        len: len as u32,
                    })
                }
                _ => Err(r.invalid(
                    "reference",
                    at,
                    "it reads outside of what comes before the frame, or too much",
                )),
            }
        })
        .collect()
}

const fn codec_tag(codec: Codec) -> u8 {
    match codec {
        Codec::Stored => 0,
        Codec::Zstd => 1,
        Codec::ZstdReferences => 2,
        Codec::Difference => 3,
        Codec::Lzma => 4,
        Codec::LzmaReferences => 5,
        Codec::Patch => 6,
        Codec::CodePatch => 7,
    }
}

fn decode_codec(r: &Reader<'_>, tag: u8) -> Result<Codec> {
    match tag {
        0 => Ok(Codec::Stored),
        1 => Ok(Codec::Zstd),
        2 => Ok(Codec::ZstdReferences),
        3 => Ok(Codec::Difference),
        4 => Ok(Codec::Lzma),
        5 => Ok(Codec::LzmaReferences),
        6 => Ok(Codec::Patch),
        7 => Ok(Codec::CodePatch),
        _ => Err(r.invalid(
            "frame codec",
            r.at(),
            "codecs are 0 to 7: upgrade capsule to read newer ones",
        )),
    }
}
