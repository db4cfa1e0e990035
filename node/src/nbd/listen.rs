//! `capsule nbd`: a disk of a capsule at a socket, until whoever asked for it goes away.

use std::fs::Permissions;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use capsule_proto::manifest::ComponentKind;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::whole::Whole;
use super::{Export, serve};
use crate::control::{CapsuleRef, Failure, FailureCode, Nbd, Reporter, Serving};
use crate::disk::Disk;
use crate::export::pick;
use crate::held::component_info;
use crate::node::Node;
use crate::paging;

/// Clients of one disk at a time.
const MAX_CLIENTS: usize = 16;
/// Before the next is accepted where that fails, as for want of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves a disk of a capsule; does not end by itself.
pub async fn nbd(node: &Arc<Node>, request: Nbd, reporter: &Reporter) -> Result<Serving, Failure> {
    // What is in the way is known before anything is fetched.
    let listener = Listener::bind(request.socket.as_deref(), request.listen).await?;
    let opened = paging::open(node, &request.capsule, request.wait, reporter).await?;
    let name = opened.name();
    let component = pick(opened.manifest(), request.component.as_deref(), &name)?.clone();
    if component.kind == ComponentKind::Tree {
        let message = format!("component {} of {name} is a directory tree", component.name);
        return Err(Failure::new(FailureCode::Invalid, message)
            .hint(format!("`capsule mount {name} DIR` shows its files")));
    }
    let resolution = &opened.resolution;
    let (mut whole_bytes, mut whole_seconds) = (None, None);
    let disk: Arc<dyn Disk> = match request.whole {
        false => Arc::new(opened.stream(&component).await?),
        true => {
            let capsule = CapsuleRef(resolution.capsule.to_string());
            let whole = Whole::make(node, capsule, &component.name, request.wait, reporter).await?;
            (whole_bytes, whole_seconds) = (Some(whole.takes()), Some(whole.took.as_secs_f64()));
            Arc::new(whole)
        }
    };
    let serving = Serving {
        capsule: resolution.capsule,
        name: resolution.name.as_ref().map(ToString::to_string),
        component: component_info(&component),
        uri: listener.uri(),
        whole_bytes,
        whole_seconds,
    };
    let export = Arc::new(Export {
        name: format!("{name}/{}", component.name),
        description: format!("component {} of capsule {name}", component.name),
        disk,
    });
    reporter.ready(&serving).await;
    listener.run(&export).await;
    Ok(serving)
}

/// Serves a disk at a Unix socket for as long as what comes back is waited for; clients may come at once.
pub async fn serve_at(
    socket: &Path,
    export: Arc<Export>,
) -> Result<impl Future<Output = ()> + Send + use<>, Failure> {
    let listener = Listener::bind(Some(socket), None).await?;
    Ok(async move { listener.run(&export).await })
}

/// Where clients come.
enum Listener {
    Unix(UnixListener, RemoveOnDrop),
    Tcp(TcpListener, SocketAddr),
}

/// A socket's file, which goes with it, unless another has its name by then.
struct RemoveOnDrop {
    path: PathBuf,
    inode: u64,
}

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        let found = std::fs::symlink_metadata(&self.path);
        if found.is_ok_and(|found| found.ino() == self.inode) {
            let _gone = std::fs::remove_file(&self.path);
        }
    }
}

/// Listens at a path at which nothing is: under another name first, until only this user may connect.
fn bind(path: &Path) -> std::io::Result<(UnixListener, RemoveOnDrop)> {
    let mut hidden = path.as_os_str().to_owned();
    hidden.push(".new");
    let hidden = PathBuf::from(hidden);
    let listener = UnixListener::bind(&hidden)?;
    let named = std::fs::set_permissions(&hidden, Permissions::from_mode(0o600)).and_then(|()| {
        let inode = std::fs::symlink_metadata(&hidden)?.ino();
        renameat_with(CWD, &hidden, CWD, path, RenameFlags::NOREPLACE)?;
        Ok(inode)
    });
    match named {
        Ok(inode) => {
            let path = path.to_owned();
            Ok((listener, RemoveOnDrop { path, inode }))
        }
        Err(error) => {
            let _gone = std::fs::remove_file(&hidden);
            Err(error)
        }
    }
}

impl Listener {
    async fn bind(socket: Option<&Path>, listen: Option<SocketAddr>) -> Result<Self, Failure> {
        match (socket, listen) {
            (Some(path), None) if path.is_absolute() => {
                let failed = |e: std::io::Error| failed(&path.display().to_string(), &e);
                let (listener, file) = bind(path).map_err(failed)?;
                Ok(Self::Unix(listener, file))
            }
            (Some(path), None) => {
                let message = format!("{} is not an absolute path", path.display());
                Err(Failure::new(FailureCode::Invalid, message))
            }
            (None, Some(at)) => {
                let failed = |e: std::io::Error| failed(&at.to_string(), &e);
                let listener = TcpListener::bind(at).await.map_err(failed)?;
                let at = listener.local_addr().map_err(failed)?;
                Ok(Self::Tcp(listener, at))
            }
            _ => {
                let message = "where to serve it is not said: a socket's path, or an address";
                Err(Failure::new(FailureCode::Invalid, message))
            }
        }
    }

    /// As clients write it: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md>.
    fn uri(&self) -> String {
        match self {
            Self::Unix(_, file) => format!("nbd+unix:///?socket={}", escaped(&file.path)),
            Self::Tcp(_, at) => format!("nbd://{at}"),
        }
    }

    async fn run(&self, export: &Arc<Export>) {
        let places = Arc::new(Semaphore::new(MAX_CLIENTS));
        // They end with it.
        let mut clients = JoinSet::new();
        loop {
            let Ok(place) = places.clone().acquire_owned().await else {
                return;
            };
            let accepted = match self {
                Self::Unix(listener, _) => listener
                    .accept()
                    .await
                    .map(|(stream, _)| Box::pin(stream) as Stream),
                Self::Tcp(listener, _) => listener.accept().await.map(|(stream, _)| {
                    // Replies are small, and waited for; who is gone without a word is noticed.
                    let _as_it_is = stream.set_nodelay(true);
                    let _as_it_is = SockRef::from(&stream).set_keepalive(true);
                    Box::pin(stream) as Stream
                }),
            };
            while clients.try_join_next().is_some() {}
            match accepted {
                Ok(stream) => {
                    let export = export.clone();
                    clients.spawn(async move {
                        if let Err(error) = serve(stream, &export).await {
                            tracing::debug!(%error, export = export.name, "an NBD client is gone");
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "no NBD client could be accepted");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

trait Both: AsyncRead + AsyncWrite + Send {}
impl<S: AsyncRead + AsyncWrite + Send> Both for S {}
type Stream = std::pin::Pin<Box<dyn Both>>;

fn failed(at: &str, error: &std::io::Error) -> Failure {
    use std::io::ErrorKind::{AddrInUse, AlreadyExists, PermissionDenied};
    let failure = |code| Failure::new(code, format!("cannot serve at {at}: {error}"));
    match error.kind() {
        AddrInUse | AlreadyExists => failure(FailureCode::Exists).hint(
            "something is there: remove the file if nothing uses it, or choose another place",
        ),
        PermissionDenied => failure(FailureCode::Io).hint(
            "the node makes the socket, not this command: choose a place that it may write to",
        ),
        _ => failure(FailureCode::Io),
    }
}

/// A path in a URI.
fn escaped(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let keep = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte);
    let mut text = String::new();
    for byte in path.as_os_str().as_bytes() {
        match keep(*byte) {
            true => text.push(char::from(*byte)),
            false => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_escaped_in_uris() {
        assert_eq!(escaped(Path::new("/tmp/a b?c")), "/tmp/a%20b%3Fc");
    }

    #[tokio::test]
    async fn a_socket_is_this_users_and_goes_with_its_listener() {
        use std::os::unix::fs::PermissionsExt;
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("disk.sock");
        let listener = Listener::bind(Some(&path), None).await.unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let Err(failure) = Listener::bind(Some(&path), None).await else {
            panic!("it is taken")
        };
        assert_eq!(failure.code, FailureCode::Exists);
        drop(listener);
        assert!(!path.exists());
        for (socket, listen) in [(None, None), (Some(Path::new("disk.sock")), None)] {
            let refused = Listener::bind(socket, listen).await;
            assert!(refused.is_err_and(|e| e.code == FailureCode::Invalid));
        }
    }
}
