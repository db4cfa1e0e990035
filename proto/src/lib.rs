//! Capsule's formats: what is named, signed or sent, as values that were checked when they were parsed.
//!
//! Everything that one machine writes and another reads is defined here, and nowhere else; each format has a byte-level
//! description in `proto/docs` and golden vectors in `proto/tests/golden`.
//!
//! | module | what | described in |
//! |---|---|---|
//! | [`hash`], [`ranges`] | root hashes and ids; chunk groups and sets of them | |
//! | [`name`] | channels and versions | `record.md` |
//! | [`codec`] | the encoding of all that is stored or signed | `encoding.md` |
//! | [`manifest`] | a capsule: its components, and the machine that it was | `manifest.md` |
//! | [`listing`] | a directory tree, apart from its files' bytes | `listing.md` |
//! | [`index`] | a layer: how each byte of a component comes about | `index.md` |
//! | [`credential`] | a fleet: root key, tokens, machines, roles | `credential.md` |
//! | [`record`] | signed statements: names, layers, prefetch lists, releases, revocations | `record.md` |
//! | [`wire`] | what peers say to each other | `wire.md` |
//!
//! How a capsule hangs together: a *name* record leads to the hash of a [`manifest::Manifest`], which names each component by the
//! BLAKE3 of its bytes, or of its [`listing::Listing`]. *Layer* records lead from one component (or nothing) to another, by
//! an [`index::Index`] and a pack. Records are signed by members whose [`credential::Credential`] the fleet's root vouches for;
//! everything below a record is named by its hash, so whoever sends it need not be trusted.
//!
//! # Rules for all formats
//! - **Parse once.** Decoders take bytes and return values that keep every rule which can be told from the bytes alone; nothing
//!   behind them checks again. Encoders of values that decoders made cannot fail.
//! - **Bounded.** Every length is checked against a constant before anything is allocated; memory is at most a small multiple of
//!   the input (`tests/hostile.rs` counts it).
//! - **Canonical.** What is signed or named by its hash has one encoding: whatever decodes, encodes to the same bytes.
//! - **Said where it failed.** A [`codec::DecodeError`] has the value and the offset of the fault.
//!
//! Depends on nothing of ours. Knows no files, sockets or clocks: time and keys are arguments.
//!
//! ```
//! use capsule_proto::RootHash;
//! use capsule_proto::manifest::{Component, ComponentKind, Manifest};
//!
//! let bytes = b"what the file holds";
//! let size = bytes.len() as u64;
//! let kind = ComponentKind::File;
//! let file = Component { name: "notes".into(), kind, root: RootHash::of(bytes), size, content_size: size };
//! let manifest = Manifest::new(vec![file])?;
//! assert_eq!(Manifest::decode(&manifest.encode())?.id(), manifest.id());
//! # Ok::<(), capsule_proto::codec::DecodeError>(())
//! ```

pub mod codec;
pub mod credential;
pub mod hash;
pub mod index;
pub mod listing;
pub mod manifest;
pub mod name;
pub mod ranges;
pub mod record;
pub mod wire;

pub use hash::{CapsuleId, FrameHash, RootHash};
pub use ranges::{GROUP_LEN, GroupRanges};
