//! How results look: aligned text for people, one JSON document for programs.

use std::ffi::OsString;
use std::io::{self, BufRead, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use api::{Error, Kind};
use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Shows results, progress and errors.
#[derive(Debug)]
pub(crate) struct Ui {
    json: bool,
    yes: bool,
}

impl Ui {
    pub(crate) fn new(json: bool, yes: bool) -> Self {
        Self { json, yes }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Prints `value` as JSON, or what `text` makes of it.
    pub(crate) fn show<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) -> Result<(), Error> {
        if self.json {
            let document = serde_json::to_string(value)
                .map_err(|error| Error::failed(format!("encoding the result: {error}")))?;
            line(&document)
        } else {
            let text = text(value);
            if text.is_empty() { Ok(()) } else { line(&text) }
        }
    }

    /// Prints the end of an action that has no result of its own.
    pub(crate) fn done(&self, text: &str) -> Result<(), Error> {
        #[derive(Serialize)]
        struct Done {
            done: bool,
        }
        self.show(&Done { done: true }, |_| text.to_owned())
    }

    /// Writes bytes to stdout as they are.
    pub(crate) fn raw(&self, bytes: &[u8]) -> Result<(), Error> {
        let mut out = io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush()).map_err(|error| no_stdout(&error))
    }

    /// A line for people, beside the output.
    pub(crate) fn note(&self, text: &str) {
        drop(writeln!(io::stderr(), "{text}"));
    }

    /// Asks before something is destroyed: on a terminal the user types `name`, elsewhere `--yes` is needed.
    pub(crate) fn confirm(&self, what: &str, name: &str) -> Result<(), Error> {
        if self.yes {
            return Ok(());
        }
        if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
            return Err(Error::usage(format!("{what}: this needs a confirmation"))
                .hint("add --yes, or look with --dry-run"));
        }
        drop(write!(io::stderr(), "{what}. Type `{name}` to go on: "));
        drop(io::stderr().flush());
        let mut answer = String::new();
        io::stdin()
            .lock()
            .read_line(&mut answer)
            .map_err(|error| Error::failed(format!("reading the answer: {error}")))?;
        if answer.trim() == name {
            Ok(())
        } else {
            Err(Error::usage(format!("{what}: not confirmed, nothing was done")))
        }
    }

    /// Progress of long work: a bar on a terminal, plain lines elsewhere. Programs that want one document get neither.
    pub(crate) fn progress(&self, what: &str) -> Steps {
        let shown = match (self.json, io::stderr().is_terminal()) {
            (true, _) => Shown::Nothing,
            (false, true) => Shown::Bar(bar(what)),
            (false, false) => Shown::Lines(Lines::new(what)),
        };
        Steps { shown: Mutex::new(shown) }
    }

    /// Progress of unknown length: a spinner on a terminal, plain lines elsewhere.
    pub(crate) fn spinner(&self, what: &str) -> Spinner {
        let bar = if self.json || !io::stderr().is_terminal() {
            None
        } else {
            let bar = ProgressBar::new_spinner().with_message(what.to_owned());
            bar.enable_steady_tick(Duration::from_millis(100));
            Some(bar)
        };
        let spinner = Spinner { bar, quiet: self.json };
        spinner.plain(what);
        spinner
    }

    /// Prints an error to stderr.
    pub(crate) fn error(&self, error: &Error) {
        if !error.message.is_empty() {
            drop(writeln!(io::stderr(), "{}", self.error_text(error)));
        }
    }

    fn error_text(&self, error: &Error) -> String {
        if self.json {
            return serde_json::json!({
                "error": { "kind": error.kind.as_str(), "message": error.message, "hint": error.hint }
            })
            .to_string();
        }
        if error.hint.is_empty() {
            format!("error: {}", error.message)
        } else {
            format!("error: {}\n hint: {}", error.message, error.hint)
        }
    }
}

fn bar(what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {percent} % {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style).with_message(what.to_owned())
}

/// How far long work is: shown until this is dropped.
#[derive(Debug)]
pub(crate) struct Steps {
    shown: Mutex<Shown>,
}

#[derive(Debug)]
enum Shown {
    Bar(ProgressBar),
    Lines(Lines),
    Nothing,
}

impl Steps {
    /// `done` of `total` steps are done.
    pub(crate) fn at(&self, done: u64, total: u64) {
        match &mut *self.shown.lock().unwrap_or_else(PoisonError::into_inner) {
            Shown::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            Shown::Lines(lines) => {
                if let Some(line) = lines.next(done, total) {
                    drop(writeln!(io::stderr(), "{line}"));
                }
            }
            Shown::Nothing => {}
        }
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        if let Shown::Bar(bar) = &*self.shown.lock().unwrap_or_else(PoisonError::into_inner) {
            bar.finish_and_clear();
        }
    }
}

/// Progress for those who keep what they read: a line at each tenth, never more.
#[derive(Debug)]
struct Lines {
    what: String,
    told: Option<u64>,
}

impl Lines {
    fn new(what: &str) -> Self {
        Self { what: what.to_owned(), told: None }
    }

    /// The line for `done` of `total`, if it says something new.
    fn next(&mut self, done: u64, total: u64) -> Option<String> {
        let tenth = u64::try_from(u128::from(done.min(total)) * 10 / u128::from(total.max(1))).unwrap_or(10);
        if self.told.is_some_and(|told| tenth <= told) {
            return None;
        }
        self.told = Some(tenth);
        Some(format!("{}: {} %", self.what, tenth * 10))
    }
}

/// A spinner on a terminal, lines elsewhere.
#[derive(Debug)]
pub(crate) struct Spinner {
    bar: Option<ProgressBar>,
    quiet: bool,
}

impl Spinner {
    /// What is being done now.
    pub(crate) fn step(&self, what: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(what.to_owned()),
            None => self.plain(what),
        }
    }

    fn plain(&self, what: &str) {
        if self.bar.is_none() && !self.quiet {
            drop(writeln!(io::stderr(), "{what}"));
        }
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Rows under a heading, aligned.
pub(crate) fn table<const N: usize>(
    heading: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(heading.map(str::to_uppercase));
    for row in rows {
        table.add_row(row);
    }
    trim_lines(&table.to_string())
}

/// One `name: value` per line, aligned; empty values are left out.
pub(crate) fn fields<'a>(rows: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let rows: Vec<_> = rows.into_iter().filter(|(_, value)| !value.is_empty()).collect();
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    let lines: Vec<_> =
        rows.iter().map(|(name, value)| format!("{:<width$} {value}", format!("{name}:"))).collect();
    lines.join("\n")
}

fn trim_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(str::trim_end).collect();
    lines.join("\n")
}

fn line(text: &str) -> Result<(), Error> {
    writeln!(io::stdout(), "{text}").map_err(|error| no_stdout(&error))
}

/// A reader that has seen enough, such as `head`, is nothing to complain about: the error has no text and is not shown.
fn no_stdout(error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Error::failed(""),
        _ => Error::failed(format!("writing to stdout: {error}")),
    }
}

/// Shows a command line that makes no sense, or the help that was asked for.
pub(crate) fn usage(error: &clap::Error, mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    if !error.use_stderr() {
        drop(error.print());
        return ExitCode::SUCCESS;
    }
    if arguments.any(|argument| argument == "--json") {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        let ui = Ui::new(true, false);
        ui.error(&Error::usage(first).hint("csvctl --help lists what can be done"));
    } else {
        drop(error.print());
    }
    ExitCode::from(Kind::Usage.exit_code())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_in_json_has_kind_message_and_hint() {
        let text = Ui::new(true, false).error_text(&Error::not_found("volume x").hint("volume list"));
        let parsed: serde_json::Value = serde_json::from_str(&text).expect("one document");
        assert_eq!(parsed["error"]["kind"], "not_found");
        assert_eq!(parsed["error"]["hint"], "volume list");
    }

    #[test]
    fn progress_in_lines_tells_each_tenth_once() {
        let mut lines = Lines::new("merging");
        let told: Vec<_> = (0..=1000).filter_map(|done| lines.next(done, 1000)).collect();
        assert_eq!(told.len(), 11);
        assert_eq!((told[0].as_str(), told[10].as_str()), ("merging: 0 %", "merging: 100 %"));
        assert_eq!(Lines::new("x").next(0, 0), Some("x: 0 %".to_owned()));
        assert_eq!(Lines::new("x").next(u64::MAX, u64::MAX), Some("x: 100 %".to_owned()));
    }

    #[test]
    fn columns_are_aligned_and_lines_end_clean() {
        let text = table(["name", "state"], [["n1".into(), "up".into()], ["node-22".into(), "down".into()]]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0].find("STATE"), lines[1].find("up"));
        assert!(lines.iter().all(|line| !line.ends_with(' ')));
    }
}
