//! Tokens: the power to enrol machines, and the text that carries it from one to another.

use std::fmt;

use ed25519_dalek::{Signer, SigningKey};
use thiserror::Error;

use super::{
    Channels, Credential, CredentialError, FleetId, FleetKey, Grant, MAX_MACHINE_NAME_LEN,
    MachineId, TokenCertificate, VERSION,
};
use crate::codec::{DecodeError, Reader, Writer};

const TOKEN_MAGIC: &[u8; 4] = b"CAPK";
/// What a token's text begins with; its version is in the bytes.
const TOKEN_PREFIX: &str = "capsule1";
const CHECKSUM_LEN: usize = 4;

/// Longest token, in bytes.
pub const MAX_TOKEN_LEN: usize = 16 << 10;
/// Most addresses in a token.
pub const MAX_ADDRESSES: usize = 16;
/// Longest address, in bytes.
pub const MAX_ADDRESS_LEN: usize = 256;

/// The power to enrol machines, with addresses to begin at.
#[derive(Clone)]
pub struct Token {
    fleet: FleetId,
    certificate: TokenCertificate,
    key: SigningKey,
    addresses: Vec<String>,
}

/// Why a text is no token.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum TokenError {
    /// It does not look like one.
    #[error(
        "this is not a capsule token: one begins with \"{TOKEN_PREFIX}\" and is printed by `capsule fleet invite`"
    )]
    NotAToken,
    /// A part was lost or changed in copying.
    #[error("the token is damaged or cut off: copy it again, whole")]
    Damaged,
    /// The bytes are not a token's.
    #[error("the token is malformed: {0}")]
    Malformed(#[from] DecodeError),
    /// Its certificate does not hold.
    #[error(transparent)]
    Credential(#[from] CredentialError),
}

impl FleetKey {
    /// Makes a token of 32 secret random bytes. Addresses are multiaddr texts; at most [`MAX_ADDRESSES`] are kept, and only
    /// texts of at most [`MAX_ADDRESS_LEN`] bytes without control characters.
    pub fn invite(&self, mut grant: Grant, secret: [u8; 32], addresses: &[String]) -> Token {
        let key = SigningKey::from_bytes(&secret);
        let fleet = self.fleet();
        if let Channels::Only(channels) = grant.channels {
            // What is signed must be canonical, or nobody could read it.
            grant.channels = Channels::only(channels);
        }
        let mut certificate = TokenCertificate {
            grant,
            key: key.verifying_key().to_bytes(),
            signature: [0; 64],
        };
        certificate.signature = self.sign(&certificate.signed_bytes(&fleet));
        let fits = |address: &&String| {
            address.len() <= MAX_ADDRESS_LEN && !address.chars().any(char::is_control)
        };
        let addresses = addresses
            .iter()
            .filter(fits)
            .take(MAX_ADDRESSES)
            .cloned()
            .collect();
        Token {
            fleet,
            certificate,
            key,
            addresses,
        }
    }
}

impl Token {
    /// The fleet that it leads to.
    pub const fn fleet(&self) -> FleetId {
        self.fleet
    }

    /// What it grants.
    pub const fn grant(&self) -> &Grant {
        &self.certificate.grant
    }

    /// Where members can be met: multiaddr texts.
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// Enrols a machine. The name is for people: cut to [`MAX_MACHINE_NAME_LEN`] bytes and stripped of control characters.
    pub fn enrol(&self, machine: MachineId, name: &str, now: u64) -> Credential {
        let mut machine_name: String = name.chars().filter(|c| !c.is_control()).collect();
        while machine_name.len() > MAX_MACHINE_NAME_LEN {
            machine_name.pop();
        }
        let mut credential = Credential {
            fleet: self.fleet,
            token: self.certificate.clone(),
            machine,
            machine_name,
            issued: now,
            signature: [0; 64],
        };
        credential.signature = self.key.sign(&credential.signed_bytes()).to_bytes();
        credential
    }

    /// Parses a token's text and checks its certificate and expiry.
    pub fn parse(text: &str, now: u64) -> Result<Self, TokenError> {
        let body = text
            .trim()
            .strip_prefix(TOKEN_PREFIX)
            .ok_or(TokenError::NotAToken)?;
        if body.len() > MAX_TOKEN_LEN * 2 {
            return Err(TokenError::Damaged);
        }
        let bytes = data_encoding::BASE32_NOPAD_NOCASE
            .decode(body.as_bytes())
            .map_err(|_| TokenError::Damaged)?;
        let (bytes, checksum) = bytes
            .split_last_chunk::<CHECKSUM_LEN>()
            .ok_or(TokenError::Damaged)?;
        if blake3::hash(bytes).as_bytes()[..CHECKSUM_LEN] != checksum[..] {
            return Err(TokenError::Damaged);
        }
        let token = Self::decode(bytes)?;
        token.certificate.check(&token.fleet, now)?;
        Ok(token)
    }

    fn encode(&self) -> Vec<u8> {
        let mut w = Writer::with_header(TOKEN_MAGIC, VERSION);
        w.raw(&self.fleet.0);
        self.certificate.encode(&mut w);
        w.raw(&self.key.to_bytes());
        w.list(&self.addresses, |w, address| w.bytes(address.as_bytes()));
        w.finish()
    }

    fn decode(bytes: &[u8]) -> Result<Self, TokenError> {
        let mut r = Reader::with_header(bytes, TOKEN_MAGIC, VERSION, "token", MAX_TOKEN_LEN)?;
        let fleet = FleetId(r.array("fleet")?);
        let certificate = TokenCertificate::decode(&mut r)?;
        let at = r.at();
        let key = SigningKey::from_bytes(&r.array("token key")?);
        if key.verifying_key().to_bytes() != certificate.key {
            return Err(r
                .invalid(
                    "token key",
                    at,
                    "it is not the key that the certificate names",
                )
                .into());
        }
        let addresses = r.list("addresses", MAX_ADDRESSES, 1, |r| {
            r.text("address", MAX_ADDRESS_LEN)
        })?;
        r.finish()?;
        Ok(Self {
            fleet,
            certificate,
            key,
            addresses,
        })
    }
}

impl fmt::Display for Token {
    /// The text that is copied from one machine to another: prefix, then base32 of the bytes and their checksum.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = self.encode();
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(&hash.as_bytes()[..CHECKSUM_LEN]);
        write!(
            f,
            "{TOKEN_PREFIX}{}",
            data_encoding::BASE32_NOPAD.encode(&bytes).to_lowercase()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::token;
    use super::*;

    #[test]
    fn a_damaged_expired_or_foreign_token_says_so() {
        let root = FleetKey::from_secret([1; 32]);
        let text = token(&root).to_string();
        assert!(matches!(
            Token::parse("hello", 0),
            Err(TokenError::NotAToken)
        ));
        for cut in TOKEN_PREFIX.len()..text.len() {
            assert!(Token::parse(&text[..cut], 0).is_err(), "cut at {cut}");
        }
        let flipped = text.replacen('a', "b", 1);
        assert!(Token::parse(&flipped, 0).is_err());
        assert!(matches!(
            Token::parse(&text, 1000),
            Err(TokenError::Credential(CredentialError::Expired { .. }))
        ));
    }
}
