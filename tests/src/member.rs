//! A machine that holds a token, without a home: who signs by hand, or enters by hand.

use std::time::{SystemTime, UNIX_EPOCH};

use capsule_proto::credential::{
    Channels, Credential, Grant, MachineKey, Roles, Token, TokenError, TokenId,
};
use capsule_proto::record::{Body, Record, SignedRecord};

/// A member's key, and its proof that it is one.
#[derive(Clone)]
pub struct Member {
    /// Its key.
    pub key: MachineKey,
    /// What it shows.
    pub credential: Credential,
    /// Where its token says that the fleet is.
    pub addresses: Vec<String>,
}

impl Member {
    /// The machine of that number, enrolled by a token's text.
    pub fn of(token: &str, number: u8) -> Self {
        let now = now();
        Self::enrol(
            &Token::parse(token, now).expect("the token is good"),
            number,
        )
    }

    /// The machine of that number, enrolled by a token.
    pub fn enrol(token: &Token, number: u8) -> Self {
        Self::with_key(token, MachineKey::from_secret([number; 32]))
    }

    /// The machine of that key, enrolled by a token's text, if it admits one.
    pub fn join(token: &str, key: MachineKey) -> Result<Self, TokenError> {
        Ok(Self::with_key(&Token::parse(token, now())?, key))
    }

    fn with_key(token: &Token, key: MachineKey) -> Self {
        Self {
            credential: token.enrol(key.machine(), "hostile", now()),
            addresses: token.addresses().to_vec(),
            key,
        }
    }

    /// Signs a statement of now, whether or not it may say that.
    pub fn sign(&self, sequence: u64, body: Body) -> Vec<u8> {
        self.sign_record(Record {
            issued: now(),
            expires: None,
            sequence,
            body,
        })
    }

    /// Signs a statement.
    pub fn sign_record(&self, record: Record) -> Vec<u8> {
        let signed = SignedRecord::sign(record, &self.credential, &self.key);
        signed
            .expect("the statement is well-formed")
            .as_bytes()
            .to_vec()
    }
}

/// All rights, for a while: what somebody writes into a token of his own fleet.
pub fn all_rights(id: u8) -> Grant {
    Grant {
        id: TokenId([id; 8]),
        roles: Roles {
            publisher: true,
            admin: true,
        },
        channels: Channels::All,
        issued: now() - 10,
        expires: now() + 1000,
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("the clock is set")
        .as_secs()
}
