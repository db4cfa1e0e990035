//! The old contents that new content is compared with, read in pieces.

use std::ops::Range;
use std::sync::Arc;

use capsule_proto::index::Source as SourceName;
use thiserror::Error;

use crate::content::{Content, ReadError};

/// Read at a time: what is compared is seldom alone.
const PIECE_LEN: u64 = 64 << 10;
/// Pieces that a reader keeps: 2 MiB.
const PIECES: usize = 32;

/// A content that copies and references may read.
#[derive(Clone)]
pub struct OldSource {
    /// What the layer's index calls it.
    pub name: SourceName,
    /// Its bytes.
    pub content: Arc<dyn Content>,
}

/// Old content that could not be read.
#[derive(Debug, Error)]
#[error("reading the older content {}, which the new is compared with: {error}", .source_name.root)]
pub struct OldError {
    /// Which.
    pub source_name: SourceName,
    /// What failed.
    #[source]
    pub error: ReadError,
}

impl OldSource {
    /// Fills a buffer.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), OldError> {
        self.content.read_at(offset, buf).map_err(|error| OldError {
            source_name: self.name.clone(),
            error,
        })
    }
}

/// Reads of one thread, which lie near each other.
pub(super) struct OldReader<'a> {
    sources: &'a [OldSource],
    /// The pieces read last, the newest at the end: source, number of the piece, bytes.
    pieces: Vec<(u16, u64, Vec<u8>)>,
}

impl<'a> OldReader<'a> {
    pub fn new(sources: &'a [OldSource]) -> Self {
        Self {
            sources,
            pieces: Vec::new(),
        }
    }

    /// The piece that a byte lies in, and where it begins.
    fn piece(&mut self, source: u16, at: u64) -> Result<(u64, &[u8]), OldError> {
        let number = at / PIECE_LEN;
        let kept = self
            .pieces
            .iter()
            .rposition(|(of, piece, _)| (*of, *piece) == (source, number));
        match kept {
            Some(kept) => {
                let piece = self.pieces.remove(kept);
                self.pieces.push(piece);
            }
            None => {
                let old = &self.sources[usize::from(source)];
                let start = number * PIECE_LEN;
                let mut bytes = if self.pieces.len() == PIECES {
                    self.pieces.remove(0).2
                } else {
                    Vec::new()
                };
                bytes.resize(PIECE_LEN.min(old.content.len() - start) as usize, 0);
                old.read(start, &mut bytes)?;
                self.pieces.push((source, number, bytes));
            }
        }
        let (_, number, bytes) = self.pieces.last().expect("just pushed");
        Ok((number * PIECE_LEN, bytes))
    }

    /// The bytes that lie under a stretch of something whose first byte would lie at `base`; none where not all of them are
    /// within the source.
    pub fn under(
        &mut self,
        source: u16,
        base: i64,
        range: Range<usize>,
    ) -> Result<Vec<u8>, OldError> {
        let old = &self.sources[usize::from(source)];
        let at = |place: usize| {
            base.checked_add_unsigned(place as u64)
                .and_then(|at| u64::try_from(at).ok())
        };
        let Some((start, end)) = at(range.start)
            .zip(at(range.end))
            .filter(|(_, end)| *end <= old.content.len())
        else {
            return Ok(Vec::new());
        };
        let mut bytes = vec![0; (end - start) as usize];
        old.read(start, &mut bytes)?;
        Ok(bytes)
    }

    /// How many of the first bytes of `new` are those of the source from `at` on.
    pub fn common_prefix(&mut self, source: u16, at: u64, new: &[u8]) -> Result<usize, OldError> {
        let len = self.sources[usize::from(source)].content.len();
        let new = &new[..len.saturating_sub(at).min(new.len() as u64) as usize];
        let mut done = 0;
        while done < new.len() {
            let at = at + done as u64;
            let (start, piece) = self.piece(source, at)?;
            let old = &piece[(at - start) as usize..];
            let rest = &new[done..];
            let same = same_prefix(rest, old);
            done += same;
            if same < rest.len().min(old.len()) {
                break;
            }
        }
        Ok(done)
    }

    /// How many of the last bytes of `new` are those of the source up to `end`.
    pub fn common_suffix(&mut self, source: u16, end: u64, new: &[u8]) -> Result<usize, OldError> {
        let new = &new[new.len() - end.min(new.len() as u64) as usize..];
        let mut done = 0;
        while done < new.len() {
            let end = end - done as u64;
            let (start, piece) = self.piece(source, end - 1)?;
            let old = &piece[..(end - start) as usize];
            let rest = &new[..new.len() - done];
            let most = rest.len().min(old.len());
            let same = rest
                .iter()
                .rev()
                .zip(old.iter().rev())
                .take_while(|(new, old)| new == old)
                .count();
            done += same;
            if same < most {
                break;
            }
        }
        Ok(done)
    }
}

/// Length of the common prefix.
fn same_prefix(a: &[u8], b: &[u8]) -> usize {
    const LINE: usize = 64;
    let lines = a
        .chunks_exact(LINE)
        .zip(b.chunks_exact(LINE))
        .take_while(|(a, b)| a == b)
        .count();
    let (a, b) = (&a[lines * LINE..], &b[lines * LINE..]);
    lines * LINE + a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
