//! TLS 1.3 with libp2p's certificate extension, and our choice of ciphers.
//!
//! `libp2p-tls` itself puts ChaCha20 first, which costs half as much CPU again where the processor has AES; its
//! certificates are made and read by its public functions, so that the peer's identity means what the libp2p TLS
//! specification says (<https://github.com/libp2p/specs/blob/master/tls/tls.md>). Nothing here knows of
//! fleets: whoever proves any identity gets through, and meets `admission` next.

use std::sync::Arc;

use futures_rustls::{TlsAcceptor, TlsConnector};
use libp2p::PeerId;
use libp2p::identity::Keypair;
use libp2p_tls::certificate;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::cipher_suite::{
    TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, CommonState, DigitallySignedStruct, DistinguishedName, Error,
    SignatureScheme, SupportedCipherSuite,
};

/// Tells our connections from any other TLS; a new version of the admission exchange gets a new one.
const ALPN: &[u8] = b"/capsule/tls/1";

/// Both ends' TLS configuration under one identity.
#[derive(Clone)]
pub struct Tls {
    pub acceptor: TlsAcceptor,
    pub connector: TlsConnector,
}

impl Tls {
    /// Makes a certificate for this run, certified by the identity.
    pub fn new(identity: &Keypair) -> Result<Self, String> {
        let (certificate, key) = certificate::generate(identity).map_err(|e| e.to_string())?;
        let provider = Arc::new(CryptoProvider {
            cipher_suites: cipher_suites(),
            ..rustls::crypto::ring::default_provider()
        });
        // Set up as a resolver: the direct way would refuse the libp2p extension, which is marked critical.
        let key = provider
            .key_provider
            .load_private_key(key)
            .map_err(|e| e.to_string())?;
        let certified = Arc::new(SingleCertAndKey::from(CertifiedKey::new(
            vec![certificate],
            key,
        )));
        let mut server = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| e.to_string())?
            .with_client_cert_verifier(Arc::new(IdentityVerifier))
            .with_cert_resolver(certified.clone());
        let mut client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| e.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(IdentityVerifier))
            .with_client_cert_resolver(certified);
        server.alpn_protocols = vec![ALPN.to_vec()];
        client.alpn_protocols = vec![ALPN.to_vec()];
        // Connections live long, so tickets would only cost memory and a flight of messages.
        server.send_tls13_tickets = 0;
        client.resumption = rustls::client::Resumption::disabled();
        client.enable_sni = false;
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(server)),
            connector: TlsConnector::from(Arc::new(client)),
        })
    }
}

/// The name that the client must give to rustls; with SNI off it is never sent (the specification forbids it).
pub fn no_server_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::IpAddr::from([0, 0, 0, 0]).into())
}

/// The identity that the other end of an established connection proved.
pub fn peer_id(state: &CommonState) -> Result<PeerId, Error> {
    match state.peer_certificates() {
        Some([certificate]) => identity_of(certificate),
        _ => Err(Error::NoCertificatesPresented),
    }
}

/// Ciphers in the order of what they cost on this processor; the server's order decides.
fn cipher_suites() -> Vec<SupportedCipherSuite> {
    let (aes_128, aes_256) = (TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384);
    let chacha = TLS13_CHACHA20_POLY1305_SHA256;
    if has_aes() {
        vec![aes_128, aes_256, chacha]
    } else {
        vec![chacha, aes_128, aes_256]
    }
}

#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
fn has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq")
}

#[cfg(target_arch = "aarch64")]
fn has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes")
        && std::arch::is_aarch64_feature_detected!("pmull")
}

#[cfg(not(any(target_arch = "x86", target_arch = "x86_64", target_arch = "aarch64")))]
fn has_aes() -> bool {
    false
}

fn identity_of(certificate: &CertificateDer<'_>) -> Result<PeerId, Error> {
    Ok(certificate::parse(certificate)?.peer_id())
}

/// Accepts any single self-signed certificate whose libp2p extension proves an identity.
#[derive(Debug)]
struct IdentityVerifier;

impl IdentityVerifier {
    fn check(
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<(), Error> {
        if !intermediates.is_empty() {
            return Err(Error::InvalidCertificate(CertificateError::BadEncoding));
        }
        identity_of(end_entity).map(|_| ())
    }

    fn check_signature(
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        certificate::parse(certificate)?.verify_signature(
            signed.scheme,
            message,
            signed.signature(),
        )?;
        Ok(HandshakeSignatureValid::assertion())
    }

    /// What `libp2p-tls` makes (P-256) and what else its specification allows.
    fn schemes() -> Vec<SignatureScheme> {
        vec![
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::ECDSA_NISTP384_SHA384,
            SignatureScheme::ED25519,
        ]
    }
}

impl ServerCertVerifier for IdentityVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Self::check(end_entity, intermediates).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not offered".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}

impl ClientCertVerifier for IdentityVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Self::check(end_entity, intermediates).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not offered".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}
