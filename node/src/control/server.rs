//! The daemon's half: accepts clients, reads one request each, and passes on what its handler says.

use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc};

use super::error::{Failure, FailureCode};
use super::event::{Progress, Reply};
use super::{MAX_REPLY_LEN, MAX_REQUEST_LEN};

/// Clients served at once: people and scripts of one machine.
pub const MAX_CLIENTS: usize = 64;
/// Replies that may wait for a slow client; beyond, progress is dropped.
const QUEUE: usize = 16;
/// A client that sends no request for so long is sent away.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// A client that takes no reply for so long is gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// Answers requests.
pub trait Handler: Send + Sync + 'static {
    /// What it is asked.
    type Request: DeserializeOwned + Send;

    /// Works on a request until its answer, which is dropped when the client goes away.
    fn handle(
        &self,
        request: Self::Request,
        reporter: Reporter,
    ) -> impl Future<Output = Result<serde_json::Value, Failure>> + Send;
}

/// Tells the client how far its request has come. Clones tell the same client.
#[derive(Debug, Clone)]
pub struct Reporter {
    replies: mpsc::Sender<Reply<serde_json::Value>>,
}

/// Why the control socket could not be served.
#[derive(Debug, Error)]
#[error("the control socket {}: {source}", .path.display())]
pub struct ServerError {
    /// The socket.
    pub path: PathBuf,
    /// What the operating system said.
    #[source]
    pub source: io::Error,
}

impl Reporter {
    /// One that nobody hears, for work that the node does by itself.
    pub fn silent() -> Self {
        Self {
            replies: mpsc::channel(1).0,
        }
    }

    /// Tells progress; dropped where the client is slow, as the next one says more.
    pub fn progress(&self, progress: Progress) {
        let _ = self.replies.try_send(Reply::Progress(progress));
    }

    /// Tells that what was asked for runs, and what it is.
    pub async fn ready(&self, answer: &(impl Serialize + Sync)) {
        if let Ok(answer) = serde_json::to_value(answer) {
            // Fails only where the client is gone.
            let _ = self.replies.send(Reply::Ready(answer)).await;
        }
    }

    /// Tells a person something; dropped only where the client is slow or gone.
    pub fn notice(&self, text: impl Into<String>) {
        let _ = self.replies.try_send(Reply::Notice(text.into()));
    }
}

/// Listens on a socket, which only this user may use. The caller holds the home's lock, so an old socket is left over.
pub fn listen(path: &Path) -> Result<UnixListener, ServerError> {
    let failed = |source| ServerError {
        path: path.into(),
        source,
    };
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    // Bound under another name, restricted, and only then given the name that clients know.
    let hidden = path.with_extension("new");
    let _ = std::fs::remove_file(&hidden);
    let listener = UnixListener::bind(&hidden).map_err(failed)?;
    std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    std::fs::rename(&hidden, path).map_err(failed)?;
    Ok(listener)
}

/// Serves clients until dropped.
pub async fn serve(listener: UnixListener, handler: Arc<impl Handler>) {
    let places = Arc::new(Semaphore::new(MAX_CLIENTS));
    // Its tasks end with it.
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors: others will be freed.
                tracing::warn!(%error, "no client could be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        while tasks.try_join_next().is_some() {}
        let place = places.clone().try_acquire_owned().ok();
        let handler = handler.clone();
        tasks.spawn(async move {
            let (read, mut write) = stream.into_split();
            match place {
                Some(_place) => serve_client(read, write, &*handler).await,
                None => {
                    let failure = Failure::new(
                        FailureCode::Busy,
                        format!("the node serves {MAX_CLIENTS} commands already"),
                    );
                    let _ = send(
                        &mut write,
                        &Reply::<()>::Failed(failure.hint("wait for some of them to end")),
                    )
                    .await;
                }
            }
        });
    }
}

async fn serve_client(read: OwnedReadHalf, mut write: OwnedWriteHalf, handler: &impl Handler) {
    let mut read = BufReader::new(read);
    let request = match tokio::time::timeout(REQUEST_TIMEOUT, read_request(&mut read)).await {
        Ok(Ok(Some(request))) => request,
        Ok(Ok(None)) | Err(_) => return,
        Ok(Err(failure)) => {
            let _ = send(&mut write, &Reply::<()>::Failed(failure)).await;
            return;
        }
    };
    let (replies, mut queue) = mpsc::channel(QUEUE);
    let work = handler.handle(request, Reporter { replies });
    tokio::pin!(work);
    let last = loop {
        tokio::select! {
            biased;
            Some(reply) = queue.recv() => {
                if send(&mut write, &reply).await.is_err() {
                    return;
                }
            }
            answer = &mut work => break match answer {
                Ok(answer) => Reply::Done(answer),
                Err(failure) => Reply::Failed(failure),
            },
            () = client_gone(&mut read) => return,
        }
    };
    while let Ok(reply) = queue.try_recv() {
        if send(&mut write, &reply).await.is_err() {
            return;
        }
    }
    let _ = send(&mut write, &last).await;
}

async fn read_request<R: DeserializeOwned>(
    read: &mut BufReader<OwnedReadHalf>,
) -> Result<Option<R>, Failure> {
    let mut line = Vec::new();
    let invalid = |why: String| {
        Failure::new(
            FailureCode::Invalid,
            format!("the request cannot be read: {why}"),
        )
    };
    match read
        .take(MAX_REQUEST_LEN as u64 + 1)
        .read_until(b'\n', &mut line)
        .await
    {
        Ok(0) | Err(_) => return Ok(None),
        Ok(_) if line.len() > MAX_REQUEST_LEN => return Err(invalid("it is too long".into())),
        Ok(_) => {}
    }
    let request = serde_json::from_slice(&line);
    request.map(Some).map_err(|e| {
        invalid(e.to_string()).hint("the node runs another version of capsule: restart it")
    })
}

/// Returns when the client has closed its end. Whatever else it says is not listened to.
async fn client_gone(read: &mut BufReader<OwnedReadHalf>) {
    let mut ignored = [0; 256];
    while matches!(read.read(&mut ignored).await, Ok(n) if n > 0) {}
}

async fn send<A: Serialize>(write: &mut OwnedWriteHalf, reply: &Reply<A>) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    if line.len() >= MAX_REPLY_LEN {
        let failure =
            Failure::new(FailureCode::Refused, "the answer is too long").hint("ask for less");
        line = serde_json::to_vec(&Reply::<A>::Failed(failure))?;
    }
    line.push(b'\n');
    let written = tokio::time::timeout(WRITE_TIMEOUT, write.write_all(&line)).await;
    written.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::control::{CapsuleRef, Client, ClientError, Hashes, Phase, Pin, Pull, Request};
    use crate::home::socket;

    /// Echoes a pin, refuses hashes, and pulls for ever.
    #[derive(Default)]
    struct Fake {
        pulling: Arc<AtomicBool>,
        asked: Mutex<Vec<String>>,
    }

    /// Says when the work was dropped.
    struct Working(Arc<AtomicBool>);

    impl Drop for Working {
        fn drop(&mut self) {
            self.0.store(false, Ordering::SeqCst);
        }
    }

    impl Handler for Fake {
        type Request = Request;

        async fn handle(
            &self,
            request: Request,
            reporter: Reporter,
        ) -> Result<serde_json::Value, Failure> {
            self.asked.lock().unwrap().push(format!("{request:?}"));
            match request {
                Request::Pin(pin) => {
                    reporter.notice("noticed");
                    let capsule = pin.capsule.0;
                    Ok(serde_json::json!({"capsule": capsule, "changed": true, "pins": ["user"]}))
                }
                Request::Pull(_) => {
                    self.pulling.store(true, Ordering::SeqCst);
                    let _working = Working(self.pulling.clone());
                    let progress = Progress {
                        phase: Phase::Fetching,
                        done: 1,
                        total: None,
                        rate: 0,
                        peers: 0,
                        written: 0,
                        what: None,
                    };
                    reporter.progress(progress);
                    std::future::pending().await
                }
                _ => Err(Failure::new(FailureCode::NotFound, "nothing").hint("look elsewhere")),
            }
        }
    }

    fn start() -> (
        tempfile::TempDir,
        PathBuf,
        Arc<Fake>,
        tokio::runtime::Runtime,
    ) {
        let temp = tempfile::tempdir().unwrap();
        let path = socket::prepare(temp.path()).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let fake = Arc::new(Fake::default());
        let serving = fake.clone();
        let listening = path.clone();
        let listener = runtime.block_on(async move { listen(&listening) }).unwrap();
        runtime.spawn(serve(listener, serving));
        (temp, path, fake, runtime)
    }

    #[test]
    fn answers_notices_and_failures_arrive() {
        let (temp, path, fake, _runtime) = start();
        assert_eq!(
            std::fs::metadata(path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let id = capsule_proto::RootHash::of(b"x").to_string();
        let mut notices = Vec::new();
        let pin = Pin {
            capsule: CapsuleRef(id.clone()),
            machine: None,
        };
        let pinned = Client::connect(temp.path())
            .unwrap()
            .run(pin, |_| {}, |text| notices.push(text))
            .unwrap();
        assert_eq!(
            (pinned.capsule.to_string(), notices),
            (id, vec!["noticed".to_owned()])
        );
        let Err(ClientError::Failed(failure)) =
            Client::connect(temp.path()).unwrap().call(Hashes {})
        else {
            panic!("a failure")
        };
        assert_eq!(
            (failure.code, failure.hint.as_deref()),
            (FailureCode::NotFound, Some("look elsewhere"))
        );
        assert_eq!(fake.asked.lock().unwrap().len(), 2);
    }

    #[test]
    fn a_client_that_goes_away_stops_its_work() {
        let (temp, _path, fake, _runtime) = start();
        let client = Client::connect(temp.path()).unwrap();
        let canceller = client.canceller().unwrap();
        let pull = Pull {
            capsule: CapsuleRef("lab".into()),
            wait: None,
            like_path: None,
            like_capsule: None,
        };
        let ended = client.run(pull, |_| canceller.cancel(), |_| {});
        assert!(matches!(ended, Err(ClientError::Lost)));
        let waited = (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            !fake.pulling.load(Ordering::SeqCst)
        });
        assert!(waited, "the work was not stopped");
    }

    #[test]
    fn what_is_no_request_is_refused_and_bounded() {
        let (_temp, path, fake, _runtime) = start();
        let answer = |bytes: &[u8]| {
            let mut stream = UnixStream::connect(&path).unwrap();
            // Cut off by the daemon where it is too long.
            let _ = stream.write_all(bytes);
            let mut text = String::new();
            let _ = stream.read_to_string(&mut text);
            text
        };
        assert!(answer(b"hello\n").contains("\"code\":\"invalid\""));
        assert!(answer(b"{\"explode\":{}}\n").contains("another version"));
        let long = [vec![b' '; super::MAX_REQUEST_LEN + 10], b"\n".to_vec()].concat();
        assert!(answer(&long).contains("too long"));
        assert!(fake.asked.lock().unwrap().is_empty());
    }

    #[test]
    fn no_daemon_is_told_as_such() {
        let temp = tempfile::tempdir().unwrap();
        assert!(matches!(
            Client::connect(temp.path()),
            Err(ClientError::NoDaemon { .. })
        ));
    }
}
