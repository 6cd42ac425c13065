//! Rounds of random faults under verified load: `cargo xtask faults [--rounds N] [--seed N]`.
//!
//! A failure prints the seed and keeps the nodes' folders and logs.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people at a terminal")]
#![expect(clippy::disallowed_methods, reason = "shows how long each round took")]

use std::process::ExitCode;
use std::time::Instant;

use cluster_tests::fire::{Dice, Rounds};

const ROUNDS: u64 = 100;
const USAGE: &str = "usage: faults [--rounds N] [--seed N]";

fn main() -> ExitCode {
    let (rounds, seed) = match options(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(what) => {
            eprintln!("{what}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    println!("{rounds} rounds, seed {seed}");
    match run(rounds, seed) {
        Ok([blocks, names, numbers]) => {
            println!(
                "{blocks} blocks, {names} names and {numbers} numbers were acknowledged, and none was lost"
            );
            ExitCode::SUCCESS
        }
        Err(what) => {
            eprintln!("FAILED, seed {seed}: {what}");
            ExitCode::FAILURE
        }
    }
}

fn options(mut words: impl Iterator<Item = String>) -> Result<(u64, u64), String> {
    let (mut rounds, mut seed) = (ROUNDS, None);
    while let Some(word) = words.next() {
        let number = words.next().and_then(|text| text.parse().ok());
        let number = number.ok_or_else(|| format!("{word} wants a number"))?;
        match word.as_str() {
            "--rounds" => rounds = number,
            "--seed" => seed = Some(number),
            other => return Err(format!("unknown option {other}")),
        }
    }
    Ok((rounds, seed.unwrap_or_else(Dice::fresh_seed)))
}

fn run(number: u64, seed: u64) -> Result<[u64; 3], String> {
    let mut rounds = Rounds::begin(seed)?;
    for round in 1..=number {
        let began = Instant::now();
        match rounds.round() {
            Ok(outcome) => println!("{round:4}  {:5.1} s  {outcome}", began.elapsed().as_secs_f64()),
            Err(what) => {
                let kept = rounds.keep();
                return Err(format!("round {round}: {what}; the nodes' folders are in {}", kept.display()));
            }
        }
    }
    rounds.finish()
}
