//! What can go wrong in the store: one enum per operation, each variant with the place of the fault
//! and the way out.
//!
//! Nothing here decides; the mapping from the operating system's errors (above all "disk full") and
//! from redb's is the only logic.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

use capsule_chunker::bao::DecodeError;
use capsule_proto::{GroupRanges, RootHash};
use thiserror::Error;

/// A file operation that failed: what was being done, and to which file.
#[derive(Debug, Error)]
#[error("{doing} {}: {source}", path.display())]
pub struct IoFault {
    /// What was being done, as a verb: "write", "sync".
    pub doing: &'static str,
    /// The file or directory, relative to the store's directory.
    pub path: PathBuf,
    /// What the operating system said.
    pub source: io::Error,
}

/// There is no room: by the quota, or on the file system. What was stored stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Full {
    /// The store's own limit.
    Quota {
        /// Bytes that the refused operation needed.
        needed: u64,
        /// Bytes that are in use.
        used: u64,
        /// The limit, in bytes.
        quota: u64,
    },
    /// The file system has no space left.
    FileSystem {
        /// The file that could not grow, relative to the store's directory.
        path: PathBuf,
    },
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Quota {
                needed,
                used,
                quota,
            } => write!(
                f,
                "the store is full: {needed} bytes needed, {used} of the quota of {quota} in use. \
                 Raise `quota` in home.json and restart the node, or make room with `capsule unpin` or `capsule rm`, then `capsule gc`; \
                 what was fetched is kept, and the same command resumes"
            ),
            Self::FileSystem { path } => write!(
                f,
                "no space left on the file system of the store (at {}). Free space there, or make room \
                 with `capsule unpin` or `capsule rm`, then `capsule gc`; what was fetched is kept, and \
                 the same command resumes",
                path.display()
            ),
        }
    }
}

impl std::error::Error for Full {}

/// A transaction or a lookup in the database failed.
#[derive(Debug, Error)]
pub enum DatabaseError {
    /// No room for the database to grow.
    #[error(transparent)]
    Full(#[from] Full),
    /// The database's file could not be read, written or synced. The store opens it anew at the next
    /// operation.
    #[error(
        "the store's database could not be used ({0}); nothing was changed. Check the disk; the node tries again by itself"
    )]
    Io(#[source] io::Error),
    /// The database refused, or is damaged.
    #[error("the store's database failed: {0}")]
    Engine(#[source] Box<redb::Error>),
    /// A row that this version cannot read.
    #[error("a row of the store's table {table:?} cannot be read: {reason}")]
    Row {
        /// The table.
        table: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A table at its bound.
    #[error(
        "the store's table {table:?} is at its bound of {limit} rows: remove some (`capsule gc`)"
    )]
    TooMany {
        /// The table.
        table: &'static str,
        /// The bound in rows.
        limit: u64,
    },
    /// A value longer than its bound.
    #[error("a value of {len} bytes for the store's table {table:?} exceeds its bound of {limit}")]
    TooLong {
        /// The table.
        table: &'static str,
        /// Length of the value in bytes.
        len: usize,
        /// The bound in bytes.
        limit: usize,
    },
}

/// [`Store::open`](super::Store::open) failed.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Another process has the store open.
    #[error("the store in {} is in use by {holder}. Stop that node, or use another home (`--home`)", dir.display())]
    InUse {
        /// The store's directory.
        dir: PathBuf,
        /// Who holds it: its process id, as far as known.
        holder: String,
    },
    /// The store was written by a newer version.
    #[error(
        "the store is of format {found}, this program reads up to format {supported}: use a newer capsule"
    )]
    Version {
        /// Format found.
        found: u64,
        /// Newest format known here.
        supported: u64,
    },
    /// A file or directory could not be used.
    #[error("the store cannot be opened: {0}")]
    Io(#[from] IoFault),
    /// The database could not be used.
    #[error("the store cannot be opened: {0}")]
    Database(#[from] DatabaseError),
}

/// Bytes could not be stored.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The bytes are not what the root hash names. Nothing was written.
    #[error("data for {root} does not verify: {source}")]
    Invalid {
        /// The blob.
        root: RootHash,
        /// Where it fails.
        source: DecodeError,
    },
    /// The blob was neither created nor imported here.
    #[error("blob {0} is not in the store")]
    Unknown(RootHash),
    /// The range is empty or beyond the blob.
    #[error("groups {}..{} do not lie within blob {root} of {count} groups", groups.start, groups.end)]
    OutOfRange {
        /// The blob.
        root: RootHash,
        /// The range asked for.
        groups: Range<u64>,
        /// Groups in the blob.
        count: u64,
    },
    /// The same hash with two sizes.
    #[error("blob {root} was announced with {claimed} bytes, but is known with {known}")]
    Size {
        /// The blob.
        root: RootHash,
        /// Size given now.
        claimed: u64,
        /// Size in the store, or of what was written.
        known: u64,
    },
    /// No room. What was stored stays.
    #[error(transparent)]
    Full(#[from] Full),
    /// A file could not be written. After a failed sync, what was not yet durable is forgotten (and
    /// must be fetched again): the operating system no longer vouches for it.
    #[error("the store could not keep the data: {0}")]
    Io(#[from] IoFault),
    /// The commit failed.
    #[error(transparent)]
    Database(DatabaseError),
}

/// Bytes could not be served.
#[derive(Debug, Error)]
pub enum ReadError {
    /// Neither a blob nor a component of that root is here.
    #[error("{0} is not in the store")]
    Unknown(RootHash),
    /// Not all of the range is here.
    #[error("groups {}..{} of {root} are not all in the store", groups.start, groups.end)]
    Absent {
        /// The blob or component.
        root: RootHash,
        /// The range asked for.
        groups: Range<u64>,
    },
    /// Groups no longer verify. They were taken out of what the store holds and reported.
    #[error("{} chunk group(s) of {root} are damaged on this machine's disk, from group {first}; they will be fetched again", groups.count(), first = groups.runs().first().map_or(0, |r| r.start))]
    Damaged {
        /// The blob or component.
        root: RootHash,
        /// The groups that do not verify.
        groups: GroupRanges,
    },
    /// The blob is longer than the caller allows.
    #[error("{root} has {size} bytes, more than the {limit} allowed here")]
    TooLong {
        /// The blob.
        root: RootHash,
        /// Its size in bytes.
        size: u64,
        /// The caller's bound.
        limit: u64,
    },
    /// A component could not be produced through its layers.
    #[error("component {root} cannot be read through its layers: {reason}")]
    Component {
        /// The component.
        root: RootHash,
        /// What the provider said.
        reason: String,
    },
    /// A file could not be read.
    #[error("the store could not read: {0}")]
    Io(#[from] IoFault),
    /// The database could not be used.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

/// Bytes could not be removed.
#[derive(Debug, Error)]
pub enum RemoveError {
    /// The blob is not here.
    #[error("{0} is not in the store")]
    Unknown(RootHash),
    /// A transfer, import or export uses it.
    #[error("{0} is in use by a transfer or an export; try again when that has ended")]
    Busy(RootHash),
    /// Its directory entry or its space could not be freed. It no longer counts as held; the space is
    /// freed when the store is next opened.
    #[error("space could not be freed: {0}")]
    Io(#[from] IoFault),
    /// The commit failed.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl IoFault {
    pub(super) fn new(doing: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self {
            doing,
            path: path.into(),
            source,
        }
    }
}

/// Whether the operating system says that there is no room.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

impl WriteError {
    /// Wraps a failed file operation, "disk full" apart.
    pub(super) fn io(fault: IoFault) -> Self {
        if is_full(&fault.source) {
            Self::Full(Full::FileSystem { path: fault.path })
        } else {
            Self::Io(fault)
        }
    }
}

impl From<DatabaseError> for WriteError {
    fn from(error: DatabaseError) -> Self {
        match error {
            DatabaseError::Full(full) => Self::Full(full),
            other => Self::Database(other),
        }
    }
}

impl From<redb::Error> for DatabaseError {
    fn from(error: redb::Error) -> Self {
        match error {
            redb::Error::Io(e) if is_full(&e) => Self::Full(Full::FileSystem {
                path: super::META_FILE.into(),
            }),
            redb::Error::Io(e) => Self::Io(e),
            other => Self::Engine(Box::new(other)),
        }
    }
}

/// redb has an error type per call; each is first made its general one.
macro_rules! from_redb {
    ($($kind:ident),*) => {$(
        impl From<redb::$kind> for DatabaseError {
            fn from(error: redb::$kind) -> Self {
                redb::Error::from(error).into()
            }
        }
    )*};
}
from_redb!(
    DatabaseError,
    TransactionError,
    TableError,
    StorageError,
    CommitError
);
