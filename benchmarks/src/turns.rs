//! Options of programs that take turns with a peer.

use std::path::PathBuf;
use std::time::Duration;

/// How long and how often each side has its turn, and where files are made.
#[derive(Clone, Debug)]
pub struct Turns {
    /// Length of a turn.
    pub length: Duration,
    /// Turns of each side; the median counts.
    pub rounds: usize,
    /// The folder.
    pub dir: PathBuf,
}

impl Turns {
    /// `--seconds S`, `--rounds N` and `--dir DIR` of the command line; else turns of 0.4 s, `rounds`, and the system's temporary folder.
    ///
    /// # Errors
    /// When another word or no number is there.
    pub fn of_command_line(rounds: usize) -> Result<Self, Box<dyn std::error::Error>> {
        let mut turns = Self { length: Duration::from_millis(400), rounds, dir: std::env::temp_dir() };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or(format!("{word} needs a value"));
            match word.as_str() {
                "--seconds" => turns.length = Duration::try_from_secs_f64(value()?.parse()?)?,
                "--rounds" => turns.rounds = value()?.parse()?,
                "--dir" => turns.dir = value()?.into(),
                _ => return Err(format!("{word}: not known; use --seconds S, --rounds N, --dir DIR").into()),
            }
        }
        Ok(turns)
    }
}
