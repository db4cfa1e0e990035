//! What every command has: the home, the clock, and a way to ask its daemon.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use capsule_node::control::{Client, ClientError, Command};
use clap::Args;
use serde::Serialize;

use super::exit::Exit;
use super::interrupt::Interrupt;
use super::output;
use super::progress::Display;
use super::style::Style;

/// How a command's answer is printed.
#[derive(Debug, Clone, Copy, Args)]
pub struct Output {
    /// Print one JSON object, with stable keys (documented in node/docs/cli.md)
    #[arg(long)]
    pub json: bool,
}

impl Output {
    /// Says on standard error what a person may want to do next.
    pub fn next(self, text: impl std::fmt::Display) {
        if !self.json {
            output::tell(format_args!("{} {text}", Style::stderr().dim("next:")));
        }
    }

    /// Says on standard error that a list is empty: for people only, who could think that nothing happened.
    pub fn empty(self, text: &str) {
        if !self.json {
            output::tell(Style::stderr().dim(text));
        }
    }

    /// Prints an answer: as it is for programs, or as `render` writes it for people.
    ///
    /// # Errors
    /// As [`output::print()`].
    pub fn print<A: Serialize>(
        self,
        answer: &A,
        render: impl FnOnce(&A, Style) -> String,
    ) -> Result<(), Exit> {
        if self.json {
            output::print_json(answer)
        } else {
            output::print(&render(answer, Style::stdout()))
        }
    }
}

/// How a request ended.
type Ended<C> = Result<<C as Command>::Answer, ClientError>;

/// The home that the commands act on.
#[derive(Debug, Clone)]
pub struct Context {
    home: PathBuf,
}

impl Context {
    /// For a home.
    pub const fn new(home: PathBuf) -> Self {
        Self { home }
    }

    /// The home.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Asks the daemon something that it answers at once.
    ///
    /// # Errors
    /// No daemon, or what it says.
    pub fn ask<C: Command>(&self, command: C) -> Result<C::Answer, Exit> {
        Ok(Client::connect(&self.home)?.call(command)?)
    }

    /// Has the daemon do long work, and shows how far it has come. Ctrl-C closes the connection, which stops the work;
    /// `stopped` then says what became of it.
    ///
    /// # Errors
    /// No daemon, what it says, or that it was stopped.
    pub fn work<C: Command>(
        &self,
        command: C,
        output: Output,
        stopped: &'static str,
    ) -> Result<C::Answer, Exit> {
        match self.converse(command, output, |_| Ok(()))? {
            (Ok(answer), _) => Ok(answer),
            (Err(_), Some(signal)) => Err(Exit::Interrupted {
                signal,
                message: stopped,
            }),
            (Err(error), None) => Err(error.into()),
        }
    }

    /// Has the daemon do something until Ctrl-C; `ready` hears when it does it.
    ///
    /// # Errors
    /// No daemon, what it says, or what `ready` says.
    pub fn serve<C: Command>(
        &self,
        command: C,
        output: Output,
        ready: impl FnMut(&C::Answer) -> Result<(), Exit>,
    ) -> Result<(), Exit> {
        match self.converse(command, output, ready)? {
            (Ok(_), _) | (Err(_), Some(_)) => Ok(()),
            (Err(error), None) => Err(error.into()),
        }
    }

    /// How a request ended, and the signal that came meanwhile, if one did. Where `ready` fails, the request ends and that is the error.
    fn converse<C: Command>(
        &self,
        command: C,
        output: Output,
        mut ready: impl FnMut(&C::Answer) -> Result<(), Exit>,
    ) -> Result<(Ended<C>, Option<i32>), Exit> {
        let client = Client::connect(&self.home)?;
        let canceller = || {
            let canceller = client.canceller();
            canceller.map_err(|error| Exit::failed(format!("the node's socket: {error}")))
        };
        let (on_signal, on_failure) = (canceller()?, canceller()?);
        let interrupt = Interrupt::catch(true, move || on_signal.cancel())?;
        let display = std::cell::RefCell::new(Display::stderr(output.json));
        let mut told = Ok(());
        let ended = client.serve(
            command,
            |progress| display.borrow_mut().progress(&progress),
            |notice| display.borrow_mut().notice(&notice),
            |answer| {
                display.borrow_mut().clear();
                told = ready(&answer);
                if told.is_err() {
                    on_failure.cancel();
                }
            },
        );
        display.into_inner().clear();
        told?;
        Ok((ended, interrupt.signal()))
    }
}

/// What of a capsule is read while it comes, and how long is waited for it.
#[derive(Debug, Args)]
pub struct Wanted {
    /// Only this component, of a capsule that has several
    #[arg(long, value_name = "NAME")]
    pub component: Option<String>,
    /// Wait so many seconds for the name, and for somebody who has the manifest
    #[arg(long, value_name = "SECONDS")]
    pub wait: Option<u64>,
}

/// The time, in seconds since 1970: for ages and dates.
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// A path from the command line as the daemon needs it, whose working directory is another.
///
/// # Errors
/// The working directory is gone.
pub fn absolute(path: &Path) -> Result<PathBuf, Exit> {
    std::path::absolute(path).map_err(|error| Exit::failed(format!("{}: {error}", path.display())))
}
