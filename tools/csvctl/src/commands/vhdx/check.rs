//! `csvctl vhdx check`.

use std::path::PathBuf;

use api::Error;
use clap::Args;
use serde::Serialize;
use vhdx::{Defect, Report};

use super::in_use::{self, Use};
use super::{failed, file, message};
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

#[derive(Serialize)]
struct Checked {
    path: PathBuf,
    sound: bool,
    errors: Vec<Finding>,
    defects: Vec<Finding>,
    warnings: Vec<String>,
    not_listed: u64,
    repaired: Vec<Finding>,
}

#[derive(Serialize)]
struct Finding {
    code: String,
    message: String,
}

impl Check {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let wanted = if self.repair { Use::Change } else { Use::Read };
        let _claim = in_use::claim(&self.path, wanted, context).await?;
        let checked = if self.repair { self.repair()? } else { self.check()? };
        context.ui.show(&checked, text)?;
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

    fn check(&self) -> Result<Checked, Error> {
        Ok(self.checked(vhdx::check(&file::open(&self.path)?), &[]))
    }

    fn repair(&self) -> Result<Checked, Error> {
        let image = file::open_writable(&self.path)?;
        let report = vhdx::check(&image);
        if !report.is_sound() {
            return Ok(self.checked(report, &[]));
        }
        let done = vhdx::repair(&image).map_err(|error| failed("check", &self.path, &error))?;
        Ok(self.checked(done.report, &done.repaired))
    }

    fn checked(&self, report: Report, repaired: &[Defect]) -> Checked {
        Checked {
            path: self.path.clone(),
            sound: report.is_sound(),
            errors: report
                .errors
                .iter()
                .map(|error| Finding { code: code(error), message: message(error) })
                .collect(),
            defects: report.defects.iter().map(finding).collect(),
            warnings: report.warnings,
            not_listed: report.more,
            repaired: repaired.iter().map(finding).collect(),
        }
    }
}

fn finding(defect: &Defect) -> Finding {
    Finding { code: defect.code().to_owned(), message: defect.to_string() }
}

/// `OrphanLogId` as `orphan_log_id`.
fn code(error: &vhdx::VhdxError) -> String {
    let mut code = String::new();
    for char in format!("{:?}", error.kind()).chars() {
        if char.is_ascii_uppercase() && !code.is_empty() {
            code.push('_');
        }
        code.push(char.to_ascii_lowercase());
    }
    code
}

fn text(checked: &Checked) -> String {
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
