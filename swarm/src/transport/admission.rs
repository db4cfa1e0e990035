//! Who is let in: the exchange of credentials inside the security upgrade, before anything is multiplexed.
//!
//! After TLS the dialler sends a greeting: its credential and the newest revocation record it knows. The listener checks
//! it and sends a verdict and, if that is welcome, a greeting of its own, which the dialler answers with its verdict.
//! Each is a big-endian `u32` of length and a message of `capsule_proto::wire`. So a stranger who dials learns nothing and never
//! reaches a protocol, and a member that is refused is told why.

use std::collections::HashSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use capsule_proto::credential::{Credential, CredentialError, FleetId, MachineId, Member};
use capsule_proto::wire::{Greeting, MAX_GREETING_LEN, PROTOCOL, Verdict, WireError};
use futures::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::PeerId;
use libp2p::identity::{PublicKey, ed25519};

use super::refusal::{AdmissionError, Refusal};
use crate::api::{Offer, RecordId, RecordStore};

/// Time for TLS and the exchange together: a slow link carries it in 5 s; a stranger who stays silent is gone soon.
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// Most members admitted whose connections the behaviour has not yet taken over: more than dials and accepts at once.
const MAX_ADMITTED: usize = 256;
/// Most machines refused for what they sent: 2 MiB. Beyond, any one of them may come back, and is refused again for its
/// next wrong byte.
const MAX_BANNED: usize = 1 << 14;
/// What a greeting says of the program.
const AGENT: &str = concat!("capsule/", env!("CARGO_PKG_VERSION"));

/// What a peer that was let in said of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// By its credential.
    pub member: Member,
    /// Label of its site, or empty.
    pub site: String,
}

/// Checks who may come in, and remembers who did until the behaviour asks.
pub struct Gatekeeper {
    fleet: FleetId,
    local: PeerId,
    credential: Vec<u8>,
    site: String,
    records: Arc<dyn RecordStore>,
    unix_time: Arc<dyn Fn() -> u64 + Send + Sync>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    banned: HashSet<PeerId>,
    /// In order of admission.
    admitted: Vec<(PeerId, Admitted)>,
    /// The revocation record seen last: mostly every peer brings the same.
    last_revocation: Option<RecordId>,
}

impl Gatekeeper {
    pub fn new(
        local: PeerId,
        credential: &Credential,
        records: Arc<dyn RecordStore>,
        unix_time: Arc<dyn Fn() -> u64 + Send + Sync>,
        site: String,
        banned: impl IntoIterator<Item = PeerId>,
    ) -> Self {
        let state = State {
            banned: banned.into_iter().take(MAX_BANNED).collect(),
            ..State::default()
        };
        Self {
            fleet: credential.fleet(),
            local,
            credential: credential.encode(),
            site,
            records,
            unix_time,
            state: Mutex::new(state),
        }
    }

    /// Refuses a peer from now on. `None` if it was refused already; else those that no longer are, for it.
    pub fn ban(&self, peer: PeerId) -> Option<Vec<PeerId>> {
        let banned = &mut self.lock().banned;
        if banned.contains(&peer) {
            return None;
        }
        let excess = (banned.len() + 1).saturating_sub(MAX_BANNED);
        let lifted: Vec<_> = banned.iter().take(excess).copied().collect();
        banned.retain(|other| !lifted.contains(other));
        banned.insert(peer);
        Some(lifted)
    }

    /// Refuses it no longer.
    pub fn unban(&self, peer: &PeerId) {
        self.lock().banned.remove(peer);
    }

    /// Whether the peer is refused for what it sent before.
    pub fn is_banned(&self, peer: &PeerId) -> bool {
        self.lock().banned.contains(peer)
    }

    /// What an admitted peer said of itself. Leaves it in place: two connections may race.
    pub fn admitted(&self, peer: &PeerId) -> Option<Admitted> {
        self.lock()
            .admitted
            .iter()
            .rev()
            .find(|(id, _)| id == peer)
            .map(|(_, admitted)| admitted.clone())
    }

    /// Which of these members no longer count, though they did when they were let in, and why.
    pub fn ended<'a, K>(
        &self,
        members: impl Iterator<Item = (K, &'a Member)>,
    ) -> Vec<(K, CredentialError)> {
        let (now, revoked) = ((self.unix_time)(), self.records.revoked());
        let why = |Member { machine, grant, .. }: &Member| {
            let expired = grant.expires;
            if now >= expired {
                return Some(CredentialError::Expired { expired, now });
            }
            let is_revoked =
                revoked.tokens.contains(&grant.id) || revoked.machines.contains(machine);
            is_revoked.then_some(CredentialError::Revoked(*machine))
        };
        members
            .filter_map(|(key, member)| Some((key, why(member)?)))
            .collect()
    }

    /// Runs the exchange on a connection whose other end proved to be `peer`.
    pub async fn admit<S>(
        self: &Arc<Self>,
        peer: PeerId,
        stream: &mut S,
        is_listener: bool,
    ) -> Result<(), AdmissionError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let admitted = if is_listener {
            let admitted = self.judge(peer, stream).await?;
            self.introduce_ourselves(stream).await?;
            read_verdict(stream).await?;
            admitted
        } else {
            self.introduce_ourselves(stream).await?;
            read_verdict(stream).await?;
            self.judge(peer, stream).await?
        };
        self.remember(peer, admitted);
        Ok(())
    }

    async fn introduce_ourselves(
        self: &Arc<Self>,
        stream: &mut (impl AsyncWrite + Unpin),
    ) -> Result<(), AdmissionError> {
        let keeper = self.clone();
        let greeting = blocking(move || keeper.greeting()).await;
        Ok(write_message(stream, &greeting.encode()).await?)
    }

    /// Reads the peer's greeting and tells it our verdict.
    async fn judge(
        self: &Arc<Self>,
        peer: PeerId,
        stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    ) -> Result<Admitted, AdmissionError> {
        let greeting = Greeting::decode(&read_message(stream).await?)?;
        let keeper = self.clone();
        let checked = blocking(move || keeper.check(peer, &greeting)).await;
        let verdict = Verdict(checked.as_ref().map(|_| ()).map_err(Refusal::to_string));
        write_message(stream, &verdict.encode()).await?;
        if checked.is_err() {
            // In good order, so that the verdict arrives.
            let _best_effort = stream.close().await;
        }
        checked.map_err(|refusal| AdmissionError::Refused { peer, refusal })
    }

    fn greeting(&self) -> Greeting {
        Greeting {
            protocol: PROTOCOL,
            credential: self.credential.clone(),
            revocation: self.records.revocation_head(),
            newest_time: (self.unix_time)(),
            agent: AGENT.to_owned(),
            site: self.site.clone(),
        }
    }

    fn check(&self, peer: PeerId, greeting: &Greeting) -> Result<Admitted, Refusal> {
        if greeting.protocol != PROTOCOL {
            return Err(Refusal::Version(greeting.protocol));
        }
        if peer == self.local {
            return Err(Refusal::Myself);
        }
        if self.is_banned(&peer) {
            return Err(Refusal::Banned);
        }
        let credential = Credential::decode(&greeting.credential).map_err(CredentialError::from)?;
        if peer_id_of(&credential.machine()) != Some(peer) {
            return Err(Refusal::OtherMachine);
        }
        if credential.fleet() != self.fleet {
            return Err(CredentialError::OtherFleet(credential.fleet()).into());
        }
        self.learn_revocation(greeting.revocation.as_deref());
        let member = credential.verify(&self.fleet, (self.unix_time)(), &self.records.revoked())?;
        let site = greeting.site.clone();
        Ok(Admitted { member, site })
    }

    /// Offers the peer's revocation record to our store; a bad one is the store's to reject, and changes nothing.
    fn learn_revocation(&self, record: Option<&[u8]>) {
        let Some(record) = record else { return };
        let id = RecordId(capsule_proto::RootHash::of(record));
        if self.lock().last_revocation != Some(id) {
            let offer = self.records.offer(record);
            tracing::debug!(?offer, "revocation record with a hello");
            // What could not be kept is worth another try with the next hello.
            if !matches!(offer, Offer::Later(_)) {
                self.lock().last_revocation = Some(id);
            }
        }
    }

    fn remember(&self, peer: PeerId, admitted: Admitted) {
        let all = &mut self.lock().admitted;
        all.retain(|(id, _)| *id != peer);
        if all.len() >= MAX_ADMITTED {
            all.remove(0);
        }
        all.push((peer, admitted));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The network identity of a machine; `None` if its bytes are no key.
pub fn peer_id_of(machine: &MachineId) -> Option<PeerId> {
    let key = ed25519::PublicKey::try_from_bytes(&machine.0).ok()?;
    Some(PublicKey::from(key).to_peer_id())
}

/// Signatures and the record store take their time: not on a thread that moves everybody's bytes.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

async fn read_verdict(stream: &mut (impl AsyncRead + Unpin)) -> Result<(), AdmissionError> {
    let Verdict(verdict) = Verdict::decode(&read_message(stream).await?)?;
    verdict.map_err(|reason| {
        AdmissionError::RefusedByPeer(reason.chars().filter(|c| !c.is_control()).collect())
    })
}

async fn write_message(stream: &mut (impl AsyncWrite + Unpin), message: &[u8]) -> io::Result<()> {
    stream
        .write_all(&(message.len() as u32).to_be_bytes())
        .await?;
    stream.write_all(message).await?;
    stream.flush().await
}

async fn read_message(stream: &mut (impl AsyncRead + Unpin)) -> Result<Vec<u8>, AdmissionError> {
    let mut len = [0; 4];
    stream.read_exact(&mut len).await?;
    let (value, bound) = (u32::from_be_bytes(len) as usize, MAX_GREETING_LEN);
    if value > bound {
        return Err(WireError::TooLong {
            what: "greeting",
            value,
            bound,
        }
        .into());
    }
    let mut message = vec![0; value];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

#[cfg(test)]
mod tests {
    use capsule_proto::credential::{
        Channels, FleetKey, Grant, MachineKey, Revoked, Roles, TokenId,
    };
    use futures::executor::block_on;
    use futures::io::Cursor;

    use super::*;

    struct NoRecords;

    impl RecordStore for NoRecords {
        fn ids(&self) -> Vec<RecordId> {
            Vec::new()
        }
        fn get(&self, _id: &RecordId) -> Option<Vec<u8>> {
            None
        }
        fn offer(&self, _bytes: &[u8]) -> Offer {
            Offer::Rejected("a test's store takes none".into())
        }
        fn revocation_head(&self) -> Option<Vec<u8>> {
            None
        }
        fn revoked(&self) -> Revoked {
            Revoked::default()
        }
    }

    fn credential(machine: u8) -> (PeerId, Credential) {
        let machine = MachineKey::from_secret([machine; 32]).machine();
        let (id, roles, channels) = (TokenId([1; 8]), Roles::default(), Channels::All);
        let grant = Grant {
            id,
            roles,
            channels,
            issued: 1,
            expires: 100,
        };
        let token = FleetKey::from_secret([9; 32]).invite(grant, [8; 32], &[]);
        (peer_id_of(&machine).unwrap(), token.enrol(machine, "pc", 1))
    }

    fn keeper() -> Gatekeeper {
        let (local, credential) = credential(1);
        Gatekeeper::new(
            local,
            &credential,
            Arc::new(NoRecords),
            Arc::new(|| 50),
            String::new(),
            [],
        )
    }

    fn greeting(credential: &Credential) -> Greeting {
        Greeting {
            protocol: PROTOCOL,
            credential: credential.encode(),
            revocation: None,
            newest_time: 0,
            agent: String::new(),
            site: String::new(),
        }
    }

    #[test]
    fn every_reason_to_refuse_is_found() {
        let keeper = keeper();
        let (peer, credential_of_peer) = credential(2);
        let good = greeting(&credential_of_peer);
        assert_eq!(keeper.check(peer, &good).unwrap().member.name, "pc");
        // A revocation that the store rejects changes nothing.
        let revocation = Some(b"no record".to_vec());
        assert!(
            keeper
                .check(
                    peer,
                    &Greeting {
                        revocation,
                        ..good.clone()
                    }
                )
                .is_ok()
        );
        let refusal = |peer, greeting: &Greeting| keeper.check(peer, greeting).unwrap_err();
        let newer = Greeting {
            protocol: PROTOCOL + 1,
            ..good.clone()
        };
        assert!(matches!(refusal(peer, &newer), Refusal::Version(_)));
        let malformed = Greeting {
            credential: b"nothing".to_vec(),
            ..good.clone()
        };
        assert!(matches!(
            refusal(peer, &malformed),
            Refusal::Credential(CredentialError::Malformed(_))
        ));
        assert!(matches!(
            refusal(PeerId::random(), &good),
            Refusal::OtherMachine
        ));
        assert!(matches!(refusal(keeper.local, &good), Refusal::Myself));
        assert_eq!(keeper.ban(peer), Some(Vec::new()));
        assert_eq!(keeper.ban(peer), None);
        assert!(matches!(refusal(peer, &good), Refusal::Banned));
        keeper.unban(&peer);
        assert!(keeper.check(peer, &good).is_ok());
    }

    #[test]
    fn messages_beyond_their_bound_are_not_read() {
        let read = |bytes: &[u8]| block_on(read_message(&mut Cursor::new(bytes))).map_err(Box::new);
        let long = (MAX_GREETING_LEN as u32 + 1).to_be_bytes();
        assert!(matches!(
            read(&long),
            Err(error) if matches!(*error, AdmissionError::Malformed(WireError::TooLong { .. }))
        ));
        assert!(
            matches!(read(&[0, 0, 0, 9, 1]), Err(error) if matches!(*error, AdmissionError::Io(_)))
        );
        assert_eq!(read(&[0, 0, 0, 1, 7]).unwrap(), [7]);
    }

    #[test]
    fn a_refusal_is_passed_on_without_control_characters() {
        let verdict = Verdict(Err("no\u{1b}[31m".into())).encode();
        let message = [&(verdict.len() as u32).to_be_bytes()[..], &verdict].concat();
        let error = block_on(read_verdict(&mut Cursor::new(message))).unwrap_err();
        assert_eq!(error.to_string(), "the peer refused us: no[31m");
    }

    #[test]
    fn the_banned_are_bounded_and_the_newest_is_among_them() {
        let keeper = keeper();
        let mut lifted = 0;
        for _ in 0..MAX_BANNED + 10 {
            let peer = PeerId::random();
            let others = keeper.ban(peer).unwrap();
            assert!(keeper.is_banned(&peer));
            assert!(others.iter().all(|other| !keeper.is_banned(other)));
            lifted += others.len();
        }
        assert_eq!((keeper.lock().banned.len(), lifted), (MAX_BANNED, 10));
    }

    #[test]
    fn members_remembered_are_bounded() {
        let keeper = keeper();
        let member = keeper
            .check(credential(2).0, &greeting(&credential(2).1))
            .unwrap();
        let peers: Vec<_> = (0..=MAX_ADMITTED).map(|_| PeerId::random()).collect();
        peers
            .iter()
            .for_each(|peer| keeper.remember(*peer, member.clone()));
        assert_eq!(keeper.admitted(&peers[0]), None);
        assert_eq!(keeper.admitted(&peers[MAX_ADMITTED]), Some(member));
    }
}
