//! What people set, and what joining left: the home's JSON files.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use capsule_proto::credential::Credential;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Where a node listens unless told otherwise: one port, so that tokens stay valid over restarts.
pub const DEFAULT_LISTEN: SocketAddr =
    SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 4277));

/// `home.json`: what people set. Unknown keys are an error, so that a misspelt one is noticed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Format of the home directory.
    pub format: u32,
    /// Where to listen.
    pub listen: Vec<SocketAddr>,
    /// Most bytes in the store; no limit but the disk's where absent.
    pub quota: Option<u64>,
    /// The site (cheap network) that this machine is in.
    pub site: Option<String>,
    /// Whether to look for the fleet by multicast on the LAN.
    pub lan_discovery: bool,
    /// More addresses where the fleet may be found, beside the token's.
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
