//! What the benchmarks share: medians, and a table of ratios against the raw device of the same run.
#![expect(clippy::print_stdout, reason = "programs for people at a terminal")]

mod apart;
mod fio;
mod local;
mod streams;
mod turns;

pub use apart::{ADDRESS, run_apart};
pub use fio::Job;
pub use local::{LocalVolume, fill, write_once};
pub use streams::Streams;
pub use turns::Turns;

/// One line of a comparison.
#[derive(Clone, Debug)]
pub struct Row {
    /// The workload.
    pub name: String,
    /// The raw device's figure.
    pub base: f64,
    /// Ours, in the same unit; larger is better.
    pub ours: f64,
    /// The ratio to reach.
    pub goal: f64,
}

/// The middle value; the mean of the two middle ones for an even count, 0 for none.
#[must_use]
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        count if count % 2 == 1 => values[count / 2],
        count => f64::midpoint(values[count / 2 - 1], values[count / 2]),
    }
}

/// The value below or at which this part (0 to 1) of the values lies, 0 for none.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an index into what a program measured: small, and not negative"
)]
pub fn percentile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() as f64 * part).ceil() as usize;
    values.get(rank.saturating_sub(1)).or(values.last()).copied().unwrap_or(0.0)
}

/// Prints the rows with their ratios, and whether each goal was reached in this run.
pub fn print_table(title: &str, base: &str, ours: &str, rows: &[Row]) {
    print_heading(title, base, ours);
    rows.iter().for_each(print_row);
}

/// Prints what stands above rows, for those who print each as soon as it is measured.
pub fn print_heading(title: &str, base: &str, ours: &str) {
    println!("{title}");
    println!("  {:42} {base:>12} {ours:>12} {:>7} {:>6}", "workload", "ratio", "goal");
}

/// Prints a row with its ratio, and whether its goal was reached in this run; without a peer's figure only ours.
pub fn print_row(row: &Row) {
    let Row { name, base, ours, goal } = row;
    if *base <= 0.0 {
        return println!("  {name:42} {:>12} {ours:12.1}", "-");
    }
    let ratio = ours / base;
    let verdict = match *goal {
        0.0 => "",
        goal if ratio >= goal => "reached",
        _ => "missed",
    };
    println!("  {name:42} {base:12.1} {ours:12.1} {ratio:7.2} {goal:6.2} {verdict}");
}
