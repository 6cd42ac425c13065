//! What can go wrong on a connection, and the refusal that a peer sends instead of a reply.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

/// A connection or a call failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WireError {
    /// The length field, or a body to be sent, is over the limit.
    #[error("frame of {bytes} bytes is longer than the {max} allowed")]
    TooLong {
        /// Length that was announced or wanted.
        bytes: u64,
        /// The limit.
        max: usize,
    },
    /// Bytes that are not a frame of ours.
    #[error("malformed frame: {what}")]
    BadFrame {
        /// What is wrong with it.
        what: String,
    },
    /// No protocol version in common.
    #[error(
        "peer {name} speaks protocol versions {min} to {max}, this side {} to {}",
        crate::VERSION_MIN,
        crate::VERSION_MAX
    )]
    Version {
        /// How the peer calls itself.
        name: String,
        /// Its lowest version.
        min: u32,
        /// Its highest version.
        max: u32,
    },
    /// The peer's certificate was not issued by this cluster's authority, or it has none, or it refuses ours.
    #[error("certificate refused: {what}")]
    ForeignCertificate {
        /// What TLS said.
        what: String,
    },
    /// This side's own certificate, key or authority cannot be used.
    #[error("cannot use identity: {what}")]
    BadIdentity {
        /// What is wrong with it.
        what: String,
    },
    /// Another node answers at this address, or a node says to be another than its certificate.
    #[error("expected node {expected}, found {found}")]
    WrongNode {
        /// Who should be there.
        expected: String,
        /// Who is there.
        found: String,
    },
    /// The peer belongs to another cluster.
    #[error("peer {name} belongs to cluster {found}, this side to {expected}")]
    WrongCluster {
        /// How the peer calls itself.
        name: String,
        /// Our cluster.
        expected: uuid::Uuid,
        /// Its cluster.
        found: uuid::Uuid,
    },
    /// The peer answered with a refusal.
    #[error("{0}")]
    Refused(Refusal),
    /// The connection is over; whether the peer acted on a call in flight is unknown.
    #[error("connection to {peer} closed: {reason}")]
    Closed {
        /// Who was there.
        peer: Arc<str>,
        /// Why it ended.
        reason: Arc<str>,
    },
    /// There is no connection to this node now, or it is not known at all; nothing was sent.
    #[error("no connection to node {node}: {reason}")]
    NotConnected {
        /// The wanted node.
        node: u16,
        /// What the last attempt met.
        reason: Arc<str>,
    },
    /// The operating system refused something.
    #[error("cannot {doing}")]
    Io {
        /// What was attempted.
        doing: String,
        /// Why it failed.
        #[source]
        source: Arc<std::io::Error>,
    },
    /// The peer did not finish the handshake in time.
    #[error("{doing} took longer than {ms} ms")]
    TimedOut {
        /// What was waited for.
        doing: String,
        /// The limit.
        ms: u64,
    },
}

impl WireError {
    pub(crate) fn io(doing: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io { doing: doing.into(), source: Arc::new(source) }
    }

    /// What the administrator can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::TooLong { .. } | Self::BadFrame { .. } => {
                "something other than a csv process talks to this port, or a peer is faulty; the connection was closed"
            }
            Self::Version { .. } => {
                "upgrade the older node; releases speak the protocol of the release before"
            }
            Self::ForeignCertificate { .. } => {
                "give the node a certificate of this cluster: remove its old one and join it again"
            }
            Self::BadIdentity { .. } => {
                "check the certificate, key and authority files named in the configuration"
            }
            Self::WrongNode { .. } => {
                "check the member addresses; two nodes may share one address or certificate"
            }
            Self::WrongCluster { .. } => {
                "check the member addresses; a node of another cluster answers there"
            }
            Self::Refused(refusal) if !refusal.hint.is_empty() => return None,
            Self::Refused(refusal) if refusal.code == RefusalCode::Unsupported => {
                "the peer is an older release; upgrade it"
            }
            Self::NotConnected { .. } | Self::TimedOut { .. } => {
                "check that the peer runs and that its address is reachable"
            }
            Self::Refused(_) | Self::Closed { .. } | Self::Io { .. } => return None,
        })
    }

    /// The message, its causes and its hint in one line for a log.
    #[must_use]
    pub fn explain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        match self.hint() {
            Some(hint) => format!("{text} (hint: {hint})"),
            None => text,
        }
    }
}

/// The codec's trait asks for this; what was being done is added where it is known.
impl From<std::io::Error> for WireError {
    fn from(source: std::io::Error) -> Self {
        Self::io("read from the connection", source)
    }
}

/// Kinds of refusal that every service shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalCode {
    /// The receiver does not know this service or this request.
    Unsupported,
    /// The request makes no sense.
    Invalid,
    /// Too much is in flight; ask again later.
    Busy,
    /// The caller may not do this.
    Denied,
    /// The receiver is not (or no longer) the one to ask.
    NotHere,
    /// It was tried and failed.
    Failed,
}

impl RefusalCode {
    fn number(self) -> u32 {
        match self {
            Self::Unsupported => 1,
            Self::Invalid => 2,
            Self::Busy => 3,
            Self::Denied => 4,
            Self::NotHere => 5,
            Self::Failed => 6,
        }
    }

    /// A code of a later release reads as `Failed`: still a refusal, with its message.
    fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Unsupported,
            2 => Self::Invalid,
            3 => Self::Busy,
            4 => Self::Denied,
            5 => Self::NotHere,
            _ => Self::Failed,
        }
    }
}

/// Typed answer of a receiver that does not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}{}", if hint.is_empty() { String::new() } else { format!(" (hint: {hint})") })]
pub struct Refusal {
    /// Kind.
    pub code: RefusalCode,
    /// What was refused and why.
    pub message: String,
    /// What to do about it; may be empty.
    pub hint: String,
    /// A message of the service's own, for programs.
    pub detail: Bytes,
}

/// On the wire. Field numbers are never reused.
#[derive(Clone, PartialEq, Message)]
struct RefusalMessage {
    #[prost(uint32, tag = "1")]
    code: u32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(string, tag = "3")]
    hint: String,
    #[prost(bytes = "bytes", tag = "4")]
    detail: Bytes,
}

impl Refusal {
    /// A refusal with a message.
    pub fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: String::new(), detail: Bytes::new() }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// Adds a message for programs.
    #[must_use]
    pub fn with_detail(mut self, detail: Bytes) -> Self {
        self.detail = detail;
        self
    }

    /// The answer to a service number that nobody serves here.
    #[must_use]
    pub fn unsupported(service: u16) -> Self {
        Self::new(RefusalCode::Unsupported, format!("service {service} is not known here"))
    }

    pub(crate) fn encode(&self) -> Bytes {
        let message = RefusalMessage {
            code: self.code.number(),
            message: self.message.clone(),
            hint: self.hint.clone(),
            detail: self.detail.clone(),
        };
        message.encode_to_vec().into()
    }

    pub(crate) fn decode(body: Bytes) -> Result<Self, WireError> {
        let message = RefusalMessage::decode(body)
            .map_err(|error| WireError::BadFrame { what: format!("refusal: {error}") })?;
        Ok(Self {
            code: RefusalCode::from_number(message.code),
            message: message.message,
            hint: message.hint,
            detail: message.detail,
        })
    }
}
