//! Names by content: BLAKE3 root hashes and what is derived from them.
//!
//! Hashing itself belongs to `capsule-chunker`; here a hash is a value with one spelling (64 lower-case
//! hex digits) and one parser.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// BLAKE3 hash of a blob or component: what `b3sum` prints for its bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootHash([u8; 32]);

/// Root hash of a capsule's manifest: the capsule's name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CapsuleId(pub RootHash);

/// First 16 bytes of the BLAKE3 hash of a frame's (or span's) decoded content.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameHash(pub [u8; 16]);

/// Text that is not a root hash.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{text:?} is not a hash: expected 64 hexadecimal digits")]
pub struct ParseHashError {
    text: String,
}

impl RootHash {
    /// Wraps 32 bytes that are a BLAKE3 hash.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The hash of bytes at hand; for long content use the chunker.
    pub fn of(content: &[u8]) -> Self {
        Self(*blake3::hash(content).as_bytes())
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first 10 hex digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..10].to_owned()
    }
}

impl FrameHash {
    /// The truncated hash of decoded content.
    pub fn of(content: &[u8]) -> Self {
        Self::truncate(&RootHash::of(content))
    }

    /// Truncates a full hash.
    pub fn truncate(hash: &RootHash) -> Self {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hash.0[..16]);
        Self(bytes)
    }
}

impl fmt::Display for RootHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for RootHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RootHash({})", self.short())
    }
}

impl fmt::Display for CapsuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for CapsuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CapsuleId({})", self.0.short())
    }
}

impl fmt::Debug for FrameHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FrameHash({})", data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl FromStr for RootHash {
    type Err = ParseHashError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseHashError {
            text: text.chars().take(80).collect(),
        };
        let bytes = data_encoding::HEXLOWER_PERMISSIVE
            .decode(text.as_bytes())
            .map_err(|_| error())?;
        Ok(Self(bytes.try_into().map_err(|_| error())?))
    }
}

impl FromStr for CapsuleId {
    type Err = ParseHashError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl Serialize for RootHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RootHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_and_rejects_other_lengths() {
        let hash = RootHash::of(b"capsule");
        assert_eq!(hash.to_string().parse(), Ok(hash));
        assert_eq!(hash.to_string().to_uppercase().parse(), Ok(hash));
        for bad in [
            "",
            "ab",
            &hash.to_string()[1..],
            &format!("{hash}0"),
            &"g".repeat(64),
        ] {
            assert!(bad.parse::<RootHash>().is_err(), "{bad}");
        }
    }
}
