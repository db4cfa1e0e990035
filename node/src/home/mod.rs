//! The node's directory: keys, credential, settings, and where the rest lies.
//!
//! | file | what | mode |
//! |---|---|---|
//! | `home.json` | format of the directory; settings that people edit | 0600 |
//! | `machine.key` | the machine's secret, 64 hex digits | 0600 |
//! | `fleet.key` | the fleet's root secret, where this home did `fleet init`; an older fleet's: `fleet-ID.key` | 0600 |
//! | `membership.json` | credential, and addresses of the fleet from the token | 0600 |
//! | `listening.json` | addresses that the node listened on last, for `fleet invite` | 0600 |
//! | `rates.json` | caps of rates, once `capsule rates` has set any | 0600 |
//! | `store/` | blobs and database (`crate::store`) | 0700 |
//! | `machines/` | machines, a directory each (`crate::machine`) | 0700 |
//! | `control.sock` | the control socket (`socket`) | 0600 |
//!
//! Every file is written whole, beside its place, synced and renamed: a crash leaves the old one or the new one. Joining
//! a fleet lives in `fleet`, what people write in `address` and `expiry`. Nothing here talks to the network or a daemon.
//! For people: `node/docs/home.md`.

mod address;
mod expiry;
mod files;
mod fleet;
mod rates;
mod settings;
pub mod socket;

use std::path::{Path, PathBuf};

use capsule_proto::credential::{
    Credential, CredentialError, FleetId, FleetKey, MachineKey, TokenError,
};
use thiserror::Error;

pub use address::check_address;
pub use expiry::{DEFAULT_EXPIRY, ExpiryError, parse_expiry};
pub use files::Fault;
pub(crate) use files::{Mode, make_private_dir, read_json, write_json};
pub use fleet::{Entropy, Founded, Invitation, InviteOptions, JoinOptions, Joined, system_entropy};
pub use rates::Rates;
pub use settings::{DEFAULT_LISTEN, Membership, Settings};

use files::read_secret;
use settings::Listening;

const HOME_FILE: &str = "home.json";
const MACHINE_KEY: &str = "machine.key";
const FLEET_KEY: &str = "fleet.key";
const MEMBERSHIP: &str = "membership.json";
const LISTENING: &str = "listening.json";
const RATES: &str = "rates.json";
const STORE: &str = "store";
const MACHINES: &str = "machines";

// What to do where one of them is damaged.
const CORRECT_SETTINGS: &str = "correct that, or move the file away to have the defaults";
const FORGET_LISTENING: &str = "remove it; the node writes it again when it starts";
const CORRECT_RATES: &str = "correct that, or remove it and set them anew with `capsule rates`";
const RENEW_MEMBERSHIP: &str =
    "restore it from a backup, or join again with `capsule join --force TOKEN`";
const RENEW_MACHINE: &str = "restore it from a backup, or remove it and join again, as a new machine, with \
                             `capsule join --force TOKEN`";
const RESTORE_ROOT: &str = "restore it from a backup; it cannot be made again";

/// A home directory, which need not exist yet.
#[derive(Debug, Clone)]
pub struct Home {
    dir: PathBuf,
}

/// Who this machine is in its fleet.
pub struct Identity {
    /// The machine's key pair.
    pub machine: MachineKey,
    /// The chain root -> token -> machine.
    pub credential: Credential,
    /// Where the token says that the fleet is found.
    pub addresses: Vec<String>,
}

/// Why the home could not be used.
#[derive(Debug, Error)]
pub enum HomeError {
    /// No directory was given, and there is no usual one.
    #[error("there is no home directory: set CAPSULE_HOME, or use --home DIR")]
    Nowhere,
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] Fault),
    /// The directory was made by a newer version.
    #[error("{} was made by a newer capsule (format {found}; this one knows {known}): use that one", .dir.display())]
    Newer {
        /// The directory.
        dir: PathBuf,
        /// Its format.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// The home belongs to no fleet.
    #[error("{} belongs to no fleet: make one with `capsule fleet init`, or join one with `capsule join TOKEN`", .dir.display())]
    NotAMember {
        /// The directory.
        dir: PathBuf,
    },
    /// The home belongs to a fleet already.
    #[error("{} belongs to fleet {fleet} already: use another --home, or --force to replace its membership (its root key, if it holds one, is kept in a file of its own)", .dir.display())]
    AlreadyAMember {
        /// The directory.
        dir: PathBuf,
        /// That fleet.
        fleet: FleetId,
    },
    /// Only the home of `fleet init` has the root key.
    #[error("{} does not hold the fleet's root key: invite from the home where `capsule fleet init` was run", .dir.display())]
    NoRootKey {
        /// The directory.
        dir: PathBuf,
    },
    /// The credential is not for this machine's key.
    #[error("the credential in {} is not for its machine.key: join again with a token (`capsule join --force TOKEN`)", .dir.display())]
    WrongKey {
        /// The directory.
        dir: PathBuf,
    },
    /// The token cannot be used.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The credential cannot be used.
    #[error(transparent)]
    Credential(#[from] CredentialError),
    /// An address that is neither HOST:PORT nor a multiaddr.
    #[error(
        "{0:?} is not an address: give HOST:PORT, [IPV6]:PORT, or a multiaddr such as /ip4/10.0.0.1/tcp/4277"
    )]
    Address(String),
    /// More than fits in a token.
    #[error("a token holds at most {limit} {what}: give fewer")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
}

impl Home {
    /// The home in a directory.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The directory where the user names none: `CAPSULE_HOME`, or `capsule` in the user's data directory.
    pub fn default_dir() -> Result<PathBuf, HomeError> {
        let set = |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        set("CAPSULE_HOME")
            .or_else(|| {
                set("XDG_DATA_HOME")
                    .filter(|dir| dir.is_absolute())
                    .map(|dir| dir.join("capsule"))
            })
            .or_else(|| set("HOME").map(|dir| dir.join(".local/share/capsule")))
            .ok_or(HomeError::Nowhere)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the store lies.
    pub fn store_dir(&self) -> PathBuf {
        self.dir.join(STORE)
    }

    /// Where machines lie, a directory each.
    pub fn machines_dir(&self) -> PathBuf {
        self.dir.join(MACHINES)
    }

    /// Whether a daemon answers for this home.
    pub fn has_daemon(&self) -> bool {
        std::os::unix::net::UnixStream::connect(socket::find(&self.dir)).is_ok()
    }

    /// The settings; the defaults where there are none.
    pub fn settings(&self) -> Result<Settings, HomeError> {
        let settings: Settings =
            read_json(&self.path(HOME_FILE), CORRECT_SETTINGS)?.unwrap_or_default();
        if settings.format > Settings::FORMAT {
            let (dir, known) = (self.dir.clone(), Settings::FORMAT);
            return Err(HomeError::Newer {
                dir,
                found: settings.format,
                known,
            });
        }
        Ok(settings)
    }

    /// Who this machine is.
    pub fn identity(&self) -> Result<Identity, HomeError> {
        self.settings()?;
        let dir = || self.dir.clone();
        let membership = self
            .membership()?
            .ok_or_else(|| HomeError::NotAMember { dir: dir() })?;
        let machine = self
            .known_machine_key()?
            .ok_or_else(|| HomeError::WrongKey { dir: dir() })?;
        let Membership {
            credential,
            addresses,
        } = membership;
        if credential.machine() != machine.machine() {
            return Err(HomeError::WrongKey { dir: dir() });
        }
        Ok(Identity {
            machine,
            credential,
            addresses,
        })
    }

    /// Notes where the node listens, for invitations.
    pub fn save_listening(&self, addresses: &[String]) -> Result<(), HomeError> {
        Ok(write_json(
            &self.path(LISTENING),
            &Listening {
                addresses: addresses.to_vec(),
            },
            Mode::Private,
        )?)
    }

    /// Where the node listened last.
    pub fn listening(&self) -> Result<Vec<String>, HomeError> {
        let listening: Listening =
            read_json(&self.path(LISTENING), FORGET_LISTENING)?.unwrap_or_default();
        Ok(listening.addresses)
    }

    /// Caps of rates; none where none were set.
    pub fn rates(&self) -> Result<Rates, HomeError> {
        Ok(read_json(&self.path(RATES), CORRECT_RATES)?.unwrap_or_default())
    }

    /// Keeps caps of rates.
    pub fn save_rates(&self, rates: &Rates) -> Result<(), HomeError> {
        Ok(write_json(&self.path(RATES), rates, Mode::Private)?)
    }

    fn membership(&self) -> Result<Option<Membership>, HomeError> {
        Ok(read_json(&self.path(MEMBERSHIP), RENEW_MEMBERSHIP)?)
    }

    fn known_machine_key(&self) -> Result<Option<MachineKey>, HomeError> {
        let secret = read_secret(&self.path(MACHINE_KEY), RENEW_MACHINE)?;
        Ok(secret.map(MachineKey::from_secret))
    }

    fn fleet_key(&self) -> Result<Option<FleetKey>, HomeError> {
        let root = read_secret(&self.path(FLEET_KEY), RESTORE_ROOT)?;
        Ok(root.map(FleetKey::from_secret))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes the directory and that of the store, private, with the settings.
    fn make(&self) -> Result<(), HomeError> {
        files::make_private_dir(&self.dir)?;
        files::make_private_dir(&self.store_dir())?;
        if !self.path(HOME_FILE).exists() {
            write_json(&self.path(HOME_FILE), &Settings::default(), Mode::Private)?;
        }
        Ok(())
    }
}
