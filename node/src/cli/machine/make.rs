//! `capsule machine create`.

use std::path::{Path, PathBuf};

use capsule_node::control::CapsuleRef;
use capsule_node::home::Home;
use capsule_node::machine::client;
use capsule_node::machine::config::Directory;
use capsule_node::machine::create::{DiskFrom, NewMachine, create as make};
use clap::Args;

use super::super::context::{Output, absolute};
use super::super::exit::Exit;
use super::super::format::parse_size;

/// Least memory with which anything boots.
const MIN_MEMORY: u64 = 16 << 20;

/// Make a machine
///
/// Its disks are capsules, or images, which are only read: what the machine writes lies in overlays of its own.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// What it is called on this node
    #[arg(value_name = "NAME")]
    name: String,
    /// A disk: the path of an image that is there, or else a capsule of a disk; may be given several times
    #[arg(long = "disk", value_name = "CAPSULE|FILE")]
    disks: Vec<String>,
    /// Its memory, such as 512M
    #[arg(long, value_name = "SIZE", value_parser = memory, default_value = "512M")]
    memory: u64,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Without a network card; otherwise one behind a network of the user's own
    #[arg(long)]
    no_network: bool,
    /// A kernel that is booted as it is, instead of what a disk has
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Its initial ramdisk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Its command line
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    append: Option<String>,
    /// QEMU's machine type, with its version [default: the newest pc-q35]
    #[arg(long, value_name = "TYPE")]
    machine_type: Option<String>,
    /// QEMU's CPU model, with its version: machines on which it is to go on need as much [default: one that most have]
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
    /// kvm or tcg: what was captured under one does not go on under the other [default: tcg]
    #[arg(long, value_name = "ACCELERATOR", value_parser = ["kvm", "tcg"])]
    accelerator: Option<String>,
    /// Wait so many seconds for a capsule's name, and for somebody who has its manifest
    #[arg(long, value_name = "SECONDS")]
    wait: Option<u64>,
    #[command(flatten)]
    output: Output,
}

fn memory(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    match bytes >= MIN_MEMORY && bytes.is_multiple_of(1 << 20) {
        true => Ok(bytes),
        false => Err(format!(
            "memory cannot be {text}: write 16M or more, in whole MiB"
        )),
    }
}

/// Runs `create`.
pub fn create(args: CreateArgs, home: &Home) -> Result<(), Exit> {
    let whole = |path: Option<PathBuf>| path.as_deref().map(absolute).transpose();
    let disks = args.disks.iter().map(|disk| disk_from(disk));
    let new = NewMachine {
        disks: disks.collect::<Result<_, Exit>>()?,
        memory: args.memory,
        cpus: args.cpus,
        network: !args.no_network,
        machine_type: args.machine_type,
        cpu_model: args.cpu,
        accelerator: args.accelerator,
        kernel: whole(args.kernel)?,
        initrd: whole(args.initrd)?,
        append: args.append,
        wait: args.wait,
    };
    make(home, &args.name, &new)?;
    let info = client::info(&Directory::of(home, &args.name)?)?;
    args.output.print(&info, super::render)?;
    args.output
        .next(format_args!("capsule machine run {}", args.name));
    Ok(())
}

fn disk_from(text: &str) -> Result<DiskFrom, Exit> {
    let is_path = ["/", "./", "../"]
        .iter()
        .any(|begin| text.starts_with(begin));
    Ok(match is_path || Path::new(text).exists() {
        true => DiskFrom::File(absolute(Path::new(text))?),
        false => DiskFrom::Capsule(CapsuleRef(text.to_owned())),
    })
}
