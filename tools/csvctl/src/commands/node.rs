//! `csvctl node`.

mod confirm_dead;
mod drain;
mod evict;
mod join;
mod leave;
mod list;
mod resume;
mod show;

use api::Error;
use api::pb::Node;
use clap::Subcommand;

use crate::context::Context;
use crate::ui;

#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// Make this machine a member, with a token
    Join(join::Join),
    /// List the members
    List(list::List),
    /// Show one member
    Show(show::Show),
    /// Move what a node has to others, and place nothing on it any more
    Drain(drain::Drain),
    /// Let a drained node take part again, and give it back what it had
    Resume(resume::Resume),
    /// Drain this node, end it, and leave the cluster for good
    Leave(leave::Leave),
    /// Vouch that a node is off which could not be fenced
    ConfirmDead(confirm_dead::ConfirmDead),
    /// Forget a member that is off
    Evict(evict::Evict),
}

impl NodeCommand {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Self::Join(command) => command.run(context).await,
            Self::List(command) => command.run(context).await,
            Self::Show(command) => command.run(context).await,
            Self::Drain(command) => command.run(context).await,
            Self::Resume(command) => command.run(context).await,
            Self::Leave(command) => command.run(context).await,
            Self::ConfirmDead(command) => command.run(context).await,
            Self::Evict(command) => command.run(context).await,
        }
    }
}

/// Nodes as a table.
pub(crate) fn table(nodes: &[Node]) -> String {
    let rows = nodes.iter().map(|node| {
        [
            node.name.clone(),
            node.id.to_string(),
            state(node),
            node.epoch.to_string(),
            node.address.clone(),
            role(node),
            node.volumes_owned.to_string(),
            node.vms.to_string(),
        ]
    });
    ui::table(["node", "id", "state", "epoch", "address", "role", "volumes", "vms"], rows)
}

/// A node that is drained is up all the same.
pub(crate) fn state(node: &Node) -> String {
    match node.drain.as_str() {
        "" => node.state.clone(),
        drain => format!("{}, {drain}", node.state),
    }
}

fn role(node: &Node) -> String {
    let words = [(node.role == "witness", "witness"), (node.leader, "leader"), (node.this_node, "here")];
    let words: Vec<_> = words.into_iter().filter(|(holds, _)| *holds).map(|(_, word)| word).collect();
    words.join(", ")
}
