//! `csvctl vm console`.

use std::io::{self, IsTerminal};
use std::time::Duration;

use api::Error;
use api::pb::{ConsoleChunk, VmConsoleRequest};
use clap::Args;
use serde::Serialize;

use super::typing::Typing;
use crate::context::Context;
use crate::units;

#[derive(Debug, Args)]
pub(crate) struct Console {
    /// Name of the VM
    name: String,
    /// Go on with what comes next, also when the VM moves or boots again, until interrupted or it ends; with --json one document
    /// per line
    #[arg(long)]
    follow: bool,
    /// With --follow: end as soon as there is something new, at the latest after this time
    #[arg(long, value_name = "MS", requires = "follow", value_parser = units::parse_duration)]
    limit_ms: Option<Duration>,
    /// Start at this byte of what the VM has written since its boot; without it --limit-ms starts at the end. Of a VM that has
    /// stopped or failed, its last output is kept until it starts again
    #[arg(long, value_name = "BYTE")]
    from: Option<u64>,
    /// Type there what standard input has, to its end, as fast as the guest reads it; shows the console only with --follow
    #[arg(long, conflicts_with = "limit_ms")]
    send: bool,
}

#[derive(Serialize)]
struct Typed {
    vm: String,
    typed_bytes: u64,
}

#[derive(Serialize)]
struct Chunk {
    vm: String,
    from: u64,
    next: u64,
    /// Which boot of the VM positions count from; 0: not known.
    boot: u64,
    text: String,
    /// What has become of the VM, in the last document of one that is followed.
    #[serde(skip_serializing_if = "String::is_empty")]
    ended: String,
}

impl Console {
    pub(crate) async fn run(mut self, context: &Context) -> Result<(), Error> {
        let mut client = context.client().await?;
        if self.send && !self.follow {
            let typed_bytes = Typing::input(client, &self.name)?.end().await?;
            return context.ui.show(&Typed { vm: self.name, typed_bytes }, |_| String::new());
        }
        let at_terminal = self.is_at_terminal(context);
        self.follow |= at_terminal;
        let endless = self.follow && self.limit_ms.is_none();
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
            boot: 0,
        };
        let mut stream = client.vm_console(request).await?.into_inner();
        let mut typing = match (at_terminal, self.send) {
            (true, _) => {
                context.ui.note(&format!("Console of VM {}; Ctrl-] leaves", self.name));
                Some(Typing::keys(client, &self.name)?)
            }
            (false, true) => Some(Typing::input(client, &self.name)?),
            (false, false) => None,
        };
        let mut all = Collected { next: from, ..Collected::default() };
        loop {
            let next = tokio::select! {
                next = stream.message() => next?,
                ended = end_of_typing(&mut typing) => {
                    ended?;
                    if at_terminal {
                        break;
                    }
                    typing = None;
                    continue;
                }
            };
            let Some(chunk) = next else { break };
            if !context.ui.is_json() {
                self.print(context, &chunk, all.boot)?;
                all.boot = chunk.boot;
                continue;
            }
            all.add(&chunk);
            if endless {
                let part =
                    std::mem::replace(&mut all, Collected { next: chunk.next, ..Collected::default() });
                context.ui.show(&part.document(&self.name), |_| String::new())?;
            }
        }
        if context.ui.is_json() && !endless {
            context.ui.show(&all.document(&self.name), |_| String::new())?;
        }
        Ok(())
    }

    /// Somebody sits there and asks for nothing but the console.
    fn is_at_terminal(&self, context: &Context) -> bool {
        let plain = !self.follow && !self.send && self.from.is_none() && !context.ui.is_json();
        plain && io::stdin().is_terminal() && io::stdout().is_terminal()
    }

    /// Output as it is; what becomes of the VM is not a part of it.
    fn print(&self, context: &Context, chunk: &ConsoleChunk, boot_before: u64) -> Result<(), Error> {
        if boot_before != 0 && chunk.boot != 0 && chunk.boot != boot_before {
            context.ui.note(&format!("VM {}: it boots again", self.name));
        }
        context.ui.raw(&chunk.data)?;
        if !chunk.ended.is_empty() {
            context.ui.note(&format!("VM {}: {}", self.name, chunk.ended));
        }
        Ok(())
    }
}

/// Never, where nobody types.
async fn end_of_typing(typing: &mut Option<Typing>) -> Result<u64, Error> {
    match typing {
        Some(typing) => typing.end().await,
        None => std::future::pending().await,
    }
}

/// Where the output ends now.
async fn end_of(client: &mut api::Client, name: &str) -> Result<u64, Error> {
    let vm = client.vm_show(api::pb::VmRequest { name: name.to_owned() }).await?.into_inner();
    Ok(vm.console_bytes)
}

/// Pieces of the console, joined before they become text: a character may lie across two of them.
#[derive(Default)]
struct Collected {
    from: Option<u64>,
    next: u64,
    boot: u64,
    data: Vec<u8>,
    ended: String,
}

impl Collected {
    fn add(&mut self, chunk: &ConsoleChunk) {
        self.from.get_or_insert(chunk.from);
        (self.next, self.boot) = (chunk.next, chunk.boot);
        self.data.extend_from_slice(&chunk.data);
        self.ended.clone_from(&chunk.ended);
    }

    fn document(self, vm: &str) -> Chunk {
        Chunk {
            vm: vm.to_owned(),
            from: self.from.unwrap_or(self.next),
            next: self.next,
            boot: self.boot,
            text: String::from_utf8_lossy(&self.data).into_owned(),
            ended: self.ended,
        }
    }
}
