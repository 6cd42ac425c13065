//! Memory streams without a link in the way: what RAM to RAM costs beside a plain TLS stream of the same kind.
#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a harness: it measures time and talks to people"
)]

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

use benchmarks::median;
use hv::GuestRam;
use migrator::stream::{self, Pages};
use wire::{Endpoint, Identity, Local, Stream, authority};

use crate::Failure;

const RAM_BYTES: u64 = 512 << 20;
const BLOCK_BYTES: usize = 256 << 10;
const ROUNDS: usize = 5;
const GOAL: f64 = 0.8;

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

/// Two nodes of a cluster that exists here only.
struct Nodes {
    runtime: tokio::runtime::Runtime,
    near: Endpoint,
    address: String,
    _server: wire::Server,
    arrived: Receiver<Stream>,
}

impl Nodes {
    fn start() -> Result<Self, Failure> {
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

    fn stream(&self) -> Result<(Stream, Stream), Failure> {
        let near = self.runtime.block_on(wire::connect_bare(&self.address, &self.near, 2))?;
        Ok((near, self.arrived.recv()?))
    }
}

/// Prints one stream beside a plain one, and several beside one.
pub(crate) fn measure() -> Result<(), Failure> {
    let nodes = Nodes::start()?;
    let (source, target) = (noise()?, GuestRam::new(RAM_BYTES)?);
    let (mut plain, mut one) = (Vec::new(), Vec::new());
    let mut several: Vec<(usize, Vec<f64>)> = [2, 4].map(|count| (count, Vec::new())).into();
    for _ in 0..ROUNDS {
        plain.push(plain_bytes(&nodes)?);
        one.push(memory(&nodes, &source, &target, 1)?);
        for (count, values) in &mut several {
            values.push(memory(&nodes, &source, &target, *count)?);
        }
    }
    let (plain, one) = (median(&mut plain), median(&mut one));
    let ratio = one / plain;
    let verdict = if ratio >= GOAL { "reached" } else { "missed" };
    println!("memory streams, {} MiB of noise, TLS on loopback, not shaped", RAM_BYTES >> 20);
    println!("  plain TLS stream {plain:8.0} MiB/s");
    println!("  one memory stream {one:7.0} MiB/s, ratio {ratio:.2}, goal {GOAL} {verdict}");
    for (count, mut values) in several {
        let rate = median(&mut values);
        println!("  {count} memory streams {rate:8.0} MiB/s, {:.2} of one", rate / one);
    }
    Ok(())
}

fn noise() -> Result<GuestRam, Failure> {
    let ram = GuestRam::new(RAM_BYTES)?;
    let mut block = vec![0; BLOCK_BYTES];
    let mut random = std::fs::File::open("/dev/urandom")?;
    for at in (0..RAM_BYTES).step_by(BLOCK_BYTES) {
        random.read_exact(&mut block)?;
        ram.write_linear(at, &block)?;
    }
    Ok(ram)
}

/// MiB/s of bytes from a buffer into a buffer.
fn plain_bytes(nodes: &Nodes) -> Result<f64, Failure> {
    let (mut near, mut far) = nodes.stream()?;
    let begun = Instant::now();
    let taking = thread::spawn(move || -> std::io::Result<()> {
        let mut into = vec![0; BLOCK_BYTES];
        for _ in 0..RAM_BYTES / BLOCK_BYTES as u64 {
            far.read_exact(&mut into)?;
        }
        Ok(())
    });
    let block = vec![7; BLOCK_BYTES];
    for _ in 0..RAM_BYTES / BLOCK_BYTES as u64 {
        near.write_all(&block)?;
    }
    near.flush()?;
    taking.join().expect("no panic")?;
    Ok(mib_per_second(begun))
}

/// MiB/s of RAM into RAM over so many streams.
fn memory(nodes: &Nodes, source: &GuestRam, target: &GuestRam, count: usize) -> Result<f64, Failure> {
    let streams = (0..count).map(|_| nodes.stream()).collect::<Result<Vec<_>, _>>()?;
    let begun = Instant::now();
    let pages = RAM_BYTES / hv::PAGE_BYTES;
    thread::scope(|scope| -> Result<(), Failure> {
        let mut ends = Vec::new();
        for (number, (near, mut far)) in streams.into_iter().enumerate() {
            ends.push(scope.spawn(move || stream::receive(&mut far, target, |_| Ok(())).map(drop)));
            ends.push(scope.spawn(move || {
                let mut sender = stream::Sender::new(near, source.clone());
                for first in (0..pages).step_by(usize::try_from(stream::CHUNK_PAGES).expect("small")) {
                    let mine = stream::stream_of(first, u32::try_from(count).expect("few"));
                    if mine as usize == number {
                        let words = usize::try_from(stream::CHUNK_PAGES / 64).expect("small");
                        sender.send(&Pages { first, bits: vec![u64::MAX; words], fresh: true })?;
                    }
                }
                sender.finish(None).map(drop)
            }));
        }
        for end in ends {
            end.join().expect("no panic")?;
        }
        Ok(())
    })?;
    Ok(mib_per_second(begun))
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn mib_per_second(begun: Instant) -> f64 {
    (RAM_BYTES >> 20) as f64 / begun.elapsed().as_secs_f64()
}
