//! Where a home's control socket lies.
//!
//! In the home, as `control.sock`. A socket's path may have only 107 bytes; where the home's is too long, the socket lies in the
//! runtime directory under a name made of the home's path, which daemon and client both derive.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use capsule_proto::RootHash;

/// Longest path of a Unix socket on Linux: 108 bytes with the NUL at its end.
const MAX_SOCKET_PATH: usize = 107;
const SOCKET: &str = "control.sock";

/// The socket's path for a home.
///
/// The home's path is made canonical first where it exists, so that all ways of writing it lead to one socket.
pub fn find(home: &Path) -> PathBuf {
    let home = home.canonicalize().unwrap_or_else(|_| home.into());
    let inside = home.join(SOCKET);
    if inside.as_os_str().len() <= MAX_SOCKET_PATH {
        return inside;
    }
    let name = format!(
        "capsule-{}.sock",
        &RootHash::of(home.as_os_str().as_bytes()).to_string()[..32]
    );
    runtime_dir().join(name)
}

/// The user's runtime directory, or a private directory below the temporary one.
pub fn runtime_dir() -> PathBuf {
    let given = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let short = |dir: &PathBuf| {
        dir.is_absolute() && dir.as_os_str().len() + 50 <= MAX_SOCKET_PATH && dir.is_dir()
    };
    given
        .filter(short)
        .unwrap_or_else(|| format!("/tmp/capsule-{}", rustix::process::getuid().as_raw()).into())
}

/// The directory of the socket, made private where it is ours to make.
pub fn prepare(home: &Path) -> std::io::Result<PathBuf> {
    use std::os::unix::fs::{DirBuilderExt, MetadataExt};
    let path = find(home);
    if let Some(dir) = path.parent().filter(|dir| !dir.is_dir()) {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)?;
    }
    if let Some(dir) = path.parent().filter(|dir| dir.starts_with("/tmp")) {
        // Another user may have made it first, to listen in our place.
        let meta = dir.symlink_metadata()?;
        if !meta.is_dir() || meta.uid() != rustix::process::getuid().as_raw() {
            let message = format!(
                "{} belongs to another user: use a home with a shorter path",
                dir.display()
            );
            return Err(std::io::Error::other(message));
        }
    }
    Ok(path)
}
