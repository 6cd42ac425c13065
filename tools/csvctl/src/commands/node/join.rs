//! `csvctl node join`.

use std::net::SocketAddr;
use std::path::PathBuf;

use api::Error;
use api::config::{MemberConfig, NodeConfig, SharedConfig, VmUser};
use clap::Args;
use serde::Serialize;
use uuid::Uuid;
use wire::{JoinReply, JoinToken, WireError};

use crate::context::Context;
use crate::node_home::{self, Certificates, NewNode};
use crate::ui;

#[derive(Debug, Args)]
pub(crate) struct Join {
    /// What `csvctl cluster token` printed on a member
    #[arg(long, value_name = "TOKEN")]
    token: String,
    #[command(flatten)]
    node: NewNode,
    /// Only vote: no volumes, no VMs. The third voter of a cluster of two nodes; it needs no access to any LUN
    #[arg(long)]
    witness: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Joined {
    cluster: String,
    node: String,
    id: u16,
    socket: PathBuf,
    config: PathBuf,
    started: bool,
}

impl Join {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let dir = self.node.check()?;
        let token: JoinToken =
            self.token.parse().map_err(|error: WireError| Error::usage(error.explain()))?;
        let spinner = context.ui.spinner(&format!("asking the member at {}", token.address));
        let address = self.node.listen.to_string();
        let (reply, key) = wire::join(&token, &self.node.node, &address, self.witness)
            .await
            .map_err(|error| refused(&error))?;
        let config = self.config(&reply, dir)?;
        let certificates = Certificates {
            ca_cert: &reply.ca_cert_pem,
            ca_key: &reply.ca_key_pem,
            cert: &reply.cert_pem,
            key: &key,
        };
        node_home::furnish(&config, &certificates)?;
        if !self.node.no_start {
            spinner.step(&format!("starting node {}", config.name));
            node_home::start(&config).await?;
        }
        drop(spinner);
        let joined = Joined {
            cluster: config.cluster.clone(),
            node: config.name.clone(),
            id: config.id,
            socket: config.admin_socket(),
            config: config.dir.join("csvd.toml"),
            started: !self.node.no_start,
        };
        context.ui.show(&joined, text)
    }

    fn config(&self, reply: &JoinReply, dir: PathBuf) -> Result<NodeConfig, Error> {
        let shared: SharedConfig =
            toml::from_str(&reply.shared_config).map_err(|error| unreadable(&error.to_string()))?;
        let members = reply.members.iter().map(|member| {
            let address: SocketAddr =
                member.address.parse().map_err(|_| unreadable(&format!("address {}", member.address)))?;
            Ok(MemberConfig { id: number(member.node)?, name: member.name.clone(), address, pid_file: None })
        });
        Ok(NodeConfig {
            cluster: reply.cluster_name.clone(),
            cluster_id: Uuid::from_slice(&reply.cluster).map_err(|_| unreadable("cluster id"))?,
            name: self.node.node.clone(),
            id: number(reply.node)?,
            listen: self.node.listen,
            socket: node_home::socket_of(&dir),
            bootstrap: false,
            witness: self.witness,
            base_ms: shared.base_ms,
            vm_user: VmUser::default(),
            tls: node_home::tls_of(&dir),
            fence: shared.fence,
            members: members.collect::<Result<_, Error>>()?,
            dir,
        })
    }
}

fn number(node: u32) -> Result<u16, Error> {
    u16::try_from(node).map_err(|_| unreadable(&format!("node number {node}")))
}

fn unreadable(what: &str) -> Error {
    Error::failed(format!("the member's answer cannot be read: {what}")).hint("is it of a newer version?")
}

fn refused(error: &WireError) -> Error {
    let hint = match error {
        WireError::ForeignCertificate { .. } => {
            "a member of another cluster answers at the token's address; make a new token"
        }
        other => other.hint().unwrap_or("make a new token with `csvctl cluster token` and try again"),
    };
    let kind = match error {
        WireError::Refused(_) | WireError::ForeignCertificate { .. } => api::Kind::Conflict,
        _ => api::Kind::Unreachable,
    };
    Error::new(kind, error.explain()).during("joining the cluster").hint(hint)
}

fn text(joined: &Joined) -> String {
    let facts = ui::fields([
        ("cluster", joined.cluster.clone()),
        ("node", format!("{} (number {})", joined.node, joined.id)),
        ("socket", joined.socket.display().to_string()),
        ("configuration", joined.config.display().to_string()),
    ]);
    if joined.started {
        return facts;
    }
    format!("{facts}\n\nstart it with `csvd --config {}`", joined.config.display())
}
