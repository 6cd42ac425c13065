//! `csvctl vm`.

mod balloon;
mod check_migrate;
mod checkpoint;
mod console;
mod create;
mod delete;
mod disk;
mod list;
mod migrate;
mod pause;
mod resume;
mod save;
mod show;
mod start;
mod stop;
mod typing;

use api::Error;
use api::pb::Vm;
use clap::{Args, Subcommand};

use crate::context::Context;
use crate::{ui, units};

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Define a VM
    Create(create::Create),
    /// Start a VM on the node that csvctl talks to
    Start(VmName),
    /// Stop a VM
    Stop(stop::Stop),
    /// Halt a VM's processors
    Pause(VmName),
    /// Let a paused VM go on
    Resume(VmName),
    /// Save a VM's memory and state to the volume; start it to let it go on, on any node
    Save(VmName),
    /// List the VMs
    List(list::List),
    /// Show one VM
    Show(VmName),
    /// Show a VM's serial console; on a terminal, type there too
    Console(console::Console),
    /// Add, remove, resize or limit a disk, also while the VM runs
    #[command(subcommand)]
    Disk(disk::DiskCommand),
    /// Have a VM's guest give a part of its memory back to the node, also while it runs
    Balloon(balloon::Balloon),
    /// Keep a VM as it is at a moment, and return to that
    #[command(subcommand)]
    Checkpoint(checkpoint::CheckpointCommand),
    /// Move a VM to another node
    Migrate(migrate::Migrate),
    /// Tell what stands against moving a VM to a node
    CheckMigrate(check_migrate::CheckMigrate),
    /// Forget a stopped VM; its disks stay
    Delete(delete::Delete),
}

impl VmCommand {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Self::Create(command) => command.run(context).await,
            Self::Start(vm) => start::run(vm, context).await,
            Self::Stop(command) => command.run(context).await,
            Self::Pause(vm) => pause::run(vm, context).await,
            Self::Resume(vm) => resume::run(vm, context).await,
            Self::Save(vm) => save::run(vm, context).await,
            Self::List(command) => command.run(context).await,
            Self::Show(vm) => show::run(vm, context).await,
            Self::Console(command) => command.run(context).await,
            Self::Disk(command) => command.run(context).await,
            Self::Balloon(command) => command.run(context).await,
            Self::Checkpoint(command) => command.run(context).await,
            Self::Migrate(command) => command.run(context).await,
            Self::CheckMigrate(command) => command.run(context).await,
            Self::Delete(command) => command.run(context).await,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct VmName {
    /// Name of the VM
    name: String,
}

fn summary(vm: &Vm) -> String {
    match vm.reason.as_str() {
        "" => format!("VM {} is {} on {}", vm.name, vm.state, vm.owner),
        reason => format!("VM {} is {} on {}: {reason}", vm.name, vm.state, vm.owner),
    }
}

fn balloon(vm: &Vm, target_bytes: u64) -> String {
    let target = units::size(target_bytes);
    match &vm.balloon {
        Some(balloon) if balloon.has_driver => format!("{} of {target}", units::size(balloon.actual_bytes)),
        Some(_) if target_bytes > 0 => format!("nothing of {target}: the guest has no driver for it"),
        None if target_bytes > 0 => target,
        _ => String::new(),
    }
}

/// What the guest says of it.
fn guest_memory(vm: &Vm) -> String {
    let balloon = vm.balloon.unwrap_or_default();
    let figures = [
        ("total", balloon.total_bytes),
        ("free", balloon.free_bytes),
        ("available", balloon.available_bytes),
        ("cached", balloon.cached_bytes),
    ];
    let said = figures.iter().filter(|(_, bytes)| *bytes > 0);
    said.map(|(what, bytes)| format!("{} {what}", units::size(*bytes))).collect::<Vec<_>>().join(", ")
}

fn details(vm: &Vm) -> String {
    let spec = vm.spec.clone().unwrap_or_default();
    let known = |number: u64| if number == 0 { String::new() } else { number.to_string() };
    let mut text = ui::fields([
        ("VM", vm.name.clone()),
        ("id", vm.id.clone()),
        ("state", vm.state.clone()),
        ("reason", vm.reason.clone()),
        ("owner", vm.owner.clone()),
        ("epoch", vm.epoch.to_string()),
        ("pid", known(vm.pid)),
        ("memory", units::size(spec.memory_bytes)),
        ("memory used", if vm.pid == 0 { String::new() } else { units::size(vm.memory_used_bytes) }),
        ("balloon", balloon(vm, spec.balloon_bytes)),
        ("guest memory", guest_memory(vm)),
        ("CPUs", spec.cpus.to_string()),
        ("kernel", spec.kernel),
        ("initrd", spec.initrd),
        ("cmdline", spec.cmdline),
        ("network", spec.net),
        ("priority", spec.priority),
        ("console bytes", known(vm.console_bytes)),
        ("exits", known(vm.exits)),
    ]);
    for disk in &spec.disks {
        let access = if disk.read_only { " (read-only)" } else { "" };
        text += &format!("\n  disk {}:/{}{access}", disk.volume, disk.path);
    }
    for disk in &vm.disks {
        text += &format!(
            "\n  {} {}: {} reads, {} writes, {} flushes",
            disk.path,
            units::size(disk.size_bytes),
            disk.reads,
            disk.writes,
            disk.flushes
        );
        if !disk.parents.is_empty() {
            text += &format!(", over {}", disk.parents.join(", "));
        }
    }
    text
}
