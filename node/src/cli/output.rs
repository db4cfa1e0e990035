//! Standard output: results only, and quiet when its reader has gone (`capsule hashes | head`). Standard error: the rest.

use std::fmt::Display;
use std::io::{self, Write};

use serde::Serialize;

use super::exit::Exit;

/// Writes text to standard output.
///
/// # Errors
/// [`Exit::OutputClosed`] when the reader has gone, which is no failure; what else the system says is.
pub fn print(text: &str) -> Result<(), Exit> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Exit::OutputClosed,
            _ => Exit::failed(format!("cannot write to standard output: {error}")),
        })
}

/// Writes an answer as one JSON object on one line.
///
/// # Errors
/// As [`print()`].
pub fn print_json(answer: &impl Serialize) -> Result<(), Exit> {
    let text = serde_json::to_string(answer)
        .map_err(|error| Exit::failed(format!("cannot print the answer: {error}")))?;
    print(&(text + "\n"))
}

/// Writes a line to standard error: notes, warnings, progress. Where that fails there is nowhere left to complain to,
/// and the work goes on.
pub fn tell(line: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}
