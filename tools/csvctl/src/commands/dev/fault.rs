//! `csvctl dev fault`.

use std::path::Path;

use api::Error;
use api::config::NodeConfig;
use api::pb::FaultRequest;
use clap::{Args, ValueEnum};
use rustix::process::Signal;

use super::DevDir;
use super::down::END_WITHIN;
use super::folder::Folder;
use super::node;
use super::process::Running;
use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct Fault {
    /// The node
    node: String,
    /// What happens to it
    #[arg(value_enum)]
    action: Action,
    /// For lose: inquire, prepare, activate, cancel or commit, or the answer to it, such as commit-answer. For hold: preflight, announce, prepare, copy, save, commit, activate at the source, load or start at the target of a move; snapshot (the new image is whole) or snapshot-recorded (the record names it)
    #[arg(long, value_name = "STEP", required_if_eq_any([("action", "hold"), ("action", "lose")]))]
    at: Option<String>,
    /// For cpu: the feature as LEAF.SUBLEAF.REGISTER.BIT of CPUID, such as 0x1.0.edx.25; without it the node has all again
    #[arg(long, value_name = "FEATURE")]
    without: Option<String>,
    #[command(flatten)]
    folder: DevDir,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Action {
    /// The machine dies: its daemon and VMs are killed
    Kill,
    /// The machine freezes
    Stop,
    /// A frozen machine goes on
    Cont,
    /// The network to the other nodes is cut
    Partition,
    /// The network is whole again
    Heal,
    /// The paths to the LUNs are cut
    LunFail,
    /// The paths to the LUNs are whole again
    LunHeal,
    /// The next VM move that comes to a step waits there
    Hold,
    /// Return when a VM move waits
    Held,
    /// A VM move that waits goes on
    Release,
    /// The next message of a VM move is lost on its way
    Lose,
    /// The node's processor lacks a feature
    Cpu,
}

impl Fault {
    /// The folder of an embedded cluster, or of one node on a host of its own.
    fn config(&self) -> Result<NodeConfig, Error> {
        if let Some(config) = lone_node(&self.folder.dir)? {
            return match config.name == self.node {
                true => Ok(config),
                false => Err(Error::not_found(format!(
                    "{} is the folder of node {}, not of {}",
                    self.folder.dir.display(),
                    config.name,
                    self.node
                ))),
            };
        }
        let folder = Folder::open(&self.folder.dir)?;
        let plan = folder.existing_plan()?;
        Ok(folder.node_config(&plan, node::named(&plan, &self.node)?))
    }

    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let config = self.config()?;
        let running = Running::find(&config.pid_file())?.ok_or_else(|| {
            Error::conflict(format!("node {} is not running", self.node))
                .hint("`csvctl dev start NODE` starts it again")
        })?;
        let what = match self.action {
            Action::Kill => {
                running.signal_group(Signal::KILL)?;
                if !running.wait_end(END_WITHIN)? {
                    return Err(Error::failed(format!("node {} does not end", self.node)));
                }
                "killed"
            }
            Action::Stop => {
                running.signal_group(Signal::STOP)?;
                "stopped"
            }
            Action::Cont => {
                running.signal_group(Signal::CONT)?;
                "going on"
            }
            Action::Partition => {
                inside(&config, "partition").await?;
                "cut off from the other nodes"
            }
            Action::Heal => {
                inside(&config, "heal").await?;
                "connected to the other nodes"
            }
            Action::LunFail => {
                inside(&config, "lun-fail").await?;
                "cut off from its LUNs"
            }
            Action::LunHeal => {
                inside(&config, "lun-heal").await?;
                "connected to its LUNs"
            }
            Action::Hold => {
                inside(&config, &format!("hold:{}", self.at.unwrap_or_default())).await?;
                "going to hold the next move"
            }
            Action::Held => {
                inside(&config, "held").await?;
                "holding a move"
            }
            Action::Release => {
                inside(&config, "release").await?;
                "holding no move"
            }
            Action::Lose => {
                inside(&config, &format!("lose:{}", self.at.unwrap_or_default())).await?;
                "going to lose a message"
            }
            Action::Cpu => {
                inside(&config, &format!("cpu:{}", self.without.unwrap_or_default())).await?;
                "telling what its processor has"
            }
        };
        context.ui.done(&format!("node {} is {what}", self.node))
    }
}

/// The configuration of the node whose own folder this is, if it is one.
fn lone_node(dir: &Path) -> Result<Option<NodeConfig>, Error> {
    let path = dir.join("csvd.toml");
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(None) };
    toml::from_str(&text).map(Some).map_err(|error| Error::usage(format!("{}: {error}", path.display())))
}

/// A fault that the daemon rehearses itself.
async fn inside(config: &NodeConfig, action: &str) -> Result<(), Error> {
    let mut client = api::connect(&config.admin_socket()).await?;
    client.fault(FaultRequest { action: action.to_owned() }).await?;
    Ok(())
}
