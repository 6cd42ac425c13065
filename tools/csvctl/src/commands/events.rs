//! `csvctl events`.

use api::Error;
use api::pb::{Event, EventsRequest};
use clap::Args;

use crate::context::Context;
use crate::units;

/// Show what happened, on all nodes
#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Go on until interrupted; with --json one document per line
    #[arg(long)]
    follow: bool,
    /// Only what is younger than this, such as 5m
    #[arg(long, value_parser = units::parse_duration)]
    since: Option<std::time::Duration>,
}

impl Events {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let request = EventsRequest { follow: self.follow, since_ms: self.since.map_or(0, since_ms) };
        let mut stream = context.client().await?.events(request).await?.into_inner();
        if self.follow || !context.ui.is_json() {
            while let Some(event) = stream.message().await? {
                context.ui.show(&event, text)?;
            }
            return Ok(());
        }
        let mut events = Vec::new();
        while let Some(event) = stream.message().await? {
            events.push(event);
        }
        context.ui.show(&serde_json::json!({ "events": events }), |_| String::new())
    }
}

#[expect(clippy::disallowed_methods, reason = "the user means the time of day")]
fn since_ms(age: std::time::Duration) -> u64 {
    let start = std::time::SystemTime::now() - age;
    start
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

fn text(event: &Event) -> String {
    format!("{}  {:<8} {:<16} {}", units::moment(event.time_ms), event.node, event.kind, event.text)
}
