//! `csvctl vhdx check`.

use std::path::{Path, PathBuf};

use api::Error;
use clap::Args;
use hv_runner::report::ImageCheck;

use super::in_use::{self, Use};
use super::online::{self, Online};
use super::{failed, file};
use crate::context::Context;
use crate::ui;

#[derive(Debug, Args)]
pub(crate) struct Check {
    /// The image
    path: PathBuf,
    /// Put right what needs no guess about content
    #[arg(long)]
    repair: bool,
}

impl Check {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let checked = match Online::of(&self.path, context).await {
            Some(disk) if self.repair => return Err(in_use_by(&self.path, &disk)),
            Some(disk) => ImageCheck {
                path: self.path.clone(),
                ..disk.work(online::request("check"), "checking", context).await?
            },
            None => self.closed(context).await?,
        };
        self.tell(&checked, context)
    }

    async fn closed(&self, context: &Context) -> Result<ImageCheck, Error> {
        let wanted = if self.repair { Use::Change } else { Use::Read };
        let _claim = in_use::claim(&self.path, wanted, context).await?;
        if self.repair { self.repair() } else { self.check() }
    }

    fn tell(&self, checked: &ImageCheck, context: &Context) -> Result<(), Error> {
        context.ui.show(checked, text)?;
        let found = checked.errors.len() + checked.defects.len();
        if found == 0 {
            return Ok(());
        }
        let hint = match (checked.errors.is_empty(), self.repair) {
            (true, false) => "nothing is lost; `csvctl vhdx check --repair` puts it right",
            _ => "keep the image as it is and restore it from a backup",
        };
        Err(Error::conflict(format!("vhdx check {}: {found} problem(s) found", self.path.display()))
            .hint(hint))
    }

    fn check(&self) -> Result<ImageCheck, Error> {
        Ok(ImageCheck::new(self.path.clone(), vhdx::check(&file::open(&self.path)?), &[]))
    }

    fn repair(&self) -> Result<ImageCheck, Error> {
        let image = file::open_writable(&self.path)?;
        let report = vhdx::check(&image);
        if !report.is_sound() {
            return Ok(ImageCheck::new(self.path.clone(), report, &[]));
        }
        let done = vhdx::repair(&image).map_err(|error| failed("check", &self.path, &error))?;
        Ok(ImageCheck::new(self.path.clone(), done.report, &done.repaired))
    }
}

fn in_use_by(path: &Path, disk: &Online) -> Error {
    Error::conflict(format!("{} is a disk of VM {}, which runs", path.display(), disk.vm()))
        .hint(format!("stop it first: csvctl vm stop {}", disk.vm()))
}

fn text(checked: &ImageCheck) -> String {
    let verdict = match (checked.sound, checked.defects.is_empty()) {
        (false, _) => "damaged",
        (true, false) => "sound, with defects that a repair puts right",
        (true, true) => "sound",
    };
    let head = ui::fields([("image", checked.path.display().to_string()), ("verdict", verdict.to_owned())]);
    let kinds = [("error", &checked.errors), ("defect", &checked.defects), ("repaired", &checked.repaired)];
    let findings = kinds
        .iter()
        .flat_map(|(kind, list)| list.iter().map(move |one| format!("\n  {kind}: {}", one.message)));
    // A defect is told once, not as a warning again.
    let warnings = checked.warnings.iter().filter(|_| checked.defects.is_empty());
    let more = match checked.not_listed {
        0 => String::new(),
        more => format!("\n  and {more} more"),
    };
    head + &findings.collect::<String>()
        + &warnings.map(|text| format!("\n  note: {text}")).collect::<String>()
        + &more
}
