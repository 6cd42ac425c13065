//! TLS streams as the nodes have them, from buffer to buffer: what encryption alone costs on this machine.
#![expect(clippy::disallowed_methods, reason = "measures time")]

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

use wire::{Endpoint, Identity, Local, Stream, authority};

const BLOCK_BYTES: usize = 256 << 10;

type Failure = Box<dyn std::error::Error>;

struct Taking(Sender<Stream>);

impl wire::Handler for Taking {
    fn handle(
        &self,
        _from: wire::Peer,
        _connection: wire::Connection,
        service: u16,
        _body: bytes::Bytes,
    ) -> futures::future::BoxFuture<'static, Result<bytes::Bytes, wire::Refusal>> {
        Box::pin(async move { Err(wire::Refusal::unsupported(service)) })
    }

    fn bare_stream(&self, stream: Stream) {
        // The measurement is over when nobody listens.
        let _ = self.0.send(stream);
    }
}

/// Two nodes of a cluster that exists here only, and TLS streams between them over the loopback.
pub struct Streams {
    runtime: tokio::runtime::Runtime,
    near: Endpoint,
    address: String,
    _server: wire::Server,
    arrived: Receiver<Stream>,
}

impl Streams {
    /// Both nodes, one of which listens.
    ///
    /// # Errors
    /// What of the cluster cannot be made.
    pub fn start() -> Result<Self, Failure> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let ca = authority::create_ca("benchmark")?;
        let cluster = uuid::Uuid::new_v4();
        let endpoint = |node: u16| -> Result<Endpoint, Failure> {
            let issued = authority::issue(&ca, node)?;
            let identity = Identity::from_pem(&issued.cert_pem, &issued.key_pem, &ca.cert_pem)?;
            Ok(Endpoint::new(Local { cluster, node, name: format!("n{node}") }, identity)?)
        };
        let (near, far) = (endpoint(1)?, endpoint(2)?);
        let (tell, arrived) = channel();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?.to_string();
        let server = {
            let _inside = runtime.enter();
            wire::Server::serve_tls(listener, far, Arc::new(Taking(tell)))
        };
        Ok(Self { runtime, near, address, _server: server, arrived })
    }

    /// Both ends of a new stream.
    ///
    /// # Errors
    /// How the connection failed.
    pub fn open(&self) -> Result<(Stream, Stream), Failure> {
        let near = self.runtime.block_on(wire::connect_bare(&self.address, &self.near, 2))?;
        Ok((near, self.arrived.recv()?))
    }

    /// MiB/s over one stream of bytes from a small buffer into a small buffer, which stay in the caches: what the stream costs
    /// by itself.
    ///
    /// # Errors
    /// How the stream broke.
    ///
    /// # Panics
    /// When the receiving thread does.
    pub fn mib_per_second(&self, bytes: u64) -> Result<f64, Failure> {
        self.carry(&[7; BLOCK_BYTES], &mut [0; BLOCK_BYTES], usize::try_from(bytes)?)
    }

    /// MiB/s over one stream of all of a piece of memory into another one of the same size. Unless they fit into the caches this
    /// has the memory read and written as well.
    ///
    /// # Errors
    /// How the stream broke.
    ///
    /// # Panics
    /// When the receiving thread does.
    pub fn mib_per_second_between(&self, from: &[u8], into: &mut [u8]) -> Result<f64, Failure> {
        self.carry(from, into, from.len())
    }

    /// So many bytes, over and over out of one and into the other.
    fn carry(&self, from: &[u8], into: &mut [u8], bytes: usize) -> Result<f64, Failure> {
        let (mut near, mut far) = self.open()?;
        let blocks = bytes / BLOCK_BYTES;
        let begun = Instant::now();
        thread::scope(|scope| -> Result<(), Failure> {
            let taking = scope.spawn(move || -> std::io::Result<()> {
                let round = into.len() / BLOCK_BYTES;
                for block in 0..blocks {
                    far.read_exact(&mut into[block % round * BLOCK_BYTES..][..BLOCK_BYTES])?;
                }
                Ok(())
            });
            for block in from.chunks_exact(BLOCK_BYTES).cycle().take(blocks) {
                near.write_all(block)?;
            }
            near.flush()?;
            Ok(taking.join().expect("no panic")?)
        })?;
        let mib = (blocks * BLOCK_BYTES) as f64 / f64::from(1 << 20);
        Ok(mib / begun.elapsed().as_secs_f64())
    }
}

impl std::fmt::Debug for Streams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Streams").field("address", &self.address).finish_non_exhaustive()
    }
}
