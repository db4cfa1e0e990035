//! `capsule machine`: machines that run from capsules, and become capsules.

mod console;
mod make;

use std::time::Duration;

use capsule_node::control::{CapsuleRef, Failure, FailureCode, Progress};
use capsule_node::home::Home;
use capsule_node::home::parse_expiry;
use capsule_node::machine::api::{
    AwaitRunning, CaptureMachine, CapturedMachine, MachineInfo, MachineList, MachineState,
    RemovedMachine, StopMachine, StoppedMachine,
};
use capsule_node::machine::config::Directory;
use capsule_node::machine::{client, create, host};
use capsule_proto::name::CapsuleName;
use clap::{Args, Subcommand};

use super::context::{Context, Output, now};
use super::exit::Exit;
use super::format::{duration, size};
use super::output::tell;
use super::progress::Display;
use super::publish::{Strength, versioned_name};
use super::style::{Style, printable};
use super::table::{Table, fields};

/// Run machines from capsules under QEMU, and capture them as capsules
#[derive(Debug, Subcommand)]
pub enum MachineCommand {
    Create(make::CreateArgs),
    Run(RunArgs),
    Capture(CaptureArgs),
    Stop(StopArgs),
    Ls(LsArgs),
    Console(console::ConsoleArgs),
    Rm(RmArgs),
    #[command(hide = true)]
    Host(HostArgs),
}

/// Run a machine, or a capsule of one: it goes on where it was captured, as soon as what it reads first is there
///
/// The rest comes while it runs, from as many machines as have it, behind what it reads. It runs in the background and goes
/// on when the node is restarted; `capsule machine console` shows its screen.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// A machine's name; or a capsule: CHANNEL:VERSION, CHANNEL for its newest, or an id
    #[arg(value_name = "NAME|CAPSULE")]
    what: String,
    /// For a capsule: what the machine is called here [default: the channel]
    #[arg(long = "as", value_name = "NAME")]
    name: Option<String>,
    /// Wait so many seconds for the capsule's name, and for somebody who has its manifest
    #[arg(long, value_name = "SECONDS")]
    wait: Option<u64>,
    #[command(flatten)]
    output: Output,
}

/// Capture a machine: all of its disks, memory and devices at one instant, published as a capsule
///
/// It stands still for a moment and goes on; hashing and publishing happen behind. The second capture costs what changed since the
/// first. Of a machine that does not run its disks are captured.
#[derive(Debug, Args)]
pub struct CaptureArgs {
    /// The machine
    #[arg(value_name = "NAME")]
    machine: String,
    /// What to publish it as: CHANNEL:VERSION, such as me:monday
    #[arg(long, value_name = "CHANNEL:VERSION", value_parser = versioned_name)]
    name: CapsuleName,
    /// How hard to compress: zstd level 1, 3 or 19; max with LZMA too, which is slower to read
    #[arg(long, value_enum, default_value_t = Strength::Default)]
    effort: Strength,
    /// Compare memory that was never captured with the disks, as it is often what lies there: less in all, but who resumes it
    /// without having the disks fetches more of them first
    #[arg(long)]
    against_disks: bool,
    /// Leave the guest's memory as it is, instead of having it give back what it does not need
    #[arg(long)]
    no_balloon: bool,
    /// Stop it there: `capsule machine run` goes on from the capsule, here or elsewhere
    #[arg(long)]
    stop: bool,
    /// Until when the name holds: 90d, 1y, or a date such as 2027-01-31; without end, when not given
    #[arg(long, value_name = "WHEN", value_parser = |text: &str| parse_expiry(text, now()))]
    expires: Option<u64>,
    #[command(flatten)]
    output: Output,
}

/// Shut a machine down; its memory is gone then, and its disks go on where they are
#[derive(Debug, Args)]
pub struct StopArgs {
    /// The machine
    #[arg(value_name = "NAME")]
    machine: String,
    /// Pull its plug, instead of pressing its power button
    #[arg(long)]
    force: bool,
    /// Give its guest so many seconds [default: 60]
    #[arg(long, value_name = "SECONDS")]
    wait: Option<u64>,
    #[command(flatten)]
    output: Output,
}

/// List the machines of this home
#[derive(Debug, Args)]
pub struct LsArgs {
    #[command(flatten)]
    output: Output,
}

/// Remove a machine that does not run, and what was written to it
///
/// The capsules that it was made from and captured as stay.
#[derive(Debug, Args)]
pub struct RmArgs {
    /// The machine
    #[arg(value_name = "NAME")]
    machine: String,
    /// Even if something was written to it that no capsule has
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    output: Output,
}

/// The process that has a machine: started by `run`
#[derive(Debug, Args)]
pub struct HostArgs {
    /// The machine
    #[arg(value_name = "NAME")]
    machine: String,
}

/// Runs the command.
pub fn run(command: MachineCommand, context: &Context) -> Result<(), Exit> {
    let home = Home::new(context.home());
    match command {
        MachineCommand::Create(args) => make::create(args, &home),
        MachineCommand::Run(args) => start(args, &home),
        MachineCommand::Capture(args) => capture(args, &home),
        MachineCommand::Stop(args) => stop(args, &home),
        MachineCommand::Ls(args) => list(args, &home),
        MachineCommand::Console(args) => console::console(args, &home),
        MachineCommand::Rm(args) => remove(args, &home),
        MachineCommand::Host(args) => {
            super::node::log_to_stderr();
            Ok(host::run(&home, &args.machine)?)
        }
    }
}

fn start(args: RunArgs, home: &Home) -> Result<(), Exit> {
    let mut display = Display::stderr(args.output.json);
    let mut tell = |progress: Progress| display.progress(&progress);
    let directory = match Directory::of(home, &args.what) {
        Ok(directory) if directory.exists() && args.name.is_none() => directory,
        _ => {
            let capsule = CapsuleRef(args.what.clone());
            let channel = || args.what.split(':').next().unwrap_or_default().to_owned();
            let is_given = args.name.is_some();
            let name = args.name.unwrap_or_else(channel);
            let directory = Directory::of(home, &name).map_err(|failure| match is_given {
                true => failure,
                false => failure.hint("give it a name with --as"),
            })?;
            if client::runs(&directory) {
                return Err(running(&directory).into());
            }
            create::of_machine(home, &name, &capsule, args.wait, &mut tell)?;
            directory
        }
    };
    if client::runs(&directory) {
        return Err(running(&directory).into());
    }
    client::spawn(home, &directory)?;
    let ran = client::ask(&directory, AwaitRunning {}, &mut tell, |_| {});
    display.clear();
    let info = ran?;
    let name = directory.name();
    args.output.print(&info, render)?;
    args.output
        .next(format_args!("capsule machine console {name}"));
    Ok(())
}

fn running(directory: &Directory) -> Failure {
    let name = directory.name();
    let message = format!("machine {name} runs already");
    Failure::new(FailureCode::Exists, message).hint(format!(
        "`capsule machine console {name}` shows its screen; --as runs a capsule under another name"
    ))
}

fn capture(args: CaptureArgs, home: &Home) -> Result<(), Exit> {
    let directory = Directory::of(home, &args.machine)?;
    let request = CaptureMachine {
        name: args.name,
        effort: args.effort.into(),
        expires: args.expires,
        against_disks: args.against_disks,
        no_balloon: args.no_balloon,
        stop: args.stop,
    };
    let display = std::cell::RefCell::new(Display::stderr(args.output.json));
    let tell = |progress: Progress| display.borrow_mut().progress(&progress);
    let notice = |text: String| display.borrow_mut().notice(&text);
    let captured = match client::runs(&directory) {
        true => client::ask(&directory, request, tell, notice),
        false => client::capture_stopped(home, &directory, &request, tell, notice),
    };
    display.borrow_mut().clear();
    let captured = captured?;
    if args.stop {
        client::await_end(&directory)?;
    }
    for warning in &captured.published.warnings {
        super::output::tell(format_args!("note: {}", printable(warning)));
    }
    args.output.print(&captured, render_captured)?;
    let name = &captured.published.name;
    args.output.next(format_args!(
        "on another machine: capsule machine run {name}"
    ));
    Ok(())
}

fn stop(args: StopArgs, home: &Home) -> Result<(), Exit> {
    let directory = Directory::of(home, &args.machine)?;
    let request = StopMachine {
        force: args.force,
        wait: args.wait,
    };
    let stopped = client::ask(&directory, request, |_| {}, |_| {})?;
    client::await_end(&directory)?;
    args.output.print(&stopped, |stopped: &StoppedMachine, _| {
        let how = if stopped.orderly {
            "shut down"
        } else {
            "stopped"
        };
        format!("{} is {how}", stopped.machine)
    })
}

fn list(args: LsArgs, home: &Home) -> Result<(), Exit> {
    let directories = Directory::all(home)?;
    let mut machines = Vec::new();
    for directory in &directories {
        match client::info(directory) {
            Ok(info) => machines.push(info),
            // One that is damaged does not hide the others.
            Err(failure) => tell(format_args!("{}: {}", directory.name(), failure.message)),
        }
    }
    if machines.is_empty() {
        args.output.empty(
            "no machines: `capsule machine create` and `capsule machine run CAPSULE` make one",
        );
    }
    args.output.print(&MachineList { machines }, |list, style| {
        let mut table = Table::new(&["NAME", "STATE", "FROM", ">MEMORY", ">DISKS", ">WRITTEN"]);
        for info in &list.machines {
            table.row([
                info.name.clone(),
                state_word(info),
                origin_word(info),
                size(info.memory),
                size(info.disks),
                size(info.written),
            ]);
        }
        table.render(style)
    })
}

fn remove(args: RmArgs, home: &Home) -> Result<(), Exit> {
    let directory = Directory::of(home, &args.machine)?;
    client::remove(home, &directory, args.force)?;
    let removed = RemovedMachine {
        machine: args.machine,
    };
    args.output.print(&removed, |removed, _| {
        format!("{} is removed", removed.machine)
    })
}

fn state_word(info: &MachineInfo) -> String {
    match info.state {
        MachineState::Stopped if info.resume => "stopped, goes on".to_owned(),
        MachineState::Stopped => "stopped".to_owned(),
        MachineState::Starting => "starting".to_owned(),
        MachineState::Running => "running".to_owned(),
        MachineState::Paused => "paused".to_owned(),
        MachineState::Waiting => {
            let waits = Duration::from_secs_f64(info.waiting_seconds.unwrap_or_default());
            format!("waits for peers ({})", duration(waits))
        }
    }
}

fn origin_word(info: &MachineInfo) -> String {
    let origin = info.origin.as_ref().map(|origin| {
        let id = || origin.capsule.to_string();
        origin.name.clone().unwrap_or_else(id)
    });
    origin.unwrap_or_else(|| "-".to_owned())
}

fn render(info: &MachineInfo, style: Style) -> String {
    let started = info.started_seconds.map(Duration::from_secs_f64);
    let mut rows = vec![
        ("machine", info.name.clone()),
        ("state", state_word(info)),
        ("from", origin_word(info)),
        ("memory", size(info.memory)),
        ("disks", size(info.disks)),
    ];
    if let Some(started) = started {
        rows.push(("started in", duration(started)));
        rows.push(("read of capsules", size(info.read)));
    }
    fields(style, &rows)
}

fn render_captured(captured: &CapturedMachine, style: Style) -> String {
    let published = &captured.published;
    let mut rows = vec![
        ("captured", captured.machine.clone()),
        ("as", published.name.clone()),
        ("capsule", published.capsule.to_string()),
        ("memory written", size(captured.ram_written)),
        ("disks written", size(captured.disk_written)),
        ("stored", size(published.pack_bytes + published.index_bytes)),
    ];
    if let Some(pause) = captured.pause_seconds {
        rows.push(("stood still for", duration(Duration::from_secs_f64(pause))));
    }
    rows.push((
        "published in",
        duration(Duration::from_secs_f64(published.seconds)),
    ));
    fields(style, &rows)
}
