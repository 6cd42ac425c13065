//! The cluster's own certificate authority.
//!
//! One authority per cluster, made when the cluster is created. It issues one certificate per node, whose common name
//! and DNS name are `node-<id>`: peers check the name against the node that they expect. A certificate's serial number says
//! when it was issued, so that those of before a renewal can be told from those after it.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SerialNumber,
};
use rustls_pki_types::CertificateSigningRequestDer;

use crate::WireError;

/// A certificate and its private key, both in PEM. The key is a secret: its file must be readable by its owner only.
#[derive(Clone)]
pub struct Issued {
    /// The certificate.
    pub cert_pem: String,
    /// The private key.
    pub key_pem: String,
}

impl std::fmt::Debug for Issued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issued").field("cert_pem", &self.cert_pem).finish_non_exhaustive()
    }
}

/// The name that certificates give to a node.
#[must_use]
pub fn node_name(node: u16) -> String {
    format!("node-{node}")
}

/// Makes the authority of a new cluster.
pub fn create_ca(cluster_name: &str) -> Result<Issued, WireError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = named(&format!("csv cluster {cluster_name}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().map_err(|error| bad("make a key", &error))?;
    let cert = params.self_signed(&key).map_err(|error| bad("make the authority's certificate", &error))?;
    Ok(Issued { cert_pem: cert.pem(), key_pem: key.serialize_pem() })
}

/// Issues the certificate of one node, with a key made here.
pub fn issue(ca: &Issued, node: u16) -> Result<Issued, WireError> {
    issue_at(ca, node, unix_ms())
}

/// The same, with the moment at which it counts as issued, in ms since 1970.
pub fn issue_at(ca: &Issued, node: u16, issued_ms: u64) -> Result<Issued, WireError> {
    let key = KeyPair::generate().map_err(|error| bad("make a key", &error))?;
    Ok(Issued { cert_pem: sign(ca, node, &key, issued_ms)?, key_pem: key.serialize_pem() })
}

/// Issues the certificate of a node that has made its key itself and asks with a signing request (DER). Of the request
/// only the public key is used, after its signature has proved that the node has the private one.
pub fn issue_requested(ca: &Issued, node: u16, csr_der: &[u8]) -> Result<String, WireError> {
    let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr_der))
        .map_err(|error| bad("read the signing request", &error))?;
    sign(ca, node, &request.public_key, unix_ms())
}

/// Makes a private key and a signing request for it: the request in DER, the key in PEM.
pub fn request() -> Result<(Vec<u8>, String), WireError> {
    let key = KeyPair::generate().map_err(|error| bad("make a key", &error))?;
    let request = CertificateParams::default()
        .serialize_request(&key)
        .map_err(|error| bad("make a signing request", &error))?;
    Ok((request.der().to_vec(), key.serialize_pem()))
}

fn sign(ca: &Issued, node: u16, key: &impl PublicKeyData, issued_ms: u64) -> Result<String, WireError> {
    let ca_key = KeyPair::from_pem(&ca.key_pem).map_err(|error| bad("read the authority's key", &error))?;
    let issuer = Issuer::from_ca_cert_pem(&ca.cert_pem, ca_key)
        .map_err(|error| bad("read the authority's certificate", &error))?;
    let mut params = CertificateParams::new(vec![node_name(node)])
        .map_err(|error| bad("name the node's certificate", &error))?;
    params.distinguished_name = named(&node_name(node));
    params.serial_number = Some(serial(issued_ms)?);
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let cert = params.signed_by(key, &issuer).map_err(|error| bad("sign the node's certificate", &error))?;
    Ok(cert.pem())
}

/// Marks the serial numbers that say when a certificate was issued.
const SERIAL_MARK: &[u8; 2] = b"CS";
const SERIAL_BYTES: usize = 16;

/// The mark, the moment (big-endian), and a random part that makes it unique.
fn serial(issued_ms: u64) -> Result<SerialNumber, WireError> {
    let mut random = [0; 6];
    let filled = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut random);
    filled.map_err(|_| WireError::BadIdentity { what: "the system gives no random numbers".to_owned() })?;
    let bytes = [SERIAL_MARK.as_slice(), &issued_ms.to_be_bytes(), &random].concat();
    Ok(SerialNumber::from(bytes))
}

/// When a certificate with this serial number was issued, in ms since 1970; 0 for one that does not say.
pub(crate) fn issued_ms(serial: &[u8]) -> u64 {
    let moment = serial.strip_prefix(SERIAL_MARK).filter(|_| serial.len() == SERIAL_BYTES);
    moment.and_then(|rest| rest.first_chunk()).map_or(0, |moment| u64::from_be_bytes(*moment))
}

#[expect(clippy::disallowed_methods, reason = "a date in a certificate; no safety rests on it")]
fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn named(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

fn bad(doing: &str, error: &rcgen::Error) -> WireError {
    WireError::BadIdentity { what: format!("cannot {doing}: {error}") }
}
