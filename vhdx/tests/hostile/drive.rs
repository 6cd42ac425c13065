//! Feeds a fuzz target without a fuzzer: the inputs in its corpus, then inputs made from seeds.
//!
//! **Invariant:** an input that fails is made as short as it can be before it is reported, in a form that can be put into
//! the corpus.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::common::Random;
use crate::{seeds, variable};

/// Attempts to make a failing input shorter.
const ATTEMPTS_MAX: usize = 300;

/// Gives `target` its corpus, and so many inputs of at most `len_max` bytes for each seed.
pub(crate) fn drive(name: &str, target: fn(&[u8]), inputs: u64, len_max: u64) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    for entry in std::fs::read_dir(&corpus).into_iter().flatten() {
        let path = entry.expect("the corpus is readable").path();
        let data = std::fs::read(&path).expect("the corpus is readable");
        try_input(target, &data, &path.to_string_lossy());
    }
    let inputs = inputs * variable("VHDX_HOSTILE_CASES").unwrap_or(1);
    for seed in seeds() {
        for number in 0..inputs {
            let mut random = Random((seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1);
            let len = random.below(len_max) + 1;
            let data: Vec<u8> = (0..len).map(|_| random.next().to_le_bytes()[3]).collect();
            try_input(target, &data, &format!("{name}, VHDX_HOSTILE_SEED={seed}, input {number}"));
        }
    }
}

fn fails(target: fn(&[u8]), data: &[u8]) -> bool {
    catch_unwind(AssertUnwindSafe(|| target(data))).is_err()
}

fn try_input(target: fn(&[u8]), data: &[u8], why: &str) {
    if !fails(target, data) {
        return;
    }
    let short = shortened(target, data.to_vec());
    let hex: String = short.iter().map(|byte| format!("\\x{byte:02x}")).collect();
    panic!("{why} fails; shortest: printf '{hex}' > fuzz/corpus/TARGET/NAME");
}

/// Leaves out pieces of halving length as long as it still fails.
fn shortened(target: fn(&[u8]), mut data: Vec<u8>) -> Vec<u8> {
    let (mut piece, mut attempts) = (data.len() / 2, 0);
    while piece > 0 {
        let mut at = 0;
        while at + piece <= data.len() && attempts < ATTEMPTS_MAX {
            let shorter = [&data[..at], &data[at + piece..]].concat();
            attempts += 1;
            if fails(target, &shorter) {
                data = shorter;
            } else {
                at += piece;
            }
        }
        piece /= 2;
    }
    data
}
