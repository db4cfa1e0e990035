//! Founding a fleet, inviting into it, joining it: work on the home alone, without a daemon.
//!
//! A daemon that runs meanwhile goes on with the membership that it started with; the answers say so.

use capsule_proto::credential::{
    Channels, FleetId, FleetKey, Grant, MAX_ADDRESSES, MAX_CHANNELS, MachineId, MachineKey, Roles,
    Token, TokenId,
};
use capsule_proto::name::Channel;

use super::address::check_address;
use super::files::{Mode, write_json, write_secret};
use super::settings::Membership;
use super::{FLEET_KEY, Home, HomeError, MACHINE_KEY, MEMBERSHIP};

/// How long the founder's own credential holds: it cannot be renewed without the root key, which lies beside it anyway.
const FOUNDER_EXPIRY: u64 = 100 * 365 * 24 * 3600;

/// What fills secrets: the system's randomness, or a test's.
pub type Entropy<'a> = &'a mut dyn FnMut(&mut [u8]);

/// How to join.
#[derive(Debug, Clone, Default)]
pub struct JoinOptions {
    /// Name of this machine, for people; the host's where absent.
    pub machine_name: Option<String>,
    /// Replaces a membership that there is.
    pub force: bool,
}

/// A new fleet.
#[derive(Debug, Clone)]
pub struct Founded {
    /// The fleet.
    pub fleet: FleetId,
    /// This machine.
    pub machine: MachineId,
    /// The name that it goes by.
    pub machine_name: String,
    /// A daemon runs, and must be restarted.
    pub restart_needed: bool,
}

/// What an invitation grants.
#[derive(Debug, Clone)]
pub struct InviteOptions {
    /// What its machines may do beyond fetching and serving.
    pub roles: Roles,
    /// Channels that they may publish to, if they are publishers; empty: all.
    pub channels: Vec<Channel>,
    /// When it ends, with all credentials made of it: seconds since 1970.
    pub expires: u64,
    /// Where the fleet is found; empty: where this node listened last.
    pub addresses: Vec<String>,
}

/// A token to be given away.
#[derive(Debug, Clone)]
pub struct Invitation {
    /// Its text: the one thing to print.
    pub token: String,
    /// By which it is revoked.
    pub id: TokenId,
    /// The addresses in it; none: machines find the fleet on their LAN only, which is worth a warning.
    pub addresses: Vec<String>,
}

/// A membership taken up.
#[derive(Debug, Clone)]
pub struct Joined {
    /// The fleet.
    pub fleet: FleetId,
    /// This machine.
    pub machine: MachineId,
    /// The name that it goes by.
    pub machine_name: String,
    /// What the token grants.
    pub grant: Grant,
    /// Where the fleet is found.
    pub addresses: Vec<String>,
    /// A daemon runs, and must be restarted.
    pub restart_needed: bool,
}

/// Fills a buffer from the operating system's generator.
pub fn system_entropy(buffer: &mut [u8]) {
    rand::fill(buffer);
}

impl Home {
    /// Makes a fleet: its root key lies here, and this machine becomes a member with all roles.
    pub fn init_fleet(
        &self,
        options: &JoinOptions,
        now: u64,
        entropy: Entropy<'_>,
    ) -> Result<Founded, HomeError> {
        self.refuse_membership(options.force)?;
        self.make()?;
        let machine = self.machine_key(entropy)?;
        let root = FleetKey::from_secret(secret(entropy));
        self.keep_old_root()?;
        let grant = Grant {
            id: token_id(entropy),
            roles: Roles {
                publisher: true,
                admin: true,
            },
            channels: Channels::All,
            issued: now,
            expires: now + FOUNDER_EXPIRY,
        };
        let token = root.invite(grant, secret(entropy), &[]);
        // The root key first: a membership without it would be a fleet that nobody can invite to.
        write_secret(&self.path(FLEET_KEY), &root.secret())?;
        let machine_name = self.enrol(&token, &machine, options, now)?;
        Ok(Founded {
            fleet: root.fleet(),
            machine: machine.machine(),
            machine_name,
            restart_needed: self.has_daemon(),
        })
    }

    /// Makes a token.
    pub fn invite(
        &self,
        options: &InviteOptions,
        now: u64,
        entropy: Entropy<'_>,
    ) -> Result<Invitation, HomeError> {
        let dir = || self.dir.clone();
        let membership = self
            .membership()?
            .ok_or_else(|| HomeError::NotAMember { dir: dir() })?;
        let root = self
            .fleet_key()?
            .filter(|root| root.fleet() == membership.credential.fleet());
        let root = root.ok_or_else(|| HomeError::NoRootKey { dir: dir() })?;
        if options.channels.len() > MAX_CHANNELS {
            return Err(HomeError::TooMany {
                what: "channels",
                limit: MAX_CHANNELS,
            });
        }
        let addresses = if options.addresses.is_empty() {
            self.listening()?
        } else {
            options.addresses.clone()
        };
        let addresses: Vec<String> = if options.addresses.is_empty() {
            addresses.into_iter().take(MAX_ADDRESSES).collect()
        } else if addresses.len() > MAX_ADDRESSES {
            return Err(HomeError::TooMany {
                what: "addresses",
                limit: MAX_ADDRESSES,
            });
        } else {
            addresses
        };
        addresses.iter().try_for_each(|text| check_address(text))?;
        let channels = if options.channels.is_empty() {
            Channels::All
        } else {
            Channels::only(options.channels.clone())
        };
        let id = token_id(entropy);
        let grant = Grant {
            id,
            roles: options.roles,
            channels,
            issued: now,
            expires: options.expires,
        };
        let token = root.invite(grant, secret(entropy), &addresses);
        Ok(Invitation {
            token: token.to_string(),
            id,
            addresses,
        })
    }

    /// Takes up membership with a token.
    pub fn join(
        &self,
        token: &str,
        options: &JoinOptions,
        now: u64,
        entropy: Entropy<'_>,
    ) -> Result<Joined, HomeError> {
        // The token first: a mistyped one is the likelier fault.
        let token = Token::parse(token, now)?;
        self.refuse_membership(options.force)?;
        self.make()?;
        let machine = self.machine_key(entropy)?;
        if self
            .fleet_key()?
            .is_some_and(|root| root.fleet() != token.fleet())
        {
            self.keep_old_root()?;
        }
        let machine_name = self.enrol(&token, &machine, options, now)?;
        Ok(Joined {
            fleet: token.fleet(),
            machine: machine.machine(),
            machine_name,
            grant: token.grant().clone(),
            addresses: token.addresses().to_vec(),
            restart_needed: self.has_daemon(),
        })
    }

    fn refuse_membership(&self, force: bool) -> Result<(), HomeError> {
        self.settings()?;
        if force {
            return Ok(());
        }
        match self.membership()? {
            Some(known) => Err(HomeError::AlreadyAMember {
                dir: self.dir.clone(),
                fleet: known.credential.fleet(),
            }),
            None => Ok(()),
        }
    }

    /// Takes up membership; the name that the machine goes by.
    fn enrol(
        &self,
        token: &Token,
        machine: &MachineKey,
        options: &JoinOptions,
        now: u64,
    ) -> Result<String, HomeError> {
        let name = options.machine_name.clone().unwrap_or_else(host_name);
        let credential = token.enrol(machine.machine(), &name, now);
        let member = credential.verify(&token.fleet(), now, &Default::default())?;
        let membership = Membership {
            credential,
            addresses: token.addresses().to_vec(),
        };
        write_json(&self.path(MEMBERSHIP), &membership, Mode::Private)?;
        Ok(member.name)
    }

    /// The machine's key, made where there is none; a machine keeps it for all fleets.
    fn machine_key(&self, entropy: Entropy<'_>) -> Result<MachineKey, HomeError> {
        if let Some(known) = self.known_machine_key()? {
            return Ok(known);
        }
        let new = secret(entropy);
        write_secret(&self.path(MACHINE_KEY), &new)?;
        Ok(MachineKey::from_secret(new))
    }

    /// Gives an older fleet's root key a name of its own: it must never be lost by an option.
    fn keep_old_root(&self) -> Result<(), HomeError> {
        let Some(old) = self.fleet_key()? else {
            return Ok(());
        };
        let name = format!("fleet-{}.key", &old.fleet().to_string()[..16]);
        write_secret(&self.path(&name), &old.secret())?;
        std::fs::remove_file(self.path(FLEET_KEY)).map_err(|source| {
            HomeError::File(super::Fault::Io {
                doing: "removing",
                path: self.path(FLEET_KEY),
                source,
            })
        })
    }
}

fn secret(entropy: Entropy<'_>) -> [u8; 32] {
    let mut bytes = [0; 32];
    entropy(&mut bytes);
    bytes
}

fn token_id(entropy: Entropy<'_>) -> TokenId {
    let mut bytes = [0; 8];
    entropy(&mut bytes);
    TokenId(bytes)
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() {
        "machine".into()
    } else {
        name.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts up: every secret differs.
    fn counter() -> impl FnMut(&mut [u8]) {
        let mut next = 0u8;
        move |buffer| {
            next += 1;
            buffer.fill(next);
        }
    }

    fn options(addresses: &[&str]) -> InviteOptions {
        InviteOptions {
            roles: Roles::default(),
            channels: Vec::new(),
            expires: 1000,
            addresses: addresses.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn a_fleet_is_founded_invited_to_and_joined() {
        let temp = tempfile::tempdir().unwrap();
        let mut entropy = counter();
        let founder = Home::new(temp.path().join("a"));
        assert!(matches!(
            founder.identity(),
            Err(HomeError::NotAMember { .. })
        ));
        let founded = founder
            .init_fleet(&JoinOptions::default(), 10, &mut entropy)
            .unwrap();
        let identity = founder.identity().unwrap();
        assert!(
            identity.credential.grant().roles.admin && identity.credential.fleet() == founded.fleet
        );
        founder.save_listening(&["10.0.0.1:4277".into()]).unwrap();
        let invitation = founder.invite(&options(&[]), 20, &mut entropy).unwrap();
        assert_eq!(invitation.addresses, ["10.0.0.1:4277"]);

        let other = Home::new(temp.path().join("b"));
        let joined = other
            .join(&invitation.token, &JoinOptions::default(), 30, &mut entropy)
            .unwrap();
        assert_eq!(
            (joined.fleet, &joined.addresses[..]),
            (founded.fleet, &["10.0.0.1:4277".to_string()][..])
        );
        assert_eq!(
            other.identity().unwrap().credential.grant().id,
            invitation.id
        );
        assert!(matches!(
            other.invite(&options(&[]), 30, &mut entropy),
            Err(HomeError::NoRootKey { .. })
        ));
        assert!(matches!(
            Home::new(temp.path().join("c")).join(
                &invitation.token,
                &JoinOptions::default(),
                1000,
                &mut entropy
            ),
            Err(HomeError::Token(_))
        ));
    }

    #[test]
    fn nothing_is_overwritten_silently_and_root_keys_never() {
        let temp = tempfile::tempdir().unwrap();
        let mut entropy = counter();
        let (a, b) = (
            Home::new(temp.path().join("a")),
            Home::new(temp.path().join("b")),
        );
        let first = a
            .init_fleet(&JoinOptions::default(), 10, &mut entropy)
            .unwrap();
        b.init_fleet(&JoinOptions::default(), 10, &mut entropy)
            .unwrap();
        let token = b
            .invite(&options(&["lab.example:4277"]), 20, &mut entropy)
            .unwrap()
            .token;
        let again = a.join(&token, &JoinOptions::default(), 30, &mut entropy);
        assert!(
            matches!(again, Err(HomeError::AlreadyAMember { fleet, .. }) if fleet == first.fleet)
        );
        assert!(matches!(
            a.init_fleet(&JoinOptions::default(), 30, &mut entropy),
            Err(HomeError::AlreadyAMember { .. })
        ));
        let key = std::fs::read(a.path(FLEET_KEY)).unwrap();
        let force = JoinOptions {
            force: true,
            machine_name: Some("pc".into()),
        };
        let joined = a.join(&token, &force, 30, &mut entropy).unwrap();
        assert_eq!(joined.machine, first.machine, "a machine keeps its key");
        assert!(matches!(
            a.invite(&options(&[]), 40, &mut entropy),
            Err(HomeError::NoRootKey { .. })
        ));
        let kept = a.path(&format!("fleet-{}.key", &first.fleet.to_string()[..16]));
        assert_eq!(std::fs::read(kept).unwrap(), key);
    }
}
