//! Oracle 2: a number in a file that the programs of all nodes raise, each time under a lock of the whole file.
//!
//! **Invariant:** no two acknowledged raises give the same number, and none is undone: the lock excludes, and what was
//! written under it is there when the next one gets it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// The numbers that were given.
#[derive(Debug, Default)]
pub(super) struct Counter {
    given: Mutex<BTreeSet<u64>>,
}

impl Counter {
    /// Raises the number.
    pub(super) fn step(&self, path: &Path) -> io::Result<()> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        file.lock()?;
        let highest = self.highest();
        let found = number_in(&file)?;
        if found < highest {
            return Err(io::Error::other(format!(
                "LOST: the counter is {found}, {highest} was acknowledged"
            )));
        }
        file.write_all_at(&(found + 1).to_le_bytes(), 0)?;
        file.sync_data()?;
        // Before the lock goes: whoever has it next must find at least this.
        let first = self.given.lock().unwrap_or_else(PoisonError::into_inner).insert(found + 1);
        if !first {
            return Err(io::Error::other(format!("LOST: the counter gave {} twice", found + 1)));
        }
        file.unlock()
    }

    /// Looks at the number without the lock.
    pub(super) fn check(&self, path: &Path) -> io::Result<()> {
        let highest = self.highest();
        let found = number_in(&File::open(path)?)?;
        if found >= highest {
            return Ok(());
        }
        Err(io::Error::other(format!("LOST: the counter is {found}, {highest} was acknowledged")))
    }

    fn highest(&self) -> u64 {
        self.given.lock().unwrap_or_else(PoisonError::into_inner).last().copied().unwrap_or(0)
    }
}

fn number_in(file: &File) -> io::Result<u64> {
    let mut bytes = [0; 8];
    match file.read_at(&mut bytes, 0)? {
        0 | 8 => Ok(u64::from_le_bytes(bytes)),
        read => Err(io::Error::other(format!("LOST: the counter has {read} bytes"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raise_that_is_undone_or_given_twice_is_noticed() {
        let folder = tempfile::tempdir().expect("a folder");
        let (counter, path) = (Counter::default(), folder.path().join("counter"));
        for _ in 0..3 {
            counter.step(&path).expect("raised");
        }
        std::fs::write(&path, 2_u64.to_le_bytes()).expect("written");
        assert!(counter.check(&path).is_err() && counter.step(&path).is_err());
    }
}
