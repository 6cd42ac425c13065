//! The tap of a VM's network card, opened before the process gives up its rights.
//!
//! A tap that the administrator has made with several queues can be opened at the target of a move while the source still
//! has it. **Invariant:** nothing is read from it before the guest runs here.
#![expect(unsafe_code, reason = "what a tap is, is told to the kernel by an ioctl that no library here has")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use hv::{NetConfig, OFFLOADS_ALL};
use uuid::Uuid;

use crate::config::NetSpec;
use crate::failure::Failure;

const DEVICE: &str = "/dev/net/tun";
const NAME_BYTES_MAX: usize = 15;
const HEADER_BYTES: libc::c_int = 12;

/// The card of a VM: its address is made of the VM's id, so it is the same wherever the VM runs.
///
/// # Errors
/// When there is no such tap, or somebody has it.
pub fn card(spec: &NetSpec, vm: Uuid) -> Result<NetConfig, Failure> {
    let tap = open(&spec.tap)?;
    let offload = takes_offloads(&tap).then_some(offload as fn(&File, u32) -> io::Result<()>);
    Ok(NetConfig { tap, mac: address_of(vm), offload })
}

/// Locally administered, of one station.
fn address_of(vm: Uuid) -> [u8; 6] {
    let id = vm.as_bytes();
    [0x02, id[0], id[1], id[2], id[3], id[4]]
}

fn open(name: &str) -> Result<File, Failure> {
    let refused = |why: &dyn std::fmt::Display| {
        Failure::new(
            format!("the tap {name} cannot be used: {why}"),
            format!("make it with `ip tuntap add {name} mode tap`, put it on a bridge, and set it up"),
        )
    };
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(refused(&"a network device has 1 to 15 letters"));
    }
    if !std::path::Path::new("/sys/class/net").join(name).exists() {
        return Err(refused(&"there is no such network device"));
    }
    let tap = tun().map_err(|error| refused(&error))?;
    // A tap with one queue refuses the flag, one with several refuses to be opened without it.
    if set_interface(&tap, name, libc::IFF_MULTI_QUEUE).is_err() {
        set_interface(&tap, name, 0).map_err(|error| refused(&error))?;
    }
    let header = HEADER_BYTES;
    // SAFETY: the kernel reads one integer at this address.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) } < 0 {
        return Err(refused(&io::Error::last_os_error()));
    }
    Ok(tap)
}

fn tun() -> io::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(DEVICE)
}

/// Whether the tap can be told what its guest takes. It is told that this is nothing yet.
fn takes_offloads(tap: &File) -> bool {
    let told = offload(tap, OFFLOADS_ALL).and_then(|()| offload(tap, 0));
    told.inspect_err(|error| tracing::warn!(%error, "the tap has no offloads")).is_ok()
}

/// Tells the tap what may be left to its guest.
fn offload(tap: &File, flags: u32) -> io::Result<()> {
    // SAFETY: the argument is a number.
    match unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set_interface(tap: &File, name: &str, more: libc::c_int) -> io::Result<()> {
    // SAFETY: a structure of numbers and bytes; all zeros are a value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).expect("flags of 16 bits");
    // SAFETY: the kernel reads and writes this structure, which outlives the call.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_a_vm_is_its_own_and_always_the_same() {
        let (a, b) = (Uuid::from_u128(1 << 120), Uuid::from_u128(2 << 120));
        assert_eq!(address_of(a), address_of(a));
        assert_ne!(address_of(a), address_of(b));
        assert_eq!(address_of(a)[0] & 3, 2);
    }

    // On a thread that has a network of its own, which is gone with it.
    #[test]
    #[expect(clippy::print_stderr, reason = "a skipped test says so")]
    fn a_tap_of_this_kernel_takes_all_that_a_guest_may_be_left_and_nothing_unknown() {
        // SAFETY: takes nothing.
        if !std::path::Path::new(DEVICE).exists() || unsafe { libc::geteuid() } != 0 {
            eprintln!("skipped: needs {DEVICE} and root");
            return;
        }
        let tried = std::thread::spawn(|| {
            // SAFETY: changes what this thread sees of the network, nothing else.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", io::Error::last_os_error());
            let tap = tun().expect("the device is there");
            set_interface(&tap, "tried0", 0).expect("a tap of its own");
            assert!(takes_offloads(&tap));
            for flags in 0..=OFFLOADS_ALL {
                // Streams are left to who does checksums, and their congestion to who has streams.
                let sensible = flags == 0 || flags & 1 != 0 && (flags & 8 == 0 || flags & 6 != 0);
                assert_eq!(offload(&tap, flags).is_ok(), sensible, "{flags}");
            }
            offload(&tap, 1 << 30).expect_err("nobody knows it");
        });
        tried.join().expect("no claim fails");
    }

    #[test]
    fn a_tap_that_is_not_there_is_refused_by_name() {
        for name in ["", "no-such-tap", "a-name-that-is-far-too-long"] {
            assert!(open(name).unwrap_err().error.contains(name));
        }
    }
}
