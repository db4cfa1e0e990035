//! What a token grants: roles, the channels of a publisher, and until when.

use super::TokenId;
use crate::codec::{DecodeError, Reader, Writer};
use crate::name::{self, Channel};

/// Most channels that a token grants by name.
pub const MAX_CHANNELS: usize = 64;

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

impl Channels {
    /// Sorts a list of channels; an empty list grants none.
    pub fn only(mut channels: Vec<Channel>) -> Self {
        channels.sort();
        channels.dedup();
        channels.truncate(MAX_CHANNELS);
        Self::Only(channels)
    }
}

impl Grant {
    pub(super) fn encode(&self, w: &mut Writer) {
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

    pub(super) fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
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
