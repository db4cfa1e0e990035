//! Image formats that QEMU reads for us: `qemu-nbd` serves the disk, `qemu-img map` tells where it is zero.
//!
//! No copy of the disk is made. The server listens on a socket in a private directory, serves only while we are connected,
//! and exits by itself when the last connection closes, however this process ends. The protocol is in `nbd`.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capsule_proto::ranges::MAX_CONTENT_LEN;
use serde_json::Value;

use super::ImageError;
use super::detect::Format;
use super::nbd::Client;
use crate::content::{Content, Extent, Extents, ReadError, Source, check_range};
use crate::osfile::Fingerprint;

/// Connections, so that a few threads read at once.
const CONNECTIONS: usize = 4;
/// How often, and how many times, is looked whether the server listens or has ended: ten seconds in all.
const WAIT: Duration = Duration::from_millis(5);
const WAITS: usize = 2000;
/// Longest answer of `qemu-img info`: 64 images of a chain take far less.
const MAX_INFO: u64 = 4 << 20;
/// Longest line of `qemu-img map`.
const MAX_LINE: u64 = 64 << 10;
/// Most directories tried for the socket.
const TRIES: usize = 1000;

/// A disk served by `qemu-nbd`.
pub(super) struct QemuSource {
    path: PathBuf,
    format: Format,
    clients: Vec<Mutex<Client>>,
    next: AtomicUsize,
    len: u64,
    files: Vec<(PathBuf, File, Fingerprint)>,
    /// After the clients, so that the server sees them go before it is waited for.
    _server: Server,
}

impl QemuSource {
    /// Starts the server and connects to it.
    pub fn open(path: &Path, format: Format) -> Result<Self, ImageError> {
        // Absolute, so that no name is taken for an option or a protocol.
        let path = std::path::absolute(path).map_err(|e| ImageError::open(path, e))?;
        let files = files(&path, format)?;
        let mut server = Server::start(&path, format)?;
        let mut clients = Vec::new();
        while clients.len() < CONNECTIONS {
            clients.push(
                server
                    .connect()
                    .map_err(|why| failed(&path, "qemu-nbd", why))?,
            );
        }
        let len = clients[0].size();
        if len > MAX_CONTENT_LEN {
            return Err(failed(
                &path,
                "qemu-nbd",
                "its disk is larger than 1 PiB".to_owned(),
            ));
        }
        let clients = clients.into_iter().map(Mutex::new).collect();
        Ok(Self {
            path,
            format,
            clients,
            next: AtomicUsize::new(0),
            len,
            files,
            _server: server,
        })
    }

    /// A connection that is free, or else the one whose turn it is.
    fn client(&self) -> MutexGuard<'_, Client> {
        for client in &self.clients {
            if let Ok(free) = client.try_lock() {
                return free;
            }
        }
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.clients.len();
        self.clients[turn]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Content for QemuSource {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        check_range(self.len, offset, buf.len())?;
        self.client()
            .read_at(offset, buf)
            .map_err(|e| ReadError::Format {
                path: self.path.clone(),
                offset,
                why: format!("qemu-nbd could not read this part of its disk: {e}"),
            })
    }
}

impl Source for QemuSource {
    fn extents(&self) -> Extents<'_> {
        match Map::start(self) {
            Ok(map) => Box::new(map),
            Err(error) => Box::new(std::iter::once(Err(error))),
        }
    }

    fn check_unchanged(&self) -> Result<(), ReadError> {
        self.files
            .iter()
            .try_for_each(|(path, file, stamp)| stamp.check(path, file))
    }
}

fn failed(path: &Path, tool: &'static str, why: String) -> ImageError {
    ImageError::Qemu {
        path: path.into(),
        tool,
        why,
    }
}

/// The error for a tool that could not be started.
fn not_started(path: &Path, format: Format, tool: &'static str, error: &io::Error) -> ImageError {
    if error.kind() == io::ErrorKind::NotFound {
        return ImageError::NeedsQemu {
            path: path.into(),
            format,
        };
    }
    failed(path, tool, error.to_string())
}

/// A child process that never outlives its owner.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a tool said of its failure, on one line.
fn complaint(stderr: impl Read) -> String {
    let mut text = Vec::new();
    let _ = stderr.take(MAX_LINE).read_to_end(&mut text);
    let text = String::from_utf8_lossy(&text).trim().replace('\n', "; ");
    if text.is_empty() {
        "it ended without a word".to_owned()
    } else {
        text
    }
}

/// Opens all files of an image that `qemu-img info` names, in order to notice changes.
fn files(path: &Path, format: Format) -> Result<Vec<(PathBuf, File, Fingerprint)>, ImageError> {
    let mut command = Command::new("qemu-img");
    command
        .args([
            "info",
            "--output=json",
            "--backing-chain",
            "-f",
            format.name(),
        ])
        .arg(path);
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut running = Running(child.map_err(|e| not_started(path, format, "qemu-img", &e))?);
    let (stdout, stderr) = (running.0.stdout.take(), running.0.stderr.take());
    let mut answer = Vec::new();
    stdout
        .expect("piped")
        .take(MAX_INFO)
        .read_to_end(&mut answer)
        .map_err(|e| failed(path, "qemu-img", e.to_string()))?;
    if !running.0.wait().is_ok_and(|status| status.success()) {
        return Err(failed(path, "qemu-img", complaint(stderr.expect("piped"))));
    }
    let answer: Value =
        serde_json::from_slice(&answer).map_err(|e| failed(path, "qemu-img", e.to_string()))?;
    let mut names = vec![path.to_owned()];
    inspect(&answer, &mut names).map_err(|why| failed(path, "qemu-img", why.to_owned()))?;
    names.sort();
    names.dedup();
    names
        .into_iter()
        .map(open_file)
        .collect::<Result<_, _>>()
        .map_err(ImageError::Read)
}

/// Gathers the names of files from what `qemu-img info` says, at any depth.
fn inspect(value: &Value, names: &mut Vec<PathBuf>) -> Result<(), &'static str> {
    match value {
        Value::Object(fields) => {
            if fields.get("encrypted") == Some(&Value::Bool(true)) {
                return Err(
                    "it is encrypted: decrypt it with qemu-img convert, or publish it with --as file",
                );
            }
            match fields.get("filename").and_then(Value::as_str) {
                // A node that QEMU put together itself; its files are below.
                Some(name) if name.starts_with("json:") => {}
                Some(name) if name.starts_with('/') => names.push(name.into()),
                Some(_) => {
                    return Err(
                        "one of its files is not on this machine: convert it with qemu-img first",
                    );
                }
                None => {}
            }
            fields.values().try_for_each(|value| inspect(value, names))
        }
        Value::Array(values) => values.iter().try_for_each(|value| inspect(value, names)),
        _ => Ok(()),
    }
}

fn open_file(path: PathBuf) -> Result<(PathBuf, File, Fingerprint), ReadError> {
    let file = File::open(&path).map_err(|e| ReadError::io(&path, 0, e))?;
    let stat = rustix::fs::fstat(&file).map_err(|e| ReadError::io(&path, 0, e.into()))?;
    Ok((path, file, Fingerprint::of(&stat)))
}

/// A running `qemu-nbd`, and the directory of its socket.
struct Server {
    child: Running,
    directory: PathBuf,
}

impl Server {
    fn start(path: &Path, format: Format) -> Result<Self, ImageError> {
        let directory = private_directory().map_err(|e| failed(path, "qemu-nbd", e.to_string()))?;
        let mut command = Command::new("qemu-nbd");
        command.args([
            "--read-only",
            &format!("--shared={CONNECTIONS}"),
            "--format",
            format.name(),
            "--socket",
        ]);
        command.arg(directory.join("nbd")).arg(path);
        match command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
        {
            Ok(child) => Ok(Self {
                child: Running(child),
                directory,
            }),
            Err(error) => {
                let _ = std::fs::remove_dir_all(&directory);
                Err(not_started(path, format, "qemu-nbd", &error))
            }
        }
    }

    /// Connects, the first time as soon as the server listens; the error is in its words.
    fn connect(&mut self) -> Result<Client, String> {
        for _ in 0..WAITS {
            match UnixStream::connect(self.directory.join("nbd")) {
                Ok(stream) => return Client::new(stream).map_err(|e| e.to_string()),
                Err(_) if matches!(self.child.0.try_wait(), Ok(None)) => std::thread::sleep(WAIT),
                Err(error) => {
                    return Err(self
                        .child
                        .0
                        .stderr
                        .take()
                        .map_or_else(|| error.to_string(), complaint));
                }
            }
        }
        Err("it does not listen".to_owned())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// A directory of our own, in the directory for temporary files: socket paths must be short.
fn private_directory() -> io::Result<PathBuf> {
    let base = std::env::temp_dir();
    for number in 0..TRIES {
        let path = base.join(format!("capsule-nbd-{}-{number}", std::process::id()));
        match std::fs::DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => return result.map(|()| path),
        }
    }
    Err(io::Error::from(io::ErrorKind::AlreadyExists))
}

/// The disk's extents, as `qemu-img map` writes them: a JSON array, one element a line.
struct Map<'a> {
    source: &'a QemuSource,
    child: Running,
    lines: BufReader<ChildStdout>,
    at: u64,
}

impl<'a> Map<'a> {
    fn start(source: &'a QemuSource) -> Result<Self, ReadError> {
        let mut command = Command::new("qemu-img");
        command
            .args(["map", "--output=json", "-f", source.format.name()])
            .arg(&source.path);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut child = child
            .map(Running)
            .map_err(|e| ReadError::io(&source.path, 0, e))?;
        let lines = BufReader::new(child.0.stdout.take().expect("piped"));
        Ok(Self {
            source,
            child,
            lines,
            at: 0,
        })
    }

    fn failed(&self, why: &str) -> ReadError {
        ReadError::Format {
            path: self.source.path.clone(),
            offset: self.at,
            why: format!("qemu-img map failed ({why}); qemu-img check tells more"),
        }
    }

    /// The next element; `None` after the last.
    fn element(&mut self) -> Result<Option<Extent>, ReadError> {
        let mut line = String::new();
        loop {
            line.clear();
            let read = (&mut self.lines)
                .take(MAX_LINE)
                .read_line(&mut line)
                .map_err(|e| self.failed(&e.to_string()))?;
            if read == 0 {
                let ended = self.child.0.wait().is_ok_and(|status| status.success());
                return if ended {
                    Ok(None)
                } else {
                    Err(self.failed("it ended early"))
                };
            }
            let element = line
                .trim()
                .trim_start_matches('[')
                .trim_end_matches([',', ']']);
            if !element.is_empty() {
                return self.parse(element).map(Some);
            }
        }
    }

    fn parse(&self, element: &str) -> Result<Extent, ReadError> {
        let value: Value =
            serde_json::from_str(element).map_err(|e| self.failed(&e.to_string()))?;
        let number = |name| {
            value[name]
                .as_u64()
                .ok_or_else(|| self.failed("a number is missing"))
        };
        let (start, len) = (number("start")?, number("length")?);
        let end = start.saturating_add(len).min(self.source.len);
        if start != self.at || end <= start {
            return Err(self.failed("its elements leave gaps"));
        }
        Ok(Extent {
            range: start..end,
            zero: value["zero"] == Value::Bool(true),
        })
    }
}

impl Iterator for Map<'_> {
    type Item = Result<Extent, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at == self.source.len {
            return None;
        }
        let extent = match self.element() {
            Ok(Some(extent)) => Ok(extent),
            // What is not mapped is read.
            Ok(None) => Ok(Extent {
                range: self.at..self.source.len,
                zero: false,
            }),
            Err(error) => Err(error),
        };
        self.at = extent
            .as_ref()
            .map_or(self.source.len, |extent| extent.range.end);
        Some(extent)
    }
}
