//! Content with what was written upon it: a machine's disk or memory when it was stopped.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use capsule_chunker::content::{Content, Extent, Extents, ReadError, Source, check_range};
use capsule_chunker::layer::Storage;
use capsule_proto::ranges::groups_touching;
use capsule_proto::{GroupRanges, RootHash};
use serde::Deserialize;

use crate::control::{Failure, FailureCode, Patch};

/// Longest list of runs, in bytes: more than two million of them, which take ten times as many in memory as a bitmap of 64 GiB.
const MAX_RUNS_LEN: u64 = 256 << 20;

/// See the module.
pub(super) struct Patched {
    size: u64,
    below: Option<Box<dyn Source>>,
    /// By where they start; they do not overlap.
    runs: BTreeMap<u64, Run>,
    files: Vec<(PathBuf, File)>,
}

/// What was written there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    end: u64,
    from: From,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    Zeros,
    File { number: usize, offset: u64 },
}

/// A run as `qemu-img map --output=json` tells it.
#[derive(Debug, Deserialize)]
struct Told {
    start: u64,
    length: u64,
    present: bool,
    zero: bool,
    #[serde(default)]
    offset: Option<u64>,
}

impl Patched {
    /// Content of a size: what lies below, and zeros behind its end.
    pub fn new(size: u64, below: Option<Box<dyn Source>>) -> Self {
        Self {
            size,
            below,
            runs: BTreeMap::new(),
            files: Vec::new(),
        }
    }

    /// Puts what was written upon it.
    pub fn put(&mut self, patch: &Patch) -> Result<(), Failure> {
        let file = File::open(&patch.data).map_err(|e| unreadable(&patch.data, &e.to_string()))?;
        let number = self.files.len();
        self.files.push((patch.data.clone(), file));
        let Some(runs) = &patch.runs else {
            let from = From::File { number, offset: 0 };
            self.insert(0..self.size, from);
            return Ok(());
        };
        let wrong = |why: &str| unreadable(runs, why);
        let list = File::open(runs).map_err(|e| wrong(&e.to_string()))?;
        let len = list.metadata().map_err(|e| wrong(&e.to_string()))?.len();
        if len > MAX_RUNS_LEN {
            return Err(wrong("the list of what was written is too long"));
        }
        let told: Vec<Told> =
            serde_json::from_reader(BufReader::new(list)).map_err(|e| wrong(&e.to_string()))?;
        for run in told {
            let end = run.start.checked_add(run.length);
            let Some(end) = end.filter(|end| *end <= self.size) else {
                return Err(wrong("it tells of bytes beyond the component's end"));
            };
            let from = match (run.present && run.length > 0, run.zero, run.offset) {
                (false, ..) => continue,
                (true, true, _) => From::Zeros,
                (true, false, Some(offset)) => From::File { number, offset },
                (true, false, None) => {
                    return Err(wrong("it tells of bytes, but not where they are"));
                }
            };
            self.insert(run.start..end, from);
        }
        Ok(())
    }

    /// Has a range come from elsewhere than before.
    fn insert(&mut self, range: Range<u64>, from: From) {
        if range.is_empty() {
            return;
        }
        let cut = |from: From, by: u64| match from {
            From::Zeros => From::Zeros,
            From::File { number, offset } => From::File {
                number,
                offset: offset + by,
            },
        };
        // What reaches into it or lies in it gives way.
        let first = self.runs.range(..range.start).next_back();
        let first = first.filter(|(_, run)| run.end > range.start);
        let first = first.map_or(range.start, |(start, _)| *start);
        let over: Vec<(u64, Run)> = self
            .runs
            .range(first..range.end)
            .map(|(s, r)| (*s, *r))
            .collect();
        for (start, run) in over {
            self.runs.remove(&start);
            if start < range.start {
                let before = Run {
                    end: range.start,
                    from: run.from,
                };
                self.runs.insert(start, before);
            }
            if run.end > range.end {
                let after = Run {
                    end: run.end,
                    from: cut(run.from, range.end - start),
                };
                self.runs.insert(range.end, after);
            }
        }
        let run = Run {
            end: range.end,
            from,
        };
        self.runs.insert(range.start, run);
    }

    /// The groups in which something was written.
    pub fn written(&self) -> GroupRanges {
        let ranges = self.runs.iter().map(|(start, run)| *start..run.end);
        ranges.map(|range| groups_touching(&range)).collect()
    }

    /// The run at a byte; or none, and where the next begins.
    fn at(&self, offset: u64) -> (Option<(u64, Run)>, u64) {
        let run = self.runs.range(..=offset).next_back();
        if let Some((start, run)) = run.filter(|(_, run)| run.end > offset) {
            return (Some((*start, *run)), run.end);
        }
        let next = self.runs.range(offset..).next();
        (None, next.map_or(self.size, |(start, _)| *start))
    }

    fn below_len(&self) -> u64 {
        self.below
            .as_ref()
            .map_or(0, |below| below.len())
            .min(self.size)
    }

    fn read_below(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        let here = self
            .below_len()
            .saturating_sub(offset)
            .min(buf.len() as u64);
        let (from_it, zeros) = buf.split_at_mut(here as usize);
        zeros.fill(0);
        match &self.below {
            Some(below) if !from_it.is_empty() => below.read_at(offset, from_it),
            _ => Ok(()),
        }
    }
}

impl Content for Patched {
    fn len(&self) -> u64 {
        self.size
    }

    fn is_zero(&self, range: Range<u64>) -> bool {
        let mut at = range.start;
        while at < range.end {
            let (run, end) = self.at(at);
            let end = end.min(range.end);
            let zero = match run {
                Some((_, run)) => run.from == From::Zeros,
                None => {
                    let below = at..end.min(self.below_len()).max(at);
                    let lies_below = self.below.as_deref();
                    below.is_empty() || lies_below.is_some_and(|it| it.is_zero(below))
                }
            };
            if !zero {
                return false;
            }
            at = end;
        }
        true
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        check_range(self.size, offset, buf.len())?;
        let (mut at, end) = (offset, offset + buf.len() as u64);
        while at < end {
            let (run, until) = self.at(at);
            let until = until.min(end);
            let part = &mut buf[(at - offset) as usize..(until - offset) as usize];
            match run {
                None => self.read_below(at, part)?,
                Some((
                    _,
                    Run {
                        from: From::Zeros, ..
                    },
                )) => part.fill(0),
                Some((
                    start,
                    Run {
                        from: From::File { number, offset },
                        ..
                    },
                )) => {
                    let (path, file) = &self.files[number];
                    let place = offset + (at - start);
                    let read = file.read_exact_at(part, place);
                    read.map_err(|error| ReadError::io(path, place, error))?;
                }
            }
            at = until;
        }
        Ok(())
    }
}

impl Source for Patched {
    fn extents(&self) -> Extents<'_> {
        let mut below = self.below.as_ref().map(|below| below.extents());
        let mut extent: Option<Extent> = None;
        let mut at = 0;
        Box::new(std::iter::from_fn(move || {
            if at == self.size {
                return None;
            }
            let (run, mut end) = self.at(at);
            let zero = match run {
                Some((_, run)) => run.from == From::Zeros,
                None if at >= self.below_len() => true,
                None => {
                    // Of what lies below, the extent that has this byte.
                    while extent.as_ref().is_none_or(|extent| extent.range.end <= at) {
                        extent = match below.as_mut().and_then(Iterator::next) {
                            Some(Ok(next)) => Some(next),
                            Some(Err(error)) => {
                                at = self.size;
                                return Some(Err(error));
                            }
                            // It ends before its length: what reads it will tell.
                            None => Some(Extent {
                                range: at..end,
                                zero: false,
                            }),
                        };
                    }
                    let zero = extent.as_ref().is_some_and(|extent| extent.zero);
                    let ends = extent.as_ref().map_or(end, |extent| extent.range.end);
                    end = end.min(ends).min(self.below_len());
                    zero
                }
            };
            let range = at..end;
            at = end;
            Some(Ok(Extent { range, zero }))
        }))
    }

    fn check_unchanged(&self) -> Result<(), ReadError> {
        self.below
            .as_ref()
            .map_or(Ok(()), |below| below.check_unchanged())
    }
}

/// A component that lies in the store as it is, as a source.
pub(super) struct Stored {
    pub root: RootHash,
    pub size: u64,
    pub bytes: Storage,
}

impl Content for Stored {
    fn len(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        check_range(self.size, offset, buf.len())?;
        let read = self.bytes.read_exact_at(offset, buf);
        read.map_err(|error| ReadError::io(format!("blob {}", self.root), offset, error))
    }
}

impl Source for Stored {
    fn extents(&self) -> Extents<'_> {
        let all = Extent {
            range: 0..self.size,
            zero: false,
        };
        Box::new((self.size > 0).then_some(Ok(all)).into_iter())
    }

    fn check_unchanged(&self) -> Result<(), ReadError> {
        Ok(())
    }
}

fn unreadable(path: &Path, why: &str) -> Failure {
    Failure::new(
        FailureCode::Io,
        format!("cannot read {}: {why}", path.display()),
    )
    .hint("it is a part of a machine that is captured: nothing else may change or remove it")
}

#[cfg(test)]
mod tests {
    use capsule_chunker::content::BytesSource;
    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    const SIZE: usize = 64;

    /// A patch of runs (start, length, zero), of which the bytes are a number.
    fn patch(dir: &TempDir, number: u8, runs: &[(usize, usize, bool)]) -> Patch {
        let data = dir.path().join(format!("data{number}"));
        std::fs::write(&data, [number; SIZE]).unwrap();
        let told = runs.iter().map(|(start, length, zero)| {
            serde_json::json!({"start": start, "length": length, "depth": 0, "present": true,
                "zero": zero, "data": !zero, "offset": start})
        });
        let told: Vec<_> = told.collect();
        let list = dir.path().join(format!("runs{number}"));
        std::fs::write(&list, serde_json::to_vec(&told).unwrap()).unwrap();
        Patch {
            data,
            runs: Some(list),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn later_patches_lie_upon_earlier_ones(
            below in 0..SIZE + 8,
            patches in prop::collection::vec(
                prop::collection::vec((0..SIZE - 9, 1..10usize, any::<bool>()), 0..5), 0..4),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut expected = vec![0; SIZE];
            expected[..below.min(SIZE)].fill(0xff);
            let mut patched = Patched::new(SIZE as u64, Some(Box::new(BytesSource(vec![0xff; below]))));
            for (number, runs) in (1..).zip(&patches) {
                patched.put(&patch(&dir, number, runs)).unwrap();
                for (start, len, zero) in runs {
                    expected[*start..start + len].fill(if *zero { 0 } else { number });
                }
            }
            let mut all = vec![1; SIZE];
            patched.read_at(0, &mut all).unwrap();
            prop_assert_eq!(&all, &expected);
            let mut at = 0;
            for extent in patched.extents() {
                let extent = extent.unwrap();
                prop_assert!(extent.range.start == at && extent.range.end > at);
                let bytes = &expected[at as usize..extent.range.end as usize];
                prop_assert!(!extent.zero || bytes.iter().all(|byte| *byte == 0));
                prop_assert!(!extent.zero || patched.is_zero(extent.range.clone()));
                at = extent.range.end;
            }
            prop_assert_eq!(at, SIZE as u64);
        }
    }

    #[test]
    fn what_is_told_wrongly_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let put = |runs: &[(usize, usize, bool)], size| {
            Patched::new(size, None).put(&patch(&dir, 1, runs))
        };
        assert!(put(&[(0, 8, false)], 8).is_ok());
        let failure = put(&[(4, 8, false)], 8).unwrap_err();
        assert!(failure.message.contains("beyond the component's end"));
        let gone = Patch {
            data: dir.path().join("none"),
            runs: None,
        };
        assert!(Patched::new(8, None).put(&gone).is_err());
    }
}
