//! What an update reads must be what was hashed before it: a device does not tell that somebody wrote to it in between.
//!
//! The bytes that become frames are compared with the content's hash tree themselves. To read the source once more afterwards
//! would not do: what is changed and changed back between two readings is in neither of them, but in the frames.

use std::io;
use std::ops::Range;

use capsule_proto::ranges::{group_bytes, group_count, groups_touching};
use capsule_proto::{GROUP_LEN, GroupRanges};
use positioned_io::ReadAt;

use super::encode::{EncodeError, Hashed};
use super::slab::Slab;
use crate::bao::{VerifyError, verify};
use crate::content::Content;
use crate::delta::Outline;

/// Zeros are compared as bytes, where a group is not wholly zero.
static ZEROS: [u8; GROUP_LEN as usize] = [0; GROUP_LEN as usize];

/// Compares what is read with the tree, slab by slab.
pub(super) struct Reread<'a> {
    hashed: &'a Hashed<'a>,
    outline: &'a Outline,
    /// Where in the content the bytes lie that wait for the rest of their group.
    start: u64,
    bytes: Vec<u8>,
    /// How much of what is to be read has come.
    taken: u64,
}

impl<'a> Reread<'a> {
    pub fn new(hashed: &'a Hashed<'a>, outline: &'a Outline) -> Self {
        Self {
            hashed,
            outline,
            start: 0,
            bytes: Vec::new(),
            taken: 0,
        }
    }

    /// Takes the next slab; the outline's unknown stretches are whole chunk groups.
    pub fn push(&mut self, slab: &Slab) -> Result<(), EncodeError> {
        for region in &slab.regions {
            self.taken += region.len;
            let mut at = region.at;
            for place in self.outline.places(region.start..region.start + region.len) {
                let len = place.end - place.start;
                match &mut at {
                    Some(at) => {
                        self.data(place.start, slab.bytes(*at, len as usize))?;
                        *at += len as usize;
                    }
                    None => self.zeros(place.start, len)?,
                }
            }
        }
        self.check()
    }

    /// Compares the last group. Where reading ended early, who ended it tells why.
    pub fn finish(mut self) -> Result<(), EncodeError> {
        if self.taken < self.outline.unknown_len() {
            return Ok(());
        }
        self.check()?;
        self.nothing_left()
    }

    fn data(&mut self, start: u64, bytes: &[u8]) -> Result<(), EncodeError> {
        if self.start + self.bytes.len() as u64 != start {
            self.check()?;
            self.nothing_left()?;
            self.start = start;
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// Of long zeros only the groups that they share with data: nobody read the others, in either reading.
    fn zeros(&mut self, start: u64, len: u64) -> Result<(), EncodeError> {
        let end = start + len;
        let up = start.next_multiple_of(GROUP_LEN).min(end);
        self.data(start, &ZEROS[..(up - start) as usize])?;
        let down = (end - end % GROUP_LEN).max(up);
        if down < end {
            self.data(down, &ZEROS[..(end - down) as usize])?;
        }
        Ok(())
    }

    /// Compares all groups that are whole.
    fn check(&mut self) -> Result<(), EncodeError> {
        let tree = &self.hashed.tree;
        let first = self.start / GROUP_LEN;
        let end = self.start + self.bytes.len() as u64;
        let whole = if end == tree.size {
            group_count(tree.size)
        } else {
            end / GROUP_LEN
        };
        if whole <= first || self.bytes.is_empty() {
            return Ok(());
        }
        check(self.hashed, first..whole, self.start, &self.bytes)?;
        let done = group_bytes(&(first..whole), tree.size).end - self.start;
        self.bytes.drain(..done as usize);
        self.start += done;
        Ok(())
    }

    /// Only what is not as long as it was leaves part of a group.
    fn nothing_left(&self) -> Result<(), EncodeError> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        Err(EncodeError::Changed { offset: self.start })
    }
}

/// Reads a part of content that was hashed before, which must still be what it was; behind what the buffer has.
pub(super) fn proved(
    content: &dyn Content,
    hashed: &Hashed<'_>,
    part: Range<u64>,
    into: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let groups = groups_touching(&part);
    let around = group_bytes(&groups, hashed.tree.size);
    let mut bytes = vec![0; (around.end - around.start) as usize];
    content.read_at(around.start, &mut bytes)?;
    check(hashed, groups, around.start, &bytes)?;
    let from = (part.start - around.start) as usize;
    into.extend_from_slice(&bytes[from..from + (part.end - part.start) as usize]);
    Ok(())
}

/// Compares chunk groups, which lie in bytes of the content from some place on, with the tree.
fn check(
    hashed: &Hashed<'_>,
    groups: Range<u64>,
    start: u64,
    bytes: &[u8],
) -> Result<(), EncodeError> {
    let groups = GroupRanges::from(groups);
    let data = Window { start, bytes };
    let same = verify(&hashed.tree, &groups, &data, hashed.outboard);
    let same = same.map_err(|error| match error {
        VerifyError::Outboard { offset, source } => EncodeError::Hashed { offset, source },
        VerifyError::Data { group, .. } => EncodeError::Changed {
            offset: group * GROUP_LEN,
        },
    })?;
    match groups.difference(&same).runs().first() {
        Some(run) => Err(EncodeError::Changed {
            offset: run.start * GROUP_LEN,
        }),
        None => Ok(()),
    }
}

/// Bytes of content from some place on.
struct Window<'a> {
    start: u64,
    bytes: &'a [u8],
}

impl ReadAt for Window<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let from = offset
            .checked_sub(self.start)
            .and_then(|from| self.bytes.get(from as usize..));
        let bytes = from.unwrap_or_default();
        let len = bytes.len().min(buf.len());
        buf[..len].copy_from_slice(&bytes[..len]);
        Ok(len)
    }
}
