//! Names that people give: channels, versions, and `CHANNEL:VERSION`.
//!
//! A name is one spelling of ASCII, so that no two look alike; it can stand in a path, where it stays below the directory it
//! is joined to; and it is never mistaken for a hash.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::hash::RootHash;

/// Longest channel or version, in bytes.
pub const MAX_NAME_LEN: usize = 64;

/// A named line of versions, such as `lab`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Channel(String);

/// One version of a channel, such as `2026-11`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Version(String);

/// `CHANNEL:VERSION`, or `CHANNEL` alone for its newest version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CapsuleName {
    /// The channel.
    pub channel: Channel,
    /// The version; none means the newest.
    pub version: Option<Version>,
}

/// Text that is no name.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
#[error(
    "{text:?} is not a {what}: use 1 to {MAX_NAME_LEN} of a-z A-Z 0-9 . _ + - / with a letter or digit first and after each /, not a hash"
)]
pub struct NameError {
    what: &'static str,
    text: String,
}

fn check(what: &'static str, text: &str) -> Result<String, NameError> {
    let allowed = |b: &u8| b.is_ascii_alphanumeric() || b"._+-".contains(b);
    // No part is empty, hidden, `..` or an option: names end up in paths and on command lines.
    let part = |part: &[u8]| {
        part.first().is_some_and(u8::is_ascii_alphanumeric) && part.iter().all(allowed)
    };
    let fine = text.len() <= MAX_NAME_LEN
        && text.as_bytes().split(|&b| b == b'/').all(part)
        && text.parse::<RootHash>().is_err();
    if fine {
        Ok(text.to_owned())
    } else {
        Err(NameError {
            what,
            text: text.chars().take(80).collect(),
        })
    }
}

macro_rules! name {
    ($type:ident, $what:literal) => {
        impl $type {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                check($what, text).map(Self)
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> Self {
                name.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(Channel, "channel");
name!(Version, "version");

impl FromStr for CapsuleName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.split_once(':') {
            Some((channel, version)) => Ok(Self {
                channel: channel.parse()?,
                version: Some(version.parse()?),
            }),
            None => Ok(Self {
                channel: text.parse()?,
                version: None,
            }),
        }
    }
}

impl fmt::Display for CapsuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            Some(version) => write!(f, "{}:{version}", self.channel),
            None => self.channel.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_others_are_refused() {
        for good in ["lab", "lab:2026-11", "site/a:v1.2+3"] {
            assert_eq!(good.parse::<CapsuleName>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            ":",
            "lab:",
            ":1",
            "a:b:c",
            "-x",
            "lab 1",
            "läb",
            "lab/",
            "/lab",
            "a//b",
            "a/../b",
            "a/.b",
            &"x".repeat(65),
            &"ab".repeat(32),
        ] {
            assert!(bad.parse::<CapsuleName>().is_err(), "{bad}");
        }
    }
}
