//! The directory at the head of an index: what the layer is, and where its pages lie.

use super::page::{self, MAX_FRAMES_PER_PAGE, MAX_PAGE_LEN, MAX_RUNS_PER_PAGE, UNMENTIONED};
use super::{
    Frame, IndexHeader, MAX_FRAME_PACK_LEN, MAX_FRAMES, MAX_INDEX_LEN, MAX_SOURCES, Run, Source,
    SourceKind, Space,
};
use crate::codec::{DecodeError, Reader, Writer};
use crate::ranges::MAX_CONTENT_LEN;

const MAGIC: &[u8; 4] = b"CAPI";
const VERSION: u8 = 1;
/// Longest head: magic, version, and the directory's length as a varint.
const MAX_HEAD_LEN: usize = 4 + 1 + 4;
/// Longest directory: that of a million pages.
const MAX_DIRECTORY_LEN: u64 = 24 << 20;
/// Most pages of runs, and most of frames.
pub(super) const MAX_PAGES: usize = 1 << 20;

/// What a layer is, and where in the index its pages lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory {
    header: IndexHeader,
    run_pages: Vec<RunPageEntry>,
    frame_pages: Vec<FramePageEntry>,
    frame_count: u64,
    pack_len: u64,
    index_len: u64,
}

/// A page of runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunPageEntry {
    /// First byte of the target that its first run makes.
    pub start: u64,
    /// How many runs it holds.
    pub count: u32,
    /// First byte in the index.
    pub at: u64,
    /// Length in the index, in bytes.
    pub len: u32,
}

/// A page of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FramePageEntry {
    /// Id of its first frame.
    pub first: u32,
    /// How many frames it holds.
    pub count: u32,
    /// Where in the pack its first frame begins.
    pub pack_offset: u64,
    /// Length of its frames in the pack, in bytes.
    pub pack_len: u64,
    /// First byte in the index.
    pub at: u64,
    /// Length in the index, in bytes.
    pub len: u32,
}

impl Directory {
    /// How many bytes from the start of an index tell how long its directory is.
    pub const HEAD_LEN: usize = MAX_HEAD_LEN;

    /// What the layer leads from and to.
    pub const fn header(&self) -> &IndexHeader {
        &self.header
    }

    /// The pages of runs, in order of the target.
    pub fn run_pages(&self) -> &[RunPageEntry] {
        &self.run_pages
    }

    /// The pages of frames, in order of ids.
    pub fn frame_pages(&self) -> &[FramePageEntry] {
        &self.frame_pages
    }

    /// How many frames the layer has.
    pub const fn frame_count(&self) -> u64 {
        self.frame_count
    }

    /// Length of the layer's pack, in bytes.
    pub const fn pack_len(&self) -> u64 {
        self.pack_len
    }

    /// Where in the index the pages of frames begin: behind the directory and the pages of runs. Its end, where there are none.
    pub fn frames_at(&self) -> u64 {
        let first = self.frame_pages.first();
        first.map_or(self.index_len, |page| page.at)
    }

    /// Length of the whole index, in bytes.
    pub const fn index_len(&self) -> u64 {
        self.index_len
    }

    /// Position of the page whose runs may reach the byte of the target: the last that begins at or before it.
    pub fn run_page_at(&self, offset: u64) -> Option<usize> {
        self.run_pages
            .partition_point(|page| page.start <= offset)
            .checked_sub(1)
    }

    /// Position of the page that holds the frame.
    pub fn frame_page_of(&self, id: u32) -> Option<usize> {
        let page = self
            .frame_pages
            .partition_point(|page| page.first <= id)
            .checked_sub(1)?;
        (u64::from(id) < self.frame_count).then_some(page)
    }

    /// How many bytes from the start of the index hold the directory; told by its first [`Self::HEAD_LEN`] bytes, or all of a shorter one.
    pub fn needed(start: &[u8]) -> Result<usize, DecodeError> {
        let mut reader = Reader::with_header(
            &start[..start.len().min(MAX_HEAD_LEN)],
            MAGIC,
            VERSION,
            "layer index",
            MAX_HEAD_LEN,
        )?;
        let len = reader.varint("directory length", MAX_DIRECTORY_LEN)? as usize;
        Ok(reader.at() + len)
    }

    /// Parses and checks the directory from the start of an index; later bytes are not looked at.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let needed = Self::needed(bytes)?;
        let bytes = bytes.get(..needed).ok_or(DecodeError::Truncated {
            what: "directory",
            at: bytes.len(),
        })?;
        let mut reader = Reader::with_header(bytes, MAGIC, VERSION, "layer index", needed)?;
        reader.varint("directory length", MAX_DIRECTORY_LEN)?;
        let header = decode_header(&mut reader)?;
        let mut at = needed as u64;
        let before_pages = reader.at();
        let run_pages = decode_run_pages(&mut reader, &header, &mut at)?;
        // The gaps behind are the pages' to check.
        if run_pages
            .first()
            .map_or(header.target_size, |page| page.start)
            > header.inherited_len()
        {
            return Err(reader.invalid("run pages", before_pages, UNMENTIONED));
        }
        let (mut frame_count, mut pack_len) = (0, 0);
        let frame_pages = reader.list("frame pages", MAX_PAGES, 3, |r| {
            let start = r.at();
            let entry = FramePageEntry {
                first: frame_count as u32,
                count: count(r, "frames in a page", MAX_FRAMES_PER_PAGE)?,
                pack_offset: pack_len,
                pack_len: r.varint(
                    "pack bytes of a page",
                    u64::from(MAX_FRAMES_PER_PAGE) * MAX_FRAME_PACK_LEN,
                )?,
                at,
                len: page_len(r)?,
            };
            frame_count += u64::from(entry.count);
            pack_len += entry.pack_len;
            at += u64::from(entry.len);
            if frame_count > MAX_FRAMES || pack_len > MAX_CONTENT_LEN {
                return Err(r.invalid("frame pages", start, "they exceed the largest pack"));
            }
            Ok(entry)
        })?;
        reader.finish()?;
        if at > MAX_INDEX_LEN {
            return Err(DecodeError::OutOfBounds {
                what: "index",
                at: 0,
                value: at,
                bound: MAX_INDEX_LEN,
            });
        }
        Ok(Self {
            header,
            run_pages,
            frame_pages,
            frame_count,
            pack_len,
            index_len: at,
        })
    }

    /// Decodes a page of runs from its bytes and checks each against the header. Whether a run fits its frame is told by the
    /// frame's own entry.
    ///
    /// # Panics
    /// Where there is no such page.
    pub fn decode_runs(&self, page: usize, bytes: &[u8]) -> Result<Vec<Run>, DecodeError> {
        let entry = self.run_pages[page];
        let end = self
            .run_pages
            .get(page + 1)
            .map_or(self.header.target_size, |next| next.start);
        page::decode_runs(bytes, &entry, end, &self.header, self.frame_count)
    }

    /// Decodes a page of frames from its bytes and checks each against the header. Whether a reference fits an earlier frame,
    /// and is less deep, is told by that frame's own entry.
    ///
    /// # Panics
    /// Where there is no such page.
    pub fn decode_frames(&self, page: usize, bytes: &[u8]) -> Result<Vec<Frame>, DecodeError> {
        page::decode_frames(bytes, &self.frame_pages[page], &self.header)
    }
}

fn decode_run_pages(
    r: &mut Reader<'_>,
    header: &IndexHeader,
    at: &mut u64,
) -> Result<Vec<RunPageEntry>, DecodeError> {
    let mut start = 0;
    let mut first = true;
    r.list("run pages", MAX_PAGES, 3, |r| {
        let from = r.at();
        let step = r.varint("start of a page", header.target_size)?;
        if (step == 0 && !first) || start + step >= header.target_size {
            return Err(r.invalid(
                "start of a page",
                from,
                "pages are sorted, without repetition, within the target",
            ));
        }
        start += step;
        first = false;
        let entry = RunPageEntry {
            start,
            count: count(r, "runs in a page", MAX_RUNS_PER_PAGE)?,
            at: *at,
            len: page_len(r)?,
        };
        *at += u64::from(entry.len);
        Ok(entry)
    })
}

fn count(r: &mut Reader<'_>, what: &'static str, bound: u32) -> Result<u32, DecodeError> {
    let at = r.at();
    match r.varint(what, bound.into())? as u32 {
        0 => Err(r.invalid(what, at, "a page is not empty")),
        count => Ok(count),
    }
}

fn page_len(r: &mut Reader<'_>) -> Result<u32, DecodeError> {
    Ok(r.varint("length of a page", MAX_PAGE_LEN as u64)? as u32)
}

/// Puts directory and pages together.
pub(super) fn encode(
    header: &IndexHeader,
    run_pages: &[(u64, u32, Vec<u8>)],
    frame_pages: &[(u32, u64, Vec<u8>)],
) -> Vec<u8> {
    let mut body = Writer::default();
    encode_header(&mut body, header);
    let mut previous = 0;
    body.list(run_pages, |w, (start, count, page)| {
        w.varint(start - previous);
        w.varint((*count).into());
        w.varint(page.len() as u64);
        previous = *start;
    });
    body.list(frame_pages, |w, (count, pack_len, page)| {
        w.varint((*count).into());
        w.varint(*pack_len);
        w.varint(page.len() as u64);
    });
    let mut index = Writer::with_header(MAGIC, VERSION);
    index.bytes(&body.finish());
    run_pages.iter().for_each(|(_, _, page)| index.raw(page));
    frame_pages.iter().for_each(|(_, _, page)| index.raw(page));
    index.finish()
}

fn encode_header(w: &mut Writer, header: &IndexHeader) {
    w.u8(space_tag(header.space));
    w.option(header.parent.as_ref(), Writer::hash);
    w.hash(&header.target);
    w.varint(header.target_size);
    w.list(&header.sources, |w, source| {
        w.u8(match source.kind {
            SourceKind::Parent => 0,
            SourceKind::ParentCapsule => 1,
            SourceKind::SameCapsule => 2,
        });
        w.hash(&source.root);
        w.u8(space_tag(source.space));
        w.varint(source.size);
    });
}

fn decode_header(r: &mut Reader<'_>) -> Result<IndexHeader, DecodeError> {
    let space = decode_space(r)?;
    let parent = r.option("parent", |r| r.hash("parent"))?;
    let target = r.hash("target")?;
    let target_size = r.varint("target size", MAX_CONTENT_LEN)?;
    let start = r.at();
    let sources = r.list("sources", MAX_SOURCES, 35, |r| {
        let at = r.at();
        let kind = match r.u8("source kind")? {
            0 => SourceKind::Parent,
            1 => SourceKind::ParentCapsule,
            2 => SourceKind::SameCapsule,
            _ => return Err(r.invalid("source kind", at, "kinds are 0 to 2")),
        };
        let root = r.hash("source")?;
        Ok(Source {
            kind,
            root,
            space: decode_space(r)?,
            size: r.varint("source size", MAX_CONTENT_LEN)?,
        })
    })?;
    for (i, source) in sources.iter().enumerate() {
        let is_parent = source.kind == SourceKind::Parent;
        if is_parent && (i > 0 || Some(source.root) != parent || source.space != space) {
            return Err(r.invalid(
                "sources",
                start,
                "the parent comes first, once, in the layer's own space",
            ));
        }
        if source.root == target && source.space == space {
            return Err(r.invalid("sources", start, "a layer does not read what it makes"));
        }
    }
    if parent.is_some()
        && sources
            .first()
            .is_none_or(|first| first.kind != SourceKind::Parent)
    {
        return Err(r.invalid("sources", start, "the parent comes first"));
    }
    Ok(IndexHeader {
        space,
        parent,
        target,
        target_size,
        sources,
    })
}

const fn space_tag(space: Space) -> u8 {
    match space {
        Space::Stream => 0,
        Space::Contents => 1,
    }
}

fn decode_space(r: &mut Reader<'_>) -> Result<Space, DecodeError> {
    let at = r.at();
    match r.u8("space")? {
        0 => Ok(Space::Stream),
        1 => Ok(Space::Contents),
        _ => Err(r.invalid("space", at, "spaces are 0 and 1")),
    }
}
