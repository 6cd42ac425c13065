//! `csvctl file clone`.

use api::Error;
use api::pb::{FileCloneRequest, FileCloned};

use crate::context::Context;
use crate::units;

pub(crate) async fn run(request: FileCloneRequest, context: &Context) -> Result<(), Error> {
    let cloned = context.client().await?.file_clone(request).await?.into_inner();
    context.ui.show(&cloned, text)
}

fn text(cloned: &FileCloned) -> String {
    let still = match cloned.vm.as_str() {
        "" => String::new(),
        vm => format!("; VM {vm} was held still for it"),
    };
    format!(
        "{} is a clone of {}: {}, {} shared, in {:.1} ms{still}\n",
        cloned.to,
        cloned.from,
        units::size(cloned.size_bytes),
        units::size(cloned.shared_bytes),
        cloned.took_ms,
    )
}
