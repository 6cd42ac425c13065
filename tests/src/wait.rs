//! Waits for what is to come: by asking, and with one bound for all.

use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest wait for anything that must happen. A bound, not a pause: a loaded machine may take long, and a scenario that
/// fails has time to lose.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Asks until the answer is as wanted, and returns it.
///
/// # Panics
/// When that takes longer than [`PATIENCE`]; `what` and the last answer are in the message.
pub fn until(what: &str, mut ask: impl FnMut() -> Value, wanted: impl Fn(&Value) -> bool) -> Value {
    let started = Instant::now();
    loop {
        let found = ask();
        if wanted(&found) {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "{what} did not happen within {PATIENCE:?}: {found}");
    }
}
