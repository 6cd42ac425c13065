//! Moves in a row under load, as many as asked for: `moves [ROUNDS]`, 100 rounds of two guests unless told otherwise.
#![expect(clippy::print_stdout, reason = "a program for people at a terminal")]

fn main() {
    let rounds = std::env::args().nth(1).map_or(100, |word| word.parse().expect("a number of rounds"));
    let outcome = cluster_tests::move_under_load(rounds, |so_far| {
        if so_far.moves % 20 == 0 {
            println!("{} moves, no failed check", so_far.moves);
        }
    });
    for (kind, mut figures) in [("live", outcome.live_ms), ("quick", outcome.quick_ms)] {
        figures.sort_by(f64::total_cmp);
        let at = |percent: usize| figures.get((figures.len() * percent).div_ceil(100).saturating_sub(1));
        if let (Some(half), Some(most)) = (at(50), at(99)) {
            println!("{} {kind} moves: blackout p50 {half:.1} ms, p99 {most:.1} ms", figures.len());
        }
    }
    println!("{} moves under load, no failed check, nothing acknowledged lost", outcome.moves);
}
