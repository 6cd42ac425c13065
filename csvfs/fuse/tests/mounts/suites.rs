//! Suites that others wrote, on mounts of a volume: `pjdfstest` for the rules of POSIX, `fsx` for content.
//!
//! `cargo xtask test` installs both into `target/suites`; without them these tests say that they are skipped. The long forms
//! are in CONTRIBUTING.md.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::world::{World, can_mount};

/// The program of a suite, if it is installed.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn suite(name: &str) -> Option<PathBuf> {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).parent()?.join("suites/bin").join(name);
    if !program.is_file() {
        eprintln!("skipped: needs {} (cargo xtask test installs it)", program.display());
        return None;
    }
    can_mount().then_some(program)
}

/// Runs `work` while another node lists and looks at everything on its own mount; says how often it went through.
fn while_walked<T>(mount: &Path, work: impl FnOnce() -> T) -> (T, u64) {
    let end = AtomicBool::new(false);
    thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let mut walks = 0;
            while !end.load(Ordering::SeqCst) {
                walk(mount);
                walks += 1;
            }
            walks
        });
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        end.store(true, Ordering::SeqCst);
        let walks = watching.join().expect("walking does not panic");
        (outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic)), walks)
    })
}

/// Looks at everything below; what goes meanwhile is no error.
fn walk(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if fs::symlink_metadata(entry.path()).is_ok_and(|about| about.is_dir()) {
            walk(&entry.path());
        }
    }
}

/// A folder on the mount where each user may do what the suite has it do.
fn open_folder(mount: &Path) -> PathBuf {
    let folder = mount.join("s");
    fs::create_dir(&folder).expect("mkdir");
    fs::set_permissions(&folder, PermissionsExt::from_mode(0o777)).expect("chmod");
    folder
}

fn said(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]];
    both.map(|text| String::from_utf8_lossy(text).into_owned()).concat()
}

/// Runs the suite in a folder of the mount. It changes to users who may reach the folder only by where it starts.
fn pjdfstest(program: &Path, mount: &Path) {
    let folder = open_folder(mount);
    let settings = mount.join("settings.toml");
    fs::write(&settings, PJDFSTEST).expect("write");
    let run = Command::new(program).current_dir(&folder).args(["-p", ".", "-c"]).arg(&settings).output();
    let output = run.expect("the suite starts");
    let text = said(&output);
    let summary = text.lines().rfind(|line| line.contains("Summary")).unwrap_or_default();
    assert!(output.status.success() && summary.contains("Summary: 0 failed"), "{text}");
    let passed = summary.split(" passed").next().and_then(|head| head.rsplit(' ').next()?.parse().ok());
    assert!(passed.is_some_and(|passed: u32| passed > 350), "most of the suite ran: {summary}");
}

/// What Linux has of the optional parts; two users that every Debian has.
const PJDFSTEST: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utimensat = {}
utime_now = {}
stat_st_birthtime = {}
[settings]
naptime = 0.01
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;

#[test]
fn pjdfstest_passes_on_one_mount() {
    let Some(program) = suite("pjdfstest") else { return };
    let mut world = World::new();
    pjdfstest(&program, &world.mount());
    world.end();
}

#[test]
fn pjdfstest_passes_while_another_node_lists_and_stats_the_same_tree() {
    let Some(program) = suite("pjdfstest") else { return };
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    let ((), walks) = while_walked(&b, || pjdfstest(&program, &a));
    assert!(walks > 10, "the other node looked {walks} times");
    world.end();
}

/// The older suite, in C, by hand: `CSVFS_PJDFSTEST_C` names the folder in which it was built.
#[test]
fn the_older_pjdfstest_passes_alone_and_while_another_node_looks_on() {
    let Some(built) = std::env::var_os("CSVFS_PJDFSTEST_C").map(PathBuf::from) else { return };
    assert!(built.join("pjdfstest").is_file(), "{} holds no built pjdfstest", built.display());
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    let folder = open_folder(&a);
    let prove = || {
        let run = Command::new("prove").current_dir(&folder).arg("-r").arg(built.join("tests")).output();
        let output = run.expect("prove starts (package perl)");
        assert!(output.status.success() && said(&output).contains("Result: PASS"), "{}", said(&output));
    };
    prove();
    let ((), walks) = while_walked(&b, prove);
    assert!(walks > 10, "the other node looked {walks} times");
    world.end();
}

/// How many operations each run of `fsx` makes.
fn operations() -> String {
    std::env::var("CSVFS_FSX_OPERATIONS").unwrap_or_else(|_| "3000".to_owned())
}

/// Runs `fsx` on `file` with two seeds.
fn fsx(program: &Path, file: &Path, weights: &str) {
    let folder = tempfile::tempdir().expect("a folder for what it leaves behind");
    let settings = folder.path().join("fsx.toml");
    fs::write(&settings, format!("{FSX}{weights}")).expect("write");
    for seed in ["1", "20"] {
        let mut run = Command::new(program);
        run.args(["-q", "-N", &operations(), "-S", seed, "-P"]).arg(folder.path());
        let output = run.arg("-f").arg(&settings).arg(file).output().expect("the suite starts");
        assert!(output.status.success(), "seed {seed}: {}", said(&output));
    }
}

const FSX: &str = r"
flen = 1000000
[opsize]
min = 1
max = 100000
[weights]
invalidate = 0.0
read = 10.0
write = 10.0
truncate = 3.0
fsync = 1.0
fdatasync = 1.0
posix_fallocate = 1.0
punch_hole = 3.0
sendfile = 2.0
copy_file_range = 2.0
";

#[test]
fn fsx_finds_what_it_wrote() {
    let Some(program) = suite("fsx") else { return };
    let mut world = World::new();
    let mount = world.mount();
    fsx(&program, &mount.join("f"), "close_open = 1.0\nmapread = 3.0\nmapwrite = 3.0\n");
    world.end();
}

/// `fsx` opens its file anew again and again, each time on the mount that a link leads to at that moment.
#[test]
fn fsx_finds_on_one_node_what_it_wrote_on_the_other() {
    let Some(program) = suite("fsx") else { return };
    let mut world = World::new();
    let mounts = [world.mount(), world.mount()];
    let folder = tempfile::tempdir().expect("a folder for the link");
    let (link, next) = (folder.path().join("f"), folder.path().join("next"));
    symlink(mounts[0].join("f"), &link).expect("symlink");
    let end = AtomicBool::new(false);
    thread::scope(|scope| {
        let turning = scope.spawn(|| {
            let mut turns = 0;
            while !end.load(Ordering::SeqCst) {
                turns += 1;
                symlink(mounts[turns % 2].join("f"), &next).expect("symlink");
                fs::rename(&next, &link).expect("rename");
                thread::yield_now();
            }
        });
        let ran = std::panic::catch_unwind(|| {
            fsx(&program, &link, "close_open = 20.0\nmapread = 5.0\nmapwrite = 5.0\n");
        });
        end.store(true, Ordering::SeqCst);
        turning.join().expect("turning does not panic");
        ran.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    world.end();
}
