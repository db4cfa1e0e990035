//! What the rooms below say when something fails, as failures with codes.
//!
//! Their messages name the place and the way out already; here each variant only gets its code, and a hint where this
//! side knows more.

use std::io;

use capsule_chunker::bao::HashError;
use capsule_chunker::content::ReadError as ContentError;
use capsule_chunker::image::ImageError;
use capsule_chunker::layer::encode::EncodeError;
use capsule_chunker::layer::read::LayerError;
use capsule_chunker::layer::restore::RestoreError as LayerRestoreError;
use capsule_chunker::tree::{RestoreError as TreeRestoreError, ScanError};
use capsule_swarm::{FetchError, NetworkClosed, StoreError};

use crate::control::{Failure, FailureCode as Code};
use crate::home::Fault;
use crate::store::{DatabaseError, Full, ReadError, RemoveError, WriteError};

impl From<WriteError> for Failure {
    fn from(error: WriteError) -> Self {
        let code = match &error {
            WriteError::Full(_) | WriteError::Database(DatabaseError::Full(_)) => Code::Full,
            WriteError::Io(_) => Code::Io,
            WriteError::Size { .. } | WriteError::Invalid { .. } => Code::Damaged,
            _ => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        let code = match &error {
            ReadError::Unknown(_) | ReadError::Absent { .. } => Code::NotFound,
            ReadError::Damaged { .. } | ReadError::Component { .. } | ReadError::TooLong { .. } => {
                Code::Damaged
            }
            ReadError::Io(_) | ReadError::Database(_) => Code::Io,
        };
        Self::new(code, error.to_string())
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        let code = match &fault {
            Fault::Io { source, .. } => io_code(source),
            Fault::Damaged { .. } => Code::Damaged,
        };
        Self::new(code, fault.to_string())
    }
}

impl From<DatabaseError> for Failure {
    fn from(error: DatabaseError) -> Self {
        let code = if matches!(error, DatabaseError::Full(_)) {
            Code::Full
        } else {
            Code::Io
        };
        Self::new(code, error.to_string())
    }
}

impl From<RemoveError> for Failure {
    fn from(error: RemoveError) -> Self {
        let code = match &error {
            RemoveError::Unknown(_) => Code::NotFound,
            RemoveError::Busy(_) => Code::Refused,
            RemoveError::Io(_) | RemoveError::Database(_) => Code::Io,
        };
        Self::new(code, error.to_string())
    }
}

impl From<ContentError> for Failure {
    fn from(error: ContentError) -> Self {
        let code = match &error {
            ContentError::Changed { .. } => Code::Changed,
            ContentError::Io { .. } => Code::Io,
            ContentError::Format { .. } | ContentError::OutOfRange { .. } => Code::Invalid,
            ContentError::Decode { .. } => Code::Damaged,
        };
        Self::new(code, error.to_string())
    }
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        let code = match error {
            ImageError::Read(error) => return error.into(),
            ImageError::Open { ref source, .. } => io_code(source),
            _ => Code::Invalid,
        };
        Self::new(code, error.to_string())
    }
}

impl From<ScanError> for Failure {
    fn from(error: ScanError) -> Self {
        let code = match error {
            ScanError::Read(error) => return error.into(),
            ScanError::Unreadable { ref source, .. } => io_code(source),
            _ => Code::Invalid,
        };
        Self::new(code, error.to_string())
    }
}

impl From<EncodeError> for Failure {
    fn from(error: EncodeError) -> Self {
        let code = match error {
            EncodeError::Read(error) => return error.into(),
            EncodeError::Old(_) => Code::Damaged,
            EncodeError::Cancelled => {
                return Self::new(Code::Cancelled, "stopped; nothing was published");
            }
            // Pack and outboards grow in the store.
            EncodeError::Pack { source, .. } if io_code(&source) == Code::Full => {
                return store_is_full(&source);
            }
            EncodeError::Pack { ref source, .. } => io_code(source),
            EncodeError::Hash(error) => return of_hash(error),
            EncodeError::Parts { .. } | EncodeError::Changed { .. } => Code::Changed,
            EncodeError::Hashed { ref source, .. } => io_code(source),
            EncodeError::Extents { .. } => Code::Invalid,
            EncodeError::Compress { .. } | EncodeError::Index(_) => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}

impl From<LayerError> for Failure {
    fn from(error: LayerError) -> Self {
        Self::new(Code::Damaged, error.to_string())
    }
}

impl From<LayerRestoreError> for Failure {
    fn from(error: LayerRestoreError) -> Self {
        let code = match error {
            LayerRestoreError::Cancelled => return Self::cancelled(),
            LayerRestoreError::Layer { .. } => Code::Damaged,
            LayerRestoreError::Sink { offset, source } => return of_sink(offset, source),
            LayerRestoreError::Hash(error) => return of_hash(error),
        };
        Self::new(code, error.to_string())
    }
}

/// A hash tree that could not be made: while it grows it lies in the store.
pub fn of_hash(error: HashError) -> Failure {
    match error {
        HashError::TooLarge => Failure::new(Code::Invalid, error.to_string()),
        HashError::Outboard { source, .. } if io_code(&source) == Code::Full => {
            store_is_full(&source)
        }
        HashError::Outboard { ref source, .. } => {
            Failure::new(Code::Io, format!("hashing: {error}: {source}"))
        }
    }
}

/// The store's own words, where its error came by way of a room that does not know them.
fn store_is_full(error: &io::Error) -> Failure {
    let quota = error.get_ref().and_then(|e| e.downcast_ref::<Full>());
    let path = "tmp".into();
    let full = quota.cloned().unwrap_or(Full::FileSystem { path });
    WriteError::Full(full).into()
}

/// The way out where it is not the store that has no room.
pub const NO_ROOM_THERE: &str = "make room there, or choose another place";

/// A sink's own error, out of the general one it had to travel in.
fn of_sink(offset: u64, error: io::Error) -> Failure {
    let code = io_code(&error);
    let message = format!("writing at byte {offset}: {error}");
    match error
        .into_inner()
        .map(|inner| inner.downcast::<TreeRestoreError>())
    {
        Some(Ok(inner)) => (*inner).into(),
        Some(Err(other)) => match other.downcast::<Failure>() {
            Ok(failure) => *failure,
            Err(_) => Failure::new(code, message),
        },
        None => Failure::new(code, message),
    }
}

impl From<TreeRestoreError> for Failure {
    fn from(error: TreeRestoreError) -> Self {
        let code = match error {
            TreeRestoreError::Read(error) => return error.into(),
            TreeRestoreError::Cancelled => return Self::cancelled(),
            TreeRestoreError::NotEmpty { .. }
            | TreeRestoreError::NotADirectory { .. }
            | TreeRestoreError::NotRemoved { .. } => Code::Exists,
            TreeRestoreError::Io { ref source, .. } if io_code(source) == Code::Full => {
                return Self::new(Code::Full, error.to_string()).hint(NO_ROOM_THERE);
            }
            TreeRestoreError::Io { ref source, .. } => io_code(source),
            TreeRestoreError::Damaged { .. } => Code::Damaged,
            TreeRestoreError::NoProc => Code::Refused,
            TreeRestoreError::OutOfOrder { .. } | TreeRestoreError::Failed => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}

impl From<FetchError> for Failure {
    fn from(error: FetchError) -> Self {
        let code = match &error {
            FetchError::Store {
                source: StoreError::Full,
                ..
            } => Code::Full,
            FetchError::Store { .. } => Code::Io,
            FetchError::SizeConflict { .. } | FetchError::TooLarge { .. } => Code::Damaged,
            FetchError::TooMany(_) => Code::Busy,
            FetchError::Closed => return NetworkClosed.into(),
        };
        let hint = match &error {
            FetchError::SizeConflict { .. } | FetchError::TooLarge { .. } => {
                "a record says a wrong size: tell who published it to publish it again"
            }
            _ => "what was verified is kept: the same command resumes",
        };
        Self::new(code, error.to_string()).hint(hint)
    }
}

impl From<NetworkClosed> for Failure {
    fn from(_: NetworkClosed) -> Self {
        Self::new(Code::Cancelled, "the node is stopping")
            .hint("start it again with `capsule node`")
    }
}

/// The code of an error of the operating system.
pub fn io_code(error: &io::Error) -> Code {
    match error.kind() {
        io::ErrorKind::NotFound => Code::NotFound,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::Full,
        io::ErrorKind::AlreadyExists => Code::Exists,
        _ => Code::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_store_is_told_as_that_whichever_room_met_it() {
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let outboard = || HashError::Outboard {
            offset: 64,
            source: full(),
        };
        let pack = EncodeError::Pack {
            offset: 1,
            source: full(),
        };
        let quota = Full::Quota {
            needed: 3,
            used: 2,
            quota: 4,
        };
        let over = EncodeError::Pack {
            offset: 1,
            source: io::Error::new(io::ErrorKind::StorageFull, quota.clone()),
        };
        assert_eq!(Failure::from(over).message, quota.to_string());
        for failure in [
            Failure::from(pack),
            EncodeError::Hash(outboard()).into(),
            LayerRestoreError::Hash(outboard()).into(),
        ] {
            assert_eq!(failure.code, Code::Full);
            let way_out = failure.message.contains("Free space there");
            assert!(
                way_out && failure.message.contains("`capsule gc`"),
                "{failure}"
            );
        }
    }
}
