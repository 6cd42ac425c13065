//! The way to a daemon on another host: mutual TLS with the certificate of a node, to the port on which members listen.
//!
//! ```text
//!   csvctl -- gRPC --> socket pair -- carried over TLS --> member --> its csvd.sock
//! ```
//! **Invariant:** only a member of the cluster that the identity belongs to is talked to, and it answers members only.

use std::path::Path;

use api::config::NodeConfig;
use api::{Client, Error};
use tokio::net::UnixStream;
use wire::{Endpoint, Identity, Local, WireError};

/// Connects to the member that listens at `address`, as the node whose folder is `identity`.
pub(crate) async fn connect(address: &str, identity: &Path) -> Result<Client, Error> {
    let during = |error: Error| error.during(format!("connect to {address}"));
    let endpoint = endpoint(identity).map_err(during)?;
    let stream = wire::connect_admin(address, &endpoint).await.map_err(|error| during(refused(&error)))?;
    let (near, far) =
        UnixStream::pair().map_err(|error| Error::failed(format!("making a pair of sockets: {error}")))?;
    // Ends with the connection; what broke it shows as the failure of the request that it carried.
    tokio::spawn(stream.carry(far));
    api::connect_over(near, address).await
}

fn endpoint(identity: &Path) -> Result<Endpoint, Error> {
    let file = identity.join("csvd.toml");
    let text = std::fs::read_to_string(&file).map_err(|error| {
        Error::not_found(format!("identity {}: {error}", file.display()))
            .hint("name the folder of a node of the cluster with --identity or CSVCTL_IDENTITY")
    })?;
    let config: NodeConfig = toml::from_str(&text)
        .map_err(|error| Error::usage(format!("identity {}: {error}", file.display())))?;
    let loaded = Identity::load(&config.tls.cert, &config.tls.key, &config.tls.ca);
    let local =
        Local { cluster: config.cluster_id, node: config.id, name: format!("csvctl on {}", config.name) };
    loaded.and_then(|identity| Endpoint::new(local, identity)).map_err(|error| refused(&error))
}

fn refused(error: &WireError) -> Error {
    let kind = match error {
        WireError::Refused(_) | WireError::ForeignCertificate { .. } => api::Kind::Conflict,
        _ => api::Kind::Unreachable,
    };
    Error::new(kind, error.explain()).hint(error.hint().unwrap_or("is csvd running there?"))
}
