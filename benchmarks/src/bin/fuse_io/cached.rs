//! Looking at the same things again and again, where nothing changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use benchmarks::{Row, median};

const FILES: usize = 100;
const LOOKS: usize = 20;
const BYTES: usize = 16 << 10;

/// Tells rows for the mounts of the peer and of ours.
pub(crate) fn measure(mounts: &[PathBuf; 2], tell: fn(&Row)) {
    for mount in mounts {
        fs::create_dir(mount.join("looked-at")).expect("mkdir");
        (0..FILES).for_each(|file| fs::write(path(mount, file), vec![7; BYTES]).expect("write"));
    }
    let stat = |mount: &Path| rate(mount, |file| assert!(fs::symlink_metadata(file).is_ok()));
    let read = |mount: &Path| rate(mount, |file| assert_eq!(fs::read(file).expect("read").len(), BYTES));
    tell(&row("stat", mounts, stat));
    tell(&row("open, read 16 KiB, close", mounts, read));
    mounts
        .iter()
        .for_each(|mount| fs::remove_dir_all(mount.join("looked-at")).expect("everything goes again"));
}

fn path(mount: &Path, file: usize) -> PathBuf {
    mount.join("looked-at").join(format!("f{file}"))
}

fn row(name: &str, mounts: &[PathBuf; 2], figure: impl Fn(&Path) -> f64) -> Row {
    let mut figures = [Vec::new(), Vec::new()];
    for _ in 0..5 {
        for (side, mount) in mounts.iter().enumerate() {
            figures[side].push(figure(mount));
        }
    }
    let [base, ours] = figures.map(|mut side| median(&mut side));
    Row { name: name.into(), base, ours, goal: 1.0 }
}

/// Looks per second, each file in turn.
#[expect(clippy::disallowed_methods, clippy::cast_precision_loss, reason = "a figure for people")]
fn rate(mount: &Path, look: impl Fn(&Path)) -> f64 {
    let files: Vec<PathBuf> = (0..FILES).map(|file| path(mount, file)).collect();
    files.iter().for_each(|file| look(file));
    let started = Instant::now();
    for _ in 0..LOOKS {
        files.iter().for_each(|file| look(file));
    }
    (FILES * LOOKS) as f64 / started.elapsed().as_secs_f64()
}
