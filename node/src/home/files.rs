//! Small files of the home: JSON and secrets, replaced atomically.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::error::Category;
use thiserror::Error;

/// Longest file read here, in bytes: the settings, and a credential, fit many times.
const MAX_LEN: u64 = 1 << 20;

/// A file of the home that could not be used.
#[derive(Debug, Error)]
pub enum Fault {
    /// The operating system refused.
    #[error("{doing} {}: {source}", .path.display())]
    Io {
        /// What was tried, as in "writing".
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// The file is not what it should be.
    #[error("{}: {why}: {way_out}", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
        /// What to do.
        way_out: &'static str,
    },
}

impl Fault {
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            doing,
            path: path.into(),
            source,
        }
    }

    fn damaged(path: &Path, why: impl ToString, way_out: &'static str) -> Self {
        Self::Damaged {
            path: path.into(),
            why: why.to_string(),
            way_out,
        }
    }
}

/// Who may read a file.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Mode {
    /// The owner alone.
    Private,
}

/// Makes a directory that only the owner uses; one that exists stays as it is.
pub(crate) fn make_private_dir(dir: &Path) -> Result<(), Fault> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(Fault::io("making", dir))
}

/// Reads a JSON file, if there is one; with what to do if it is damaged.
pub(crate) fn read_json<T: DeserializeOwned>(
    path: &Path,
    way_out: &'static str,
) -> Result<Option<T>, Fault> {
    let Some(bytes) = read(path, way_out)? else {
        return Ok(None);
    };
    // Whether it is whole comes first: the last value of what is cut off may look wrong.
    serde_json::from_slice(&bytes)
        .and_then(|_: IgnoredAny| serde_json::from_slice(&bytes))
        .map(Some)
        .map_err(|e| {
            let why = match e.classify() {
                Category::Eof => format!("it is empty or cut off ({e})"),
                Category::Syntax => format!("it is not JSON ({e})"),
                Category::Data | Category::Io => e.to_string(),
            };
            Fault::damaged(path, why, way_out)
        })
}

/// Replaces a JSON file.
pub(crate) fn write_json(path: &Path, value: &impl Serialize, mode: Mode) -> Result<(), Fault> {
    let mut bytes = serde_json::to_vec_pretty(value)
        .map_err(io::Error::from)
        .map_err(Fault::io("writing", path))?;
    bytes.push(b'\n');
    write(path, &bytes, mode)
}

/// Reads a secret of 32 bytes, if there is one; with what to do if it is damaged.
pub(super) fn read_secret(path: &Path, way_out: &'static str) -> Result<Option<[u8; 32]>, Fault> {
    let Some(bytes) = read(path, way_out)? else {
        return Ok(None);
    };
    let text = String::from_utf8_lossy(&bytes);
    // A root hash has the same form: 64 hex digits.
    let secret = text.trim().parse::<capsule_proto::RootHash>();
    secret
        .map(|secret| Some(*secret.as_bytes()))
        .map_err(|_| Fault::damaged(path, "it is not 64 hexadecimal digits", way_out))
}

/// Replaces a secret.
pub(super) fn write_secret(path: &Path, secret: &[u8; 32]) -> Result<(), Fault> {
    let text = format!("{}\n", capsule_proto::RootHash::from_bytes(*secret));
    write(path, text.as_bytes(), Mode::Private)
}

fn read(path: &Path, way_out: &'static str) -> Result<Option<Vec<u8>>, Fault> {
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(Fault::io("reading", path))?,
    };
    let mut bytes = Vec::new();
    file.take(MAX_LEN + 1)
        .read_to_end(&mut bytes)
        .map_err(Fault::io("reading", path))?;
    if bytes.len() as u64 > MAX_LEN {
        return Err(Fault::damaged(
            path,
            "it is longer than a megabyte",
            way_out,
        ));
    }
    Ok(Some(bytes))
}

/// Writes beside, syncs, renames, syncs the directory.
fn write(path: &Path, bytes: &[u8], mode: Mode) -> Result<(), Fault> {
    let mode = match mode {
        Mode::Private => 0o600,
    };
    let beside = path.with_extension(format!("new-{}", std::process::id()));
    let written = write_beside(&beside, bytes, mode).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        // What cannot be removed is overwritten by the next try.
        let _ = fs::remove_file(&beside);
    }
    written.map_err(Fault::io("writing", path))?;
    let dir = path.parent().unwrap_or(Path::new("."));
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(Fault::io("syncing", dir))
}

fn write_beside(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn secrets_are_private_and_damage_is_told() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("machine.key");
        let read_secret = |path| read_secret(path, "restore it");
        assert_eq!(read_secret(&path).unwrap(), None);
        write_secret(&path, &[7; 32]).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(read_secret(&path).unwrap(), Some([7; 32]));
        write_secret(&path, &[8; 32]).unwrap();
        assert_eq!(read_secret(&path).unwrap(), Some([8; 32]));
        assert_eq!(
            fs::read_dir(temp.path()).unwrap().count(),
            1,
            "nothing is left beside"
        );
        fs::write(&path, "0123").unwrap();
        let damaged = read_secret(&path).unwrap_err().to_string();
        assert!(damaged.ends_with("machine.key: it is not 64 hexadecimal digits: restore it"));
    }

    #[test]
    fn json_that_is_cut_off_is_told_from_json_that_is_wrong() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("home.json");
        let read = || read_json::<super::super::Settings>(&path, "correct that");
        let refusal = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            let text = read().unwrap_err().to_string();
            assert!(
                text.contains("home.json: ") && text.ends_with(": correct that"),
                "{text}"
            );
            text
        };
        let settings = super::super::Settings {
            quota: Some(5_368_709_120),
            site: Some("building 3".into()),
            ..Default::default()
        };
        let mut whole = serde_json::to_vec_pretty(&settings).unwrap();
        for cut in 0..whole.len() {
            assert!(refusal(&whole[..cut]).contains("cut off"), "at {cut}");
        }
        assert!(refusal(b"quota = 5").contains("not JSON"));
        assert!(refusal(b"7").contains("line 1"));
        whole.resize(MAX_LEN as usize + 1, b' ');
        assert!(refusal(&whole).contains("longer than"));
        fs::write(&path, &whole[..MAX_LEN as usize]).unwrap();
        assert!(read().unwrap().is_some());
    }
}
