//! Oracle 3: a name that is replaced by rename again and again, for metadata what the register is for data.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the name must lead to.
#[derive(Debug, Default)]
pub(super) struct Latest {
    acked: AtomicU64,
    attempted: AtomicU64,
}

impl Latest {
    /// Replaces the file at `path` by one with the next number.
    pub(super) fn step(&self, path: &Path) -> io::Result<()> {
        let number = self.attempted.fetch_add(1, Ordering::SeqCst) + 1;
        let fresh = path.with_extension("new");
        let mut file = File::create(&fresh)?;
        file.write_all(number.to_string().as_bytes())?;
        file.sync_all()?;
        fs::rename(&fresh, path)?;
        self.acked.store(number, Ordering::SeqCst);
        Ok(())
    }

    /// Reads the number through `path`, while it may be replaced.
    pub(super) fn check(&self, path: &Path) -> io::Result<()> {
        self.number(path).map(drop)
    }

    /// The writer has died: what is found counts from now on.
    pub(super) fn settle(&self, path: &Path) -> io::Result<()> {
        let found = self.number(path)?;
        self.acked.store(found, Ordering::SeqCst);
        self.attempted.store(found, Ordering::SeqCst);
        Ok(())
    }

    fn number(&self, path: &Path) -> io::Result<u64> {
        let at_least = self.acked.load(Ordering::SeqCst);
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && at_least == 0 => "0".to_owned(),
            // Outrun twice by the one who replaces it.
            Err(error) if error.kind() == io::ErrorKind::StaleNetworkFileHandle => return self.number(path),
            Err(error) => return Err(error),
        };
        let at_most = self.attempted.load(Ordering::SeqCst);
        match text.parse() {
            Ok(found) if (at_least..=at_most).contains(&found) => Ok(found),
            _ => {
                let what = format!("{} holds {text:?}, {at_least} was acknowledged", path.display());
                Err(io::Error::other(format!("LOST: {what} and {at_most} tried last")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_goes_back_is_noticed() {
        let folder = tempfile::tempdir().expect("a folder");
        let (latest, path) = (Latest::default(), folder.path().join("latest"));
        latest.check(&path).expect("nothing was promised yet");
        latest.step(&path).and_then(|()| latest.step(&path)).expect("replaced");
        latest.check(&path).expect("there");
        for bad in ["1", "3", ""] {
            fs::write(&path, bad).expect("written");
            assert!(latest.check(&path).is_err(), "{bad:?}");
        }
    }
}
