//! Content as it is pushed to a hasher: cut into groups, whose chaining values go on in order.

use capsule_proto::GROUP_LEN;
use capsule_proto::ranges::{MAX_CONTENT_LEN, group_count};

use super::cv::{self, Cv};
use super::hasher::HashError;
use super::zeros::{self, ZERO_SPAN};

/// What is made of the chaining values of groups. They come in order and without gaps.
pub(super) trait Values {
    /// Takes the values of groups, of which `first` is the first.
    fn take(&mut self, first: u64, values: &[Cv]) -> Result<(), HashError>;

    /// Takes spans of [`ZERO_SPAN`] zero groups each, from the span on that begins with group `first`.
    fn take_zero_spans(&mut self, first: u64, spans: u64) -> Result<(), HashError>;
}

/// What was pushed so far.
#[derive(Default)]
pub(super) struct Pushed {
    /// Whole groups.
    groups: u64,
    /// The beginning of the next group; never a whole one.
    partial: Vec<u8>,
    /// The root hash, should the first group remain the only one.
    first_as_root: Cv,
}

impl Pushed {
    pub(super) fn size(&self) -> u64 {
        self.groups * GROUP_LEN + self.partial.len() as u64
    }

    pub(super) fn push(&mut self, data: &[u8], to: &mut impl Values) -> Result<(), HashError> {
        self.check_room(data.len() as u64)?;
        let data = self.fill_partial(data, to)?;
        let whole = data.len() - data.len() % GROUP_LEN as usize;
        let (whole, rest) = data.split_at(whole);
        self.push_groups(whole, to)?;
        self.partial.extend_from_slice(rest);
        Ok(())
    }

    pub(super) fn push_zeros(&mut self, len: u64, to: &mut impl Values) -> Result<(), HashError> {
        self.check_room(len)?;
        let end = self.size() + len;
        if !self.partial.is_empty() {
            let missing = (GROUP_LEN - self.partial.len() as u64).min(len);
            self.fill_partial(&zeros::zero_group()[..missing as usize], to)?;
        }
        let end_group = end / GROUP_LEN;
        if self.groups < end_group {
            let first_span = self.groups.next_multiple_of(ZERO_SPAN).min(end_group);
            self.push_zero_groups(first_span - self.groups, to)?;
            let spans = (end_group - self.groups) / ZERO_SPAN;
            if spans > 0 {
                // Content with a whole span in it has more than one group: no need to note the first.
                to.take_zero_spans(self.groups, spans)?;
                self.groups += spans * ZERO_SPAN;
            }
            self.push_zero_groups(end_group - self.groups, to)?;
        }
        self.partial
            .resize((end - self.groups * GROUP_LEN) as usize, 0);
        Ok(())
    }

    /// Ends the content; its root hash, where it is a single group, whose value then means nothing.
    pub(super) fn end(&mut self, to: &mut impl Values) -> Result<Option<Cv>, HashError> {
        if group_count(self.size()) == 1 {
            return Ok(Some(if self.groups == 1 {
                self.first_as_root
            } else {
                blake3::hash(&self.partial).into()
            }));
        }
        if !self.partial.is_empty() {
            to.take(self.groups, &cv::hash_groups(self.groups, &self.partial))?;
        }
        Ok(None)
    }

    fn check_room(&self, len: u64) -> Result<(), HashError> {
        if len > MAX_CONTENT_LEN - self.size() {
            Err(HashError::TooLarge)
        } else {
            Ok(())
        }
    }

    /// Completes a group that was begun, and returns what is left of the data.
    fn fill_partial<'d>(
        &mut self,
        data: &'d [u8],
        to: &mut impl Values,
    ) -> Result<&'d [u8], HashError> {
        if self.partial.is_empty() {
            return Ok(data);
        }
        let missing = GROUP_LEN as usize - self.partial.len();
        let (part, rest) = data.split_at(missing.min(data.len()));
        self.partial.extend_from_slice(part);
        if self.partial.len() as u64 == GROUP_LEN {
            let mut group = std::mem::take(&mut self.partial);
            self.push_groups(&group, to)?;
            group.clear();
            self.partial = group;
        }
        Ok(rest)
    }

    fn push_groups(&mut self, whole: &[u8], to: &mut impl Values) -> Result<(), HashError> {
        if whole.is_empty() {
            return Ok(());
        }
        self.note_first(&whole[..GROUP_LEN as usize]);
        self.hand_on(&cv::hash_groups(self.groups, whole), to)
    }

    fn push_zero_groups(&mut self, mut count: u64, to: &mut impl Values) -> Result<(), HashError> {
        while count > 0 {
            self.note_first(zeros::zero_group());
            let part = count.min(ZERO_SPAN);
            self.hand_on(&zeros::hash_zero_groups(self.groups, part), to)?;
            count -= part;
        }
        Ok(())
    }

    fn note_first(&mut self, group: &[u8]) {
        if self.groups == 0 {
            self.first_as_root = blake3::hash(group).into();
        }
    }

    fn hand_on(&mut self, values: &[Cv], to: &mut impl Values) -> Result<(), HashError> {
        to.take(self.groups, values)?;
        self.groups += values.len() as u64;
        Ok(())
    }
}
