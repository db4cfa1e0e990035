//! Colours, and when to use them. No cursor movement: `progress` leaves that to indicatif.

use std::env;
use std::io::{self, IsTerminal};

/// Paints text, or leaves it alone where nobody would see colours.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    colours: bool,
}

impl Style {
    /// Without colours, for tests.
    #[cfg(test)]
    pub const PLAIN: Self = Self { colours: false };

    /// For standard output.
    pub fn stdout() -> Self {
        Self {
            colours: io::stdout().is_terminal() && colours_wanted(),
        }
    }

    /// For standard error.
    pub fn stderr() -> Self {
        Self {
            colours: io::stderr().is_terminal() && colours_wanted(),
        }
    }

    /// Headings.
    pub fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    /// What matters less.
    pub fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }

    /// What is wrong.
    pub fn red(self, text: &str) -> String {
        self.paint("1;31", text)
    }

    /// What is right.
    pub fn green(self, text: &str) -> String {
        self.paint("32", text)
    }

    /// What deserves a look.
    pub fn yellow(self, text: &str) -> String {
        self.paint("33", text)
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colours && !text.is_empty() {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// Says whether the environment allows colours: `NO_COLOR` (no-color.org) unset or empty, and no dumb terminal.
pub fn colours_wanted() -> bool {
    env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Makes text from elsewhere (paths, names that peers gave themselves) safe to print: a control character could
/// move the cursor, or colour what follows.
pub fn printable(text: &str) -> String {
    if text.chars().any(char::is_control) {
        text.chars()
            .map(|c| if c.is_control() { '\u{fffd}' } else { c })
            .collect()
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paints_only_where_colours_are_seen() {
        assert_eq!(Style { colours: true }.red("x"), "\x1b[1;31mx\x1b[0m");
        assert_eq!(Style { colours: true }.red(""), "");
        assert_eq!(Style { colours: false }.red("x"), "x");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable("lab\x1b[2Jpc"), "lab\u{fffd}[2Jpc");
        assert_eq!(printable("lab-pc"), "lab-pc");
    }
}
