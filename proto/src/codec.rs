//! The one binary encoding under manifest, listing, index, record, credential and token.
//!
//! Integers are LEB128 varints in their shortest form, byte strings are a length and bytes, lists are a
//! count and items. A value has exactly one encoding: the reader refuses longer forms, so whatever was decoded encodes to the
//! same bytes. Every length is checked against a bound *and* against the bytes that are left before anything is allocated.

use thiserror::Error;

use crate::hash::{FrameHash, RootHash};

/// Bytes that are not a well-formed value; `at` is the offset of the fault.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum DecodeError {
    /// The input ends inside a value.
    #[error("{what} is cut off at byte {at}")]
    Truncated {
        /// The value that was being read.
        what: &'static str,
        /// Offset of the value.
        at: usize,
    },
    /// Bytes follow the end of the value.
    #[error("{extra} bytes follow the end at byte {at}")]
    TrailingBytes {
        /// How many.
        extra: usize,
        /// Where the value ended.
        at: usize,
    },
    /// A length, count or number beyond its bound.
    #[error("{what} at byte {at} is {value}, beyond the bound of {bound}")]
    OutOfBounds {
        /// The value that was being read.
        what: &'static str,
        /// Offset of the value.
        at: usize,
        /// What was found.
        value: u64,
        /// The largest value allowed.
        bound: u64,
    },
    /// A value that is well-formed but not allowed, or not in its canonical form.
    #[error("{what} at byte {at}: {why}")]
    Invalid {
        /// The value that was being read.
        what: &'static str,
        /// Offset of the value.
        at: usize,
        /// The rule that it breaks.
        why: &'static str,
    },
    /// Another format, or another version of this one.
    #[error("not a {what} of format version {version}: upgrade capsule, or check what the file is")]
    Format {
        /// The format expected.
        what: &'static str,
        /// The version expected.
        version: u8,
    },
}

/// Writes values to a byte vector.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// Starts an encoding with a format's four-byte magic and its version.
    pub fn with_header(magic: &[u8; 4], version: u8) -> Self {
        let mut writer = Self::default();
        writer.raw(magic);
        writer.u8(version);
        writer
    }

    /// The encoding.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }

    /// What was written so far.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Appends bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Appends one byte.
    pub fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    /// Appends a varint: seven bits a byte, low bits first, high bit set on all but the last.
    pub fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }

    /// Appends a signed number, zigzag-folded into a varint.
    pub fn signed(&mut self, value: i64) {
        self.varint(((value << 1) ^ (value >> 63)) as u64);
    }

    /// Appends a length and bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.varint(bytes.len() as u64);
        self.raw(bytes);
    }

    /// Appends a root hash.
    pub fn hash(&mut self, hash: &RootHash) {
        self.raw(hash.as_bytes());
    }

    /// Appends a presence byte and, where there is one, the value.
    pub fn option<T>(&mut self, value: Option<T>, write: impl FnOnce(&mut Self, T)) {
        self.u8(value.is_some().into());
        if let Some(value) = value {
            write(self, value);
        }
    }

    /// Appends a count and the items.
    pub fn list<'a, T>(&mut self, items: &'a [T], mut write: impl FnMut(&mut Self, &'a T)) {
        self.varint(items.len() as u64);
        items.iter().for_each(|item| write(self, item));
    }
}

/// Reads values from bytes; each method names the value for the error.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

type Result<T> = std::result::Result<T, DecodeError>;

impl<'a> Reader<'a> {
    /// Reads from the start of the bytes.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Checks a format's magic and version, refuses inputs longer than the format's bound, and reads what follows.
    pub fn with_header(
        bytes: &'a [u8],
        magic: &[u8; 4],
        version: u8,
        what: &'static str,
        max_len: usize,
    ) -> Result<Self> {
        if bytes.len() > max_len {
            return Err(DecodeError::OutOfBounds {
                what,
                at: 0,
                value: bytes.len() as u64,
                bound: max_len as u64,
            });
        }
        let mut reader = Self::new(bytes);
        if reader.raw(4, what)? != magic || reader.u8(what)? != version {
            return Err(DecodeError::Format { what, version });
        }
        Ok(reader)
    }

    /// Offset of the next value.
    pub const fn at(&self) -> usize {
        self.at
    }

    /// How many bytes are left.
    pub const fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// Ends the reading: nothing may be left.
    pub fn finish(self) -> Result<()> {
        match self.left() {
            0 => Ok(()),
            extra => Err(DecodeError::TrailingBytes { extra, at: self.at }),
        }
    }

    /// An error about the value that starts at the given offset.
    pub const fn invalid(&self, what: &'static str, at: usize, why: &'static str) -> DecodeError {
        DecodeError::Invalid { what, at, why }
    }

    /// Takes bytes as they are.
    pub fn raw(&mut self, len: usize, what: &'static str) -> Result<&'a [u8]> {
        if len > self.left() {
            return Err(DecodeError::Truncated { what, at: self.at });
        }
        let bytes = &self.bytes[self.at..self.at + len];
        self.at += len;
        Ok(bytes)
    }

    /// Takes an array of bytes.
    pub fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.raw(N, what)?);
        Ok(array)
    }

    /// Takes one byte.
    pub fn u8(&mut self, what: &'static str) -> Result<u8> {
        Ok(self.raw(1, what)?[0])
    }

    /// Takes a varint of at most `bound`.
    pub fn varint(&mut self, what: &'static str, bound: u64) -> Result<u64> {
        let start = self.at;
        let mut value = 0u64;
        for shift in (0..).step_by(7) {
            let byte = self
                .u8(what)
                .map_err(|_| DecodeError::Truncated { what, at: start })?;
            if shift == 63 && byte > 1 {
                return Err(self.invalid(what, start, "the number does not fit in 64 bits"));
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    return Err(self.invalid(
                        what,
                        start,
                        "the number is not in its shortest form",
                    ));
                }
                break;
            }
        }
        if value > bound {
            return Err(DecodeError::OutOfBounds {
                what,
                at: start,
                value,
                bound,
            });
        }
        Ok(value)
    }

    /// Takes a zigzag-folded signed number.
    pub fn signed(&mut self, what: &'static str) -> Result<i64> {
        let folded = self.varint(what, u64::MAX)?;
        Ok((folded >> 1) as i64 ^ -((folded & 1) as i64))
    }

    /// Takes a byte string of at most `bound` bytes.
    pub fn bytes(&mut self, what: &'static str, bound: usize) -> Result<&'a [u8]> {
        let len = self.varint(what, bound as u64)? as usize;
        self.raw(len, what)
    }

    /// Takes UTF-8 text of at most `bound` bytes, without control characters.
    pub fn text(&mut self, what: &'static str, bound: usize) -> Result<String> {
        let start = self.at;
        let text = std::str::from_utf8(self.bytes(what, bound)?)
            .map_err(|_| self.invalid(what, start, "the text is not UTF-8"))?;
        if text.chars().any(char::is_control) {
            return Err(self.invalid(what, start, "the text has control characters"));
        }
        Ok(text.to_owned())
    }

    /// Takes a root hash.
    pub fn hash(&mut self, what: &'static str) -> Result<RootHash> {
        self.array(what).map(RootHash::from_bytes)
    }

    /// Takes a frame hash.
    pub fn frame_hash(&mut self, what: &'static str) -> Result<FrameHash> {
        self.array(what).map(FrameHash)
    }

    /// Takes a presence byte and, where it is 1, the value.
    pub fn option<T>(
        &mut self,
        what: &'static str,
        read: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<Option<T>> {
        let start = self.at;
        match self.u8(what)? {
            0 => Ok(None),
            1 => read(self).map(Some),
            _ => Err(self.invalid(what, start, "a presence byte is 0 or 1")),
        }
    }

    /// Takes a list of at most `bound` items of at least `item_len` bytes each.
    pub fn list<T>(
        &mut self,
        what: &'static str,
        bound: usize,
        item_len: usize,
        mut read: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let start = self.at;
        let count = self.varint(what, bound as u64)? as usize;
        if count.saturating_mul(item_len.max(1)) > self.left() {
            return Err(DecodeError::Truncated { what, at: start });
        }
        (0..count).map(|_| read(self)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_round_trip(value: u64, signed: i64) {
            let mut writer = Writer::default();
            writer.varint(value);
            writer.signed(signed);
            let bytes = writer.finish();
            let mut reader = Reader::new(&bytes);
            prop_assert_eq!(reader.varint("n", u64::MAX), Ok(value));
            prop_assert_eq!(reader.signed("n"), Ok(signed));
            prop_assert_eq!(reader.finish(), Ok(()));
        }

        // Canonical: what decodes, encodes to the same bytes.
        #[test]
        fn accepted_varints_have_one_spelling(bytes in prop::collection::vec(any::<u8>(), 0..12)) {
            let mut reader = Reader::new(&bytes);
            if let Ok(value) = reader.varint("n", u64::MAX) {
                let mut writer = Writer::default();
                writer.varint(value);
                prop_assert_eq!(writer.finish(), &bytes[..reader.at()]);
            }
        }
    }

    #[test]
    fn bounds_come_before_allocation() {
        let mut writer = Writer::default();
        writer.varint(u64::MAX >> 1);
        let bytes = writer.finish();
        assert!(matches!(
            Reader::new(&bytes).bytes("b", 100),
            Err(DecodeError::OutOfBounds { bound: 100, .. })
        ));
        assert!(matches!(
            Reader::new(&bytes).bytes("b", usize::MAX),
            Err(DecodeError::Truncated { .. })
        ));
        assert!(matches!(
            Reader::new(&bytes).list("l", usize::MAX, 32, |r| r.u8("item")),
            Err(DecodeError::Truncated { .. })
        ));
        let overlong = [0x80, 0x00];
        assert!(matches!(
            Reader::new(&overlong).varint("n", 9),
            Err(DecodeError::Invalid { .. })
        ));
        let huge = [0xff; 10];
        assert!(matches!(
            Reader::new(&huge).varint("n", u64::MAX),
            Err(DecodeError::Invalid { .. })
        ));
    }
}
