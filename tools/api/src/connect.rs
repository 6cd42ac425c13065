//! The way to a daemon's admin socket.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::Error;
use crate::pb::admin_client::AdminClient;

/// A connected client.
pub type Client = AdminClient<Channel>;

/// Connects to the daemon that listens on `socket`.
///
/// # Errors
/// `unreachable`, with a hint that fits the cause.
pub async fn connect(socket: &Path) -> Result<Client, Error> {
    // The URI is only the `host` of the requests: the connector below decides where they go.
    let endpoint = Endpoint::from_static("http://csvd.sock");
    let path = socket.to_path_buf();
    let channel = endpoint
        .connect_with_connector(tower::service_fn(move |_| open(path.clone())))
        .await
        .map_err(|error| refused(socket, &error))?;
    Ok(AdminClient::new(channel))
}

/// Talks over a stream that leads to a daemon; `shown` is how errors call it.
///
/// # Errors
/// `unreachable`.
pub async fn connect_over(stream: UnixStream, shown: &str) -> Result<Client, Error> {
    let once = Arc::new(Mutex::new(Some(stream)));
    let take = move |_| {
        let stream = once.lock().unwrap_or_else(PoisonError::into_inner).take();
        // A connection that has broken is not made again: whoever made the first one does.
        let gone = || std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        std::future::ready(stream.map(TokioIo::new).ok_or_else(gone))
    };
    let endpoint = Endpoint::from_static("http://csvd.sock");
    let channel = endpoint
        .connect_with_connector(tower::service_fn(take))
        .await
        .map_err(|error| refused(Path::new(shown), &error))?;
    Ok(AdminClient::new(channel))
}

async fn open(path: PathBuf) -> std::io::Result<TokioIo<UnixStream>> {
    UnixStream::connect(path).await.map(TokioIo::new)
}

fn refused(socket: &Path, error: &tonic::transport::Error) -> Error {
    let cause = io_cause(error);
    let message = match cause {
        Some(cause) => format!("connect to {}: {cause}", socket.display()),
        None => format!("connect to {}: {error}", socket.display()),
    };
    let hint = match cause.map(std::io::Error::kind) {
        Some(std::io::ErrorKind::NotFound) => {
            "is csvd running? Name its socket with --connect or CSVCTL_CONNECT"
        }
        Some(std::io::ErrorKind::ConnectionRefused) => {
            "csvd left this socket behind and is gone; start it again"
        }
        Some(std::io::ErrorKind::PermissionDenied) => {
            "the socket belongs to root and its group; use sudo or join the group"
        }
        _ => "look at the daemon's log",
    };
    Error::unreachable(message).hint(hint)
}

fn io_cause(error: &tonic::transport::Error) -> Option<&std::io::Error> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return Some(io);
        }
        cause = error.source();
    }
    None
}
