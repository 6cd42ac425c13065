//! Packets through a virtio network card and a real tap: a stream that the guest leaves to its host to cut, beside one of packets of 1,514
//! bytes; and the same the other way. The queue is in memory, its driver is a thread, and no guest takes processor time.
//!
//! ```text
//!   send:     driver -> queue -> card -> tap -> bridge -> a veth device       receive:  second tap -> bridge -> tap -> card -> queue -> driver
//! ```
//! `net_io [--rounds N]`, as root: it makes a network of its own (`unshare`, `mount`, `ip`), which is gone when it ends. That what was
//! sent has arrived is read from the veth device.
#![expect(clippy::disallowed_methods, clippy::print_stdout, reason = "a harness: it measures time")]

use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use benchmarks::{Row, Turns, median, print_heading, print_row};
use cluster_tests::until;
use hv::{NetConfig, NetCounts, NetTask, drive_net};
use hv_runner::config::NetSpec;
use uuid::Uuid;

type Failure = Box<dyn std::error::Error>;

/// Set in the process that has the network of its own.
const INSIDE: &str = "NET_IO_INSIDE";
/// State of a bridge's port.
const FORWARDING: &str = "3";
const SEGMENT_BYTES: usize = 1460;
const HEADERS_BYTES: usize = 54;
const STREAM_BYTES: usize = 44 * SEGMENT_BYTES;

/// A frame of TCP on IPv4 to somebody behind the bridge.
fn frame(payload: usize) -> Vec<u8> {
    let total = u16::try_from(payload + 40).expect("an IPv4 packet").to_be_bytes();
    let mut frame = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 8, 0];
    frame.extend([0x45, 0, total[0], total[1], 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0x10, 0, 0x20, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    let sum = checksum(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum);
    frame.resize(HEADERS_BYTES + payload, 0x55);
    frame
}

/// Of an IPv4 header: a bridge with filters looks at it.
fn checksum(header: &[u8]) -> [u8; 2] {
    let words = header.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    u16::try_from(!folded & 0xffff).expect("16 bits").to_be_bytes()
}

/// "Cut it into segments, and put the checksum into each."
fn stream_header() -> [u8; 12] {
    let [low, high] = u16::try_from(SEGMENT_BYTES).expect("a segment").to_le_bytes();
    [1, 1, 54, 0, low, high, 34, 0, 16, 0, 0, 0]
}

fn ip(words: &str) -> Result<String, Failure> {
    run("ip", words)
}

fn run(program: &str, words: &str) -> Result<String, Failure> {
    let output = Command::new(program).args(words.split(' ')).output()?;
    if !output.status.success() {
        return Err(format!("{program} {words}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

fn make_network() -> Result<(), Failure> {
    // The files of the network's devices are those of whoever mounts them.
    run("mount", "-t sysfs none /sys")?;
    ip("link add bridge0 type bridge mcast_snooping 0")?;
    ip("link add sink0 type veth peer name sink1")?;
    ip("link set sink1 up")?;
    for tap in ["tap0", "tap1"] {
        ip(&format!("tuntap add {tap} mode tap"))?;
    }
    for port in ["sink0", "tap0", "tap1"] {
        ip(&format!("link set {port} master bridge0 up"))?;
    }
    ip("link set bridge0 up").map(drop)
}

/// Bytes that have left through the veth device.
fn arrived() -> Result<u64, Failure> {
    let shown: serde_json::Value = serde_json::from_str(&ip("-j -s link show sink0")?)?;
    shown[0]["stats64"]["tx"]["bytes"].as_u64().ok_or_else(|| "no figure of the veth device".into())
}

/// The card of a tap, once the bridge passes on what comes from there.
fn card(tap: &str) -> Result<NetConfig, Failure> {
    let card = hv_runner::card(&NetSpec { tap: tap.into() }, Uuid::nil()).map_err(|failure| failure.error)?;
    let state = format!("/sys/class/net/{tap}/brport/state");
    let ask = || std::fs::read_to_string(&state).unwrap_or_default().trim().into();
    until("the bridge's port", ask, |state| state == FORWARDING);
    Ok(card)
}

/// The same card for a further turn.
fn again(card: &NetConfig) -> Result<NetConfig, Failure> {
    Ok(NetConfig { tap: card.tap.try_clone()?, mac: card.mac, offload: card.offload })
}

/// What a turn came to.
#[derive(Clone, Copy)]
struct Turn {
    mebibytes: f64,
    packets: f64,
    notifications: f64,
    interrupts: f64,
}

fn turn(counts: NetCounts, (bytes, packets): (u64, u64), took: Duration) -> Turn {
    let number = |count: u64| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
    let (seconds, mebibytes) = (took.as_secs_f64(), number(bytes >> 10) / 1024.0);
    Turn {
        mebibytes: mebibytes / seconds,
        packets: number(packets) / seconds,
        notifications: number(counts.notifications) / mebibytes,
        interrupts: number(counts.interrupts) / mebibytes,
    }
}

/// Sends so many MiB, and sees them arrive.
fn send(card: &NetConfig, offloads: bool, mebibytes: u64) -> Result<Turn, Failure> {
    let (header, payload) = if offloads { (stream_header(), STREAM_BYTES) } else { ([0; 12], SEGMENT_BYTES) };
    let packets = (mebibytes << 20) / payload as u64;
    let (before, start) = (arrived()?, Instant::now());
    let task = NetTask::Send { header, frame: frame(payload), packets };
    let counts = drive_net(again(card)?, offloads, &task)?;
    let took = start.elapsed();
    let (sent, came) = (packets * payload as u64, arrived()? - before);
    if came < sent {
        return Err(format!("{came} of {sent} bytes have arrived").into());
    }
    Ok(turn(counts, (sent, packets), took))
}

/// Receives so many MiB, of which somebody writes as much as is taken.
fn receive(card: &NetConfig, offloads: bool, from: &mut File, mebibytes: u64) -> Result<Turn, Failure> {
    let mut packet = stream_header().to_vec();
    packet.extend(frame(STREAM_BYTES));
    let (bytes, over) = (mebibytes << 20, AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                // What the bridge has no room for is lost.
                drop(from.write(&packet));
            }
        });
        let start = Instant::now();
        let counts = again(card).and_then(|card| Ok(drive_net(card, offloads, &NetTask::Receive { bytes })?));
        let took = start.elapsed();
        over.store(true, Ordering::SeqCst);
        let counts = counts?;
        Ok(turn(counts, (counts.bytes, counts.buffers), took))
    })
}

fn main() -> Result<(), Failure> {
    if std::env::var_os(INSIDE).is_none() {
        let program = std::env::current_exe()?;
        let mut again = Command::new("unshare");
        again.args(["--net", "--mount"]).arg(program).args(std::env::args_os().skip(1)).env(INSIDE, "1");
        return Err(again.exec().into());
    }
    let turns = Turns::of_command_line(7)?;
    make_network()?;
    let (first, mut second) = (card("tap0")?, card("tap1")?.tap);
    print_heading("a virtio network card", "cut by guest", "left to host");
    for (direction, per_turn) in [("send", 512), ("receive", 256)] {
        let mut found = [Vec::new(), Vec::new()];
        for round in 0..turns.rounds {
            for side in [round % 2, 1 - round % 2] {
                let turn = match direction {
                    "send" => send(&first, side == 1, per_turn)?,
                    _ => receive(&first, side == 1, &mut second, per_turn)?,
                };
                found[side].push(turn);
            }
        }
        let middle =
            |of: fn(&Turn) -> f64, side: usize| median(&mut found[side].iter().map(of).collect::<Vec<_>>());
        let row = |what: &str, of: fn(&Turn) -> f64| {
            print_row(&Row {
                name: format!("{direction}: {what}"),
                base: middle(of, 0),
                ours: middle(of, 1),
                goal: 0.0,
            });
        };
        row("MiB a second", |turn| turn.mebibytes);
        row("packets or buffers a second", |turn| turn.packets);
        row("notifications for a MiB", |turn| turn.notifications);
        row("interrupts for a MiB", |turn| turn.interrupts);
    }
    println!("{} turns of each side", turns.rounds);
    Ok(())
}
