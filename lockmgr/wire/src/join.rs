//! How a node that has no certificate yet becomes a member: one request and one reply over TLS with ALPN `csv-join`.
//!
//! ```text
//!   new node                                        member
//!     | -- TLS, no client certificate, ALPN csv-join -> |   chain: node certificate, authority
//!     |    the authority's digest is the token's        |
//!     | -- JoinRequest: secret, name, address, CSR ---> |   the secret is used up, the member recorded
//!     | <- JoinReply: id, certificate, members -------- |   or a refusal
//! ```
//! It shares the port of the other connections: ALPN tells them apart before any certificate is asked for.
//! **Invariant:** nothing of the request is believed before the secret was found in the records.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use prost::Message;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use crate::connect::dial;
use crate::driver::in_time;
use crate::identity::tls_error;
use crate::ticket::{JoinToken, sha256};
use crate::{Handler, Refusal, RefusalCode, WireError, authority};

/// The protocol name that tells a join from other connections.
pub(crate) const ALPN: &[u8] = b"csv-join";
/// Longest message of a join.
const MESSAGE_BYTES_MAX: usize = 256 << 10;
/// Longest time for the request to be carried out: it needs a majority of the members.
const JOIN_MS_MAX: u64 = 20_000;

/// What a new node asks for.
#[derive(Clone, PartialEq, Message)]
pub struct JoinRequest {
    /// The token's secret.
    #[prost(bytes = "bytes", tag = "1")]
    pub secret: Bytes,
    /// The name that it shall have.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Where the others will reach it, `host:port`.
    #[prost(string, tag = "3")]
    pub address: String,
    /// A certificate signing request in DER; only its public key is used.
    #[prost(bytes = "bytes", tag = "4")]
    pub csr_der: Bytes,
    /// It shall vote and do nothing else.
    #[prost(bool, tag = "5")]
    pub witness: bool,
}

/// What it gets.
#[derive(Clone, PartialEq, Message)]
pub struct JoinReply {
    /// Its number.
    #[prost(uint32, tag = "1")]
    pub node: u32,
    /// Name of the cluster.
    #[prost(string, tag = "2")]
    pub cluster_name: String,
    /// Id of the cluster.
    #[prost(bytes = "bytes", tag = "3")]
    pub cluster: Bytes,
    /// Its certificate.
    #[prost(string, tag = "4")]
    pub cert_pem: String,
    /// The authority's certificate.
    #[prost(string, tag = "5")]
    pub ca_cert_pem: String,
    /// The authority's key: each member can let others join.
    #[prost(string, tag = "6")]
    pub ca_key_pem: String,
    /// All members, the new one too.
    #[prost(message, repeated, tag = "7")]
    pub members: Vec<JoinMember>,
    /// The part of the configuration that all nodes share, in TOML.
    #[prost(string, tag = "8")]
    pub shared_config: String,
}

/// A member, for the new one's configuration.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct JoinMember {
    /// Number.
    #[prost(uint32, tag = "1")]
    pub node: u32,
    /// Name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Address.
    #[prost(string, tag = "3")]
    pub address: String,
}

/// A reply, or why not.
#[derive(Clone, PartialEq, Message)]
struct Answer {
    #[prost(message, optional, tag = "1")]
    reply: Option<JoinReply>,
    #[prost(bytes = "bytes", tag = "2")]
    refusal: Bytes,
}

/// Asks the member named in `token` to let a node join. Gives the reply and the node's new private key (PEM).
///
/// # Errors
/// When the member cannot be reached, does not belong to the token's cluster, or refuses.
pub async fn join(
    token: &JoinToken,
    name: &str,
    address: &str,
    witness: bool,
) -> Result<(JoinReply, String), WireError> {
    let (csr_der, key_pem) = authority::request()?;
    let request = JoinRequest {
        secret: Bytes::copy_from_slice(&token.secret),
        name: name.to_owned(),
        address: address.to_owned(),
        csr_der: csr_der.into(),
        witness,
    };
    let doing = format!("join by way of the member at {}", token.address);
    let stream = in_time(&doing, connect(token, &doing)).await?;
    let asking = ask(stream, &request);
    let reply = tokio::time::timeout(Duration::from_millis(JOIN_MS_MAX), asking)
        .await
        .map_err(|_| WireError::TimedOut { doing, ms: JOIN_MS_MAX })??;
    Ok((reply, key_pem))
}

async fn connect(
    token: &JoinToken,
    doing: &str,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, WireError> {
    let tcp = dial(&token.address).await.map_err(|error| WireError::io(doing, error))?;
    let name = ServerName::try_from(authority::node_name(token.node))
        .map_err(|error| WireError::BadIdentity { what: error.to_string() })?;
    TlsConnector::from(Arc::new(client_config(token)?))
        .connect(name, tcp)
        .await
        .map_err(|error| tls_error(doing, Some(token.node), &error))
}

async fn ask<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    request: &JoinRequest,
) -> Result<JoinReply, WireError> {
    let mut frames = framed(stream);
    let sent = frames.send(Bytes::from(request.encode_to_vec())).await;
    sent.map_err(|error| WireError::io("send the request to join", error))?;
    let bytes = next(&mut frames).await?;
    let answer = Answer::decode(bytes)
        .map_err(|error| WireError::BadFrame { what: format!("answer to a join: {error}") })?;
    match answer.reply {
        Some(reply) => Ok(reply),
        None => Err(WireError::Refused(Refusal::decode(answer.refusal)?)),
    }
}

/// Serves one join on a TLS stream of a client without a certificate.
pub(crate) async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    handler: &dyn Handler,
) -> Result<(), WireError> {
    let mut frames = framed(stream);
    let bytes = in_time("the request of a node that wants to join", next(&mut frames)).await?;
    let outcome = match JoinRequest::decode(bytes.freeze()) {
        Ok(request) => {
            match tokio::time::timeout(Duration::from_millis(JOIN_MS_MAX), handler.join(request)).await {
                Ok(outcome) => outcome,
                Err(_) => Err(Refusal::new(RefusalCode::Busy, "the cluster did not decide in time")),
            }
        }
        Err(error) => Err(Refusal::new(RefusalCode::Invalid, format!("request to join: {error}"))),
    };
    let answer = match outcome {
        Ok(reply) => Answer { reply: Some(reply), refusal: Bytes::new() },
        Err(refusal) => Answer { reply: None, refusal: refusal.encode() },
    };
    let told = async {
        frames.send(Bytes::from(answer.encode_to_vec())).await?;
        // The peer closes when it has read the answer; closing first could discard it.
        while frames.next().await.is_some() {}
        Ok::<_, std::io::Error>(())
    };
    in_time("the answer to a join", async {
        told.await.map_err(|error| WireError::io("answer a join", error))
    })
    .await
}

fn framed<S: AsyncRead + AsyncWrite + Unpin>(stream: S) -> Framed<S, LengthDelimitedCodec> {
    LengthDelimitedCodec::builder().max_frame_length(MESSAGE_BYTES_MAX).new_framed(stream)
}

async fn next<S: AsyncRead + AsyncWrite + Unpin>(
    frames: &mut Framed<S, LengthDelimitedCodec>,
) -> Result<BytesMut, WireError> {
    match frames.next().await {
        Some(Ok(bytes)) => Ok(bytes),
        Some(Err(error)) => Err(WireError::BadFrame { what: format!("join: {error}") }),
        None => Err(WireError::BadFrame { what: "join: the peer closed the connection".to_owned() }),
    }
}

fn client_config(token: &JoinToken) -> Result<ClientConfig, WireError> {
    let bad = |error: rustls::Error| WireError::BadIdentity { what: error.to_string() };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Pinned { token: token.clone(), provider: Arc::clone(&provider) };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(bad)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

/// Trusts the one authority whose digest the token carries, and nothing else.
#[derive(Debug)]
struct Pinned {
    token: JoinToken,
    provider: Arc<rustls::crypto::CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let unknown = || rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let ca =
            intermediates.iter().find(|cert| sha256(cert) == self.token.authority).ok_or_else(unknown)?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
                .build()
                .map_err(|_| unknown())?;
        verifier.verify_server_cert(end_entity, &[], server_name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
