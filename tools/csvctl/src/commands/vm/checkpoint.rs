//! `csvctl vm checkpoint`.

use api::Error;
use api::pb::{VmCheckpointRequest, VmCheckpoints};
use clap::{Args, Subcommand};

use super::VmName;
use crate::context::Context;
use crate::ui;

#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointCommand {
    /// Keep a VM as it is now, with its memory if it runs; it goes on at once
    Create(Create),
    /// List the checkpoints of a VM
    List(VmName),
    /// Return a VM to a checkpoint; what it has done since is given up
    Restore(Named),
    /// Forget a checkpoint, and merge its images with what rests on them
    Delete(Named),
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Name of the VM
    name: String,
    /// Name of the checkpoint [default: the next free one of checkpoint-1, checkpoint-2, ...]
    checkpoint: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Named {
    /// Name of the VM
    name: String,
    /// Name of the checkpoint
    checkpoint: String,
    /// Check everything, change nothing
    #[arg(long)]
    dry_run: bool,
}

impl CheckpointCommand {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Self::List(vm) => show(ask(context, request(vm.name, "list")).await?, context),
            Self::Create(create) => create.run(context).await,
            Self::Restore(named) => {
                let what = format!("vm checkpoint restore gives up what VM {} has done since", named.name);
                named.run("restore", &what, context).await
            }
            Self::Delete(named) => {
                let what = format!("vm checkpoint delete forgets {} of VM {}", named.checkpoint, named.name);
                named.run("delete", &what, context).await
            }
        }
    }
}

impl Create {
    async fn run(self, context: &Context) -> Result<(), Error> {
        let checkpoint = match self.checkpoint {
            Some(checkpoint) => checkpoint,
            None => next_name(&ask(context, request(self.name.clone(), "list")).await?),
        };
        let spinner = context.ui.spinner(&format!("VM {}: making checkpoint {checkpoint}", self.name));
        let made = ask(context, VmCheckpointRequest { checkpoint, ..request(self.name, "create") }).await?;
        drop(spinner);
        show(made, context)
    }
}

impl Named {
    async fn run(self, action: &str, what: &str, context: &Context) -> Result<(), Error> {
        if !self.dry_run {
            context.ui.confirm(what, &self.name)?;
        }
        let spinner =
            context.ui.spinner(&format!("VM {}: checkpoint {}: {action}", self.name, self.checkpoint));
        let (checkpoint, dry_run) = (self.checkpoint, self.dry_run);
        let asked = VmCheckpointRequest { checkpoint, dry_run, ..request(self.name, action) };
        let left = ask(context, asked).await?;
        drop(spinner);
        show(left, context)
    }
}

fn request(name: String, action: &str) -> VmCheckpointRequest {
    VmCheckpointRequest { name, action: action.to_owned(), ..VmCheckpointRequest::default() }
}

async fn ask(context: &Context, request: VmCheckpointRequest) -> Result<VmCheckpoints, Error> {
    Ok(context.client().await?.vm_checkpoint(request).await?.into_inner())
}

fn next_name(there: &VmCheckpoints) -> String {
    let taken = |name: &String| there.checkpoints.iter().any(|checkpoint| checkpoint.name == *name);
    let names = (1_u32..).map(|number| format!("checkpoint-{number}"));
    names.into_iter().find(|name| !taken(name)).expect("there are more numbers than checkpoints")
}

fn show(checkpoints: VmCheckpoints, context: &Context) -> Result<(), Error> {
    context.ui.show(&checkpoints, text)
}

fn text(checkpoints: &VmCheckpoints) -> String {
    let rows = checkpoints.checkpoints.iter().map(|checkpoint| {
        let disks: Vec<_> = checkpoint.disks.iter().map(|disk| disk.path.as_str()).collect();
        [
            checkpoint.name.clone(),
            checkpoint.after.clone(),
            if checkpoint.state.is_empty() { "no" } else { "yes" }.to_owned(),
            if checkpoint.name == checkpoints.checkpoint { "<- now" } else { "" }.to_owned(),
            disks.join(", "),
        ]
    });
    let kept = checkpoints.kept.iter().map(|kept| format!("\nnote: an image stays: {kept}"));
    ui::table(["checkpoint", "after", "memory", "", "disks"], rows) + &kept.collect::<String>()
}

#[cfg(test)]
mod tests {
    use api::pb::VmCheckpoint;

    use super::*;

    #[test]
    fn a_checkpoint_without_a_name_gets_the_next_free_one() {
        let of = |names: &[&str]| VmCheckpoints {
            checkpoints: names
                .iter()
                .map(|name| VmCheckpoint { name: (*name).into(), ..VmCheckpoint::default() })
                .collect(),
            ..VmCheckpoints::default()
        };
        assert_eq!(next_name(&of(&[])), "checkpoint-1");
        assert_eq!(next_name(&of(&["checkpoint-1", "mine", "checkpoint-3"])), "checkpoint-2");
    }
}
