//! A node's certificate and key, and the TLS rules made from them.
//!
//! TLS 1.3 only, both sides show a certificate of the cluster's authority, no session resumption: every connection
//! proves anew who is there.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    AlertDescription, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::ticket::{Digest, sha256};
use crate::{WireError, join};

/// Certificate, key and authority of one node, ready for TLS.
#[derive(Clone)]
pub struct Identity {
    node: u16,
    issued_ms: u64,
    pub(crate) client: Arc<ClientConfig>,
    /// For a program that talks to whichever member answers.
    pub(crate) any_member: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
    /// For nodes that have no certificate yet, see [`crate::join`].
    pub(crate) joining: Arc<ServerConfig>,
    authority: Digest,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Identity {
    /// Takes certificate, key and authority from PEM texts.
    pub fn from_pem(cert_pem: &str, key_pem: &str, ca_pem: &str) -> Result<Self, WireError> {
        let chain = certificates("certificate", cert_pem)?;
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|error| bad(format!("private key: {error}")))?;
        let leaf = chain.first().ok_or_else(|| bad("the certificate file holds none"))?;
        let Certified { node, issued_ms } = certified(leaf)?;
        let authorities = certificates("authority", ca_pem)?;
        let authority = authorities
            .first()
            .map(|ca| sha256(ca))
            .ok_or_else(|| bad("the authority file holds no certificate"))?;
        let joining = joining_config([chain.clone(), authorities.clone()].concat(), key.clone_key())?;
        let mut roots = RootCertStore::empty();
        for ca in authorities {
            roots.add(ca).map_err(|error| bad(format!("authority: {error}")))?;
        }
        let roots = Arc::new(roots);
        let client = client_config(&roots, chain.clone(), key.clone_key())?;
        let mut any_member = client.clone();
        any_member.dangerous().set_certificate_verifier(Arc::new(AnyMember::of(&roots)?));
        let server = server_config(roots, chain, key)?;
        Ok(Self {
            node,
            issued_ms,
            client: Arc::new(client),
            any_member: Arc::new(any_member),
            server: Arc::new(server),
            joining: Arc::new(joining),
            authority,
        })
    }

    /// Reads certificate, key and authority from PEM files.
    pub fn load(cert: &Path, key: &Path, ca: &Path) -> Result<Self, WireError> {
        let read = |path: &Path| {
            std::fs::read_to_string(path)
                .map_err(|error| WireError::io(format!("read {}", path.display()), error))
        };
        Self::from_pem(&read(cert)?, &read(key)?, &read(ca)?)
    }

    /// Node that the certificate names.
    #[must_use]
    pub fn node(&self) -> u16 {
        self.node
    }

    /// When the certificate was issued, in ms since 1970; 0 when it does not say.
    #[must_use]
    pub fn issued_ms(&self) -> u64 {
        self.issued_ms
    }

    /// Digest of the authority's certificate, for join tokens.
    #[must_use]
    pub fn authority(&self) -> Digest {
        self.authority
    }
}

fn certificates(what: &str, pem: &str) -> Result<Vec<CertificateDer<'static>>, WireError> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| bad(format!("{what}: {error}")))
}

fn client_config(
    roots: &Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig, WireError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| bad(error.to_string()))?
        .with_root_certificates(Arc::clone(roots))
        .with_client_auth_cert(chain, key)
        .map_err(|error| bad(error.to_string()))?;
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn server_config(
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, WireError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
        .build()
        .map_err(|error| bad(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| bad(error.to_string()))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|error| bad(error.to_string()))?;
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// The server's side towards nodes that want to join: they have nothing to show yet but a secret, later.
fn joining_config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, WireError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| bad(error.to_string()))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| bad(error.to_string()))?;
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![join::ALPN.to_vec()];
    Ok(config)
}

/// Takes whoever has a certificate of the authority: what TLS checks it for is the name that it gives itself.
#[derive(Debug)]
struct AnyMember(Arc<WebPkiServerVerifier>);

impl AnyMember {
    fn of(roots: &Arc<RootCertStore>) -> Result<Self, WireError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::clone(roots), provider).build();
        verifier.map(Self).map_err(|error| bad(error.to_string()))
    }
}

impl ServerCertVerifier for AnyMember {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let unnamed = rustls::Error::InvalidCertificate(rustls::CertificateError::NotValidForName);
        let node = certified(end_entity).map_err(|_| unnamed.clone())?.node;
        let name = ServerName::try_from(crate::authority::node_name(node)).map_err(|_| unnamed)?;
        self.0.verify_server_cert(end_entity, intermediates, &name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// What a certificate says of its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Certified {
    pub(crate) node: u16,
    /// When it was issued, in ms since 1970; 0 when it does not say.
    pub(crate) issued_ms: u64,
}

/// Node in the common name `node-<id>`, and the date. The certificate's signature has been checked by TLS before.
pub(crate) fn certified(der: &CertificateDer<'_>) -> Result<Certified, WireError> {
    let (_, certificate) = X509Certificate::from_der(der)
        .map_err(|error| WireError::ForeignCertificate { what: format!("unreadable: {error}") })?;
    let name = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    let node = name.and_then(|name| name.strip_prefix("node-")).and_then(|id| id.parse().ok());
    let node = node.ok_or_else(|| WireError::ForeignCertificate {
        what: format!("its name {:?} does not name a node", name.unwrap_or_default()),
    })?;
    Ok(Certified { node, issued_ms: crate::authority::issued_ms(certificate.raw_serial()) })
}

/// Tells a certificate problem from a network problem.
pub(crate) fn tls_error(doing: &str, expected: Option<u16>, error: &std::io::Error) -> WireError {
    use rustls::{CertificateError, Error};
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) else {
        return WireError::io(doing, std::io::Error::new(error.kind(), error.to_string()));
    };
    match tls {
        Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => WireError::WrongNode {
            expected: expected.map_or_else(|| "a node".to_owned(), |node| node.to_string()),
            found: "a certificate of another node".to_owned(),
        },
        Error::InvalidCertificate(why) => WireError::ForeignCertificate { what: format!("{why:?}") },
        Error::NoCertificatesPresented => {
            WireError::ForeignCertificate { what: "the peer shows none".to_owned() }
        }
        Error::AlertReceived(alert) if about_certificates(*alert) => {
            WireError::ForeignCertificate { what: format!("the peer refuses ours: {alert:?}") }
        }
        Error::InvalidMessage(why) => WireError::BadFrame { what: format!("not TLS: {why:?}") },
        other => WireError::io(doing, std::io::Error::new(error.kind(), other.to_string())),
    }
}

fn about_certificates(alert: AlertDescription) -> bool {
    matches!(
        alert,
        AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
            | AlertDescription::DecryptError
            | AlertDescription::CertificateRequired
    )
}

fn bad(what: impl Into<String>) -> WireError {
    WireError::BadIdentity { what: what.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority;

    #[test]
    fn an_issued_certificate_names_its_node() {
        let ca = authority::create_ca("test").expect("authority");
        let node = authority::issue(&ca, 17).expect("certificate");
        let identity = Identity::from_pem(&node.cert_pem, &node.key_pem, &ca.cert_pem).expect("identity");
        assert_eq!(identity.node(), 17);
        let dated = authority::issue_at(&ca, 3, 1_700_000_000_123).expect("certificate");
        let dated = Identity::from_pem(&dated.cert_pem, &dated.key_pem, &ca.cert_pem).expect("identity");
        assert_eq!((dated.node(), dated.issued_ms()), (3, 1_700_000_000_123));
    }

    #[test]
    fn unusable_files_are_refused_by_name() {
        let ca = authority::create_ca("test").expect("authority");
        let node = authority::issue(&ca, 1).expect("certificate");
        let other = authority::issue(&ca, 1).expect("certificate");
        for (cert, key, authority) in [
            ("", node.key_pem.as_str(), ca.cert_pem.as_str()),
            (&node.cert_pem, "no key", &ca.cert_pem),
            (&node.cert_pem, &node.key_pem, ""),
            (&node.cert_pem, &other.key_pem, &ca.cert_pem),
        ] {
            let error = Identity::from_pem(cert, key, authority).expect_err("unusable");
            assert!(matches!(error, WireError::BadIdentity { .. }), "{error}");
        }
    }
}
