//! `csvctl dev up`.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use api::Error;
use api::config::NodeConfig;
use api::pb::{VolumeCreateRequest, VolumeShowRequest};
use clap::Args;
use rustix::process::Signal;
use serde::Serialize;

use super::folder::{Folder, Plan, PlannedNode, listeners};
use super::node;
use super::process::{self, Running};
use crate::context::Context;
use crate::{ui, units};

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// Number of nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=64))]
    nodes: u16,
    /// Folder of the cluster; made when absent
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// The LUN: /dev/... or file:PATH; without it a sparse file in the folder
    #[arg(long, value_name = "URI")]
    lun: Option<String>,
    /// Size of the LUN's file when it is made
    #[arg(long, default_value = "8G", value_parser = units::parse_size, value_name = "SIZE")]
    lun_size: u64,
    /// Name of the volume
    #[arg(long, default_value = "vol1", value_name = "NAME")]
    volume: String,
    /// Base of all times of a new cluster, in milliseconds, 100 without it: more for a machine that is so busy that nodes are
    /// held for dead by mistake
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=10_000))]
    base_ms: Option<u64>,
}

#[derive(Serialize)]
struct Started {
    dir: PathBuf,
    lun: String,
    volume: String,
    nodes: Vec<StartedNode>,
}

#[derive(Serialize)]
struct StartedNode {
    name: String,
    pid: i32,
    socket: PathBuf,
    mount: PathBuf,
    address: SocketAddr,
}

impl Up {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let folder = Folder::make(&self.dir)?;
        let (plan, listeners) = self.plan(&folder)?;
        let configs: Vec<_> = plan.nodes.iter().map(|node| folder.node_config(&plan, node)).collect();
        refuse_running(&folder, &configs)?;
        refuse_lost_lun(&plan, &configs)?;
        Folder::make_lun(&plan)?;

        let spinner = context.ui.spinner(&format!("starting {} nodes", configs.len()));
        let outcome = bring_up(&folder, &plan, &configs, listeners, &spinner).await;
        drop(spinner);
        if outcome.is_err() {
            end_all(&configs);
        }
        outcome?;
        context.ui.show(&started(&folder, &plan, &configs)?, text)
    }

    /// The plan of the folder, or a new one with the sockets for it.
    fn plan(&self, folder: &Folder) -> Result<(Plan, Vec<TcpListener>), Error> {
        if let Some(plan) = folder.plan()? {
            self.refuse_other(folder, &plan)?;
            return Ok((plan, Vec::new()));
        }
        let listeners = listeners(self.nodes)?;
        let nodes = (1..).zip(&listeners).map(|(id, listener)| {
            let address = listener
                .local_addr()
                .map_err(|error| Error::failed(format!("asking for a port: {error}")))?;
            Ok(PlannedNode { id, name: format!("n{id}"), address })
        });
        let plan = Plan {
            cluster: uuid::Uuid::new_v4(),
            lun: self.lun_uri(folder)?,
            lun_bytes: self.lun_size,
            volume: self.volume.clone(),
            base_ms: self.base_ms,
            nodes: nodes.collect::<Result<_, Error>>()?,
        };
        folder.furnish(&plan)?;
        Ok((plan, listeners))
    }

    /// A stopped cluster is started as it was; options that ask for another one are an error.
    fn refuse_other(&self, folder: &Folder, plan: &Plan) -> Result<(), Error> {
        let differs = self.lun.is_some() && self.lun_uri(folder)? != plan.lun;
        if differs {
            return Err(Error::conflict(format!(
                "{} already holds a cluster on the LUN {}",
                folder.root().display(),
                plan.lun
            ))
            .hint("leave --lun out to start it again, or choose another folder"));
        }
        if self.base_ms.is_some() && self.base_ms != plan.base_ms {
            return Err(Error::conflict(format!(
                "{} already holds a cluster with other times",
                folder.root().display()
            ))
            .hint("leave --base-ms out to start it again, or choose another folder"));
        }
        Ok(())
    }

    fn lun_uri(&self, folder: &Folder) -> Result<String, Error> {
        let Some(uri) = &self.lun else {
            return Ok(format!("file:{}", folder.root().join("lun.img").display()));
        };
        // The daemons run in another folder.
        match uri.strip_prefix("file:") {
            Some(path) => std::path::absolute(path)
                .map(|path| format!("file:{}", path.display()))
                .map_err(|error| Error::usage(format!("LUN {uri}: {error}"))),
            None => Ok(uri.clone()),
        }
    }
}

/// A cluster that has run before had a LUN; an empty one in its place would only hide that it is gone.
fn refuse_lost_lun(plan: &Plan, configs: &[NodeConfig]) -> Result<(), Error> {
    let Some(path) = plan.lun.strip_prefix("file:").map(Path::new) else { return Ok(()) };
    let has_run = |config: &NodeConfig| {
        std::fs::read_dir(config.data_dir()).is_ok_and(|mut entries| entries.next().is_some())
    };
    if path.exists() || !configs.iter().any(has_run) {
        return Ok(());
    }
    Err(Error::not_found(format!("the LUN {} of this cluster is not there any more", path.display()))
        .hint("put the file back, or give the cluster up with `csvctl dev down --dir DIR --destroy`"))
}

fn refuse_running(folder: &Folder, configs: &[NodeConfig]) -> Result<(), Error> {
    let mut running = Vec::new();
    for config in configs {
        if Running::find(&config.pid_file())?.is_some() {
            running.push(config.name.as_str());
        }
    }
    if running.is_empty() {
        return Ok(());
    }
    Err(Error::conflict(format!(
        "a cluster is already running in {} ({})",
        folder.root().display(),
        running.join(", ")
    ))
    .hint("use it, stop it with `csvctl dev down --dir DIR`, or choose another folder"))
}

async fn bring_up(
    folder: &Folder,
    plan: &Plan,
    configs: &[NodeConfig],
    listeners: Vec<TcpListener>,
    spinner: &ui::Spinner,
) -> Result<(), Error> {
    let mut listeners = listeners.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
    for (planned, config) in plan.nodes.iter().zip(configs) {
        node::unmount_leftovers(folder, plan, planned)?;
        process::start(config, listeners.next().flatten())?;
    }
    spinner.step("waiting for the nodes to form a cluster");
    for config in configs {
        node::wait(config, configs.len(), &[]).await?;
    }
    make_volume(plan, &configs[0], spinner).await?;
    spinner.step(&format!("waiting for volume {}", plan.volume));
    for config in configs {
        node::wait(config, configs.len(), std::slice::from_ref(&plan.volume)).await?;
    }
    Ok(())
}

async fn make_volume(plan: &Plan, config: &NodeConfig, spinner: &ui::Spinner) -> Result<(), Error> {
    let mut client = api::connect(&config.admin_socket()).await?;
    let request = VolumeShowRequest { name: plan.volume.clone() };
    match client.volume_show(request).await.map_err(Error::from) {
        Ok(_) => return Ok(()),
        Err(error) if error.kind == api::Kind::NotFound => {}
        Err(error) => return Err(error),
    }
    spinner.step(&format!("formatting volume {} on {}", plan.volume, plan.lun));
    let request = VolumeCreateRequest {
        name: plan.volume.clone(),
        lun: plan.lun.clone(),
        force: false,
        dry_run: false,
        // All nodes are of one machine: a LUN could not tell them apart.
        fence: "agent".to_owned(),
    };
    client.volume_create(request).await?;
    Ok(())
}

/// After a failed start nothing is left running.
fn end_all(configs: &[NodeConfig]) {
    for config in configs {
        if let Ok(Some(running)) = Running::find(&config.pid_file()) {
            drop(running.signal_group(Signal::KILL));
            drop(running.wait_end(super::down::END_WITHIN));
        }
    }
}

fn started(folder: &Folder, plan: &Plan, configs: &[NodeConfig]) -> Result<Started, Error> {
    let nodes = configs.iter().map(|config| {
        let running = Running::find(&config.pid_file())?
            .ok_or_else(|| Error::failed(format!("node {} has ended again", config.name)))?;
        Ok(StartedNode {
            name: config.name.clone(),
            pid: running.pid(),
            socket: config.admin_socket(),
            mount: config.mount_point(&plan.volume),
            address: config.listen,
        })
    });
    Ok(Started {
        dir: folder.root().to_path_buf(),
        lun: plan.lun.clone(),
        volume: plan.volume.clone(),
        nodes: nodes.collect::<Result<_, Error>>()?,
    })
}

fn text(started: &Started) -> String {
    let rows = started.nodes.iter().map(|node| {
        [
            node.name.clone(),
            node.pid.to_string(),
            node.address.to_string(),
            node.socket.display().to_string(),
            node.mount.display().to_string(),
        ]
    });
    format!(
        "cluster in {} is up, volume {} on {}\n\n{}",
        started.dir.display(),
        started.volume,
        started.lun,
        ui::table(["node", "pid", "address", "socket", "mount"], rows)
    )
}
