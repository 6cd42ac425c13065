//! Images exported to programs of others.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use cluster_tests::{Ctl, binary};
use serde_json::Value;
use tempfile::TempDir;

use crate::text;

/// A running `csvctl nbd export`.
struct Export {
    child: Child,
    uri: String,
}

impl Export {
    fn start(image: &Path, options: &[&str]) -> Self {
        let socket = image.with_extension("sock");
        let mut child = Command::new(binary("csvctl"))
            .args(["--json", "nbd", "export", text(image), "--socket", text(&socket)])
            .args(options)
            .stdout(Stdio::piped())
            .spawn()
            .expect("csvctl can be started");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("it is piped")).read_line(&mut line).expect("a line");
        let shown: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line}: {error}"));
        Self { child, uri: shown["uri"].as_str().expect("a URI").to_owned() }
    }

    /// Ends it in order.
    fn end(mut self) {
        must("kill", &["-TERM", &self.child.id().to_string()]);
        assert!(self.child.wait().expect("a child").success());
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn must(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} cannot be started: {error}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {out}{err}");
    out.into_owned()
}

#[test]
fn qemu_writes_into_an_exported_vhdx_and_reads_it_back_from_the_file() {
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("disk.vhdx");
    Ctl::local().must(&["vhdx", "create", text(&image), "--size", "64M"]);
    let export = Export::start(&image, &[]);
    let io = ["-f", "raw", "-c", "write -P 7 1M 3M", "-c", "write -z 2M 64k", "-c", "flush", &export.uri];
    must("qemu-io", &io);
    let map = must("qemu-img", &["map", "--output=json", "-f", "raw", &export.uri]);
    assert!(map.contains("\"data\": true") && map.contains("\"data\": false"), "{map}");
    export.end();
    // Another reader of VHDX judges what is in the file.
    must("qemu-img", &["check", "-f", "vhdx", text(&image)]);
    let checks =
        ["read -P 7 1M 1M", "read -P 0 2M 64k", "read -P 7 2112k 1984k", "read -P 0 0 1M", "read -P 0 8M 8M"];
    let mut arguments = vec!["-r", "-f", "vhdx"];
    checks.iter().for_each(|check| arguments.extend(["-c", check]));
    arguments.push(text(&image));
    must("qemu-io", &arguments);
}

#[test]
fn a_read_only_export_leaves_the_file_as_it_is() {
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("disk.vhdx");
    Ctl::local().must(&["vhdx", "create", text(&image), "--size", "16M"]);
    let before = std::fs::read(&image).unwrap();
    let export = Export::start(&image, &["--read-only"]);
    let info = must("nbdinfo", &["--json", &export.uri]);
    assert!(info.contains("\"is_read_only\": true") && info.contains("\"export-size\": 16777216"), "{info}");
    let refused =
        Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 4k", &export.uri]).output().unwrap();
    assert!(!refused.status.success(), "{refused:?}");
    export.end();
    assert!(std::fs::read(&image).unwrap() == before);
}

#[test]
fn what_cannot_be_exported_is_refused_with_the_reason() {
    let folder = TempDir::new().unwrap();
    let raw = folder.path().join("raw.img");
    std::fs::write(&raw, vec![0; 1 << 20]).unwrap();
    let (socket, gone) = (folder.path().join("s"), folder.path().join("gone.vhdx"));
    let missing = Ctl::local().run(&["nbd", "export", text(&gone), "--socket", text(&socket)]).unwrap_err();
    assert_eq!(missing.code, 3, "{missing}");
    let arguments = ["nbd", "export", text(&raw), "--socket", text(&socket), "--format", "vhdx"];
    assert_eq!(Ctl::local().run(&arguments).unwrap_err().code, 1);
    std::fs::write(&socket, b"something").unwrap();
    let taken = Ctl::local().run(&["nbd", "export", text(&raw), "--socket", text(&socket)]).unwrap_err();
    assert!(taken.message().contains("exists"), "{taken}");
    assert_eq!(std::fs::read(&socket).unwrap(), b"something", "what is not ours stays");
}
