//! Where an export is: `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`.
//!
//! The form is that of the NBD project's URI specification, without a user and without TLS.

use std::fmt;
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// The port that the protocol has been assigned.
const PORT: u16 = 10809;
/// Longest wait for a host that does not answer.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// Place and name of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdAddress {
    place: Place,
    export: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Host { host: String, port: u16 },
    Socket(PathBuf),
}

impl NbdAddress {
    /// An export behind a Unix socket.
    #[must_use]
    pub fn unix(socket: impl Into<PathBuf>, export: impl Into<String>) -> Self {
        Self { place: Place::Socket(socket.into()), export: export.into() }
    }

    /// Takes a URI apart.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    pub fn parse(uri: &str) -> Result<Self, String> {
        if let Some(rest) = uri.strip_prefix("nbd+unix://") {
            return Self::parse_unix(rest);
        }
        let rest = uri.strip_prefix("nbd://").ok_or("an NBD export is named nbd://... or nbd+unix://...")?;
        let (place, export) = rest.split_once('/').unwrap_or((rest, ""));
        let (host, port) = host_and_port(place)?;
        if export.contains('?') {
            return Err("nbd://HOST:PORT/EXPORT takes no parameters".to_owned());
        }
        Ok(Self { place: Place::Host { host, port }, export: decode(export)? })
    }

    fn parse_unix(rest: &str) -> Result<Self, String> {
        let path = rest.strip_prefix('/').ok_or("nbd+unix:// is followed by /EXPORT?socket=PATH")?;
        let (export, parameters) = path.split_once('?').unwrap_or((path, ""));
        let socket = parameters.split('&').find_map(|parameter| parameter.strip_prefix("socket="));
        let socket = decode(socket.unwrap_or_default())?;
        if socket.is_empty() {
            return Err("nbd+unix:///EXPORT needs ?socket=PATH after it".to_owned());
        }
        Ok(Self { place: Place::Socket(socket.into()), export: decode(export)? })
    }

    /// Name of the export.
    #[must_use]
    pub fn export(&self) -> &str {
        &self.export
    }

    /// Opens a connection.
    pub(crate) fn connect(&self) -> io::Result<OwnedFd> {
        match &self.place {
            Place::Socket(path) => UnixStream::connect(path).map(OwnedFd::from),
            Place::Host { host, port } => {
                let mut failure = io::Error::from(io::ErrorKind::NotFound);
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, CONNECT_WITHIN) {
                        Ok(stream) => {
                            // Small requests leave at once; without it every one would wait for an acknowledgement.
                            stream.set_nodelay(true)?;
                            return Ok(stream.into());
                        }
                        Err(error) => failure = error,
                    }
                }
                Err(failure)
            }
        }
    }
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Host { host, port } if host.contains(':') => {
                write!(f, "nbd://[{host}]:{port}/{}", self.export)
            }
            Place::Host { host, port } => write!(f, "nbd://{host}:{port}/{}", self.export),
            Place::Socket(path) => write!(f, "nbd+unix:///{}?socket={}", self.export, path.display()),
        }
    }
}

fn host_and_port(place: &str) -> Result<(String, u16), String> {
    let no_host = || "nbd:// needs a host after it: nbd://HOST:PORT/EXPORT".to_owned();
    let (host, port) = match place.strip_prefix('[') {
        Some(literal) => {
            let (host, rest) = literal.split_once(']').ok_or("the [ of an IPv6 address needs its ]")?;
            (host, rest.strip_prefix(':'))
        }
        None => match place.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (place, None),
        },
    };
    if host.is_empty() || host.contains('@') {
        return Err(no_host());
    }
    let port = match port {
        Some(port) => port.parse().map_err(|_| format!("`{port}` is not a port number"))?,
        None => PORT,
    };
    Ok((host.to_owned(), port))
}

/// Resolves `%XX`.
fn decode(text: &str) -> Result<String, String> {
    let wrong = || format!("`{text}` has a % that is not followed by two hexadecimal digits of UTF-8 text");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
                let (high, low) = (digit().ok_or_else(wrong)?, digit().ok_or_else(wrong)?);
                u8::try_from(high * 16 + low).expect("two digits make a byte")
            }
            plain => plain,
        });
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(host: &str, port: u16, export: &str) -> NbdAddress {
        NbdAddress { place: Place::Host { host: host.to_owned(), port }, export: export.to_owned() }
    }

    #[test]
    fn each_part_of_a_uri_is_found() {
        for (uri, wanted) in [
            ("nbd://san/lun%201", host("san", PORT, "lun 1")),
            ("nbd://10.0.0.1:99/", host("10.0.0.1", 99, "")),
            ("nbd://[fe80::1]:7/x", host("fe80::1", 7, "x")),
            ("nbd://san", host("san", PORT, "")),
            ("nbd+unix:///lun?socket=/run/a%3fb", NbdAddress::unix("/run/a?b", "lun")),
            ("nbd+unix:///?socket=s", NbdAddress::unix("s", "")),
        ] {
            assert_eq!(NbdAddress::parse(uri), Ok(wanted), "{uri}");
        }
    }

    #[test]
    fn what_is_no_place_of_an_export_is_refused_with_the_reason() {
        for uri in [
            "nbd://",
            "nbd://h:port/x",
            "nbd://[::1/x",
            "nbd://h/x?tls=1",
            "nbd+unix:///x",
            "nbd://h/%zz",
            "nbds://h/x",
        ] {
            assert!(NbdAddress::parse(uri).is_err(), "{uri}");
        }
    }
}
