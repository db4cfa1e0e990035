//! Who belongs to a fleet: root key, tokens, and the chain root -> token -> machine.
//!
//! The root signs a token's key with its roles; whoever holds the token signs machines' keys, so that one token enrols
//! hundreds of machines without the root. Keys are Ed25519 (RFC 8032), checked strictly. Time and revocations are
//! arguments: this module knows no clock and no store. What is secret of a token, and its text, is in `token`. Byte-level description: `proto/docs/credential.md`.

mod token;

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use thiserror::Error;

use crate::codec::{DecodeError, Reader, Writer};
use crate::name::{self, Channel};

pub use token::{MAX_ADDRESS_LEN, MAX_ADDRESSES, MAX_TOKEN_LEN, Token, TokenError};

const CREDENTIAL_MAGIC: &[u8; 4] = b"CAPC";
const VERSION: u8 = 1;
// What is signed begins with its purpose, so that no signature serves another.
const TOKEN_CONTEXT: &[u8] = b"capsule token certificate v1\0";
const MACHINE_CONTEXT: &[u8] = b"capsule machine certificate v1\0";

/// Longest credential, in bytes: 64 channels of 64 bytes, and change.
pub const MAX_CREDENTIAL_LEN: usize = 8 << 10;
/// Most channels that a token grants by name.
pub const MAX_CHANNELS: usize = 64;
/// Longest name that a machine gives itself, in bytes.
pub const MAX_MACHINE_NAME_LEN: usize = 64;

/// A fleet: its root's public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FleetId(pub [u8; 32]);

/// A machine: its public key, which is also its identity on the network.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MachineId(pub [u8; 32]);

/// A token's number, by which it is revoked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId(pub [u8; 8]);

/// What a member may do beyond fetching and serving.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Roles {
    /// Publish names, layers, prefetch lists and releases, in the channels granted.
    pub publisher: bool,
    /// Revoke tokens and machines.
    pub admin: bool,
}

/// In which channels a publisher may publish.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Channels {
    /// In every channel.
    All,
    /// In these, sorted, without repetition.
    Only(Vec<Channel>),
}

/// What a token grants; signed by the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The token's number.
    pub id: TokenId,
    /// What its machines may do.
    pub roles: Roles,
    /// Where they may publish.
    pub channels: Channels,
    /// When it was made: seconds since 1970.
    pub issued: u64,
    /// When it and every credential made with it end: seconds since 1970.
    pub expires: u64,
}

/// The root's key pair; whoever has it can invite.
pub struct FleetKey(SigningKey);

/// A machine's key pair.
#[derive(Clone)]
pub struct MachineKey(SigningKey);

/// A machine's proof that it belongs to a fleet; public.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Credential {
    fleet: FleetId,
    token: TokenCertificate,
    machine: MachineId,
    machine_name: String,
    issued: u64,
    signature: [u8; 64],
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct TokenCertificate {
    grant: Grant,
    key: [u8; 32],
    signature: [u8; 64],
}

/// What a verified credential says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The machine.
    pub machine: MachineId,
    /// The name that it gave itself; not unique, for people only.
    pub name: String,
    /// What its token grants.
    pub grant: Grant,
}

/// What was taken back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Revoked {
    /// Tokens, with every machine that they enrolled.
    pub tokens: BTreeSet<TokenId>,
    /// Single machines.
    pub machines: BTreeSet<MachineId>,
}

/// Why a credential does not count.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum CredentialError {
    /// The bytes are no credential.
    #[error("the credential is malformed: {0}")]
    Malformed(#[from] DecodeError),
    /// It is of another fleet.
    #[error(
        "the credential is of another fleet ({0}): join this one with a token of `capsule fleet invite`"
    )]
    OtherFleet(FleetId),
    /// The root did not sign its token.
    #[error("the fleet's root key did not sign the credential's token")]
    TokenSignature,
    /// The token did not sign the machine.
    #[error("the credential's token did not sign this machine's key")]
    MachineSignature,
    /// It ended.
    #[error(
        "the credential expired at {expired} (seconds since 1970; now {now}): join again with a new token of `capsule fleet invite`"
    )]
    Expired {
        /// When.
        expired: u64,
        /// The time it was checked at.
        now: u64,
    },
    /// The token or the machine was revoked.
    #[error("the credential of {0} was revoked")]
    Revoked(MachineId),
}

impl FleetKey {
    /// The key pair of 32 secret random bytes.
    pub fn from_secret(secret: [u8; 32]) -> Self {
        Self(SigningKey::from_bytes(&secret))
    }

    /// The secret bytes, to be stored where only the owner reads.
    pub fn secret(&self) -> [u8; 32] {
        self.0.to_bytes()
    }

    /// The fleet.
    pub fn fleet(&self) -> FleetId {
        FleetId(self.0.verifying_key().to_bytes())
    }
}

impl MachineKey {
    /// The key pair of 32 secret random bytes.
    pub fn from_secret(secret: [u8; 32]) -> Self {
        Self(SigningKey::from_bytes(&secret))
    }

    /// The secret bytes, to be stored where only the owner reads.
    pub fn secret(&self) -> [u8; 32] {
        self.0.to_bytes()
    }

    /// The machine.
    pub fn machine(&self) -> MachineId {
        MachineId(self.0.verifying_key().to_bytes())
    }

    pub(crate) fn sign(&self, bytes: &[u8]) -> [u8; 64] {
        self.0.sign(bytes).to_bytes()
    }
}

impl MachineId {
    pub(crate) fn verify(&self, bytes: &[u8], signature: &[u8; 64]) -> bool {
        verify(&self.0, bytes, signature)
    }
}

fn verify(key: &[u8; 32], bytes: &[u8], signature: &[u8; 64]) -> bool {
    VerifyingKey::from_bytes(key).is_ok_and(|key| {
        key.verify_strict(bytes, &Signature::from_bytes(signature))
            .is_ok()
    })
}

impl TokenCertificate {
    fn signed_bytes(&self, fleet: &FleetId) -> Vec<u8> {
        let mut w = Writer::default();
        w.raw(TOKEN_CONTEXT);
        w.raw(&fleet.0);
        w.raw(&self.key);
        self.grant.encode(&mut w);
        w.finish()
    }

    fn check(&self, fleet: &FleetId, now: u64) -> Result<(), CredentialError> {
        if !verify(&fleet.0, &self.signed_bytes(fleet), &self.signature) {
            return Err(CredentialError::TokenSignature);
        }
        if now >= self.grant.expires {
            return Err(CredentialError::Expired {
                expired: self.grant.expires,
                now,
            });
        }
        Ok(())
    }

    fn encode(&self, w: &mut Writer) {
        w.raw(&self.key);
        self.grant.encode(w);
        w.raw(&self.signature);
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            key: r.array("token key")?,
            grant: Grant::decode(r)?,
            signature: r.array("token signature")?,
        })
    }
}

impl Grant {
    fn encode(&self, w: &mut Writer) {
        w.raw(&self.id.0);
        w.u8(u8::from(self.roles.publisher) | u8::from(self.roles.admin) << 1);
        let only = match &self.channels {
            Channels::All => None,
            Channels::Only(channels) => Some(channels),
        };
        w.option(only, |w, channels| {
            w.list(channels, |w, channel| w.bytes(channel.as_str().as_bytes()))
        });
        w.varint(self.issued);
        w.varint(self.expires);
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let id = TokenId(r.array("token id")?);
        let at = r.at();
        let roles = r.u8("roles")?;
        if roles > 3 {
            return Err(r.invalid("roles", at, "roles are bits 0 and 1"));
        }
        let at = r.at();
        let only = r.option("channels", |r| {
            r.list("channels", MAX_CHANNELS, 2, |r| {
                let at = r.at();
                let text = r.text("channel", name::MAX_NAME_LEN)?;
                text.parse::<Channel>()
                    .map_err(|_| r.invalid("channel", at, "it is not a channel's name"))
            })
        })?;
        if only
            .as_ref()
            .is_some_and(|channels| !channels.is_sorted_by(|a, b| a < b))
        {
            return Err(r.invalid("channels", at, "they are sorted, without repetition"));
        }
        Ok(Self {
            id,
            roles: Roles {
                publisher: roles & 1 != 0,
                admin: roles & 2 != 0,
            },
            channels: only.map_or(Channels::All, Channels::Only),
            issued: r.varint("time of issue", u64::MAX)?,
            expires: r.varint("time of expiry", u64::MAX)?,
        })
    }

    /// Whether a member with this grant may publish in the channel.
    pub fn may_publish(&self, channel: &Channel) -> bool {
        self.roles.publisher
            && match &self.channels {
                Channels::All => true,
                Channels::Only(channels) => channels.binary_search(channel).is_ok(),
            }
    }
}

impl Channels {
    /// Sorts a list of channels; an empty list grants none.
    pub fn only(mut channels: Vec<Channel>) -> Self {
        channels.sort();
        channels.dedup();
        channels.truncate(MAX_CHANNELS);
        Self::Only(channels)
    }
}

impl Credential {
    /// The fleet that it claims.
    pub const fn fleet(&self) -> FleetId {
        self.fleet
    }

    /// The machine that it claims.
    pub const fn machine(&self) -> MachineId {
        self.machine
    }

    /// What its token claims to grant.
    pub const fn grant(&self) -> &Grant {
        &self.token.grant
    }

    /// Checks the whole chain, at a time and against what was revoked.
    pub fn verify(
        &self,
        fleet: &FleetId,
        now: u64,
        revoked: &Revoked,
    ) -> Result<Member, CredentialError> {
        if self.fleet != *fleet {
            return Err(CredentialError::OtherFleet(self.fleet));
        }
        self.token.check(fleet, now)?;
        if !verify(&self.token.key, &self.signed_bytes(), &self.signature) {
            return Err(CredentialError::MachineSignature);
        }
        if revoked.tokens.contains(&self.token.grant.id) || revoked.machines.contains(&self.machine)
        {
            return Err(CredentialError::Revoked(self.machine));
        }
        Ok(Member {
            machine: self.machine,
            name: self.machine_name.clone(),
            grant: self.token.grant.clone(),
        })
    }

    fn signed_bytes(&self) -> Vec<u8> {
        let mut w = Writer::default();
        w.raw(MACHINE_CONTEXT);
        w.raw(&self.fleet.0);
        w.raw(&self.token.key);
        w.raw(&self.machine.0);
        w.bytes(self.machine_name.as_bytes());
        w.varint(self.issued);
        w.finish()
    }

    /// The canonical encoding.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::with_header(CREDENTIAL_MAGIC, VERSION);
        w.raw(&self.fleet.0);
        self.token.encode(&mut w);
        w.raw(&self.machine.0);
        w.bytes(self.machine_name.as_bytes());
        w.varint(self.issued);
        w.raw(&self.signature);
        w.finish()
    }

    /// Parses a credential; whether it holds is for [`Credential::verify`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::with_header(
            bytes,
            CREDENTIAL_MAGIC,
            VERSION,
            "credential",
            MAX_CREDENTIAL_LEN,
        )?;
        let credential = Self {
            fleet: FleetId(r.array("fleet")?),
            token: TokenCertificate::decode(&mut r)?,
            machine: MachineId(r.array("machine key")?),
            machine_name: r.text("machine name", MAX_MACHINE_NAME_LEN)?,
            issued: r.varint("time of issue", u64::MAX)?,
            signature: r.array("machine signature")?,
        };
        r.finish()?;
        Ok(credential)
    }
}

macro_rules! hex_text {
    ($type:ident, $len:literal, $what:literal) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($type))
            }
        }

        impl FromStr for $type {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                let bytes = data_encoding::HEXLOWER_PERMISSIVE
                    .decode(text.as_bytes())
                    .ok();
                let bytes = bytes.and_then(|bytes| <[u8; $len]>::try_from(bytes).ok());
                bytes.map(Self).ok_or_else(|| {
                    format!(
                        "{text:?} is not {}: expected {} hexadecimal digits",
                        $what,
                        $len * 2
                    )
                })
            }
        }
    };
}

hex_text!(FleetId, 32, "a fleet's id");
hex_text!(MachineId, 32, "a machine's id");
hex_text!(TokenId, 8, "a token's id");

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn grant(expires: u64) -> Grant {
        let channels = Channels::only(vec!["lab".parse().unwrap(), "ci".parse().unwrap()]);
        Grant {
            id: TokenId([7; 8]),
            roles: Roles {
                publisher: true,
                admin: false,
            },
            channels,
            issued: 10,
            expires,
        }
    }

    pub(super) fn token(root: &FleetKey) -> Token {
        root.invite(grant(1000), [2; 32], &["/ip4/127.0.0.1/tcp/4001".into()])
    }

    #[test]
    fn a_token_enrols_and_its_text_round_trips() {
        let root = FleetKey::from_secret([1; 32]);
        let text = token(&root).to_string();
        let token = Token::parse(&format!(" {text}\n"), 50).unwrap();
        assert_eq!(token.addresses(), ["/ip4/127.0.0.1/tcp/4001"]);
        let machine = MachineKey::from_secret([3; 32]).machine();
        let credential = token.enrol(machine, "pc-\u{7}17", 60);
        assert_eq!(
            Credential::decode(&credential.encode()),
            Ok(credential.clone())
        );
        let member = credential
            .verify(&root.fleet(), 61, &Revoked::default())
            .unwrap();
        assert_eq!((member.machine, member.name.as_str()), (machine, "pc-17"));
        assert!(
            member.grant.may_publish(&"lab".parse().unwrap())
                && !member.grant.may_publish(&"x".parse().unwrap())
        );
    }

    #[test]
    fn every_link_of_the_chain_is_checked() {
        let root = FleetKey::from_secret([1; 32]);
        let machine = MachineKey::from_secret([3; 32]).machine();
        let good = token(&root).enrol(machine, "pc", 60);
        let check =
            |credential: &Credential| credential.verify(&root.fleet(), 100, &Revoked::default());
        assert!(check(&good).is_ok());
        assert!(matches!(
            good.verify(&FleetId([9; 32]), 100, &Revoked::default()),
            Err(CredentialError::OtherFleet(_))
        ));
        let mut foreign = token(&FleetKey::from_secret([8; 32])).enrol(machine, "pc", 60);
        foreign.fleet = root.fleet();
        assert_eq!(check(&foreign), Err(CredentialError::TokenSignature));
        let mut raised = good.clone();
        raised.token.grant.roles.admin = true;
        assert_eq!(check(&raised), Err(CredentialError::TokenSignature));
        let mut other = good.clone();
        other.machine = MachineKey::from_secret([4; 32]).machine();
        assert_eq!(check(&other), Err(CredentialError::MachineSignature));
        assert!(matches!(
            good.verify(&root.fleet(), 1000, &Revoked::default()),
            Err(CredentialError::Expired { .. })
        ));
        let revoked = Revoked {
            tokens: [TokenId([7; 8])].into(),
            ..Revoked::default()
        };
        assert!(matches!(
            good.verify(&root.fleet(), 100, &revoked),
            Err(CredentialError::Revoked(_))
        ));
        let revoked = Revoked {
            machines: [machine].into(),
            ..Revoked::default()
        };
        assert!(matches!(
            good.verify(&root.fleet(), 100, &revoked),
            Err(CredentialError::Revoked(_))
        ));
    }
}
