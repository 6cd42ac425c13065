//! The first frame of each side: protocol versions, cluster, node.
//!
//! Both sides send at once and check what they get. A side that refuses says why in a [`Kind::Refusal`] with id 0
//! before it closes, so that both logs name the same reason.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use prost::Message;
use uuid::Uuid;

use crate::frame::{Frame, Kind};
use crate::identity::Certified;
use crate::{Class, Local, Peer, Refusal, Via, WireError};

/// Lowest protocol version that this release speaks.
pub const VERSION_MIN: u32 = 1;
/// Highest protocol version that this release speaks.
///
/// | version | brought |
/// |---|---|
/// | 1 | the first release |
/// | 2 | the admin interface over the network; records of drains, settings and renewed certificates; pages of a live move as differences; virtual devices of version 1 |
pub const VERSION_MAX: u32 = 2;

/// What this process speaks at most, when it was told to keep to an older version.
static SPOKEN_MAX: OnceLock<u32> = OnceLock::new();

/// Keeps to an older version of the protocol from now on: for rehearsing a cluster that is upgraded node by node. Counts
/// once, before the first connection.
///
/// # Errors
/// When this release does not speak it, or another choice was made before.
pub fn speak_at_most(version: u32) -> Result<(), WireError> {
    let known = (VERSION_MIN..=VERSION_MAX).contains(&version);
    if known && *SPOKEN_MAX.get_or_init(|| version) == version {
        return Ok(());
    }
    Err(WireError::BadIdentity { what: format!("version {version} of the protocol cannot be kept to") })
}

/// Highest protocol version that this process speaks.
#[must_use]
pub fn spoken_max() -> u32 {
    SPOKEN_MAX.get().copied().unwrap_or(VERSION_MAX)
}

/// Tells our protocol from anything else that sends length-prefixed bytes.
const MAGIC: u32 = 0x6373_7677;
const NAME_BYTES_MAX: usize = 256;

/// On the wire. Field numbers are never reused; versions from 1 on understand this message.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Hello {
    #[prost(fixed32, tag = "1")]
    magic: u32,
    #[prost(uint32, tag = "2")]
    version_min: u32,
    #[prost(uint32, tag = "3")]
    version_max: u32,
    #[prost(bytes = "vec", tag = "4")]
    cluster: Vec<u8>,
    #[prost(uint32, tag = "5")]
    node: u32,
    #[prost(string, tag = "6")]
    name: String,
    #[prost(uint32, tag = "7")]
    class: u32,
}

impl Hello {
    pub(crate) fn new(local: &Local, class: Class) -> Self {
        Self {
            magic: MAGIC,
            version_min: VERSION_MIN,
            version_max: spoken_max(),
            cluster: local.cluster.as_bytes().to_vec(),
            node: u32::from(local.node),
            name: local.name.chars().take(NAME_BYTES_MAX / 4).collect(),
            class: class.number(),
        }
    }

    pub(crate) fn frame(&self) -> Frame {
        Frame { id: 0, kind: Kind::Hello, service: 0, body: self.encode_to_vec().into() }
    }
}

/// What is known about the peer before its hello.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Proof {
    pub(crate) via: Via,
    /// What the certificate says; nothing on a Unix socket.
    pub(crate) node: Option<Certified>,
    /// What the connection is for, if this side opened it.
    pub(crate) class: Option<Class>,
}

/// Reads the peer's first frame and checks all that it says.
pub(crate) fn accept(first: Frame, local: &Local, proof: Proof) -> Result<Peer, WireError> {
    let hello = match first.kind {
        Kind::Hello => parse(first.body)?,
        Kind::Refusal => return Err(WireError::Refused(Refusal::decode(first.body)?)),
        kind => return Err(WireError::BadFrame { what: format!("first frame is {kind:?}, not a hello") }),
    };
    let name = hello.name.clone();
    if hello.version_max < VERSION_MIN || hello.version_min > spoken_max() {
        return Err(WireError::Version { name, min: hello.version_min, max: hello.version_max });
    }
    check_cluster(&hello, local, proof.via)?;
    let node = u16::try_from(hello.node)
        .map_err(|_| WireError::BadFrame { what: format!("hello names node {}", hello.node) })?;
    if let Some(certified) = proof.node.filter(|certified| certified.node != node) {
        return Err(WireError::WrongNode {
            expected: format!("{} (by its certificate)", certified.node),
            found: format!("{node} (by its hello)"),
        });
    }
    let version = hello.version_max.min(spoken_max());
    let class = Class::from_number(hello.class)
        .filter(|class| class.since_version() <= version)
        .ok_or_else(|| WireError::BadFrame { what: format!("hello names class {}", hello.class) })?;
    Ok(Peer {
        node,
        name: Arc::from(name),
        class: proof.class.unwrap_or(class),
        via: proof.via,
        version,
        issued_ms: proof.node.map_or(0, |certified| certified.issued_ms),
    })
}

fn parse(body: Bytes) -> Result<Hello, WireError> {
    let hello =
        Hello::decode(body).map_err(|error| WireError::BadFrame { what: format!("hello: {error}") })?;
    if hello.magic != MAGIC {
        return Err(WireError::BadFrame { what: format!("hello has magic {:#x}", hello.magic) });
    }
    if hello.name.len() > NAME_BYTES_MAX || hello.version_min > hello.version_max {
        return Err(WireError::BadFrame { what: "hello is out of range".to_owned() });
    }
    Ok(hello)
}

fn check_cluster(hello: &Hello, local: &Local, via: Via) -> Result<(), WireError> {
    let found = Uuid::from_slice(&hello.cluster)
        .map_err(|_| WireError::BadFrame { what: "hello has no cluster id".to_owned() })?;
    let unnamed = found.is_nil() || local.cluster.is_nil();
    if found == local.cluster || (unnamed && matches!(via, Via::Unix { .. })) {
        return Ok(());
    }
    Err(WireError::WrongCluster { name: hello.name.clone(), expected: local.cluster, found })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn local(cluster: u128) -> Local {
        Local { cluster: Uuid::from_u128(cluster), node: 1, name: "one".to_owned() }
    }

    const TLS_2: Proof =
        Proof { via: Via::Tls, node: Some(Certified { node: 2, issued_ms: 0 }), class: None };

    fn hello_of_2() -> Hello {
        Hello::new(&Local { node: 2, name: "two".to_owned(), ..local(7) }, Class::Bulk)
    }

    fn check(hello: &Hello, proof: Proof) -> Result<Peer, WireError> {
        accept(hello.frame(), &local(7), proof)
    }

    #[test]
    fn a_good_hello_names_the_peer() {
        let peer = check(&hello_of_2(), TLS_2).expect("good");
        assert_eq!((peer.node, &*peer.name, peer.class, peer.version), (2, "two", Class::Bulk, VERSION_MAX));
    }

    #[test]
    fn a_peer_of_a_later_release_is_accepted_at_our_version() {
        let hello = Hello { version_max: VERSION_MAX + 5, ..hello_of_2() };
        assert_eq!(check(&hello, TLS_2).expect("ranges overlap").version, VERSION_MAX);
    }

    #[test]
    fn a_peer_of_an_older_release_is_spoken_to_in_its_version_and_asks_for_nothing_newer() {
        let hello = Hello { version_max: 1, ..hello_of_2() };
        assert_eq!(check(&hello, TLS_2).expect("ranges overlap").version, 1);
        let newer = Hello { class: Class::Admin.number(), ..hello };
        assert!(matches!(check(&newer, TLS_2), Err(WireError::BadFrame { .. })));
    }

    #[test]
    fn a_peer_without_a_common_version_is_refused_by_number() {
        let hello = Hello { version_min: VERSION_MAX + 1, version_max: VERSION_MAX + 2, ..hello_of_2() };
        let error = check(&hello, TLS_2).expect_err("no common version");
        assert!(matches!(error, WireError::Version { .. }) && error.hint().is_some(), "{error}");
    }

    #[test]
    fn a_node_cannot_claim_anothers_id() {
        let hello = Hello { node: 3, ..hello_of_2() };
        assert!(matches!(check(&hello, TLS_2), Err(WireError::WrongNode { .. })));
    }

    #[test]
    fn another_cluster_is_refused_and_an_unnamed_one_passes_only_inside_a_node() {
        let other = Hello { cluster: vec![9; 16], ..hello_of_2() };
        assert!(matches!(check(&other, TLS_2), Err(WireError::WrongCluster { .. })));
        let unnamed = Hello { cluster: vec![0; 16], ..hello_of_2() };
        assert!(matches!(check(&unnamed, TLS_2), Err(WireError::WrongCluster { .. })));
        let unix = Proof { via: Via::Unix { uid: 0, pid: 1 }, node: None, class: None };
        assert!(check(&unnamed, unix).is_ok());
        assert!(matches!(check(&other, unix), Err(WireError::WrongCluster { .. })));
    }

    proptest! {
        #[test]
        fn any_first_frame_is_a_peer_or_an_error(kind in 0usize..5, body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let kind = [Kind::Hello, Kind::Request, Kind::Reply, Kind::Refusal, Kind::Push][kind];
            let _outcome = accept(Frame { id: 0, kind, service: 0, body: body.into() }, &local(7), TLS_2);
        }
    }
}
