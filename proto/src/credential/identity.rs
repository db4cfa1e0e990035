//! Fleets and machines by their public keys, tokens by number; key pairs, and signatures checked strictly.
//!
//! What is signed is the rooms' that sign: certificates in `super`, records in `crate::record`.

use std::fmt;
use std::str::FromStr;

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};

/// A fleet: its root's public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FleetId(pub [u8; 32]);

/// A machine: its public key, which is also its identity on the network.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MachineId(pub [u8; 32]);

/// A token's number, by which it is revoked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId(pub [u8; 8]);

/// The root's key pair; whoever has it can invite.
pub struct FleetKey(SigningKey);

/// A machine's key pair.
#[derive(Clone)]
pub struct MachineKey(SigningKey);

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

    pub(super) fn sign(&self, bytes: &[u8]) -> [u8; 64] {
        self.0.sign(bytes).to_bytes()
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

pub(super) fn verify(key: &[u8; 32], bytes: &[u8], signature: &[u8; 64]) -> bool {
    VerifyingKey::from_bytes(key).is_ok_and(|key| {
        key.verify_strict(bytes, &Signature::from_bytes(signature))
            .is_ok()
    })
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
