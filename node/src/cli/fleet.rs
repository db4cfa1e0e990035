//! `capsule fleet init`, `fleet invite` and `join`: membership. They work on the home alone and need no daemon.

use std::io::Read;
use std::path::Path;

use anyhow::Context as _;
use capsule_node::home::{
    DEFAULT_EXPIRY, Home, HomeError, Invitation, InviteOptions, JoinOptions, check_address,
    parse_expiry, system_entropy,
};
use capsule_proto::credential::{Channels, Grant, MAX_TOKEN_LEN, Roles};
use capsule_proto::name::Channel;
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

use super::context::{Context, Output, now};
use super::exit::{Exit, shell_word};
use super::format::{date, short};
use super::output;
use super::style::Style;
use super::table::fields;

/// Found a fleet, or invite machines into it
#[derive(Debug, Subcommand)]
pub enum FleetCommand {
    Init(InitArgs),
    Invite(InviteArgs),
}

/// Found a fleet: its root key lies in this home, and this machine is a member with all roles
///
/// Needs no running node. Keep the home's fleet.key safe: who has it can invite, and without it nobody can.
#[derive(Debug, Args)]
pub struct InitArgs {
    #[command(flatten)]
    membership: MembershipArgs,
    #[command(flatten)]
    output: Output,
}

/// Print a token with which machines join the fleet
///
/// One token enrols any number of machines until it expires. Only the token is printed, so that it can be piped:
/// `capsule fleet invite | ssh pc-7 capsule join -`. Needs no running node.
#[derive(Debug, Args)]
pub struct InviteArgs {
    /// What its machines may do beyond fetching and serving; may be given more than once [default: member; publisher
    /// with --channel]
    #[arg(long = "role", value_enum, value_name = "ROLE", value_delimiter = ',')]
    roles: Vec<Role>,
    /// A channel that its machines may publish to, as publishers; may be given more than once; all channels, when not
    /// given
    #[arg(long = "channel", value_name = "CHANNEL")]
    channels: Vec<Channel>,
    /// When it ends, with every membership made of it: 12h, 30d, 2y, or a date such as 2027-01-31 [default: 365d]
    #[arg(long, value_name = "WHEN", value_parser = |text: &str| parse_expiry(text, now()))]
    expires: Option<u64>,
    /// Where the fleet is found: HOST:PORT or a multiaddr; may be given more than once; where this node listened last,
    /// when not given
    #[arg(long = "addr", value_name = "ADDR", value_parser = address)]
    addresses: Vec<String>,
    #[command(flatten)]
    output: Output,
}

/// Join a fleet with a token
///
/// Needs no running node; one that runs must be restarted.
#[derive(Debug, Args)]
pub struct JoinArgs {
    /// What `capsule fleet invite` printed, or - to read it from standard input
    token: String,
    #[command(flatten)]
    membership: MembershipArgs,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct MembershipArgs {
    /// This machine's name, for people; the host's, when not given
    #[arg(long = "machine-name", value_name = "NAME")]
    machine_name: Option<String>,
    /// Replace the membership that this home has
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Role {
    /// Fetches and serves, as every machine does
    Member,
    /// Publishes
    Publisher,
    /// Revokes tokens and machines
    Admin,
}

/// A membership; the keys of `fleet init --json` and `join --json`.
#[derive(Debug, Serialize)]
struct Membership<'a> {
    fleet: String,
    machine: String,
    machine_name: String,
    home: &'a Path,
    roles: Vec<&'static str>,
    channels: Option<Vec<String>>,
    expires: Option<u64>,
    addresses: Vec<String>,
    restart_needed: bool,
}

/// A token; the keys of `fleet invite --json`.
#[derive(Debug, Serialize)]
struct Invited {
    token: String,
    id: String,
    expires: u64,
    addresses: Vec<String>,
}

/// Runs `fleet`.
pub fn fleet(command: FleetCommand, context: &Context) -> Result<(), Exit> {
    match command {
        FleetCommand::Init(args) => init(args, context),
        FleetCommand::Invite(args) => invite(args, context),
    }
}

fn init(args: InitArgs, context: &Context) -> Result<(), Exit> {
    let home = Home::new(context.home());
    let founded = home.init_fleet(&args.membership.options(), now(), &mut system_entropy)?;
    let membership = Membership {
        fleet: founded.fleet.to_string(),
        machine: founded.machine.to_string(),
        machine_name: founded.machine_name,
        home: home.dir(),
        roles: vec!["publisher", "admin"],
        channels: None,
        expires: None,
        addresses: Vec::new(),
        restart_needed: founded.restart_needed,
    };
    args.output.print(&membership, render_membership)?;
    next_steps(
        &membership,
        args.output,
        "`capsule fleet invite` prints a token for other machines",
    );
    Ok(())
}

fn invite(args: InviteArgs, context: &Context) -> Result<(), Exit> {
    let roles = granted(&args.roles, !args.channels.is_empty())?;
    let expires = args.expires.unwrap_or_else(|| now() + DEFAULT_EXPIRY);
    let options = InviteOptions {
        roles,
        channels: args.channels,
        expires,
        addresses: args.addresses,
    };
    let invitation = Home::new(context.home()).invite(&options, now(), &mut system_entropy)?;
    if invitation.addresses.is_empty() {
        let style = Style::stderr();
        output::tell(format_args!(
            "{} the token holds no address: its machines find the fleet on their own LAN only\n{} start `capsule node` \
             here first, or name one with --addr HOST:PORT",
            style.yellow("warning:"),
            style.yellow("hint:")
        ));
    }
    if args.output.json {
        let Invitation {
            token,
            id,
            addresses,
        } = invitation;
        output::print_json(&Invited {
            token,
            id: id.to_string(),
            expires,
            addresses,
        })
    } else {
        output::print(&(invitation.token + "\n"))
    }
}

/// As it was written, if it is an address.
pub fn address(text: &str) -> Result<String, String> {
    check_address(text)
        .map(|()| text.to_owned())
        .map_err(|error| error.to_string())
}

/// The roles of a token: who is given channels publishes, unless it was said to be a member only.
fn granted(asked: &[Role], with_channels: bool) -> Result<Roles, Exit> {
    let publisher = asked.contains(&Role::Publisher);
    if with_channels && !publisher && asked.contains(&Role::Member) {
        return Err(Exit::Usage(
            "--channel says where its machines may publish, which members may not: leave out --role member".to_owned(),
        ));
    }
    Ok(Roles {
        publisher: publisher || with_channels,
        admin: asked.contains(&Role::Admin),
    })
}

/// Runs `join`.
pub fn join(args: JoinArgs, context: &Context) -> Result<(), Exit> {
    let token = if args.token == "-" {
        read_token()?
    } else {
        args.token
    };
    let home = Home::new(context.home());
    let joined = home.join(
        token.trim(),
        &args.membership.options(),
        now(),
        &mut system_entropy,
    )?;
    let membership = Membership {
        fleet: joined.fleet.to_string(),
        machine: joined.machine.to_string(),
        machine_name: joined.machine_name,
        home: home.dir(),
        roles: role_words(&joined.grant),
        channels: channel_words(&joined.grant),
        expires: Some(joined.grant.expires),
        addresses: joined.addresses,
        restart_needed: joined.restart_needed,
    };
    args.output.print(&membership, render_membership)?;
    next_steps(
        &membership,
        args.output,
        "`capsule ls` lists what the fleet has once it is connected",
    );
    Ok(())
}

impl MembershipArgs {
    fn options(&self) -> JoinOptions {
        JoinOptions {
            machine_name: self.machine_name.clone(),
            force: self.force,
        }
    }
}

impl From<HomeError> for Exit {
    fn from(error: HomeError) -> Self {
        Self::failed(error.to_string())
    }
}

/// Reads a token from standard input; more than one can be is not read.
fn read_token() -> Result<String, Exit> {
    // As text a token is longer than its bytes, by less than two.
    let most = 2 * MAX_TOKEN_LEN as u64;
    let mut text = String::new();
    std::io::stdin()
        .lock()
        .take(most)
        .read_to_string(&mut text)
        .context("cannot read the token from standard input")?;
    if text.trim().is_empty() {
        return Err(Exit::failed("standard input holds no token")
            .or_hint("`capsule fleet invite` prints one"));
    }
    Ok(text)
}

fn role_words(grant: &Grant) -> Vec<&'static str> {
    let roles = [
        (grant.roles.publisher, "publisher"),
        (grant.roles.admin, "admin"),
    ];
    roles
        .iter()
        .filter(|(has, _)| *has)
        .map(|(_, word)| *word)
        .collect()
}

fn channel_words(grant: &Grant) -> Option<Vec<String>> {
    match &grant.channels {
        Channels::All => None,
        Channels::Only(channels) => Some(channels.iter().map(ToString::to_string).collect()),
    }
}

fn render_membership(membership: &Membership<'_>, style: Style) -> String {
    let roles = if membership.roles.is_empty() {
        "member".to_owned()
    } else {
        membership.roles.join(", ")
    };
    let channels = match &membership.channels {
        _ if !membership.roles.contains(&"publisher") => String::new(),
        None => "all channels".to_owned(),
        Some(channels) => channels.join(", "),
    };
    fields(
        style,
        &[
            ("fleet", membership.fleet.clone()),
            (
                "machine",
                format!(
                    "{} ({})",
                    membership.machine_name,
                    short(&membership.machine)
                ),
            ),
            ("home", shell_word(membership.home)),
            ("roles", roles),
            ("may publish to", channels),
            ("until", membership.expires.map(date).unwrap_or_default()),
            ("found at", membership.addresses.join(" ")),
        ],
    )
}

fn next_steps(membership: &Membership<'_>, output: Output, more: &str) {
    if output.json {
        return;
    }
    if membership.restart_needed {
        output::tell(format_args!(
            "{} the node that runs for this home still has its old membership: restart it",
            Style::stderr().yellow("note:")
        ));
    } else {
        let home = shell_word(membership.home);
        output.next(format_args!(
            "start the node with `capsule --home {home} node`; {more}"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_make_publishers_unless_members_were_asked_for() {
        let roles = |asked: &[Role], with_channels| {
            let granted = granted(asked, with_channels).ok();
            granted.map(|roles| (roles.publisher, roles.admin))
        };
        assert_eq!(roles(&[], false), Some((false, false)));
        assert_eq!(roles(&[], true), Some((true, false)));
        assert_eq!(roles(&[Role::Publisher], true), Some((true, false)));
        assert_eq!(roles(&[Role::Admin], true), Some((true, true)));
        assert_eq!(roles(&[Role::Member], false), Some((false, false)));
        assert_eq!(roles(&[Role::Member], true), None);
    }

    #[test]
    fn a_membership_shows_where_it_may_publish_only_if_it_may() {
        let mut membership = Membership {
            fleet: "aa".into(),
            machine: "bb".into(),
            machine_name: "pc".into(),
            home: Path::new("/h"),
            roles: Vec::new(),
            channels: Some(vec!["lab".into()]),
            expires: Some(0),
            addresses: Vec::new(),
            restart_needed: false,
        };
        let text = render_membership(&membership, Style::PLAIN);
        assert!(
            text.contains("roles    member\n") && !text.contains("lab"),
            "{text}"
        );
        membership.roles = vec!["publisher"];
        assert!(render_membership(&membership, Style::PLAIN).contains("may publish to  lab\n"));
    }
}
