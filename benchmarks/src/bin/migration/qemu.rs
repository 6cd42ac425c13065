//! QEMU's side: two processes that hand the guest to and fro.

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::Failure;
use crate::figures::{Move, Moves};
use crate::load::{self, Guest};
use crate::qmp::Qemu;

/// A move that takes longer does not come to an end with these settings.
const GIVE_UP_AFTER: Duration = Duration::from_secs(40);

/// How QEMU is told to move.
pub(crate) struct Settings {
    pub(crate) name: &'static str,
    capabilities: &'static [&'static str],
    compression: &'static str,
    /// 0 leaves QEMU's own.
    downtime_ms: u64,
}

pub(crate) const DEFAULT: Settings =
    Settings { name: "default settings", capabilities: &[], compression: "", downtime_ms: 0 };

/// What an administrator who wants a short blackout may choose. A small budget that does not converge is left out.
const CANDIDATES: &[Settings] = &[
    Settings { name: "downtime limit 5 ms", capabilities: &[], compression: "", downtime_ms: 5 },
    Settings {
        name: "2 channels, downtime limit 5 ms",
        capabilities: &["multifd"],
        compression: "none",
        downtime_ms: 5,
    },
    Settings {
        name: "2 channels, zstd, downtime limit 5 ms",
        capabilities: &["multifd"],
        compression: "zstd",
        downtime_ms: 5,
    },
    Settings {
        name: "XBZRLE, downtime limit 5 ms",
        capabilities: &["xbzrle"],
        compression: "",
        downtime_ms: 5,
    },
    Settings {
        name: "2 channels, downtime limit 50 ms",
        capabilities: &["multifd"],
        compression: "none",
        downtime_ms: 50,
    },
];

/// The settings with the shortest blackout for this guest, and so many moves with them.
pub(crate) fn best(
    guest: &Guest,
    count: usize,
    folder: &Path,
) -> Result<(&'static Settings, Moves), Failure> {
    let mut tried = Vec::new();
    for settings in CANDIDATES {
        if let Ok(few) = moves(guest, settings, 2, folder) {
            few.print(&format!("  tried: {}", settings.name));
            tried.push((few.blackout_ms(50), settings));
        }
    }
    tried.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (_, settings) = tried.first().ok_or("QEMU comes to an end with none of the settings")?;
    Ok((settings, moves(guest, settings, count, folder)?))
}

/// Moves the guest so many times.
pub(crate) fn moves(
    guest: &Guest,
    settings: &Settings,
    count: usize,
    folder: &Path,
) -> Result<Moves, Failure> {
    let image = load::image(folder)?;
    let text = |path: &Path| path.to_str().map(ToOwned::to_owned).ok_or("a path that is no UTF-8");
    let arguments = vec![
        "-m".to_owned(),
        format!("{}M", guest.memory_mib),
        "-kernel".to_owned(),
        text(&image)?,
        "-initrd".to_owned(),
        text(&guest.module)?,
        "-append".to_owned(),
        guest.cmdline.clone(),
    ];
    let mut here = Qemu::start(folder, "qemu0", &arguments)?;
    until_ready(&here)?;
    let mut done = Vec::new();
    for number in 1..=count {
        let mut there_arguments = arguments.clone();
        there_arguments.extend(["-incoming".to_owned(), "defer".to_owned()]);
        let mut there = Qemu::start(folder, &format!("qemu{number}"), &there_arguments)?;
        done.push(one(&mut here, &mut there, settings)?);
        here = there;
        if here.said()?.contains("FAIL") {
            return Err(format!("the guest has lost memory: {}", here.said()?).into());
        }
    }
    Ok(Moves(done))
}

fn until_ready(qemu: &Qemu) -> Result<(), Failure> {
    let begun = Instant::now();
    while !qemu.said()?.contains("ready") {
        if begun.elapsed() > Duration::from_secs(120) {
            return Err(format!("the guest does not start under QEMU: {}", qemu.said()?).into());
        }
        std::thread::yield_now();
    }
    Ok(())
}

fn one(here: &mut Qemu, there: &mut Qemu, settings: &Settings) -> Result<Move, Failure> {
    settings.apply(here)?;
    settings.apply(there)?;
    // A source has arrived by a move before: what it said of that one is over.
    here.forget_events();
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let uri = format!("tcp:127.0.0.1:{port}");
    there.ask("migrate-incoming", &json!({"uri": uri}))?;
    let begun = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
    here.ask("migrate", &json!({"uri": uri}))?;
    let finished = until_complete(here)?;
    let (stopped, resumed) = (here.event("STOP")?, there.event("RESUME")?);
    let sent_bytes = finished["ram"]["transferred"].as_f64().ok_or("QEMU does not say what it has sent")?;
    Ok(Move {
        blackout_ms: (resumed - stopped) * 1000.0,
        total_ms: (resumed - begun) * 1000.0,
        sent_bytes,
        parts_ms: None,
    })
}

fn until_complete(qemu: &mut Qemu) -> Result<Value, Failure> {
    let begun = Instant::now();
    loop {
        match qemu.migration_status()?.as_str() {
            "completed" => return qemu.ask("query-migrate", &json!({})),
            status @ ("failed" | "cancelled") => return Err(format!("QEMU's move is {status}").into()),
            _ if begun.elapsed() > GIVE_UP_AFTER => return Err("QEMU's move does not come to an end".into()),
            _ => {}
        }
    }
}

impl Settings {
    fn apply(&self, qemu: &mut Qemu) -> Result<(), Failure> {
        let on: Vec<Value> = ["events"]
            .iter()
            .chain(self.capabilities)
            .map(|name| json!({"capability": name, "state": true}))
            .collect();
        qemu.ask("migrate-set-capabilities", &json!({"capabilities": on}))?;
        if self.downtime_ms == 0 {
            return Ok(());
        }
        let mut parameters = json!({"downtime-limit": self.downtime_ms, "max-bandwidth": 10_000_000_000_u64});
        if !self.compression.is_empty() {
            parameters["multifd-compression"] = self.compression.into();
            parameters["multifd-channels"] = 2.into();
        }
        if self.capabilities.contains(&"xbzrle") {
            parameters["xbzrle-cache-size"] = (512 << 20).into();
        }
        qemu.ask("migrate-set-parameters", &parameters)?;
        Ok(())
    }
}
