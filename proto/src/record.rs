//! Records: small signed statements about hashes, by members whose role allows them.
//!
//! A record carries its signer's credential, so whoever gets it can check it alone. Which of several records counts
//! (sequence, expiry) is for the store of records; here are the rules that hold for each by itself.
//! Byte-level description: `proto/docs/record.md`.

use thiserror::Error;

use crate::codec::{DecodeError, Reader, Writer};
use crate::credential::{
    Credential, CredentialError, FleetId, MAX_CREDENTIAL_LEN, MachineId, MachineKey, Member,
    Revoked, TokenId,
};
use crate::hash::{CapsuleId, RootHash};
use crate::index::{MAX_INDEX_LEN, Space};
use crate::manifest::MAX_MANIFEST_LEN;
use crate::name::{self, Channel, Version};
use crate::ranges::MAX_CONTENT_LEN;

const MAGIC: &[u8; 4] = b"CAPR";
const VERSION: u8 = 1;
const CONTEXT: &[u8] = b"capsule record v1\0";

/// Longest record, in bytes: it travels whole by gossip.
pub const MAX_RECORD_LEN: usize = 192 << 10;
/// Most ranges of a prefetch list.
pub const MAX_PREFETCH_RANGES: usize = 8192;
/// Most tokens, and most machines, that a revocation lists.
pub const MAX_REVOKED: usize = 2048;
/// How far ahead of the checker's clock a record may have been signed, in seconds: clocks of lab machines differ.
pub const MAX_CLOCK_SKEW: u64 = 24 * 3600;

/// Hash of a whole signed record: its name in gossip and synchronisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordId(pub RootHash);

/// A statement, before it is signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// When it was made: seconds since 1970.
    pub issued: u64,
    /// When it ends, if it does: seconds since 1970.
    pub expires: Option<u64>,
    /// Orders the statements about one subject (a channel's names, its releases, a component's prefetch lists, the fleet's
    /// revocations): the highest counts. Counts the orders of a layer's frames. Zero where there is no order.
    pub sequence: u64,
    /// What is said.
    pub body: Body,
}

/// What a record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// A version of a channel is this capsule.
    Name(Name),
    /// This layer leads to a component.
    Layer(Layer),
    /// Reading a component begins with these ranges.
    Prefetch(Prefetch),
    /// This version of a channel is current, and how it is rolled out.
    Release(Release),
    /// These tokens and machines no longer count. Lists everything revoked so far, so that the newest one is enough.
    Revocation(Revoked),
}

/// Version of a channel -> capsule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// The channel.
    pub channel: Channel,
    /// The version.
    pub version: Version,
    /// The capsule.
    pub capsule: CapsuleId,
    /// Length of its manifest, in bytes.
    pub manifest_size: u64,
}

/// A blob: its root hash and length in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobRef {
    /// Root hash.
    pub root: RootHash,
    /// Length in bytes.
    pub size: u64,
}

/// A way to a component: from a parent, or from nothing.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Layer {
    /// What the layer's offsets count.
    pub space: Space,
    /// The component that it starts from.
    pub parent: Option<RootHash>,
    /// The component that it makes.
    pub target: RootHash,
    /// Length of the target in its space, in bytes.
    pub target_size: u64,
    /// The index.
    pub index: BlobRef,
    /// The pack; none where the layer has no frames: an empty blob has no other name.
    pub pack: Option<BlobRef>,
}

/// The ranges of a component that are read first, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefetch {
    /// The component.
    pub component: RootHash,
    /// First byte and length of each range, in order of use.
    pub ranges: Vec<(u64, u64)>,
}

/// Which version of a channel is current, and how to roll it out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// The channel.
    pub channel: Channel,
    /// The version.
    pub version: Version,
    /// The capsule.
    pub capsule: CapsuleId,
    /// Share of the machines that take it now, in percent; which ones follows from their ids.
    pub percent: u8,
    /// Not deployed before: seconds since 1970.
    pub not_before: u64,
    /// Machines fetch it by then: seconds since 1970; none: as they can.
    pub deadline: Option<u64>,
}

/// A record with its signer's credential and signature, as it travels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedRecord {
    record: Record,
    credential: Credential,
    signature: [u8; 64],
    bytes: Vec<u8>,
}

/// Why a record does not count.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum RecordError {
    /// The bytes are no record.
    #[error("the record is malformed: {0}")]
    Malformed(#[from] DecodeError),
    /// Its signer is no member, or was none when it signed.
    #[error("the record's signer is not a valid member: {0}")]
    Signer(#[from] CredentialError),
    /// The signature does not hold.
    #[error("the record is not signed by the member whose credential it carries")]
    Signature,
    /// The signer may not say this.
    #[error("member {machine} may not {what}: its token lacks the role or the channel")]
    NotAllowed {
        /// The signer.
        machine: MachineId,
        /// What it would have needed.
        what: String,
    },
    /// It ended.
    #[error("the record expired at {expired} (seconds since 1970; now {now})")]
    Expired {
        /// When.
        expired: u64,
        /// The time it was checked at.
        now: u64,
    },
    /// It was signed in the future.
    #[error(
        "the record is dated {issued}, more than a day ahead of this machine's clock ({now}; seconds since 1970): set the clocks"
    )]
    FromTheFuture {
        /// Its date.
        issued: u64,
        /// The time it was checked at.
        now: u64,
    },
}

impl SignedRecord {
    /// Signs a record. The encoding is checked by the decoder, where the rules live.
    pub fn sign(
        record: Record,
        credential: &Credential,
        key: &MachineKey,
    ) -> Result<Self, DecodeError> {
        let mut w = Writer::with_header(MAGIC, VERSION);
        w.bytes(&credential.encode());
        w.bytes(&record.encode());
        let mut bytes = w.finish();
        let signature = key.sign(&[CONTEXT, &bytes].concat());
        bytes.extend_from_slice(&signature);
        Self::decode(&bytes)
    }

    /// Parses a record; whether it holds is for [`SignedRecord::verify`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::with_header(bytes, MAGIC, VERSION, "record", MAX_RECORD_LEN)?;
        let credential = Credential::decode(r.bytes("credential", MAX_CREDENTIAL_LEN)?)?;
        let record = Record::decode(r.bytes("statement", MAX_RECORD_LEN)?)?;
        let signature = r.array("signature")?;
        r.finish()?;
        Ok(Self {
            record,
            credential,
            signature,
            bytes: bytes.to_vec(),
        })
    }

    /// The bytes that travel.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Its name.
    pub fn id(&self) -> RecordId {
        RecordId(RootHash::of(&self.bytes))
    }

    /// What it says; trust it only after [`SignedRecord::verify`].
    pub const fn record(&self) -> &Record {
        &self.record
    }

    /// Who claims to have signed it.
    pub const fn signer(&self) -> MachineId {
        self.credential.machine()
    }

    /// Checks signer, signature, role and time. The signer must have been a member when it signed, and not be revoked now.
    pub fn verify(
        &self,
        fleet: &FleetId,
        now: u64,
        revoked: &Revoked,
    ) -> Result<Member, RecordError> {
        let Record {
            issued, expires, ..
        } = self.record;
        let member = self.credential.verify(fleet, issued, revoked)?;
        let signed = &self.bytes[..self.bytes.len() - self.signature.len()];
        if !member
            .machine
            .verify(&[CONTEXT, signed].concat(), &self.signature)
        {
            return Err(RecordError::Signature);
        }
        if let Some(what) = self.record.body.needs(&member) {
            return Err(RecordError::NotAllowed {
                machine: member.machine,
                what,
            });
        }
        if let Some(expired) = expires.filter(|&expires| now >= expires) {
            return Err(RecordError::Expired { expired, now });
        }
        if issued > now.saturating_add(MAX_CLOCK_SKEW) {
            return Err(RecordError::FromTheFuture { issued, now });
        }
        Ok(member)
    }
}

impl Body {
    /// What the member lacks to say this, if anything.
    fn needs(&self, member: &Member) -> Option<String> {
        let grant = &member.grant;
        match self {
            Self::Name(Name { channel, .. }) | Self::Release(Release { channel, .. }) => {
                (!grant.may_publish(channel)).then(|| format!("publish in channel {channel}"))
            }
            Self::Layer(_) | Self::Prefetch(_) => {
                (!grant.roles.publisher).then(|| "publish layers".to_owned())
            }
            Self::Revocation(_) => (!grant.roles.admin).then(|| "revoke".to_owned()),
        }
    }

    const fn tag(&self) -> u8 {
        match self {
            Self::Name(_) => 0,
            Self::Layer(_) => 1,
            Self::Prefetch(_) => 2,
            Self::Release(_) => 3,
            Self::Revocation(_) => 4,
        }
    }
}

impl Record {
    fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        w.varint(self.issued);
        w.option(self.expires, Writer::varint);
        w.varint(self.sequence);
        w.u8(self.body.tag());
        match &self.body {
            Body::Name(name) => {
                encode_version(&mut w, &name.channel, &name.version, &name.capsule);
                w.varint(name.manifest_size);
            }
            Body::Layer(layer) => layer.encode(&mut w),
            Body::Prefetch(prefetch) => {
                w.hash(&prefetch.component);
                w.list(&prefetch.ranges, |w, (start, len)| {
                    w.varint(*start);
                    w.varint(*len);
                });
            }
            Body::Release(release) => {
                encode_version(&mut w, &release.channel, &release.version, &release.capsule);
                w.u8(release.percent);
                w.varint(release.not_before);
                w.option(release.deadline, Writer::varint);
            }
            Body::Revocation(revoked) => {
                w.list(&revoked.tokens.iter().collect::<Vec<_>>(), |w, token| {
                    w.raw(&token.0)
                });
                w.list(
                    &revoked.machines.iter().collect::<Vec<_>>(),
                    |w, machine| w.raw(&machine.0),
                );
            }
        }
        w.finish()
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(bytes);
        let issued = r.varint("time of issue", u64::MAX)?;
        let expires = r.option("time of expiry", |r| r.varint("time of expiry", u64::MAX))?;
        let sequence = r.varint("sequence", u64::MAX)?;
        let at = r.at();
        let body = match r.u8("statement kind")? {
            0 => {
                let (channel, version, capsule) = decode_version(&mut r)?;
                let manifest_size = r.varint("manifest size", MAX_MANIFEST_LEN as u64)?;
                Body::Name(Name {
                    channel,
                    version,
                    capsule,
                    manifest_size,
                })
            }
            1 => Body::Layer(Layer::decode(&mut r)?),
            2 => Body::Prefetch(Prefetch::decode(&mut r)?),
            3 => {
                let (channel, version, capsule) = decode_version(&mut r)?;
                let at = r.at();
                let percent = r.u8("percent")?;
                if percent > 100 {
                    return Err(r.invalid("percent", at, "it is 0 to 100"));
                }
                let not_before = r.varint("not before", u64::MAX)?;
                let deadline = r.option("deadline", |r| r.varint("deadline", u64::MAX))?;
                Body::Release(Release {
                    channel,
                    version,
                    capsule,
                    percent,
                    not_before,
                    deadline,
                })
            }
            4 => Body::Revocation(decode_revoked(&mut r)?),
            _ => {
                return Err(r.invalid(
                    "statement kind",
                    at,
                    "kinds are 0 to 4: upgrade capsule to read newer ones",
                ));
            }
        };
        r.finish()?;
        Ok(Self {
            issued,
            expires,
            sequence,
            body,
        })
    }
}

impl Layer {
    fn encode(&self, w: &mut Writer) {
        let blob = |w: &mut Writer, blob: &BlobRef| {
            w.hash(&blob.root);
            w.varint(blob.size);
        };
        w.u8(u8::from(self.space == Space::Contents));
        w.option(self.parent.as_ref(), Writer::hash);
        w.hash(&self.target);
        w.varint(self.target_size);
        blob(w, &self.index);
        w.option(self.pack.as_ref(), blob);
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let blob = |r: &mut Reader<'_>, bound| {
            let at = r.at();
            let blob = BlobRef {
                root: r.hash("blob")?,
                size: r.varint("blob size", bound)?,
            };
            if blob.size == 0 {
                return Err(r.invalid(
                    "blob",
                    at,
                    "an index is not empty, and an empty pack is left out",
                ));
            }
            Ok(blob)
        };
        let at = r.at();
        let space = match r.u8("space")? {
            0 => Space::Stream,
            1 => Space::Contents,
            _ => return Err(r.invalid("space", at, "spaces are 0 and 1")),
        };
        let parent = r.option("parent", |r| r.hash("parent"))?;
        let target = r.hash("target")?;
        if parent == Some(target) {
            return Err(r.invalid("layer", at, "it leads from a component to itself"));
        }
        Ok(Self {
            space,
            parent,
            target,
            target_size: r.varint("target size", MAX_CONTENT_LEN)?,
            index: blob(r, MAX_INDEX_LEN)?,
            pack: r.option("pack", |r| blob(r, MAX_CONTENT_LEN))?,
        })
    }
}

impl Prefetch {
    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let component = r.hash("component")?;
        let ranges = r.list("prefetch ranges", MAX_PREFETCH_RANGES, 2, |r| {
            let at = r.at();
            let range = (
                r.varint("range", MAX_CONTENT_LEN)?,
                r.varint("range length", MAX_CONTENT_LEN)?,
            );
            if range.1 == 0 || range.0 + range.1 > MAX_CONTENT_LEN {
                return Err(r.invalid(
                    "range",
                    at,
                    "a range is not empty, within the largest content",
                ));
            }
            Ok(range)
        })?;
        Ok(Self { component, ranges })
    }
}

fn encode_version(w: &mut Writer, channel: &Channel, version: &Version, capsule: &CapsuleId) {
    w.bytes(channel.as_str().as_bytes());
    w.bytes(version.as_str().as_bytes());
    w.hash(&capsule.0);
}

fn decode_version(r: &mut Reader<'_>) -> Result<(Channel, Version, CapsuleId), DecodeError> {
    let at = r.at();
    let channel = r.text("channel", name::MAX_NAME_LEN)?.parse();
    let version = r.text("version", name::MAX_NAME_LEN)?.parse();
    match (channel, version) {
        (Ok(channel), Ok(version)) => Ok((channel, version, CapsuleId(r.hash("capsule")?))),
        _ => Err(r.invalid("name", at, "channel or version is not a name")),
    }
}

fn decode_revoked(r: &mut Reader<'_>) -> Result<Revoked, DecodeError> {
    let at = r.at();
    let tokens = r.list("revoked tokens", MAX_REVOKED, 8, |r| {
        r.array("token").map(TokenId)
    })?;
    let machines = r.list("revoked machines", MAX_REVOKED, 32, |r| {
        r.array("machine").map(MachineId)
    })?;
    if !tokens.is_sorted_by(|a, b| a < b) || !machines.is_sorted_by(|a, b| a < b) {
        return Err(r.invalid("revocation", at, "entries are sorted, without repetition"));
    }
    Ok(Revoked {
        tokens: tokens.into_iter().collect(),
        machines: machines.into_iter().collect(),
    })
}
