//! A node without a certificate joins by a token over real TLS, and what each kind of wrong token ends in.

mod support;

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use support::Pki;
use tokio::net::TcpListener;
use wire::{
    Class, Connection, Endpoint, Handler, Identity, JoinReply, JoinRequest, JoinToken, Peer, Refusal,
    RefusalCode, RefuseAll, Server, WireError, authority, connect_tls, join, sha256,
};

/// Lets whoever knows the secret join as node 7.
struct Desk {
    ca: authority::Issued,
    secret: [u8; 32],
}

impl Handler for Desk {
    fn handle(
        &self,
        _: Peer,
        _: Connection,
        service: u16,
        _: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        Box::pin(async move { Err(Refusal::unsupported(service)) })
    }

    fn join(&self, request: JoinRequest) -> BoxFuture<'static, Result<JoinReply, Refusal>> {
        let outcome = if sha256(&request.secret) == self.secret {
            authority::issue_requested(&self.ca, 7, &request.csr_der)
                .map(|cert_pem| JoinReply {
                    node: 7,
                    cert_pem,
                    ca_cert_pem: self.ca.cert_pem.clone(),
                    ..JoinReply::default()
                })
                .map_err(|error| Refusal::new(RefusalCode::Invalid, error.to_string()))
        } else {
            Err(Refusal::new(RefusalCode::Denied, "the token is not known"))
        };
        Box::pin(async { outcome })
    }
}

/// A server of node 2 that lets nodes join with the returned token.
async fn desk(pki: &Pki) -> (Server, JoinToken) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("bound").to_string();
    let token = JoinToken::new(2, &address, pki.identity(2).authority());
    let handler = Desk { ca: pki.ca.clone(), secret: token.digest() };
    (Server::serve_tls(listener, pki.endpoint(2), Arc::new(handler)), token)
}

#[tokio::test]
async fn a_node_with_a_token_gets_a_certificate_that_members_accept() {
    let pki = Pki::new();
    let (server, token) = desk(&pki).await;
    let (reply, key_pem) = join(&token, "n7", "127.0.0.1:1", false).await.expect("joins");
    let identity = Identity::from_pem(&reply.cert_pem, &key_pem, &reply.ca_cert_pem).expect("identity");
    let endpoint = Endpoint::new(pki.local(7), identity).expect("endpoint");
    let connection = connect_tls(&token.address, &endpoint, 2, Class::Control, Arc::new(RefuseAll)).await;
    assert_eq!(connection.expect("accepted as a member").peer().node, 2);
    server.shutdown().await;
}

#[tokio::test]
async fn a_wrong_secret_is_told_so() {
    let pki = Pki::new();
    let (server, mut token) = desk(&pki).await;
    token.secret = [0; 16];
    let error = join(&token, "n7", "127.0.0.1:1", false).await.expect_err("refused");
    assert!(matches!(&error, WireError::Refused(refusal) if refusal.code == RefusalCode::Denied), "{error}");
    server.shutdown().await;
}

// Nobody gives the secret to a stranger: the peer must belong to the authority that the token names.
#[tokio::test]
async fn a_member_of_another_cluster_gets_no_secret() {
    let (pki, other) = (Pki::new(), Pki::new());
    let (server, mut token) = desk(&pki).await;
    token.authority = other.identity(2).authority();
    let error = join(&token, "n7", "127.0.0.1:1", false).await.expect_err("refused");
    assert!(matches!(error, WireError::ForeignCertificate { .. }), "{error}");
    server.shutdown().await;
}

#[tokio::test]
async fn a_signing_request_that_is_none_is_refused() {
    let error = authority::issue_requested(&Pki::new().ca, 7, b"nonsense").expect_err("refused");
    assert!(matches!(error, WireError::BadIdentity { .. }), "{error}");
}
