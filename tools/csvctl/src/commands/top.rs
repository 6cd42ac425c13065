//! `csvctl top`.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use api::Error;
use api::pb::{TopNode, TopReport, TopRequest, TopVm, TopVolume};
use clap::Args;
use serde::Serialize;

use crate::context::Context;
use crate::{ui, units};

/// Show what everything does, again and again
#[derive(Debug, Args)]
pub(crate) struct Top {
    /// Time between two looks
    #[arg(long, value_parser = units::parse_duration, value_name = "TIME", default_value = "2s")]
    interval: Duration,
    /// End after so many looks; 0 goes on until interrupted
    #[arg(long, default_value_t = 0)]
    count: u64,
}

/// What `--json` prints, one document for each look.
#[derive(Serialize)]
struct Look {
    seconds: f64,
    nodes: Vec<TopNode>,
    volumes: Vec<Rated<TopVolume>>,
    vms: Vec<Rated<TopVm>>,
}

/// Something with what it does each second, since the look before.
#[derive(Serialize)]
struct Rated<T: Serialize> {
    #[serde(flatten)]
    what: T,
    per_second: BTreeMap<&'static str, f64>,
}

impl Top {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let mut client = context.client().await?;
        let mut before = client.top(TopRequest {}).await?.into_inner();
        let mut looks = 0;
        let clears = !context.ui.is_json() && std::io::stdout().is_terminal();
        loop {
            tokio::time::sleep(self.interval).await;
            let now = client.top(TopRequest {}).await?.into_inner();
            let heading = format!("cluster {}, led by {}", now.cluster, or_nobody(&now.leader));
            let look = compare(&before, &now);
            context.ui.show(&look, |look| {
                // Home, and clear: the view stays where it is.
                let clear = if clears { "\x1b[H\x1b[2J" } else { "" };
                format!("{clear}{heading}\n\n{}", text(look))
            })?;
            before = now;
            looks += 1;
            if looks == self.count {
                return Ok(());
            }
        }
    }
}

fn or_nobody(leader: &str) -> &str {
    if leader.is_empty() { "nobody" } else { leader }
}

/// What has happened between two reports.
fn compare(before: &TopReport, now: &TopReport) -> Look {
    let seconds = (now.time_ms.saturating_sub(before.time_ms)).max(1) as f64 / 1000.0;
    let rate = |then: u64, now: u64| now.saturating_sub(then) as f64 / seconds;
    let volumes = now.volumes.iter().map(|volume| {
        // Another coordinator counts from its own beginning.
        let then = before.volumes.iter().find(|it| it.name == volume.name && it.term == volume.term);
        let then = then.cloned().unwrap_or_else(|| volume.clone());
        let per_second = BTreeMap::from([
            ("requests", rate(then.requests, volume.requests)),
            ("commits", rate(then.commits, volume.commits)),
        ]);
        Rated { what: volume.clone(), per_second }
    });
    let vms = now.vms.iter().map(|vm| {
        let then = before.vms.iter().find(|it| it.name == vm.name).cloned().unwrap_or_else(|| vm.clone());
        let per_second = BTreeMap::from([
            ("reads", rate(then.reads, vm.reads)),
            ("writes", rate(then.writes, vm.writes)),
            ("flushes", rate(then.flushes, vm.flushes)),
        ]);
        Rated { what: vm.clone(), per_second }
    });
    Look { seconds, nodes: now.nodes.clone(), volumes: volumes.collect(), vms: vms.collect() }
}

fn text(look: &Look) -> String {
    let nodes = look.nodes.iter().map(|node| {
        let state = if node.drain.is_empty() {
            node.state.clone()
        } else {
            format!("{}, {}", node.state, node.drain)
        };
        [
            node.name.clone(),
            state,
            node.volumes.to_string(),
            node.vms.to_string(),
            format!("{:.1} ms", node.answer_ms),
        ]
    });
    let volumes = look.volumes.iter().map(|volume| {
        let it = &volume.what;
        [
            it.name.clone(),
            it.owner.clone(),
            it.state.clone(),
            figure(&volume.per_second, "requests"),
            figure(&volume.per_second, "commits"),
            it.clients.to_string(),
            format!("{} of {}", units::size(it.free_bytes), units::size(it.size_bytes)),
            it.not_direct.join(", "),
        ]
    });
    let vms = look.vms.iter().map(|vm| {
        let it = &vm.what;
        let state = if it.moving.is_empty() { it.state.clone() } else { format!("moving: {}", it.moving) };
        [
            it.name.clone(),
            it.owner.clone(),
            state,
            figure(&vm.per_second, "reads"),
            figure(&vm.per_second, "writes"),
            figure(&vm.per_second, "flushes"),
            it.errors.to_string(),
            it.reason.clone(),
        ]
    });
    [
        ui::table(["node", "state", "volumes", "vms", "answers in"], nodes),
        ui::table(
            ["volume", "owner", "state", "requests/s", "commits/s", "clients", "free", "not direct"],
            volumes,
        ),
        ui::table(["vm", "on", "state", "reads/s", "writes/s", "flushes/s", "errors", "reason"], vms),
    ]
    .join("\n\n")
}

fn figure(per_second: &BTreeMap<&'static str, f64>, name: &str) -> String {
    per_second.get(name).map_or_else(String::new, |rate| format!("{rate:.0}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(time_ms: u64, term: u64, requests: u64) -> TopReport {
        let volume = TopVolume { name: "vol1".into(), term, requests, ..TopVolume::default() };
        TopReport { time_ms, volumes: vec![volume], ..TopReport::default() }
    }

    #[test]
    fn rates_are_what_was_done_between_two_looks() {
        let look = compare(&report(1000, 1, 100), &report(3000, 1, 500));
        assert_eq!(look.volumes[0].per_second["requests"], 200.0);
        let moved = compare(&report(1000, 1, 100), &report(3000, 2, 7));
        assert_eq!(moved.volumes[0].per_second["requests"], 0.0, "a new coordinator has counted little");
    }
}
