//! A machine's disks as QEMU's graph of block nodes: a base, and overlays on it that can be added to while the machine runs.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::process::Command;
use tokio::time::timeout;

use super::arguments::{MAX_OVERLAYS, text};
use super::process::is_silent;
use super::{DiskBase, Qemu};
use crate::control::{Failure, FailureCode};

/// So long a base's server may be away before reads fail and the machine stops.
const RECONNECT_S: u32 = 300;
/// So long it may come late.
const OPEN_S: u32 = 30;
/// So long adding overlays may take: a machine that runs may be reading what does not come.
const ADD: Duration = Duration::from_secs(RECONNECT_S as u64 + 30);
/// So long it may take to make an empty overlay.
const CREATE: Duration = Duration::from_secs(30);
/// Formats that a base may have: an image, not a protocol that would name other machines or files.
const FORMATS: [&str; 6] = ["raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc"];

/// A disk of a running machine.
pub(super) struct Chain {
    pub component: String,
    pub base: DiskBase,
    /// The lowest first.
    pub overlays: Vec<PathBuf>,
    /// Whether that is what QEMU has: not while overlays are added, nor after it was not heard whether they were.
    pub is_known: bool,
}

/// Name of a node: short, as QEMU takes 31 characters.
fn node(number: usize, level: usize) -> String {
    format!("d{number}-{level}")
}

/// The node of a disk's base; none where there is no base.
pub(super) fn base(number: usize, base: &DiskBase) -> Result<Option<Value>, Failure> {
    let name = format!("d{number}-base");
    Ok(match base {
        DiskBase::Nbd(socket) => Some(json!({
            "driver": "nbd",
            "node-name": name,
            "read-only": true,
            "server": { "type": "unix", "path": text(socket)? },
            "reconnect-delay": RECONNECT_S,
            "open-timeout": OPEN_S,
        })),
        DiskBase::File { path, format } => {
            if !FORMATS.contains(&format.as_str()) {
                let message = format!("{format:?} is not a format of images that a disk can have");
                return Err(Failure::new(FailureCode::Invalid, message)
                    .hint(format!("it is one of {}", FORMATS.join(", "))));
            }
            let is_device =
                std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
            let mut node = json!({
                "driver": format,
                "node-name": name,
                "read-only": true,
                "file": {
                    "driver": if is_device { "host_device" } else { "file" },
                    "filename": text(path)?,
                    "read-only": true,
                },
            });
            // The file itself is what is shown, not others that it names.
            if matches!(format.as_str(), "qcow2" | "vmdk") {
                node["backing"] = Value::Null;
            }
            Some(node)
        }
        DiskBase::None => None,
    })
}

/// The node of an overlay's file.
pub(super) fn file(number: usize, level: usize, path: &Path) -> Result<Value, Failure> {
    Ok(json!({
        "driver": "file",
        "node-name": format!("{}-file", node(number, level)),
        "filename": text(path)?,
        "discard": "unmap",
        // Open for writing only while somebody above writes.
        "auto-read-only": true,
    }))
}

/// The node of an overlay.
pub(super) fn overlay(number: usize, level: usize, below: Value, is_top: bool) -> Value {
    let mut node = json!({
        "driver": "qcow2",
        "node-name": node(number, level),
        "file": format!("{}-file", node(number, level)),
        "backing": below,
        "read-only": !is_top,
    });
    if is_top {
        // What the guest frees or fills with zeros takes no room, and is not sent.
        node["discard"] = "unmap".into();
        node["detect-zeroes"] = "unmap".into();
    }
    node
}

/// Makes an empty overlay for a disk of the given size: a qcow2 file without a backing name. The file must not be there.
///
/// # Errors
/// There is a file, no `qemu-img`, or no room.
pub async fn create_overlay(path: &Path, size: u64) -> Result<(), Failure> {
    if !path.is_absolute() {
        let message = format!("{} is not an absolute path", path.display());
        return Err(Failure::new(FailureCode::Invalid, message));
    }
    // Claimed first, as qemu-img would write over another's.
    let claimed = tokio::fs::File::create_new(path).await;
    claimed.map_err(|error| {
        let code = match error.kind() {
            std::io::ErrorKind::AlreadyExists => FailureCode::Exists,
            _ => FailureCode::Io,
        };
        Failure::new(code, format!("cannot make {}: {error}", path.display()))
    })?;
    let program = std::env::var_os("CAPSULE_QEMU_IMG").unwrap_or_else(|| "qemu-img".into());
    let output = Command::new(&program)
        .args(["create", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(size.to_string())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let failed = |code, reason: String| {
        let message = format!("cannot make the overlay {}: {reason}", path.display());
        Failure::new(code, message)
    };
    let made = match timeout(CREATE, output).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(failed(FailureCode::Io, said.trim().to_owned()))
        }
        Ok(Err(error)) => Err(failed(
            FailureCode::NotFound,
            format!("{} does not start: {error}", program.display()),
        )
        .hint("install it (package qemu-utils), or name it in CAPSULE_QEMU_IMG")),
        Err(_elapsed) => Err(failed(FailureCode::Io, "qemu-img does not end".into())),
    };
    if made.is_err() {
        let _gone = tokio::fs::remove_file(path).await;
    }
    made
}

impl Qemu {
    /// Puts a new, empty overlay on each of the given disks, all at one instant; from then on the old ones are only read. Takes about 10 ms,
    /// and the machine may run. Wait for it to end: where the future is dropped it is not known which overlays are in use, and no more are added.
    ///
    /// # Errors
    /// Nothing was changed; but where QEMU did not answer (`Unreachable`), the new overlays may come to be in use: keep them.
    pub async fn overlay(&self, new: &[(String, PathBuf)]) -> Result<(), Failure> {
        let mut chains = self.disks.lock().await;
        let mut found = Vec::with_capacity(new.len());
        for (component, path) in new {
            let number = chains
                .iter()
                .position(|chain| chain.component == *component);
            let Some(number) = number else {
                let message = format!("the machine has no disk {component}");
                return Err(Failure::new(FailureCode::NotFound, message));
            };
            if chains[number].overlays.len() >= MAX_OVERLAYS {
                let message = format!("{component} has {MAX_OVERLAYS} overlays already");
                return Err(Failure::new(FailureCode::Refused, message)
                    .hint("stop the machine and resume it from its newest capture"));
            }
            if !chains[number].is_known {
                let message = format!("it is not known which overlays of {component} are in use");
                return Err(Failure::new(FailureCode::Refused, message)
                    .hint("an earlier capture was interrupted: stop the machine"));
            }
            if found.iter().any(|(other, _)| *other == number) {
                let message = format!("{component} is given twice");
                return Err(Failure::new(FailureCode::Invalid, message));
            }
            found.push((number, path));
        }
        for (number, _) in &found {
            chains[*number].is_known = false;
        }
        let mut added = Vec::with_capacity(2 * found.len());
        let pushed = self.push(&chains, &found, &mut added).await;
        if is_silent(&pushed) {
            return pushed;
        }
        for (number, _) in &found {
            chains[*number].is_known = true;
        }
        if let Err(failure) = pushed {
            // The upper first, as it uses the lower.
            for node in added.iter().rev() {
                let deleted = self
                    .execute("blockdev-del", json!({ "node-name": node }))
                    .await;
                if let Err(error) = deleted {
                    tracing::warn!(%error, node, "an overlay that was not used stays open");
                }
            }
            return Err(failure);
        }
        for (number, path) in &found {
            chains[*number].overlays.push((*path).clone());
        }
        for (number, _) in found {
            self.close_writing(number, &chains[number]).await;
        }
        Ok(())
    }

    async fn push(
        &self,
        chains: &[Chain],
        found: &[(usize, &PathBuf)],
        added: &mut Vec<String>,
    ) -> Result<(), Failure> {
        let mut actions = Vec::with_capacity(found.len());
        for (number, path) in found {
            let level = chains[*number].overlays.len();
            for options in [
                file(*number, level, path)?,
                overlay(*number, level, Value::Null, true),
            ] {
                let name = options["node-name"].as_str().unwrap_or_default().to_owned();
                self.execute("blockdev-add", options).await?;
                added.push(name);
            }
            actions.push(json!({
                "type": "blockdev-snapshot",
                "data": { "node": node(*number, level - 1), "overlay": node(*number, level) },
            }));
        }
        let actions = json!({ "actions": actions });
        let done = self.execute_within("transaction", actions, ADD).await;
        done.map(drop)
    }

    /// Opens the overlay below the top again, only for reading, so that others can look into it.
    async fn close_writing(&self, number: usize, chain: &Chain) {
        let level = chain.overlays.len() - 2;
        let below = match level.checked_sub(1) {
            Some(lower) => node(number, lower).into(),
            None if chain.base == DiskBase::None => Value::Null,
            None => format!("d{number}-base").into(),
        };
        let options = overlay(number, level, below, false);
        let reopened = self
            .execute("blockdev-reopen", json!({ "options": [options] }))
            .await;
        if let Err(error) = reopened {
            // Nothing writes to it all the same; only the lock on the file stays.
            tracing::warn!(%error, disk = chain.component, "an overlay is still open for writing");
        }
    }
}
