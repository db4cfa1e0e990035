//! What the QEMU on this machine can do.

use std::ffi::OsString;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::control::{Failure, FailureCode};

/// Oldest version that can do all of this (`open-timeout` of NBD, `blockdev-reopen`).
const OLDEST: (u32, u32) = (7, 2);
/// So long QEMU may take to say what it knows.
const ANSWER: Duration = Duration::from_secs(20);
/// Most bytes of a list that are looked at.
const MAX_LIST: usize = 1 << 20;
/// Confines QEMU to what it needs: no other programs, no other privileges.
pub(super) const SANDBOX: &str =
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// Images of firmware that QEMU loads into memory, whose sizes must be the same at resume.
const FIRMWARE: [&str; 3] = ["bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin"];

/// What the QEMU here can do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Probed {
    /// Its version, such as `7.2.22`.
    pub version: String,
    /// Versioned machine types that it knows, such as `pc-q35-7.2`.
    pub machine_types: Vec<String>,
    /// Versioned CPU models that it knows, such as `Nehalem-v1`.
    pub cpu_models: Vec<String>,
    /// Firmware images by name and size.
    pub firmware: Vec<(String, u64)>,
    /// Whether `/dev/kvm` can be opened. That guests run on it is not said.
    pub kvm: bool,
    /// Whether it can be confined by seccomp.
    pub sandbox: bool,
}

/// The program, which `CAPSULE_QEMU` may name.
pub(super) fn program() -> OsString {
    std::env::var_os("CAPSULE_QEMU").unwrap_or_else(|| "qemu-system-x86_64".into())
}

/// Asks the QEMU here what it can do.
///
/// # Errors
/// There is none, it does not run, or it is too old.
pub async fn probe() -> Result<Probed, Failure> {
    let version = run(&["-version"]).await?;
    let version = parse_version(&version).ok_or_else(|| {
        let message = format!(
            "{} does not say its version as QEMU does",
            program().display()
        );
        Failure::new(FailureCode::Refused, message).hint(INSTALL)
    })?;
    if major_minor(&version).is_none_or(|version| version < OLDEST) {
        let message = format!("QEMU {version} is too old");
        let hint = format!("it takes QEMU {}.{} or newer", OLDEST.0, OLDEST.1);
        return Err(Failure::new(FailureCode::Refused, message).hint(hint));
    }
    // A QEMU built without seccomp refuses the option.
    let confined = run(&["-sandbox", SANDBOX, "-machine", "help"]).await;
    let sandbox = confined.is_ok();
    let machine_types = match confined {
        Ok(list) => list,
        Err(_no_seccomp) => run(&["-machine", "help"]).await?,
    };
    let cpu_models = run(&["-cpu", "help"]).await?;
    let directories = run(&["-L", "help"]).await?;
    let firmware = FIRMWARE.iter().filter_map(|name| {
        let found = directories.lines().find_map(|directory| {
            std::fs::metadata(std::path::Path::new(directory).join(name)).ok()
        });
        Some(((*name).to_owned(), found?.len()))
    });
    Ok(Probed {
        machine_types: parse_machine_types(&machine_types),
        cpu_models: parse_cpu_models(&cpu_models),
        firmware: firmware.collect(),
        kvm: std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok(),
        version,
        sandbox,
    })
}

const INSTALL: &str = "install QEMU (package qemu-system-x86), or name the program in CAPSULE_QEMU";

async fn run(arguments: &[&str]) -> Result<String, Failure> {
    let program = program();
    let name = program.display();
    let output = Command::new(&program)
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = match timeout(ANSWER, output).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => {
            let message = format!("cannot start {name}: {error}");
            return Err(Failure::new(FailureCode::NotFound, message).hint(INSTALL));
        }
        Err(_elapsed) => {
            let message = format!("{name} says nothing within {} s", ANSWER.as_secs());
            return Err(Failure::new(FailureCode::Io, message));
        }
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().last().unwrap_or("it does not say why");
        let message = format!("{name} {} failed: {said}", arguments.join(" "));
        return Err(Failure::new(FailureCode::Refused, message).hint(INSTALL));
    }
    let said = &output.stdout[..output.stdout.len().min(MAX_LIST)];
    Ok(String::from_utf8_lossy(said).into_owned())
}

/// `QEMU emulator version 7.2.22 (Debian ...)`.
fn parse_version(said: &str) -> Option<String> {
    let (_, after) = said.lines().next()?.split_once("version ")?;
    let version = after.split_whitespace().next()?;
    major_minor(version)?;
    Some(version.to_owned())
}

pub(super) fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// The version that a type such as `pc-q35-7.2` ends with.
pub(super) fn type_version(machine_type: &str) -> Option<(u32, u32)> {
    major_minor(machine_type.rsplit_once('-')?.1)
}

fn parse_machine_types(list: &str) -> Vec<String> {
    let names = list
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next());
    names
        .filter(|name| type_version(name).is_some())
        .map(str::to_owned)
        .collect()
}

/// Lines are `x86 Nehalem-v1  Intel ...` in older versions, `  Nehalem-v1  Intel ...` in newer ones, and end where flags begin.
fn parse_cpu_models(list: &str) -> Vec<String> {
    let lines = list.lines().skip(1);
    let names = lines
        .take_while(|line| !line.starts_with("Recognized"))
        .filter_map(|line| {
            let line = line.trim_start();
            line.strip_prefix("x86 ")
                .unwrap_or(line)
                .split_whitespace()
                .next()
        });
    names
        .filter(|name| is_versioned_model(name))
        .map(str::to_owned)
        .collect()
}

pub(super) fn is_versioned_model(name: &str) -> bool {
    name.rsplit_once("-v").is_some_and(|(_, version)| {
        !version.is_empty() && version.bytes().all(|b| b.is_ascii_digit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_old_and_new_versions_are_read() {
        assert_eq!(
            parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2)\nCopyright").as_deref(),
            Some("7.2.22")
        );
        assert_eq!(parse_version("GNU bash, version x.2"), None);
        let types = "Supported machines are:\nmicrovm   microvm (i386)\nq35  Standard (alias of pc-q35-7.2)\n\
                     pc-q35-7.2           Standard PC (Q35 + ICH9, 2009)\n";
        assert_eq!(parse_machine_types(types), ["pc-q35-7.2"]);
        let old = "Available CPUs:\nx86 Nehalem  (alias configured by machine type)\nx86 Nehalem-v1  Intel Core\n\n\
                   Recognized CPUID flags:\n  3dnow-v1\n";
        let new = "Available CPUs:\n  Nehalem   (alias)\n  Nehalem-v1            Intel Core\n  host      same\n";
        for list in [old, new] {
            assert_eq!(parse_cpu_models(list), ["Nehalem-v1"]);
        }
    }

    #[test]
    fn machine_types_compare_by_number() {
        assert!(type_version("pc-q35-10.0") > type_version("pc-q35-7.2"));
        assert_eq!(type_version("microvm"), None);
    }
}
