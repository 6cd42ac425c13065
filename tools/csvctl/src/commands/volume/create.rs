//! `csvctl volume create`.

use api::Error;
use api::pb::VolumeCreateRequest;
use clap::Args;

use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Name of the volume
    name: String,
    /// The LUN: /dev/... or file:PATH
    #[arg(long, value_name = "URI")]
    lun: String,
    /// Format also when something else is found on the LUN; what it holds is lost
    #[arg(long)]
    force: bool,
    /// How dead nodes are cut off from the LUN: by its persistent reservations, by a program that powers them off (or an
    /// operator), or by waiting until their lease is over
    #[arg(long, value_name = "KIND", default_value = "auto", value_parser = ["auto", "reservation", "agent", "lease"])]
    fence: String,
    /// Check everything, write nothing
    #[arg(long)]
    dry_run: bool,
}

impl Create {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        if self.force && !self.dry_run {
            context
                .ui
                .confirm(&format!("volume create --force destroys what {} holds", self.lun), &self.name)?;
        }
        let dry_run = self.dry_run;
        let request = VolumeCreateRequest {
            name: self.name,
            lun: self.lun,
            force: self.force,
            dry_run: self.dry_run,
            fence: if self.fence == "auto" { String::new() } else { self.fence },
        };
        let spinner = context.ui.spinner(&format!("volume {}: formatting {}", request.name, request.lun));
        let volume = context.client().await?.volume_create(request).await?.into_inner();
        drop(spinner);
        context.ui.show(&volume, |volume| {
            if dry_run {
                format!("volume {} can be created on {}", volume.name, volume.lun)
            } else {
                super::details(volume)
            }
        })
    }
}
