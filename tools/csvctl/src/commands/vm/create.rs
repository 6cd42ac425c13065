//! `csvctl vm create`.

use api::Error;
use api::pb::VmCreateRequest;
use clap::{Args, ValueEnum};

use crate::commands::file::on_volume;
use crate::context::Context;
use crate::units;

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Name of the VM
    name: String,
    /// Memory, such as 512M
    #[arg(long, value_parser = units::parse_size, value_name = "SIZE")]
    memory: u64,
    /// Number of processors
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// VHDX file on a cluster volume; `,ro` at the end makes it read-only
    #[arg(long = "disk", value_name = "PATH")]
    disks: Vec<String>,
    /// Kernel to boot: a bzImage or ELF file, or a test guest such as `builtin:sector-writer`
    #[arg(long, default_value = "builtin:sector-writer", value_name = "PATH")]
    kernel: String,
    /// Initial RAM disk
    #[arg(long, default_value = "", value_name = "PATH")]
    initrd: String,
    /// Kernel command line
    #[arg(long, default_value = "")]
    cmdline: String,
    /// Network device (tap) for its network card, the same name on every node
    #[arg(long, default_value = "", value_name = "TAP")]
    net: String,
    /// Who goes first when many VMs start
    #[arg(long, value_enum, default_value_t = Priority::Medium)]
    priority: Priority,
    /// What becomes of it when its node is lost: another node starts it again, or it stays off
    #[arg(long, value_enum, default_value_t = OnNodeLoss::Restart)]
    on_node_loss: OnNodeLoss,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OnNodeLoss {
    Restart,
    Stay,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Priority {
    High,
    Medium,
    Low,
}

impl Create {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let request = VmCreateRequest {
            name: self.name,
            memory_bytes: self.memory,
            cpus: self.cpus,
            disks: self.disks.iter().map(|disk| disk_path(disk)).collect::<Result<_, _>>()?,
            kernel: local_file(&self.kernel)?,
            initrd: local_file(&self.initrd)?,
            cmdline: self.cmdline,
            priority: match self.priority {
                Priority::High => "high",
                Priority::Medium => "medium",
                Priority::Low => "low",
            }
            .to_owned(),
            on_node_loss: match self.on_node_loss {
                OnNodeLoss::Restart => "restart",
                OnNodeLoss::Stay => "stay",
            }
            .to_owned(),
            net: self.net,
        };
        let vm = context.client().await?.vm_create(request).await?.into_inner();
        context.ui.show(&vm, super::details)
    }
}

pub(super) fn disk_path(disk: &str) -> Result<String, Error> {
    match disk.strip_suffix(",ro") {
        Some(path) => on_volume(path).map(|path| path + ",ro"),
        None => on_volume(disk),
    }
}

fn local_file(path: &str) -> Result<String, Error> {
    if path.is_empty() || path.starts_with("builtin:") {
        return Ok(path.to_owned());
    }
    let resolved =
        std::fs::canonicalize(path).map_err(|error| Error::not_found(format!("file {path}: {error}")))?;
    resolved
        .into_os_string()
        .into_string()
        .map_err(|path| Error::usage(format!("path {} is not UTF-8", path.display())))
}
