//! Our NBD server and client beside qemu's and fio's: one file, Unix sockets, one run.
//!
//! `nbd_io [--dir DIR] [--rounds N]`
//!
//! ```text
//!   servers:  fio's client -> qemu-nbd          -> file        clients:  fio's client -> qemu-nbd -> file
//!             fio's client -> csvctl nbd export -> file                  our client   -> qemu-nbd -> file
//! ```
//! Everything past the page cache. Turns are short and alternate, so that whatever else the machine does meets both sides; the
//! median counts.
#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a harness: it measures time and talks to people"
)]

mod client;
mod fio;
mod server;

use std::path::{Path, PathBuf};

use benchmarks::{Row, median, print_table};
use server::Server;

type Failure = Box<dyn std::error::Error>;

const MIB: usize = 1 << 20;
/// Size of the file, all of it written before anything is measured.
const FILE_BYTES: u64 = 1 << 30;

/// A load, in what a client does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    name: &'static str,
    write: bool,
    random: bool,
    block_bytes: usize,
    depth: usize,
}

const LOADS: [Load; 4] = [
    Load { name: "4 KiB random read, depth 32", write: false, random: true, block_bytes: 4096, depth: 32 },
    Load { name: "4 KiB random write, depth 32", write: true, random: true, block_bytes: 4096, depth: 32 },
    Load { name: "1 MiB sequential read, depth 4", write: false, random: false, block_bytes: MIB, depth: 4 },
    Load { name: "1 MiB sequential write, depth 4", write: true, random: false, block_bytes: MIB, depth: 4 },
];

struct Arguments {
    dir: PathBuf,
    rounds: usize,
}

impl Arguments {
    fn parse() -> Result<Self, Failure> {
        let mut parsed = Self { dir: std::env::temp_dir(), rounds: 5 };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or(format!("{word} needs a value"));
            match word.as_str() {
                "--dir" => parsed.dir = value()?.into(),
                "--rounds" => parsed.rounds = value()?.parse()?,
                _ => return Err(format!("{word}: not known; use --dir DIR, --rounds N").into()),
            }
        }
        Ok(parsed)
    }
}

fn main() -> Result<(), Failure> {
    let arguments = Arguments::parse()?;
    let folder = tempfile::Builder::new().prefix("nbd_io").tempdir_in(&arguments.dir)?;
    let (dir, rounds) = (folder.path(), arguments.rounds);
    let file = dir.join("disk.raw");
    client::fill(&file, FILE_BYTES)?;
    print_table(
        "As a server, under fio's client (IOPS)",
        "qemu-nbd",
        "csvctl",
        &servers(dir, &file, rounds)?,
    );
    print_table("As a client, of qemu-nbd (IOPS)", "fio", "blockio", &clients(dir, &file, rounds)?);
    println!("reproduce: cargo xtask bench nbd_io");
    Ok(())
}

/// Both servers have the file open in turn, never at once.
fn servers(dir: &Path, file: &Path, rounds: usize) -> Result<Vec<Row>, Failure> {
    let start = [Server::qemu as fn(&Path, &Path) -> Result<Server, Failure>, Server::ours];
    let mut figures = LOADS.map(|_| [Vec::new(), Vec::new()]);
    for round in 0..rounds {
        for side in [round % 2, 1 - round % 2] {
            let server = start[side](file, &dir.join(format!("{side}.sock")))?;
            for (load, figures) in LOADS.iter().zip(&mut figures) {
                figures[side].push(fio::drive(server.socket(), load)?);
            }
        }
    }
    Ok(rows(figures, 1.0))
}

fn clients(dir: &Path, file: &Path, rounds: usize) -> Result<Vec<Row>, Failure> {
    let server = Server::qemu(file, &dir.join("clients.sock"))?;
    let drive = [fio::drive as fn(&Path, &Load) -> Result<f64, Failure>, client::drive];
    let mut figures = LOADS.map(|_| [Vec::new(), Vec::new()]);
    for round in 0..rounds {
        for (load, figures) in LOADS.iter().zip(&mut figures) {
            for side in [round % 2, 1 - round % 2] {
                figures[side].push(drive[side](server.socket(), load)?);
            }
        }
    }
    Ok(rows(figures, 0.95))
}

fn rows(figures: [[Vec<f64>; 2]; LOADS.len()], goal: f64) -> Vec<Row> {
    let row = |(load, [mut base, mut ours]): (&Load, [Vec<f64>; 2])| Row {
        name: load.name.into(),
        base: median(&mut base),
        ours: median(&mut ours),
        goal,
    };
    LOADS.iter().zip(figures).map(row).collect()
}
