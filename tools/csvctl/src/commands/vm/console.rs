//! `csvctl vm console`.

use std::time::Duration;

use api::Error;
use api::pb::VmConsoleRequest;
use clap::Args;
use serde::Serialize;

use crate::context::Context;
use crate::units;

#[derive(Debug, Args)]
pub(crate) struct Console {
    /// Name of the VM
    name: String,
    /// Go on with what comes next, until interrupted or the VM ends; with --json one document per line
    #[arg(long)]
    follow: bool,
    /// With --follow: end as soon as there is something new, at the latest after this time
    #[arg(long, value_name = "MS", requires = "follow", value_parser = units::parse_duration)]
    limit_ms: Option<Duration>,
    /// Start at this byte of what the VM has written since its boot; without it --limit-ms starts at the end
    #[arg(long, value_name = "BYTE")]
    from: Option<u64>,
}

#[derive(Serialize)]
struct Chunk {
    vm: String,
    from: u64,
    next: u64,
    text: String,
}

impl Console {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let endless = self.follow && self.limit_ms.is_none();
        let mut client = context.client().await?;
        let from = match (self.from, self.limit_ms) {
            (Some(from), _) => from,
            (None, Some(_)) => end_of(&mut client, &self.name).await?,
            (None, None) => 0,
        };
        let request = VmConsoleRequest {
            name: self.name.clone(),
            from,
            follow: self.follow,
            limit_ms: self.limit_ms.map_or(0, |limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)),
        };
        let mut stream = client.vm_console(request).await?.into_inner();
        let mut all = Collected { from: None, next: from, data: Vec::new() };
        while let Some(chunk) = stream.message().await? {
            if !context.ui.is_json() {
                context.ui.raw(&chunk.data)?;
                continue;
            }
            all.add(chunk.from, chunk.next, &chunk.data);
            if endless {
                let part =
                    std::mem::replace(&mut all, Collected { from: None, next: chunk.next, data: Vec::new() });
                context.ui.show(&part.document(&self.name), |_| String::new())?;
            }
        }
        if context.ui.is_json() && !endless {
            context.ui.show(&all.document(&self.name), |_| String::new())?;
        }
        Ok(())
    }
}

/// Where the output ends now.
async fn end_of(client: &mut api::Client, name: &str) -> Result<u64, Error> {
    let vm = client.vm_show(api::pb::VmRequest { name: name.to_owned() }).await?.into_inner();
    Ok(vm.console_bytes)
}

/// Pieces of the console, joined before they become text: a character may lie across two of them.
struct Collected {
    from: Option<u64>,
    next: u64,
    data: Vec<u8>,
}

impl Collected {
    fn add(&mut self, from: u64, next: u64, data: &[u8]) {
        self.from.get_or_insert(from);
        self.next = next;
        self.data.extend_from_slice(data);
    }

    fn document(self, vm: &str) -> Chunk {
        Chunk {
            vm: vm.to_owned(),
            from: self.from.unwrap_or(self.next),
            next: self.next,
            text: String::from_utf8_lossy(&self.data).into_owned(),
        }
    }
}
