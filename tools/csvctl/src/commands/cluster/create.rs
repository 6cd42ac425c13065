//! `csvctl cluster create`.

use std::path::PathBuf;

use api::Error;
use api::config::{FenceConfig, MemberConfig, NodeConfig, VmUser};
use clap::Args;
use serde::Serialize;
use uuid::Uuid;
use wire::authority;

use crate::context::Context;
use crate::node_home::{self, Certificates, NewNode};
use crate::ui;

/// Longest time that a fencing program may take, unless something else is said.
const AGENT_MS: u64 = 60_000;

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Name of the cluster
    #[arg(long)]
    name: String,
    #[command(flatten)]
    node: NewNode,
    /// Program that powers a node off and exits 0 when it is certainly off; without it an operator confirms deaths
    #[arg(long, value_name = "PROGRAM")]
    fence_agent: Option<PathBuf>,
    /// Longest time that the program may take, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = AGENT_MS, requires = "fence_agent")]
    fence_timeout_ms: u64,
    /// Base of all times of the cluster, in milliseconds: the interval of its heartbeats. More for networks or storage that
    /// pause, so that nobody is held for dead by mistake
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=10_000))]
    base_ms: Option<u64>,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Created {
    cluster: String,
    id: Uuid,
    node: String,
    socket: PathBuf,
    config: PathBuf,
    started: bool,
}

impl Create {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let dir = self.node.check()?;
        let ca = authority::create_ca(&self.name).map_err(Error::failed)?;
        let issued = authority::issue(&ca, 1).map_err(Error::failed)?;
        let config = self.config(dir)?;
        let certificates = Certificates {
            ca_cert: &ca.cert_pem,
            ca_key: &ca.key_pem,
            cert: &issued.cert_pem,
            key: &issued.key_pem,
        };
        node_home::furnish(&config, &certificates)?;
        if !self.node.no_start {
            let spinner = context.ui.spinner(&format!("starting node {}", config.name));
            node_home::start(&config).await?;
            drop(spinner);
        }
        let created = Created {
            cluster: config.cluster.clone(),
            id: config.cluster_id,
            node: config.name.clone(),
            socket: config.admin_socket(),
            config: config.dir.join("csvd.toml"),
            started: !self.node.no_start,
        };
        context.ui.show(&created, text)
    }

    fn config(&self, dir: PathBuf) -> Result<NodeConfig, Error> {
        let me =
            MemberConfig { id: 1, name: self.node.node.clone(), address: self.node.listen, pid_file: None };
        Ok(NodeConfig {
            cluster: self.name.clone(),
            cluster_id: Uuid::new_v4(),
            name: self.node.node.clone(),
            id: 1,
            listen: self.node.listen,
            socket: node_home::socket_of(&dir),
            bootstrap: true,
            witness: false,
            base_ms: self.base_ms,
            vm_user: VmUser::default(),
            tls: node_home::tls_of(&dir),
            fence: self.fence()?,
            members: vec![me],
            dir,
        })
    }

    fn fence(&self) -> Result<FenceConfig, Error> {
        let Some(program) = &self.fence_agent else { return Ok(FenceConfig::Operator) };
        let program = std::fs::canonicalize(program).map_err(|error| {
            Error::not_found(format!("fencing program {}: {error}", program.display()))
                .hint("it must be installed under the same path on every node")
        })?;
        Ok(FenceConfig::Agent { program, timeout_ms: self.fence_timeout_ms })
    }
}

fn text(created: &Created) -> String {
    let facts = ui::fields([
        ("cluster", created.cluster.clone()),
        ("id", created.id.to_string()),
        ("node", created.node.clone()),
        ("socket", created.socket.display().to_string()),
        ("configuration", created.config.display().to_string()),
    ]);
    let next = if created.started {
        "make a token for the next node with `csvctl cluster token`".to_owned()
    } else {
        format!("start it with `csvd --config {}`", created.config.display())
    };
    format!("{facts}\n\n{next}")
}
