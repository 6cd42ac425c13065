//! Verbs on the image of a VM that runs: the VM's process does them, while the guest goes on.
//!
//! **Invariant (E6):** an image that a VM has open for writing is never opened by this program.

use std::path::Path;

use api::pb::{FileUser, VmImageRequest};
use api::{Client, Error};
use serde::de::DeserializeOwned;

use super::in_use;
use crate::context::Context;

/// An image that a running VM writes.
#[derive(Debug)]
pub(super) struct Online {
    client: Client,
    user: FileUser,
}

impl Online {
    /// The VM that runs and writes the image at `path`, if there is one.
    pub(super) async fn of(path: &Path, context: &Context) -> Option<Self> {
        Self::at_depth(path, 0, context).await
    }

    /// The VM that runs and writes a child of the image at `path`.
    pub(super) async fn of_child(path: &Path, context: &Context) -> Option<Self> {
        Self::at_depth(path, 1, context).await
    }

    async fn at_depth(path: &Path, depth: u32, context: &Context) -> Option<Self> {
        let (client, users) = in_use::known_users(path, context).await?;
        let runs = |user: &FileUser| matches!(user.state.as_str(), "running" | "paused");
        let user = users.into_iter().find(|user| user.depth == depth && !user.read_only && runs(user))?;
        Some(Self { client, user })
    }

    /// The disk of the VM, as `VOLUME:/PATH`.
    pub(super) fn disk(&self) -> &str {
        &self.user.disk
    }

    /// The VM.
    pub(super) fn vm(&self) -> &str {
        &self.user.vm
    }

    /// Has the work done on the VM's disk; gives its report.
    pub(super) async fn work<T: DeserializeOwned>(
        mut self,
        request: VmImageRequest,
        what: &str,
        context: &Context,
    ) -> Result<T, Error> {
        let request = VmImageRequest { path: self.user.disk.clone(), ..request };
        let steps = context.ui.progress(what);
        let mut stream = self.client.vm_image(request).await?.into_inner();
        let mut result = String::new();
        while let Some(progress) = stream.message().await? {
            if progress.total > 0 {
                steps.at(progress.done, progress.total);
            }
            result = progress.result;
        }
        drop(steps);
        if result.is_empty() {
            return Err(Error::unreachable(format!("{what}: the daemon ended without a report"))
                .hint("`csvctl vm show` tells which images the VM has now"));
        }
        serde_json::from_str(&result).map_err(|error| {
            Error::failed(format!("{what}: its report cannot be read: {error}"))
                .hint("is csvctl of the same version as hv?")
        })
    }
}

/// A request, as the daemon knows the paths.
pub(super) fn request(action: &str) -> VmImageRequest {
    VmImageRequest { action: action.to_owned(), ..VmImageRequest::default() }
}

/// A path as the daemon knows it.
pub(super) fn shown(path: &Path) -> String {
    in_use::full(path).display().to_string()
}
