//! `csvctl vm console`.

use api::Error;
use api::pb::VmConsoleRequest;
use clap::Args;

use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct Console {
    /// Name of the VM
    name: String,
    /// Go on until interrupted or the VM ends; with --json one document per line
    #[arg(long)]
    follow: bool,
    /// Start at this byte of what the VM has written since its boot
    #[arg(long, default_value_t = 0, value_name = "BYTE")]
    from: u64,
}

impl Console {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let (follow, from) = (self.follow, self.from);
        let request = VmConsoleRequest { name: self.name, from, follow };
        let mut stream = context.client().await?.vm_console(request).await?.into_inner();
        let mut all = Chunk { from, next: from, text: String::new() };
        let mut started = false;
        while let Some(chunk) = stream.message().await? {
            if !context.ui.is_json() {
                context.ui.raw(&chunk.data)?;
                continue;
            }
            let text = String::from_utf8_lossy(&chunk.data).into_owned();
            if follow {
                context.ui.show(&Chunk { from: chunk.from, next: chunk.next, text }, |_| String::new())?;
                continue;
            }
            if !started {
                all.from = chunk.from;
                started = true;
            }
            all.text += &text;
            all.next = chunk.next;
        }
        if context.ui.is_json() && !follow { context.ui.show(&all, |_| String::new()) } else { Ok(()) }
    }
}

#[derive(serde::Serialize)]
struct Chunk {
    from: u64,
    next: u64,
    text: String,
}
