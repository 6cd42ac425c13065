//! The control socket: requests of the supervisor, answered one after the other on each connection.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hv::DiskLimits;
use hv::control::{
    Console, ConsoleReply, Control, ControlReply, DiskAdd, FetchReply, Ok as Done, Refused, StatusReply,
    TakeReply, TypeReply, control, control_reply,
};
use prost::Message;
use wire::{BlockingServer, Local, Refusal, RefusalCode, service};

use crate::config::{DiskSpec, VolumePath};
use crate::failure::Failure;
use crate::runner::Runner;

/// Console bytes in one answer; far below the largest frame.
const CONSOLE_BYTES_MAX: usize = 256 << 10;
/// How long an answer waits for output, when asked to.
const FOLLOW_LIMIT: Duration = Duration::from_secs(1);
/// How long an answer waits for room for what is typed.
const ROOM_LIMIT: Duration = Duration::from_secs(1);
/// How long an answer waits for the end of the guest, at most.
const STATUS_LIMIT: Duration = Duration::from_secs(30);

/// Makes the control socket, while the process may. Who connects is served once the VM is there.
pub(crate) fn listen(socket: &Path) -> Result<UnixListener, Failure> {
    let failed = |error: &dyn std::fmt::Display| not_listening(socket, error);
    // A socket that a former process left behind; one that still listens is another VM's supervisor's mistake.
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(&error)),
        _ => {}
    }
    let listener = UnixListener::bind(socket).map_err(|error| failed(&error))?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))
        .map_err(|error| failed(&error))?;
    Ok(listener)
}

fn not_listening(socket: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::new(
        format!("cannot listen on {}: {error}", socket.display()),
        "the folder must exist and the path be shorter than 108 bytes",
    )
}

/// Serves the runner's control socket until the server is dropped.
///
/// # Errors
/// When the system refuses, or it is served already.
pub fn serve_control(runner: &Arc<Runner>, node: u16, vm: &str) -> Result<BlockingServer, Failure> {
    let failed = |error: &dyn std::fmt::Display| not_listening(runner.control_socket(), error);
    let listener = runner.take_listener().ok_or_else(|| failed(&"it is served already"))?;
    let runner = Arc::clone(runner);
    let local = Local { cluster: uuid::Uuid::nil(), node, name: format!("hv {vm}") };
    BlockingServer::serve(listener, local, Box::new(move |_, service, body| answer(&runner, service, body)))
        .map_err(|error| failed(&error))
}

fn answer(runner: &Arc<Runner>, service: u16, body: Bytes) -> Result<Bytes, Refusal> {
    if service != service::HV {
        return Err(Refusal::unsupported(service));
    }
    let request = Control::decode(body).map_err(|error| {
        Refusal::new(RefusalCode::Invalid, format!("unreadable control request: {error}"))
    })?;
    let op = request
        .op
        .ok_or_else(|| Refusal::new(RefusalCode::Unsupported, "a control request of a newer version"))?;
    let result = carry_out(runner, op).unwrap_or_else(|failure| {
        control_reply::Result::Refused(Refused { message: failure.error, hint: failure.hint })
    });
    Ok(ControlReply { result: Some(result) }.encode_to_vec().into())
}

fn carry_out(runner: &Arc<Runner>, op: control::Op) -> Result<control_reply::Result, Failure> {
    use control::Op;
    let done = |()| control_reply::Result::Ok(Done {});
    match op {
        Op::Status(asked) => Ok(control_reply::Result::Status(status(runner, asked.wait_ms))),
        Op::Pause(_) => runner.pause().map(done),
        Op::Resume(_) => runner.resume().map(done),
        Op::Save(to) => {
            let to = VolumePath { volume: to.volume, path: to.path };
            runner.save(&to).map(control_reply::Result::Save)
        }
        Op::CopyMemory(to) => runner.copy_memory(&VolumePath { volume: to.volume, path: to.path }).map(done),
        Op::AwaitMemory(_) => runner.await_memory().map(done),
        Op::Abandon(abandon) => runner.abandon(&abandon.disks).map(done),
        Op::Activate(_) => runner.activate().map(done),
        Op::Console(console) => Ok(control_reply::Result::Console(read_console(runner, &console))),
        Op::Type(typed) => runner
            .type_in(&typed.data, ROOM_LIMIT)
            .map(|taken| control_reply::Result::Type(TypeReply { taken: taken as u64 })),
        Op::DiskAdd(disk) => {
            let DiskAdd { slot, volume, path, read_only } = disk;
            let spec = DiskSpec { volume, path, read_only, slot: Some(slot), iops: 0, bytes_per_second: 0 };
            runner.add_disk(slot, spec).map(done)
        }
        Op::DiskRemove(disk) => runner.remove_disk(disk.slot).map(done),
        Op::DiskResize(disk) => runner.resize_disk(disk.slot, disk.size_bytes).map(done),
        Op::DiskLimit(disk) => {
            let limits = DiskLimits { iops: disk.iops, bytes_per_second: disk.bytes_per_second };
            runner.limit_disk(disk.slot, limits).map(done)
        }
        Op::DiskClone(disk) => runner.clone_disk(disk.slot, &disk.path).map(done),
        Op::Stop(stop) => runner.stop(stop.force).map(done),
        Op::Ram(_) => runner.ram().map(control_reply::Result::Ram),
        Op::Track(track) => runner.track(track.on).map(done),
        Op::Fetch(_) => runner.fetch().map(|pages| control_reply::Result::Fetch(FetchReply { pages })),
        Op::Take(take) => runner
            .take(take.first_page, take.pages)
            .map(|bits| control_reply::Result::Take(TakeReply { bits })),
        Op::Halt(_) => runner.halt().map(control_reply::Result::Halt),
        Op::Throttle(throttle) => runner.hold_back(throttle.percent).map(done),
        Op::Balloon(balloon) => runner.set_balloon(balloon.bytes).map(done),
        Op::Retry(_) => {
            runner.vm().retry_stalled();
            Ok(done(()))
        }
        Op::ImageWork(work) => runner.begin_image_work(work).map(done),
        Op::ImageWatch(watch) => runner.watch_image_work(watch.seen).map(control_reply::Result::Image),
        Op::ImageDecide(decision) => runner.decide_image_work(decision.go).map(done),
        Op::Load(load) => runner.load(&load.state).map(done),
    }
}

/// A guest that has ended already is told of at once.
fn status(runner: &Runner, wait_ms: u64) -> StatusReply {
    runner.vm().end().wait_within(Duration::from_millis(wait_ms).min(STATUS_LIMIT));
    StatusReply { waited: wait_ms > 0, ..runner.status() }
}

fn read_console(runner: &Runner, request: &Console) -> ConsoleReply {
    let console = runner.vm().console();
    // Positions of another boot mean nothing here.
    let other = request.boot != 0 && console.boot() != 0 && request.boot != console.boot();
    let from = if other { 0 } else { request.from };
    let text = match request.follow {
        true => console.read_waiting(from, CONSOLE_BYTES_MAX, FOLLOW_LIMIT),
        false => console.read(from, CONSOLE_BYTES_MAX),
    };
    ConsoleReply { data: text.data, from: text.from, next: text.next, boot: text.boot, last: text.last }
}
