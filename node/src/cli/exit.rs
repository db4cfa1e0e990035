//! How a command ends when it does not succeed: what is said, and the exit code.
//!
//! The codes are part of the interface (`node/docs/cli.md`): 1 failure, 2 usage, 3 no node is running, 130 stopped by
//! Ctrl-C (128 + the signal). Commands return [`Exit`]; only [`Exit::report`] prints it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use capsule_node::control::{ClientError, Failure, FailureCode};

use super::style::{Style, printable};

/// What ended a command.
#[derive(Debug)]
pub enum Exit {
    /// It failed.
    Failed {
        /// What happened, naming the thing.
        message: String,
        /// The way out, where the message does not tell it.
        hint: Option<String>,
    },
    /// The arguments contradict each other in a way that clap cannot see.
    Usage(String),
    /// It needs the daemon, and none is running.
    NoDaemon {
        /// For this home.
        home: PathBuf,
    },
    /// A signal stopped it.
    Interrupted {
        /// The signal.
        signal: i32,
        /// What became of the work.
        message: &'static str,
    },
    /// Who read standard output has gone: they had enough.
    OutputClosed,
}

impl Exit {
    /// A failure without a hint.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::Failed {
            message: message.into(),
            hint: None,
        }
    }

    /// Adds the way out to a failure that has none.
    pub fn or_hint(self, way_out: impl Into<String>) -> Self {
        match self {
            Self::Failed {
                message,
                hint: None,
            } => Self::Failed {
                message,
                hint: Some(way_out.into()),
            },
            other => other,
        }
    }

    /// Prints what there is to say on standard error, and gives the code.
    pub fn report(self) -> ExitCode {
        let (code, text) = (self.code(), self.text(Style::stderr()));
        // There is nowhere left to complain to.
        let _ = std::io::stderr().write_all(text.as_bytes());
        code.into()
    }

    const fn code(&self) -> u8 {
        match self {
            Self::Failed { .. } => 1,
            Self::Usage(_) => 2,
            Self::NoDaemon { .. } => 3,
            Self::Interrupted { signal, .. } => 128 + *signal as u8,
            Self::OutputClosed => 0,
        }
    }

    fn text(&self, style: Style) -> String {
        let error =
            |message: &str| format!("{} {}\n", style.red("error:"), printable_lines(message));
        let hint = |text: &str| format!("{} {}\n", style.yellow("hint:"), printable_lines(text));
        match self {
            Self::Failed {
                message,
                hint: None,
            } => error(message),
            Self::Failed {
                message,
                hint: Some(way_out),
            } => error(message) + &hint(way_out),
            Self::Usage(message) => {
                error(message) + &hint("`capsule help COMMAND` tells what it takes")
            }
            Self::NoDaemon { home } => {
                error(&format!("no node is running for {}", home.display()))
                    + &hint(&format!(
                        "start it with `capsule --home {} node`",
                        shell_word(home)
                    ))
            }
            Self::Interrupted { message, .. } => {
                format!("{} {message}\n", style.yellow("stopped:"))
            }
            Self::OutputClosed => String::new(),
        }
    }
}

impl From<anyhow::Error> for Exit {
    fn from(error: anyhow::Error) -> Self {
        Self::failed(format!("{error:#}"))
    }
}

impl From<Failure> for Exit {
    fn from(failure: Failure) -> Self {
        let hint = failure
            .hint
            .or_else(|| way_out(failure.code).map(str::to_owned));
        Self::Failed {
            message: failure.message,
            hint,
        }
    }
}

impl From<ClientError> for Exit {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::NoDaemon { home } => Self::NoDaemon { home },
            ClientError::Failed(failure) => failure.into(),
            other => Self::failed(other.to_string()),
        }
    }
}

/// What helps with a kind of failure, where the daemon named nothing better.
const fn way_out(code: FailureCode) -> Option<&'static str> {
    match code {
        FailureCode::Unreachable => Some("`capsule peers` lists who is connected"),
        FailureCode::Full => Some("`capsule gc` frees what nothing pinned needs"),
        FailureCode::Internal => {
            Some("this is a fault of capsule: please report it with the node's log")
        }
        _ => None,
    }
}

/// A path as one word of a shell command.
pub fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:,@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

fn printable_lines(text: &str) -> String {
    text.lines().map(printable).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use capsule_node::control::Failure;

    use super::*;

    #[test]
    fn no_daemon_names_the_command_with_its_home() {
        let exit = Exit::NoDaemon {
            home: "/srv/lab pc".into(),
        };
        assert_eq!(exit.code(), 3);
        assert_eq!(
            exit.text(Style::PLAIN),
            "error: no node is running for /srv/lab pc\nhint: start it with `capsule --home '/srv/lab pc' node`\n"
        );
    }

    #[test]
    fn a_failure_keeps_its_own_hint_before_the_general_one() {
        let failure = Failure::new(FailureCode::Unreachable, "nobody has lab:1");
        let general = Exit::from(ClientError::Failed(failure.clone())).text(Style::PLAIN);
        assert!(general.contains("hint: `capsule peers`"), "{general}");
        let own =
            Exit::from(ClientError::Failed(failure.hint("publish it first"))).text(Style::PLAIN);
        assert_eq!(own, "error: nobody has lab:1\nhint: publish it first\n");
    }

    #[test]
    fn codes_are_those_of_the_interface() {
        assert_eq!(Exit::failed("x").code(), 1);
        assert_eq!(Exit::Usage("x".into()).code(), 2);
        assert_eq!(
            Exit::Interrupted {
                signal: 2,
                message: "x"
            }
            .code(),
            130
        );
        assert_eq!(Exit::OutputClosed.code(), 0);
    }
}
