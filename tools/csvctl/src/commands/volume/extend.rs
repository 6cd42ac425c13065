//! `csvctl volume extend`.

use api::Error;
use api::pb::{VolumeExtendRequest, VolumeExtended};
use clap::Args;

use crate::context::Context;
use crate::units;

#[derive(Debug, Args)]
pub(crate) struct Extend {
    /// Name of the volume
    name: String,
}

impl Extend {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let request = VolumeExtendRequest { name: self.name };
        let extended = context.client().await?.volume_extend(request).await?.into_inner();
        context.ui.show(&extended, text)
    }
}

fn text(extended: &VolumeExtended) -> String {
    let VolumeExtended { volume, old_bytes, new_bytes } = extended;
    if old_bytes == new_bytes {
        return format!("{volume} uses all of its LUN already: {}", units::size(*new_bytes));
    }
    format!("{volume} extended from {} to {}", units::size(*old_bytes), units::size(*new_bytes))
}
