//! What is taken out of a layer's frames, by what is read of its content.

use std::ops::Range;

use capsule_proto::index::{Index, ReferenceTo, Run, RunFrom};

/// Bytes of a frame, and where the content has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub frame: u32,
    pub bytes: Range<u32>,
    /// Where in the content they begin.
    pub start: u64,
}

impl Piece {
    pub fn content(&self) -> Range<u64> {
        self.start..self.start + u64::from(self.len())
    }

    pub const fn len(&self) -> u32 {
        self.bytes.end - self.bytes.start
    }

    /// A part of it.
    fn part(&self, bytes: Range<u32>) -> Self {
        Self {
            start: self.start + u64::from(bytes.start - self.bytes.start),
            bytes,
            ..*self
        }
    }

    /// It in two: so many bytes, and the rest.
    pub fn split(&self, len: u32) -> (Self, Self) {
        let middle = self.bytes.start + len;
        let (begin, end) = (self.bytes.start..middle, middle..self.bytes.end);
        (self.part(begin), self.part(end))
    }
}

/// What is read of each frame's bytes when ranges of the content are read: sorted, none of which touches another.
pub(super) fn read_of(index: &Index, reads: &[Range<u64>]) -> Vec<Vec<Range<u32>>> {
    let reads = joined(reads.to_vec());
    let mut read = vec![Vec::new(); index.frames.len()];
    let mut next = 0;
    for run in &index.runs {
        while reads.get(next).is_some_and(|read| read.end <= run.start) {
            next += 1;
        }
        let RunFrom::Frame { id, offset } = run.from else {
            continue;
        };
        let of_run = reads[next..]
            .iter()
            .take_while(|read| read.start < run.end());
        for part in of_run {
            let (start, end) = (part.start.max(run.start), part.end.min(run.end()));
            let at = |place: u64| offset + (place - run.start) as u32;
            read[id as usize].push(at(start)..at(end));
        }
    }
    read.into_iter().map(joined).collect()
}

/// The bytes of frames that the content has anywhere, of those that are `wanted`: sorted, none of which overlaps another. What it has several times is
/// told once.
pub(super) fn in_content(index: &Index, wanted: impl Fn(u32) -> bool) -> Vec<Vec<Piece>> {
    let mut all = vec![Vec::new(); index.frames.len()];
    for run in &index.runs {
        if let RunFrom::Frame { id, offset } = run.from
            && wanted(id)
        {
            all[id as usize].push(Piece {
                frame: id,
                bytes: offset..offset + run.len as u32,
                start: run.start,
            });
        }
    }
    all.into_iter().map(once).collect()
}

/// The same bytes, each once.
fn once(mut pieces: Vec<Piece>) -> Vec<Piece> {
    pieces.sort_unstable_by_key(|piece| (piece.bytes.start, piece.start));
    let mut end = 0;
    let mut all = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let from = piece.bytes.start.max(end);
        if from < piece.bytes.end {
            end = piece.bytes.end;
            all.push(piece.part(from..end));
        }
    }
    all
}

/// The pieces of a frame that are read, and the others.
pub(super) fn divided(pieces: &[Piece], read: &[Range<u32>]) -> (Vec<Piece>, Vec<Piece>) {
    let (mut taken, mut left) = (Vec::new(), Vec::new());
    let mut next = 0;
    for piece in pieces {
        let mut at = piece.bytes.start;
        while at < piece.bytes.end {
            while read.get(next).is_some_and(|read| read.end <= at) {
                next += 1;
            }
            let read = read.get(next).cloned().unwrap_or(u32::MAX..u32::MAX);
            let is_read = read.start <= at;
            let end = if is_read { read.end } else { read.start };
            let part = piece.part(at..end.min(piece.bytes.end));
            at = part.bytes.end;
            if is_read {
                taken.push(part);
            } else {
                left.push(part);
            }
        }
    }
    (taken, left)
}

/// Which frames others refer to.
pub(super) fn referred(index: &Index) -> Vec<bool> {
    let mut referred = vec![false; index.frames.len()];
    let references = index.frames.iter().flat_map(|frame| &frame.references);
    for reference in references {
        if let ReferenceTo::Frame(id) = reference.to {
            referred[id as usize] = true;
        }
    }
    referred
}

/// Adds the earlier frames to which those of a set refer.
pub(super) fn with_references(index: &Index, set: &mut [bool]) {
    for (id, frame) in index.frames.iter().enumerate().rev() {
        if !set[id] {
            continue;
        }
        for reference in &frame.references {
            if let ReferenceTo::Frame(earlier) = reference.to {
                set[earlier as usize] = true;
            }
        }
    }
}

/// Where bytes of frames lie in new ones.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Moves(Vec<Vec<Move>>);

/// Bytes of a frame, which lie in a new one from an offset on.
#[derive(Debug, PartialEq, Eq)]
struct Move {
    bytes: Range<u32>,
    to: usize,
    offset: u32,
}

impl Moves {
    /// Those of what the new frames take.
    pub fn of(count: usize, new: &[Vec<Piece>]) -> Self {
        let mut moves: Vec<Vec<Move>> = Vec::new();
        moves.resize_with(count, Vec::new);
        for (to, pieces) in new.iter().enumerate() {
            let mut offset = 0;
            for piece in pieces {
                moves[piece.frame as usize].push(Move {
                    bytes: piece.bytes.clone(),
                    to,
                    offset,
                });
                offset += piece.len();
            }
        }
        for of_frame in &mut moves {
            of_frame.sort_unstable_by_key(|moved| moved.bytes.start);
        }
        Self(moves)
    }

    /// How many parts the runs are cut in, at most.
    pub fn parts(&self, runs: &[Run]) -> usize {
        let of_run = |run: &Run| match run.from {
            RunFrom::Frame { id, offset } => {
                let moves = &self.0[id as usize];
                let end = offset + run.len as u32;
                let first = moves.partition_point(|moved| moved.bytes.end <= offset);
                let last = moves.partition_point(|moved| moved.bytes.start < end);
                2 * (last - first) + 1
            }
            _ => 1,
        };
        runs.iter().map(of_run).sum()
    }

    /// The runs, cut where new frames have what they take; with each part its new frame, if there is one, whose offset it has then.
    pub fn applied(&self, run: &Run) -> Vec<(Run, Option<usize>)> {
        let RunFrom::Frame { id, offset } = run.from else {
            return vec![(*run, None)];
        };
        let whole = offset..offset + run.len as u32;
        let part = |bytes: Range<u32>, offset: u32| Run {
            start: run.start + u64::from(bytes.start - whole.start),
            len: u64::from(bytes.end - bytes.start),
            from: RunFrom::Frame { id, offset },
        };
        let mut parts = Vec::new();
        let mut at = whole.start;
        let moves = &self.0[id as usize];
        let first = moves.partition_point(|moved| moved.bytes.end <= at);
        for moved in moves[first..]
            .iter()
            .take_while(|moved| moved.bytes.start < whole.end)
        {
            let bytes = moved.bytes.start.max(at)..moved.bytes.end.min(whole.end);
            if at < bytes.start {
                parts.push((part(at..bytes.start, at), None));
            }
            let offset = moved.offset + (bytes.start - moved.bytes.start);
            at = bytes.end;
            parts.push((part(bytes, offset), Some(moved.to)));
        }
        if at < whole.end {
            parts.push((part(at..whole.end, at), None));
        }
        parts
    }
}

/// The same places, none of which touches another, in order.
fn joined<T: Copy + Ord>(mut ranges: Vec<Range<T>>) -> Vec<Range<T>> {
    ranges.retain(|range| range.start < range.end);
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<T>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}
