//! `capsule machine console`: a machine's serial port in this terminal.

use std::io::{IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use capsule_node::home::Home;
use capsule_node::machine::client;
use capsule_node::machine::config::Directory;
use clap::Args;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use super::super::exit::Exit;
use super::super::output::tell;

/// Ctrl-], which ends it, as in telnet.
const ESCAPE: u8 = 0x1d;
/// How long what is piped in may take to be answered, from its end or the last answer on.
const QUIET: Duration = Duration::from_secs(2);

/// Show a machine's console, its first serial port; Ctrl-] leaves it
///
/// What is piped in is typed, and the command ends when no answer comes any more.
#[derive(Debug, Args)]
pub struct ConsoleArgs {
    /// The machine
    #[arg(value_name = "NAME")]
    machine: String,
}

/// Runs `console`.
pub fn console(args: ConsoleArgs, home: &Home) -> Result<(), Exit> {
    let directory = Directory::of(home, &args.machine)?;
    directory.load()?;
    if !client::runs(&directory) {
        let name = &args.machine;
        return Err(Exit::failed(format!("machine {name} does not run"))
            .or_hint(format!("start it with `capsule machine run {name}`")));
    }
    let path = directory.sockets().join("console.sock");
    let broken = |error: std::io::Error| Exit::failed(format!("the console: {error}"));
    let stream = UnixStream::connect(&path).map_err(broken)?;
    let typed = stream.try_clone().map_err(broken)?;
    if std::io::stdin().is_terminal() {
        tell("Ctrl-] leaves the console; the machine runs on");
        let _raw = Raw::begin();
        std::thread::spawn(move || type_to(typed, true));
        show(stream, None)
    } else {
        let timeout = stream.try_clone().map_err(broken)?;
        let typing = std::thread::spawn(move || type_to(typed, false));
        show(stream, Some((timeout, typing)))
    }
}

/// Sends what is typed, until the escape or the end.
fn type_to(mut to: UnixStream, is_terminal: bool) {
    let (mut stdin, mut buffer) = (std::io::stdin(), [0; 1024]);
    while let Ok(len @ 1..) = stdin.read(&mut buffer) {
        let typed = &buffer[..len];
        let escape = typed.iter().position(|byte| is_terminal && *byte == ESCAPE);
        let typed = &typed[..escape.unwrap_or(len)];
        if to.write_all(typed).is_err() || escape.is_some() {
            break;
        }
    }
    if is_terminal {
        let _ended = to.shutdown(Shutdown::Both);
    }
}

/// Prints what comes; where it is piped, until nothing comes after all was typed.
fn show(
    mut from: UnixStream,
    piped: Option<(UnixStream, std::thread::JoinHandle<()>)>,
) -> Result<(), Exit> {
    let broken = |error: std::io::Error| Exit::failed(format!("the console: {error}"));
    if let Some((timeout, _)) = &piped {
        timeout.set_read_timeout(Some(QUIET)).map_err(broken)?;
    }
    let (mut stdout, mut buffer) = (std::io::stdout(), [0; 4096]);
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => {
                let shown = stdout
                    .write_all(&buffer[..len])
                    .and_then(|()| stdout.flush());
                if shown.is_err() {
                    return Err(Exit::OutputClosed);
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if piped
                    .as_ref()
                    .is_none_or(|(_, typing)| typing.is_finished())
                {
                    return Ok(());
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(broken(error)),
        }
    }
}

/// A terminal that passes on every key; as it was before when dropped.
struct Raw(Option<Termios>);

impl Raw {
    fn begin() -> Self {
        let before = tcgetattr(std::io::stdin()).ok();
        if let Some(before) = &before {
            let mut raw = before.clone();
            raw.make_raw();
            let _as_it_is = tcsetattr(std::io::stdin(), OptionalActions::Now, &raw);
        }
        Self(before)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _as_it_is = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}
