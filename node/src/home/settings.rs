//! What people set, and what joining left: the home's JSON files. Their keys: `node/docs/home.md`.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use capsule_proto::credential::Credential;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::address::is_address;

/// Where a node listens unless told otherwise: one port, so that tokens stay valid over restarts.
pub const DEFAULT_LISTEN: SocketAddr =
    SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 4277));
/// Most addresses to listen on: as many as a token can tell of.
const MAX_LISTEN: usize = 16;
/// Most addresses of the fleet: as many as the network tries.
const MAX_BOOTSTRAP: usize = 64;
/// Least quota: less holds nothing, and was meant in another unit than bytes.
const MIN_QUOTA: u64 = 1 << 20;
/// Longest label of a site, in bytes: as of a machine's name.
const MAX_SITE_LEN: usize = 64;

/// `home.json`: what people set. Unknown keys are an error, so that a misspelt one is noticed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Format of the home directory.
    #[serde(deserialize_with = "checked::format")]
    pub format: u32,
    /// Where to listen.
    #[serde(deserialize_with = "checked::listen")]
    pub listen: Vec<SocketAddr>,
    /// Most bytes in the store; no limit but the disk's where absent.
    #[serde(deserialize_with = "checked::quota")]
    pub quota: Option<u64>,
    /// The site (cheap network) that this machine is in.
    #[serde(deserialize_with = "checked::site")]
    pub site: Option<String>,
    /// Whether to look for the fleet by multicast on the LAN.
    #[serde(deserialize_with = "checked::lan_discovery")]
    pub lan_discovery: bool,
    /// More addresses where the fleet may be found, beside the token's.
    #[serde(deserialize_with = "checked::bootstrap")]
    pub bootstrap: Vec<String>,
}

impl Settings {
    /// The format that this version writes.
    pub const FORMAT: u32 = 1;
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            format: Self::FORMAT,
            listen: vec![DEFAULT_LISTEN],
            quota: None,
            site: None,
            lan_discovery: true,
            bootstrap: Vec::new(),
        }
    }
}

/// What each key may hold; in words too, as whoever wrote something else needs them.
mod checked {
    use std::fmt::Display;

    use serde::de::{DeserializeOwned, Error};
    use serde_json::Value;

    use super::{
        Deserialize, Deserializer, MAX_BOOTSTRAP, MAX_LISTEN, MAX_SITE_LEN, MIN_QUOTA, SocketAddr,
        is_address,
    };

    /// Reads a key's value, or says what it must be.
    fn read<'de, T: DeserializeOwned, D: Deserializer<'de>>(
        deserializer: D,
        key: &str,
        must_be: impl Display,
        is_fine: impl FnOnce(&T) -> bool,
    ) -> Result<T, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let read = T::deserialize(&value).ok().filter(is_fine);
        read.ok_or_else(|| {
            let found: String = value.to_string().chars().take(80).collect();
            D::Error::custom(format_args!("`{key}` must be {must_be}, not {found}"))
        })
    }

    /// A greater one is a newer version's, and refused with that reason.
    pub fn format<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
        read(d, "format", "1", |&format| format >= 1)
    }

    pub fn listen<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<SocketAddr>, D::Error> {
        let must_be = format!("a list of at most {MAX_LISTEN} texts IP:PORT");
        read(d, "listen", must_be, |listen: &Vec<_>| {
            listen.len() <= MAX_LISTEN
        })
    }

    pub fn quota<'de, D: Deserializer<'de>>(d: D) -> Result<Option<u64>, D::Error> {
        let must_be = format!("bytes (a whole number, {MIN_QUOTA} or more) or null");
        read(d, "quota", must_be, |quota: &Option<u64>| {
            quota.is_none_or(|bytes| bytes >= MIN_QUOTA)
        })
    }

    pub fn site<'de, D: Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
        let must_be =
            format!("a text of 1 to {MAX_SITE_LEN} bytes without control characters, or null");
        read(d, "site", must_be, |site: &Option<String>| {
            site.as_ref().is_none_or(|label| {
                (1..=MAX_SITE_LEN).contains(&label.len()) && !label.chars().any(char::is_control)
            })
        })
    }

    pub fn lan_discovery<'de, D: Deserializer<'de>>(d: D) -> Result<bool, D::Error> {
        read(d, "lan_discovery", "true or false", |_| true)
    }

    pub fn bootstrap<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
        let must_be = format!(
            "a list of at most {MAX_BOOTSTRAP} texts HOST:PORT, or multiaddrs with a TCP port"
        );
        read(d, "bootstrap", must_be, |texts: &Vec<String>| {
            texts.len() <= MAX_BOOTSTRAP && texts.iter().all(|text| is_address(text))
        })
    }
}

/// `membership.json`: the credential, and where the fleet is found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Membership {
    /// The chain root -> token -> machine.
    #[serde(with = "credential_hex")]
    pub credential: Credential,
    /// The token's addresses.
    pub addresses: Vec<String>,
}

/// `listening.json`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Listening {
    pub addresses: Vec<String>,
}

/// A credential as hex digits.
mod credential_hex {
    use serde::de::Error;

    use super::{Credential, Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(
        credential: &Credential,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let hex: String = credential
            .encode()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        serializer.serialize_str(&hex)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Credential, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.as_bytes().chunks(2).map(|pair| {
            let pair = std::str::from_utf8(pair)
                .ok()
                .filter(|pair| pair.len() == 2)?;
            u8::from_str_radix(pair, 16).ok()
        });
        let bytes: Option<Vec<u8>> = digits.collect();
        let bytes = bytes.ok_or_else(|| D::Error::custom("the credential is not hexadecimal"))?;
        Credential::decode(&bytes).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(json: &str) -> String {
        serde_json::from_str::<Settings>(json)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn values_at_their_bounds_are_taken_and_beyond_refused() {
        let list = |count: usize, of: &str| format!("[{}]", vec![of; count].join(","));
        let text = |len: usize| format!("{:?}", "x".repeat(len));
        for (key, good, bad) in [
            ("format", "1".to_owned(), "0".to_owned()),
            ("listen", list(16, "\"[::1]:0\""), list(17, "\"[::1]:0\"")),
            ("listen", "[]".into(), "[\"localhost:4277\"]".into()),
            ("quota", "1048576".into(), "1048575".into()),
            ("quota", "null".into(), "-1".into()),
            ("quota", "1099511627776".into(), "\"1T\"".into()),
            ("site", text(64), text(65)),
            ("site", "null".into(), text(0)),
            ("site", "\"Raum 3.17\"".into(), "\"a\\nb\"".into()),
            ("lan_discovery", "false".into(), "0".into()),
            ("bootstrap", list(64, "\"lab:1\""), list(65, "\"lab:1\"")),
            ("bootstrap", "[]".into(), "[\"lab\"]".into()),
        ] {
            let with = |value: &str| format!("{{\"{key}\": {value}}}");
            serde_json::from_str::<Settings>(&with(&good))
                .unwrap_or_else(|error| panic!("{key} {good}: {error}"));
            let refused = refusal(&with(&bad));
            assert!(
                refused.starts_with(&format!("`{key}` must be ")),
                "{key} {bad}: {refused}"
            );
        }
    }

    #[test]
    fn a_misspelt_key_is_refused_with_those_that_there_are() {
        let refused = refusal("{\n  \"Quota\": 5368709120\n}");
        assert!(
            refused.contains("`Quota`")
                && refused.contains("`quota`")
                && refused.contains("line 2"),
            "{refused}"
        );
    }
}
