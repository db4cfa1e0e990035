//! Paths of entries: checked so that they stay below the directory that they are joined to, and sorted by names.

use std::fmt;

/// Longest path, in bytes: Linux's PATH_MAX.
pub const MAX_PATH_LEN: usize = 4096;
/// Longest name in a path, in bytes: Linux's NAME_MAX.
pub const MAX_NAME_LEN: usize = 255;
/// Deepest directory, so that restoring needs a bounded number of open directories.
pub const MAX_DEPTH: usize = 1024;

/// A path below the root of a tree: names joined by `/`, never empty, `.` or `..`; the root's own path is empty.
///
/// Paths sort by their names, so a directory's content follows it without a gap.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct EntryPath(Vec<u8>);

impl EntryPath {
    /// The root's own path.
    pub const fn root() -> Self {
        Self(Vec::new())
    }

    /// Checks a path; the error is the rule that it breaks.
    pub fn new(path: impl Into<Vec<u8>>) -> Result<Self, &'static str> {
        let path = path.into();
        if path.len() > MAX_PATH_LEN {
            return Err("a path is at most 4,096 bytes long");
        }
        if path.contains(&0) {
            return Err("a path has no NUL byte");
        }
        if path.is_empty() {
            return Ok(Self(path));
        }
        let mut depth = 0;
        for name in path.split(|&b| b == b'/') {
            depth += 1;
            match name {
                b"" => return Err("a path is relative and has no empty names"),
                b"." | b".." => return Err("a path has no name '.' or '..'"),
                name if name.len() > MAX_NAME_LEN => {
                    return Err("a name is at most 255 bytes long");
                }
                _ => {}
            }
        }
        if depth > MAX_DEPTH {
            return Err("a path is at most 1,024 names deep");
        }
        Ok(Self(path))
    }

    /// The path's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether this is the root's own path.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The names from the top down.
    pub fn names(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|&b| b == b'/').filter(|name| !name.is_empty())
    }

    /// The directory that holds this entry; none for the root.
    pub fn parent(&self) -> Option<EntryPath> {
        if self.is_root() {
            return None;
        }
        let cut = self.0.iter().rposition(|&b| b == b'/').unwrap_or(0);
        Some(Self(self.0[..cut].to_vec()))
    }

    /// The last name; empty for the root.
    pub fn name(&self) -> &[u8] {
        self.0.rsplit(|&b| b == b'/').next().unwrap_or_default()
    }
}

impl Ord for EntryPath {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        // '/' sorts before every byte that a name may hold.
        let key = |&b: &u8| if b == b'/' { 0 } else { b };
        self.0.iter().map(key).cmp(other.0.iter().map(key))
    }
}

impl PartialOrd for EntryPath {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for EntryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

impl fmt::Debug for EntryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_cannot_leave_the_tree() {
        for bad in ["..", "../x", "a/../b", "/etc", "a//b", "a/", "./a", "a\0b"] {
            assert!(EntryPath::new(bad).is_err(), "{bad}");
        }
    }
}
