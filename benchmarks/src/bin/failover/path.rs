//! A node loses its path to the LUN; and how fast the detour through a peer is.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use benchmarks::{Streams, median};

use crate::Figure;
use crate::stage::{Stage, ms};

const MIB: usize = 1 << 20;
/// MiB moved for one figure.
const AMOUNT: u64 = 512;
/// Figures of which the middle one counts.
const TURNS: usize = 3;
/// Requests of 1 MiB that are under way at once.
const DEPTH: u64 = 4;

/// From the loss of the path to the end of the first write that was begun after it.
pub(crate) fn lost(stage: &Stage) -> Figure {
    let node = stage.owner() % 3 + 1;
    let file = File::create(stage.cluster.mount(node).join("path")).expect("made");
    file.write_all_at(&[1; 4096], 0).expect("written");
    file.sync_all().expect("stable");
    let mut times = Vec::new();
    for _ in 0..stage.rounds {
        let began = Instant::now();
        stage.cluster.fault(node, "lun-fail");
        file.write_all_at(&[2; 4096], 0).expect("held, not failed");
        times.push(ms(began, Instant::now()));
        until_state(stage, node, "redirected_block");
        stage.cluster.fault(node, "lun-heal");
        until_state(stage, node, "direct");
    }
    Figure { name: "path lost: first write through a peer", ms: times, goals: (1000.0, 1000.0) }
}

fn until_state(stage: &Stage, node: usize, wanted: &str) {
    let name = stage.cluster.name(node);
    stage.until(wanted, || {
        let rows = stage.cluster.ctl(node).must(&["volume", "state", "vol1", "--node", &name]);
        rows["states"][0]["state"] == wanted
    });
}

/// 1 MiB sequential through a peer, beside plain TCP and plain TLS on the loopback and the direct way in the same run.
pub(crate) fn throughput(stage: &Stage) {
    let node = stage.owner() % 3 + 1;
    let name = stage.cluster.name(node);
    let path = stage.cluster.mount(node).join("stream");
    fill(&path);
    let order = |mode: &str| {
        stage.cluster.ctl(node).must(&["volume", "io-mode", "vol1", mode, "--node", &name]);
    };
    let streams = Streams::start().expect("a TLS stream");
    let mut found: [Vec<f64>; 6] = Default::default();
    for _ in 0..TURNS {
        let bare = [loopback(), streams.mib_per_second(AMOUNT << 20).expect("sent")];
        let direct = [transfer(&path, false), transfer(&path, true)];
        order("redirected");
        let redirected = [transfer(&path, false), transfer(&path, true)];
        order("direct");
        for (rates, rate) in found.iter_mut().zip([bare, direct, redirected].concat()) {
            rates.push(rate);
        }
    }
    let [tcp, tls, direct_read, direct_write, read, write] = found.map(|mut rates| median(&mut rates));
    println!(
        "1 MiB sequential, depth {DEPTH}, MiB/s: loopback TCP {tcp:.0}, a plain TLS stream there {tls:.0}"
    );
    for (name, rate, direct) in
        [("redirected read", read, direct_read), ("redirected write", write, direct_write)]
    {
        let ratio = rate / tcp;
        let verdict = if ratio >= 0.6 { "reached" } else { "missed" };
        println!(
            "{name:44} {rate:7.0} {ratio:9.2}  goal 0.60: {verdict}; {:.2} of TLS, {:.2} of direct I/O ({direct:.0})",
            rate / tls,
            rate / direct
        );
    }
}

fn fill(path: &Path) {
    let file = File::create(path).expect("made");
    let piece = vec![7; MIB];
    for at in 0..AMOUNT {
        file.write_all_at(&piece, at * MIB as u64).expect("written");
    }
    file.sync_all().expect("stable");
}

/// MiB per second of a file, by as many threads as requests are to be under way.
fn transfer(path: &Path, write: bool) -> f64 {
    let began = Instant::now();
    std::thread::scope(|scope| {
        for lane in 0..DEPTH {
            scope.spawn(move || {
                let file = File::options().read(true).write(true).open(path).expect("there");
                let mut piece = vec![9; MIB];
                for at in (lane..AMOUNT).step_by(usize::try_from(DEPTH).expect("small")) {
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
