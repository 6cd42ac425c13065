//! The link: this program runs itself in a network namespace whose loopback is shaped. Everything that it starts is inside.

use std::os::unix::process::CommandExt;
use std::process::Command;

use cluster_tests::run_tool;

use crate::Failure;

/// Set for the program inside of the namespace.
const INSIDE: &str = "CSV_BENCH_INSIDE";

/// Returns inside of the namespace; outside of it this program is replaced by one that is inside.
pub(crate) fn enter(mbit: u64) -> Result<(), Failure> {
    if std::env::var_os(INSIDE).is_none() {
        // What was measured outside is not measured again.
        let arguments: Vec<String> =
            std::env::args().skip(1).map(|word| word.replace(",stream", "").replace("stream,", "")).collect();
        if arguments.iter().any(|word| word == "stream") {
            std::process::exit(0);
        }
        let only = if arguments.iter().any(|word| word == "--only") {
            Vec::new()
        } else {
            vec!["--only".to_owned(), crate::ALL.replace(",stream", "")]
        };
        let mut command = Command::new("unshare");
        command.arg("--net").arg(std::env::current_exe()?).args(arguments).args(only);
        return Err(command.env(INSIDE, "1").exec().into());
    }
    run_tool("ip", &["link", "set", "lo", "up"]);
    let rate = format!("{mbit}mbit");
    // Short queues, as switches have them: what waits in one delays everything behind it.
    run_tool(
        "tc",
        &["qdisc", "add", "dev", "lo", "root", "tbf", "rate", &rate, "burst", "256kb", "limit", "2mb"],
    );
    Ok(())
}
