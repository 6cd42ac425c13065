//! How fast the detour through a peer is, beside what it is made of.
//!
//! ```text
//!   loopback TCP, a plain TLS stream      what the machine and the cipher give
//!   the transport alone                   NBD in TLS, in this process, to a device that answers at once
//!   a LUN in memory                       a mount through a peer, and directly: no disk in it
//!   a LUN on the disk                     the same, as on a SAN
//! ```
//! All of it in one run, in turns; the middle figure counts.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use benchmarks::{Streams, median};
use blockio::AlignedBuf;
use cluster_tests::Cluster;
use tempfile::TempDir;

use crate::Arguments;
use crate::transport::Transport;

const MIB: usize = 1 << 20;
/// MiB moved for one figure.
const AMOUNT: u64 = 512;
/// Requests of 1 MiB that are under way at once.
const DEPTH: usize = 4;
/// A folder whose files are in memory.
const IN_MEMORY: &str = "/dev/shm";

/// Reads and writes of one way.
type Rates = [Vec<f64>; 2];

/// 1 MiB sequential through a peer, beside plain TCP and plain TLS on the loopback and the direct way in the same run.
pub(crate) fn throughput(arguments: &Arguments) {
    let streams = Streams::start().expect("a TLS stream");
    let transport = Transport::open(&streams);
    let places: Vec<_> = [("memory", PathBuf::from(IN_MEMORY)), ("disk", std::env::temp_dir())]
        .into_iter()
        .filter(|(name, _)| arguments.wants_lun(name))
        .map(|(name, folder)| Place::set(name, &folder))
        .collect();
    let (mut tcp, mut tls, mut alone) = (Vec::new(), Vec::new(), Rates::default());
    let mut found: Vec<[Rates; 2]> = places.iter().map(|_| Default::default()).collect();
    for _ in 0..arguments.turns {
        tcp.push(loopback());
        tls.push(streams.mib_per_second(AMOUNT << 20).expect("sent"));
        both(&mut alone, |write| transport.mib_per_second(write, AMOUNT, DEPTH));
        for (place, [direct, redirected]) in places.iter().zip(&mut found) {
            both(direct, |write| transfer(&place.path, write));
            place.order("redirected");
            both(redirected, |write| transfer(&place.path, write));
            place.order("direct");
        }
    }
    let (tcp, tls) = (median(&mut tcp), median(&mut tls));
    println!("1 MiB sequential, depth {DEPTH}: loopback TCP {tcp:.0} MiB/s, a plain TLS stream {tls:.0}");
    println!("{:44} {:>7} {:>7} {:>7} {:>14}", "MiB/s", "", "of TCP", "of TLS", "of direct I/O");
    print("the transport alone", &mut alone, None, (tcp, tls));
    for (place, [direct, redirected]) in places.iter().zip(&mut found) {
        print(&format!("redirected, LUN: {}", place.name), redirected, Some(direct), (tcp, tls));
    }
}

fn both(rates: &mut Rates, rate: impl Fn(bool) -> f64) {
    for (rates, write) in rates.iter_mut().zip([false, true]) {
        rates.push(rate(write));
    }
}

fn print(what: &str, rates: &mut Rates, direct: Option<&mut Rates>, (tcp, tls): (f64, f64)) {
    let mut direct = direct.map(|rates| rates.each_mut().map(|rates| median(rates)).into_iter());
    for (rates, name) in rates.iter_mut().zip(["read", "write"]) {
        let rate = median(rates);
        let beside = direct.as_mut().and_then(Iterator::next);
        let beside = beside.map_or_else(String::new, |direct| format!("{:.2} ({direct:.0})", rate / direct));
        println!(
            "{:44} {rate:7.0} {:7.2} {:7.2} {beside:>14}",
            format!("{what}, {name}"),
            rate / tcp,
            rate / tls
        );
    }
}

/// A cluster of which one node is sent on the detour and back.
struct Place {
    name: &'static str,
    cluster: Cluster,
    node: usize,
    path: PathBuf,
}

impl Place {
    fn set(name: &'static str, folder: &Path) -> Self {
        let folder = TempDir::with_prefix_in("csv-", folder).expect("a temporary folder");
        let cluster = Cluster::start_in(folder, "2G");
        let shown = cluster.ctl(1).must(&["volume", "show", "vol1"]);
        let owner = (1..=3).find(|node| shown["owner"] == cluster.name(*node)).expect("the owner is a node");
        let node = owner % 3 + 1;
        let path = cluster.mount(node).join("stream");
        fill(&path);
        Self { name, cluster, node, path }
    }

    fn order(&self, mode: &str) {
        let name = self.cluster.name(self.node);
        self.cluster.ctl(self.node).must(&["volume", "io-mode", "vol1", mode, "--node", &name]);
    }
}

fn fill(path: &Path) {
    let file = File::create(path).expect("made");
    let piece = AlignedBuf::copy_of(&[7; MIB]);
    for at in 0..AMOUNT {
        file.write_all_at(&piece, at * MIB as u64).expect("written");
    }
    file.sync_all().expect("stable");
}

/// MiB per second of a file, by as many threads as requests are to be under way. Their buffers are aligned, as a VM's and a
/// database's are: the kernel cuts a MiB that begins within a page in two, of which neither is whole blocks.
fn transfer(path: &Path, write: bool) -> f64 {
    let began = Instant::now();
    std::thread::scope(|scope| {
        for lane in 0..DEPTH {
            scope.spawn(move || {
                let file = File::options().read(true).write(true).open(path).expect("there");
                let mut piece = AlignedBuf::copy_of(&[9; MIB]);
                for at in (lane as u64..AMOUNT).step_by(DEPTH) {
                    if write {
                        file.write_all_at(&piece, at * MIB as u64).expect("written");
                    } else {
                        file.read_exact_at(&mut piece, at * MIB as u64).expect("read");
                    }
                }
            });
        }
    });
    let amount = AMOUNT as f64;
    amount / began.elapsed().as_secs_f64()
}

/// MiB per second of one connection on the loopback.
fn loopback() -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut stream = TcpStream::connect(address).expect("connected");
            let piece = vec![5; MIB];
            for _ in 0..AMOUNT {
                stream.write_all(&piece).expect("sent");
            }
        });
        let (mut stream, _) = listener.accept().expect("accepted");
        let mut piece = vec![0; MIB];
        for _ in 0..AMOUNT {
            stream.read_exact(&mut piece).expect("received");
        }
    });
    let amount = AMOUNT as f64;
    amount / began.elapsed().as_secs_f64()
}
