//! One value of each kind for each format: what the golden vectors hold, and what hostile inputs are made from.
//!
//! Keys and times are fixed. A [`Case`] hides the value's type, so that one test can go over all formats.

#![allow(dead_code, reason = "each test program uses its part")]

pub mod signed;
mod stored;
mod wire;

use std::fmt::Debug;
use std::path::PathBuf;

/// How far a format rules its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// A value has one encoding, and nothing else decodes.
    Canonical,
    /// We write one encoding; others may decode.
    Pinned,
    /// What we write depends on a compressor.
    Free,
}

/// A format: values with an encoding. Only the formats' own functions are called.
pub trait Format: Debug + PartialEq + Sized {
    /// How far the format rules its bytes.
    const ENCODING: Encoding;

    /// The encoding.
    fn encode(&self) -> Vec<u8>;

    /// Parses; the error as text.
    fn decode(bytes: &[u8]) -> Result<Self, String>;
}

/// A value with a golden vector.
pub trait Case {
    /// The golden file's name.
    fn file(&self) -> &'static str;

    /// How far the format rules its bytes.
    fn encoding(&self) -> Encoding;

    /// The value's encoding today.
    fn encode(&self) -> Vec<u8>;

    /// Decodes bytes and encodes what they hold.
    fn reencode(&self, bytes: &[u8]) -> Result<Vec<u8>, String>;

    /// Panics unless the bytes decode to the value.
    fn assert_decodes(&self, bytes: &[u8]);

    /// The committed encoding.
    fn golden(&self) -> Vec<u8> {
        read_golden(self.file())
    }
}

struct Sample<F> {
    file: &'static str,
    value: F,
}

impl<F: Format> Case for Sample<F> {
    fn file(&self) -> &'static str {
        self.file
    }

    fn encoding(&self) -> Encoding {
        F::ENCODING
    }

    fn encode(&self) -> Vec<u8> {
        self.value.encode()
    }

    fn reencode(&self, bytes: &[u8]) -> Result<Vec<u8>, String> {
        F::decode(bytes).map(|value| value.encode())
    }

    fn assert_decodes(&self, bytes: &[u8]) {
        assert_eq!(F::decode(bytes).as_ref(), Ok(&self.value), "{}", self.file);
    }
}

fn case<F: Format + 'static>(file: &'static str, value: F) -> Box<dyn Case> {
    Box::new(Sample { file, value })
}

/// All values, of all formats.
pub fn all() -> Vec<Box<dyn Case>> {
    [stored::cases(), signed::cases(), wire::cases()]
        .into_iter()
        .flatten()
        .collect()
}

/// Where a golden vector lies.
pub fn golden_path(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(file)
}

/// Reads a golden vector: text as it is, or hex digits in lines.
pub fn read_golden(file: &str) -> Vec<u8> {
    let text = std::fs::read_to_string(golden_path(file))
        .unwrap_or_else(|error| panic!("{file}: {error}"));
    if file.ends_with(".txt") {
        return text.trim_end().as_bytes().to_vec();
    }
    let digits: String = text.lines().collect();
    data_encoding::HEXLOWER
        .decode(digits.as_bytes())
        .unwrap_or_else(|error| panic!("{file}: {error}"))
}
