//! `publish --trim`: a disk without its free space; and without the flag, what it would save.

use std::path::Path;

use capsule_chunker::content::Source;
use capsule_chunker::free::{self, FreeError, FreeSpace, Other, Trimmed};
use capsule_chunker::image::ImageKind;

use super::make::Making;
use crate::control::{Failure, FailureCode, PublishAs};

/// What is not worth a remark: about what a few small files leave behind.
const WORTH_TELLING: u64 = 1 << 20;
/// Most parts of a disk that a warning names.
const MAX_NAMED: usize = 8;

/// What is told of trimming in the end.
#[derive(Debug, Default)]
pub(super) struct Trimming {
    /// Bytes that were left out.
    pub trimmed: u64,
    /// About as many bytes as would be.
    pub trimmable: Option<u64>,
}

/// Refuses to trim what has no free space, as far as the request tells.
pub(super) fn check_request(path: &Path, is_dir: bool, read_as: PublishAs) -> Result<(), Failure> {
    if is_dir {
        return Err(
            not_a_disk(path, "a directory, of which only files are published")
                .hint("leave out --trim"),
        );
    }
    if read_as == PublishAs::File {
        return Err(not_a_disk(path, "published as a file, byte by byte")
            .hint("leave out --trim, or --as file"));
    }
    Ok(())
}

fn not_a_disk(path: &Path, what: &str) -> Failure {
    let message = format!("{} cannot be trimmed: it is {what}", path.display());
    Failure::new(FailureCode::Invalid, message)
}

impl Making<'_> {
    /// The disk without its free space, where that is asked for; and what there is to tell of it.
    pub(super) fn trim<'s>(
        &self,
        source: &'s dyn Source,
        kind: ImageKind,
        warnings: &mut Vec<String>,
    ) -> Result<(Option<Trimmed<'s>>, Trimming), Failure> {
        if !self.request.trim {
            let trimmable = match kind {
                ImageKind::Disk => self.trimmable(source),
                ImageKind::File => None,
            };
            self.work.check()?;
            let told = Trimming {
                trimmable,
                ..Trimming::default()
            };
            return Ok((None, told));
        }
        if kind == ImageKind::File {
            let path = &self.request.path;
            return Err(not_a_disk(path, "not a disk by its content")
                .hint("publish it without --trim; or with --as disk, if it is a disk"));
        }
        let FreeSpace { ranges, others, .. } = free::find(source, self.work)?;
        warnings.extend(left(&others));
        let told = Trimming {
            trimmed: free::data_in(source, &ranges)?,
            trimmable: None,
        };
        Ok((Some(Trimmed::new(source, ranges)), told))
    }

    /// About how many bytes trimming would leave out. Whatever is in its way is no fault of who did not ask for it.
    fn trimmable(&self, source: &dyn Source) -> Option<u64> {
        let found = free::find(source, self.work)
            .and_then(|space| Ok(free::old_data_in(source, &space.ranges)?));
        match found {
            Ok(bytes) => Some(bytes).filter(|bytes| *bytes >= WORTH_TELLING),
            Err(error) => {
                tracing::debug!(%error, "what --trim would save is not known");
                None
            }
        }
    }
}

/// The warning of what was not trimmed.
fn left(others: &[Other]) -> Option<String> {
    let names: Vec<String> = others
        .iter()
        .take(MAX_NAMED)
        .map(Other::to_string)
        .collect();
    let more = match others.len().saturating_sub(MAX_NAMED) {
        0 => String::new(),
        more => format!(", and {more} more"),
    };
    (!names.is_empty()).then(|| {
        format!(
            "left as it is, as only ext2, ext3 and ext4 are trimmed: {}{more}",
            names.join(", ")
        )
    })
}

impl From<FreeError> for Failure {
    fn from(error: FreeError) -> Self {
        let (code, hint) = match error {
            FreeError::Read(error) => return error.into(),
            FreeError::Cancelled => return Self::cancelled(),
            FreeError::NoFileSystem { .. } => (FailureCode::Invalid, "publish it without --trim"),
            FreeError::Dirty { .. } => (
                FailureCode::Refused,
                "unmount it or shut its machine down, or run `e2fsck -p` on it; or publish without --trim",
            ),
            FreeError::Damaged { .. } => (
                FailureCode::Refused,
                "run `e2fsck -f` on it; or publish without --trim, as it is",
            ),
            FreeError::Unsupported { .. } => (FailureCode::Refused, "publish without --trim"),
            FreeError::Ambiguous { .. } => (
                FailureCode::Refused,
                "see `wipefs` for the one that is no longer meant, and remove it; or publish without --trim",
            ),
            FreeError::Table { .. } => (
                FailureCode::Refused,
                "repair it, with `sgdisk --verify` or `fdisk`; or publish without --trim",
            ),
        };
        Self::new(code, error.to_string()).hint(hint)
    }
}
