//! Who belongs to a fleet: root key, tokens, and the chain root -> token -> machine.
//!
//! The root signs a token's key with its roles; whoever holds the token signs machines' keys, so that one token enrols
//! hundreds of machines without the root. Keys are Ed25519 (RFC 8032), checked strictly. Time and revocations are
//! arguments: this module knows no clock and no store. Byte-level description: `proto/docs/credential.md`.
//!
//! | file | what lives there |
//! |---|---|
//! | here | the chain: a token's certificate, a machine's credential, why one does not count |
//! | `identity` | ids, key pairs, signatures |
//! | `grant` | what a token's machines may do |
//! | `token` | what is secret of a token, and its text |

mod grant;
mod identity;
mod token;

use std::collections::BTreeSet;

use thiserror::Error;

use crate::codec::{DecodeError, Reader, Writer};
use identity::verify;

pub use grant::{Channels, Grant, MAX_CHANNELS, Roles};
pub use identity::{FleetId, FleetKey, MachineId, MachineKey, TokenId};
pub use token::{MAX_ADDRESS_LEN, MAX_ADDRESSES, MAX_TOKEN_LEN, Token, TokenError};

const CREDENTIAL_MAGIC: &[u8; 4] = b"CAPC";
const VERSION: u8 = 1;
// What is signed begins with its purpose, so that no signature serves another.
const TOKEN_CONTEXT: &[u8] = b"capsule token certificate v1\0";
const MACHINE_CONTEXT: &[u8] = b"capsule machine certificate v1\0";

/// Longest credential, in bytes: 64 channels of 64 bytes, and change.
pub const MAX_CREDENTIAL_LEN: usize = 8 << 10;
/// Longest name that a machine gives itself, in bytes.
pub const MAX_MACHINE_NAME_LEN: usize = 64;

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
