//! Snapshots: the image that a guest writes becomes a parent, and the guest goes on in a new child.
//!
//! ```text
//!   hold requests -> drain -> close cleanly -> create the child (flush) -> open it -> let the requests go on
//! ```
//! The child refers to the data write id that the closed image bears, and that nobody changes any more.
//!
//! **Invariant:** until the child is whole and open, the old image is the disk; a failure or crash before that leaves it so,
//! with a file beside it that nobody refers to.

use std::sync::Arc;

use blockio::ImageFile;

use crate::create::{ChildSpec, create_child};
use crate::disk::Disk;
use crate::error::VhdxError;
use crate::exchange::Next;
use crate::open::{Builder, Options};

impl Disk {
    /// Makes the image that is written now a parent, and goes on in a new child in `file`, which lies at `path`. The guest's
    /// requests wait meanwhile, for a handful of flushes; nothing that it can see changes.
    ///
    /// From now on the old image must not be written any more. No guard of this disk may be held by the caller.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidInput`] when the disk was opened without [`Builder::parents`]: where the old image lies is
    /// not known then. After any error the disk goes on in the old image, unless that fails too.
    pub fn snapshot(&self, file: &Arc<dyn ImageFile>, path: &str) -> Result<(), VhdxError> {
        self.snapshot_when(file, path, || Ok(()))
    }

    /// The same, and asks `commit` when the child is whole, durable and open, while the guest's requests still wait. Whoever
    /// keeps a record of which image is the disk changes it there: nothing can fail between that and the first request that
    /// the child serves. When `commit` fails the old image is the disk.
    ///
    /// # Errors
    /// As [`Disk::snapshot`], and what `commit` says.
    pub fn snapshot_when(
        &self,
        file: &Arc<dyn ImageFile>,
        path: &str,
        commit: impl FnOnce() -> Result<(), VhdxError>,
    ) -> Result<(), VhdxError> {
        self.exchange_for(|old, options| {
            let mut next = fork(old, options, file, path)?;
            next.commit = Box::new(commit);
            Ok(((), Some(next)))
        })
    }
}

/// Makes the child and says how it is opened.
fn fork(
    old: &Arc<dyn ImageFile>,
    options: &Options,
    file: &Arc<dyn ImageFile>,
    path: &str,
) -> Result<Next<'static>, VhdxError> {
    let Some(origin) = options.origin.clone() else {
        return Err(VhdxError::InvalidInput(
            "a snapshot needs to know where the image lies; open the disk with the place of its chain"
                .to_owned(),
        ));
    };
    if file.identity() == old.identity() {
        return Err(VhdxError::InvalidInput(format!(
            "{path} is the image itself; name a new file for the snapshot"
        )));
    }
    let paths = origin.resolver.paths(path, &origin.path)?;
    let parent = Builder::open(Arc::clone(old)).parents(origin.resolver.clone(), &origin.path).read_only()?;
    create_child(&**file, &parent, &ChildSpec::new(paths))?;
    let options = Options { origin: Some(origin.at(path)), ..options.clone() };
    Ok(Next::new(Arc::clone(file), options))
}
