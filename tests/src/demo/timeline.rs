//! Printing what happens, when, and how long it took.

use std::time::Instant;

/// A story with a clock.
pub(crate) struct Timeline {
    started: Instant,
}

impl Timeline {
    pub(crate) fn start(title: &str) -> Self {
        println!("{title}\n");
        Self { started: Instant::now() }
    }

    /// Does one step and prints it with its duration. `work` gives the sentence of what came out.
    pub(crate) fn step<T>(&self, what: &str, work: impl FnOnce() -> (T, String)) -> T {
        let begun = Instant::now();
        let at = self.started.elapsed().as_secs_f64();
        let (value, outcome) = work();
        let took = begun.elapsed().as_secs_f64() * 1000.0;
        println!("{at:7.2} s  {what:<44} {took:8.0} ms  {outcome}");
        value
    }

    pub(crate) fn finish(&self, conclusion: &str) {
        println!("\n{:7.2} s  {conclusion}", self.started.elapsed().as_secs_f64());
    }
}
