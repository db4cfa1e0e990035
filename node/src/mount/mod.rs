//! `capsule mount`: a capsule as files, read while they come, until whoever asked for it goes away.
//!
//! Mounted read-only, without devices and set-user-id, and only this user sees it. `names` knows what there is, `files` answers the kernel.

mod files;
mod names;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use capsule_proto::manifest::ComponentKind;
use fuser::{BackgroundSession, Config, MountOption};
use rustix::mount::{UnmountFlags, unmount};
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::control::{Failure, FailureCode, Mount, Mounted, Reporter};
use crate::disk::Disk;
use crate::export::pick;
use crate::held::component_info;
use crate::node::Node;
use crate::paging;
use crate::work::blocking;
use files::Files;
use names::{Names, Shown};

/// Shows a capsule at a directory; does not end before somebody takes it away there.
pub async fn mount(
    node: &Arc<Node>,
    request: Mount,
    reporter: &Reporter,
) -> Result<Mounted, Failure> {
    // What is in the way is known before anything is fetched.
    let at = request.at.clone();
    let at = blocking(move || check(&at)).await?;
    let opened = paging::open(node, &request.capsule, request.wait, reporter).await?;
    let chosen = match request.component.as_deref() {
        Some(component) => vec![pick(opened.manifest(), Some(component), &opened.name())?],
        None => opened.manifest().components.iter().collect(),
    };
    let mut shown = Vec::with_capacity(chosen.len());
    for component in &chosen {
        let what = match component.kind {
            ComponentKind::Tree => {
                let (listing, contents) = opened.tree(component).await?;
                let contents = contents.map(|contents| Arc::new(contents) as Arc<dyn Disk>);
                Shown::Tree(listing, contents)
            }
            _ => Shown::Stream(Arc::new(opened.stream(component).await?)),
        };
        shown.push((component.name.clone(), what));
    }
    let mounted = Mounted {
        capsule: opened.resolution.capsule,
        name: opened.resolution.name.as_ref().map(ToString::to_string),
        components: chosen.into_iter().map(component_info).collect(),
        at: request.at.clone(),
    };
    // Reads end with it.
    let (showing, is_shown) = watch::channel(());
    let runtime = Handle::current();
    let name = opened.name();
    let session = blocking(move || {
        let files = Files {
            names: Names::new(shown, owner()),
            runtime,
            shown: is_shown,
        };
        Session::start(files, showing, &at, &name)
    })
    .await?;
    reporter.ready(&mounted).await;
    session.ended().await;
    Ok(mounted)
}

fn owner() -> (u32, u32) {
    let (user, group) = (rustix::process::getuid(), rustix::process::getgid());
    (user.as_raw(), group.as_raw())
}

/// The directory itself, if something can be shown there.
fn check(at: &Path) -> Result<PathBuf, Failure> {
    let invalid = |message: String| Err(Failure::new(FailureCode::Invalid, message));
    if !at.is_absolute() {
        return invalid(format!("{} is not an absolute path", at.display()));
    }
    let place = std::fs::canonicalize(at).and_then(|place| {
        let found = std::fs::metadata(&place)?;
        // Where a file system begins, something is mounted already.
        let above = std::fs::metadata(place.parent().unwrap_or(&place))?;
        Ok((found.is_dir(), found.dev() != above.dev(), place))
    });
    match place {
        Ok((true, false, place)) => Ok(place),
        Ok((true, true, place)) => {
            let message = format!("something is mounted at {} already", place.display());
            Err(Failure::new(FailureCode::Exists, message).hint("choose another directory"))
        }
        Ok((false, ..)) => invalid(format!("{} is not a directory", at.display())),
        Err(error) => {
            let message = format!("{} cannot be mounted at: {error}", at.display());
            Err(Failure::new(FailureCode::NotFound, message)
                .hint("make the directory first; the node needs to see it"))
        }
    }
}

/// A mount, which goes with it.
struct Session {
    session: Option<BackgroundSession>,
    showing: Option<watch::Sender<()>>,
    at: PathBuf,
}

impl Session {
    fn start(
        files: Files,
        showing: watch::Sender<()>,
        at: &Path,
        name: &str,
    ) -> Result<Self, Failure> {
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::RO,
            MountOption::NoDev,
            MountOption::NoSuid,
            MountOption::DefaultPermissions,
            MountOption::FSName(name.replace(',', "-")),
            MountOption::Subtype("capsule".to_owned()),
        ];
        let session = fuser::spawn_mount(files, at, &config).map_err(|error| {
            let message = format!("cannot mount at {}: {error}", at.display());
            Failure::new(FailureCode::Io, message).hint(
                "it takes /dev/fuse and, where the node is not root's, fusermount3 (package fuse3)",
            )
        })?;
        Ok(Self {
            session: Some(session),
            showing: Some(showing),
            at: at.to_owned(),
        })
    }

    /// Returns when somebody took the mount away.
    async fn ended(&self) {
        const LOOK: std::time::Duration = std::time::Duration::from_millis(500);
        let is_over = |session: &BackgroundSession| session.guard.is_finished();
        while !self.session.as_ref().is_none_or(is_over) {
            tokio::time::sleep(LOOK).await;
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        drop(self.showing.take());
        if let Some(session) = self.session.take() {
            end(session, &self.at);
        }
    }
}

/// Takes a mount away at once, though somebody may still be in it.
pub fn end(session: BackgroundSession, at: &Path) {
    if session.guard.is_finished() {
        // Somebody took it away, and something else may be there now, which it would unmount in its turn.
        std::mem::forget(session);
        return;
    }
    // Who is not root has `fusermount3` do the same.
    let _by_fusermount = unmount(at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    drop(session);
}
