//! `csvctl vm disk`.

use api::Error;
use api::pb::{VmDisk, VmDiskRequest};
use clap::{Args, Subcommand};

use super::create::disk_path;
use crate::context::Context;
use crate::units;

#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// Give a VM another disk; a running guest sees it at once
    Add(Disk),
    /// Take a disk away; let the guest unmount it first
    Remove(Disk),
    /// Change the size of a running VM's disk; the guest sees it at once
    Resize(Resize),
    /// Limit what a disk may do; without a limit it is bounded by the storage alone
    Limit(Limit),
}

#[derive(Debug, Args)]
pub(crate) struct Disk {
    /// Name of the VM
    name: String,
    /// VHDX file on a cluster volume; `,ro` at the end makes it read-only
    path: String,
}

#[derive(Debug, Args)]
pub(crate) struct Resize {
    #[command(flatten)]
    disk: Disk,
    /// New size, such as 20G
    #[arg(long, value_parser = units::parse_size, value_name = "SIZE")]
    size: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Limit {
    #[command(flatten)]
    disk: Disk,
    /// Requests in a second; 0 lifts the limit
    #[arg(long, default_value_t = 0, value_name = "N")]
    iops: u64,
    /// Bytes in a second, such as 50M; 0 lifts the limit
    #[arg(long, default_value = "0", value_parser = units::parse_size, value_name = "SIZE")]
    bandwidth: u64,
}

impl DiskCommand {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let request = match self {
            Self::Add(disk) => disk.request("add")?,
            Self::Remove(disk) => {
                let what = format!("vm disk remove takes {} away from VM {}", disk.path, disk.name);
                context.ui.confirm(&what, &disk.name)?;
                disk.request("remove")?
            }
            Self::Resize(resize) => {
                VmDiskRequest { size_bytes: resize.size, ..resize.disk.request("resize")? }
            }
            Self::Limit(limit) => {
                let limits =
                    VmDisk { iops: limit.iops, bytes_per_second: limit.bandwidth, ..VmDisk::default() };
                VmDiskRequest { disk: Some(limits), ..limit.disk.request("limit")? }
            }
        };
        let vm = context.client().await?.vm_disk(request).await?.into_inner();
        context.ui.show(&vm, super::details)
    }
}

impl Disk {
    fn request(self, action: &str) -> Result<VmDiskRequest, Error> {
        let path = disk_path(&self.path)?;
        Ok(VmDiskRequest { name: self.name, action: action.into(), path, ..VmDiskRequest::default() })
    }
}
