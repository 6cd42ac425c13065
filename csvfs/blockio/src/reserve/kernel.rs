//! Reservations of a SCSI device of this machine.
//!
//! The kernel's calls (`linux/pr.h`) change them, for a multipath device on all of its paths. What is registered is read
//! by the SCSI command itself (SG_IO, PERSISTENT RESERVE IN), because kernels before 6.19 have no call for that.
//!
//! The calls give an error number, or a positive SCSI result. Its lowest byte is the status: 0x18 is a reservation conflict,
//! 0x02 a check condition; its third byte is above 0 when the path failed. The sense data behind the status is not given out, so it counts as a unit attention; a device that does not know the command
//! answers so every time.
#![expect(unsafe_code, reason = "the kernel reads and fills structures that live on this stack")]

use std::ffi::c_void;
use std::os::fd::{AsRawFd, OwnedFd};

use super::{Keys, ReservationType, Reservations, ReserveError};

/// `linux/pr.h`.
const TYPE_WRITE_EXCLUSIVE_ALL_REGISTRANTS: u32 = 5;
const FLAG_IGNORE_KEY: u32 = 1;
/// `_IOW('p', number, size)`.
const fn iow(number: u32, size: usize) -> u32 {
    assert!(size < 1 << 14);
    #[expect(clippy::cast_possible_truncation, reason = "checked above")]
    let size = size as u32;
    1 << 30 | size << 16 | (b'p' as u32) << 8 | number
}
const REGISTER: u32 = iow(200, size_of::<Registration>());
const RESERVE: u32 = iow(201, size_of::<Reservation>());
const PREEMPT_ABORT: u32 = iow(204, size_of::<Preemption>());
const CLEAR: u32 = iow(205, size_of::<Clearing>());
/// `scsi/sg.h`.
const SG_IO: u32 = 0x2285;
const DIRECTION_FROM_DEVICE: i32 = -3;

/// SCSI.
const PERSISTENT_RESERVE_IN: u8 = 0x5e;
const READ_KEYS: u8 = 0;
const READ_RESERVATION: u8 = 1;
const SCSI_WRITE_EXCLUSIVE_ALL_REGISTRANTS: u8 = 7;
const STATUS_GOOD: i32 = 0;
const STATUS_CHECK_CONDITION: i32 = 0x02;
const STATUS_CONFLICT: i32 = 0x18;
const SENSE_ILLEGAL_REQUEST: u8 = 5;
const SENSE_UNIT_ATTENTION: u8 = 6;

/// Keys of one answer: more than all nodes on many paths.
const KEYS_MAX: usize = 1024;
const ANSWER_HEADER_BYTES: usize = 8;
const LIMIT_MS: u32 = 10_000;

#[repr(C)]
struct Registration {
    old_key: u64,
    new_key: u64,
    flags: u32,
    pad: u32,
}

#[repr(C)]
struct Reservation {
    key: u64,
    kind: u32,
    flags: u32,
}

/// `old_key` is the caller's, `new_key` the one to be taken off.
#[repr(C)]
struct Preemption {
    old_key: u64,
    new_key: u64,
    kind: u32,
    flags: u32,
}

#[repr(C)]
struct Clearing {
    key: u64,
    flags: u32,
    pad: u32,
}

/// `sg_io_hdr`.
#[repr(C)]
struct SgIo {
    interface_id: i32,
    direction: i32,
    command_len: u8,
    sense_len_max: u8,
    iovec_count: u16,
    data_len: u32,
    data: *mut c_void,
    command: *const u8,
    sense: *mut u8,
    limit_ms: u32,
    flags: u32,
    pack_id: i32,
    user: *mut c_void,
    status: u8,
    masked_status: u8,
    message_status: u8,
    sense_len: u8,
    host_status: u16,
    driver_status: u16,
    residual: i32,
    duration_ms: u32,
    info: u32,
}

const _: () = assert!(size_of::<Registration>() == 24 && size_of::<Preemption>() == 24);
const _: () = assert!(size_of::<Reservation>() == 16 && size_of::<Clearing>() == 16);
#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<SgIo>() == 88);

/// See the module.
#[derive(Debug)]
pub(crate) struct KernelReservations {
    device: OwnedFd,
}

impl KernelReservations {
    pub(crate) fn new(device: OwnedFd) -> Self {
        Self { device }
    }

    fn change<T>(&self, op: &'static str, request: u32, argument: &T) -> Result<(), ReserveError> {
        let from = std::ptr::from_ref(argument).cast::<c_void>();
        // SAFETY: `argument` is the structure that `request` names, it outlives the call, and the kernel only reads it.
        let status = unsafe { libc::ioctl(self.device.as_raw_fd(), request.into(), from) };
        if status < 0 { Err(refused(op, &std::io::Error::last_os_error())) } else { of_result(op, status) }
    }

    /// PERSISTENT RESERVE IN; gives the number of bytes of the answer.
    fn read(&self, op: &'static str, action: u8, answer: &mut [u8]) -> Result<usize, ReserveError> {
        let data_len = u16::try_from(answer.len()).expect("answers are shorter than 64 KiB");
        let [high, low] = data_len.to_be_bytes();
        let command = [PERSISTENT_RESERVE_IN, action, 0, 0, 0, 0, 0, high, low, 0];
        let mut sense = [0_u8; 64];
        let mut call = SgIo {
            interface_id: i32::from(b'S'),
            direction: DIRECTION_FROM_DEVICE,
            command_len: 10,
            sense_len_max: 64,
            iovec_count: 0,
            data_len: data_len.into(),
            data: answer.as_mut_ptr().cast(),
            command: command.as_ptr(),
            sense: sense.as_mut_ptr(),
            limit_ms: LIMIT_MS,
            flags: 0,
            pack_id: 0,
            user: std::ptr::null_mut(),
            status: 0,
            masked_status: 0,
            message_status: 0,
            sense_len: 0,
            host_status: 0,
            driver_status: 0,
            residual: 0,
            duration_ms: 0,
            info: 0,
        };
        // SAFETY: the pointers lead to `answer`, `command` and `sense`, which outlive the call and have the lengths that are
        // stated beside them.
        let status = unsafe { libc::ioctl(self.device.as_raw_fd(), SG_IO.into(), &raw mut call) };
        if status < 0 {
            return Err(refused(op, &std::io::Error::last_os_error()));
        }
        if call.host_status != 0 {
            let why = format!("the path failed with host status {:#x}", call.host_status);
            return Err(ReserveError::Failed { op, why });
        }
        match i32::from(call.status) {
            STATUS_GOOD => {
                let left = usize::try_from(call.residual).unwrap_or(0);
                Ok(answer.len().saturating_sub(left))
            }
            STATUS_CHECK_CONDITION => Err(of_sense(op, &sense)),
            STATUS_CONFLICT => Err(ReserveError::Conflict { op }),
            other => {
                Err(ReserveError::Failed { op, why: format!("the device answers with status {other:#x}") })
            }
        }
    }
}

/// The outcome of a command by its SCSI result: status, message (of no meaning), host, driver, a byte each from the lowest.
fn of_result(op: &'static str, result: i32) -> Result<(), ReserveError> {
    let host = result >> 16 & 0xff;
    if host != 0 {
        return Err(ReserveError::Failed { op, why: format!("the path failed with host status {host:#x}") });
    }
    match result & 0xff {
        STATUS_GOOD => Ok(()),
        STATUS_CHECK_CONDITION => Err(ReserveError::Attention { op }),
        STATUS_CONFLICT => Err(ReserveError::Conflict { op }),
        other => Err(ReserveError::Failed { op, why: format!("the device answers with status {other:#x}") }),
    }
}

fn refused(op: &'static str, error: &std::io::Error) -> ReserveError {
    match error.raw_os_error() {
        Some(libc::ENOTTY | libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS) => ReserveError::Unsupported {
            op,
            why: "the device has no persistent reservations of the SCSI kind".to_owned(),
        },
        Some(libc::EBADE) => ReserveError::Conflict { op },
        _ => ReserveError::Failed { op, why: error.to_string() },
    }
}

/// Fixed or descriptor format, by the response code in the first byte.
fn of_sense(op: &'static str, sense: &[u8; 64]) -> ReserveError {
    let key = if sense[0] & 0x7f >= 0x72 { sense[1] } else { sense[2] } & 0x0f;
    match key {
        SENSE_UNIT_ATTENTION => ReserveError::Attention { op },
        SENSE_ILLEGAL_REQUEST => ReserveError::Unsupported {
            op,
            why: "the device does not know persistent reservations".to_owned(),
        },
        other => ReserveError::Failed { op, why: format!("the device answers with sense key {other}") },
    }
}

/// Generation, and the list behind the header as far as it has arrived.
fn listed<'a>(op: &'static str, answer: &'a [u8]) -> Result<(u32, &'a [u8]), ReserveError> {
    let short = || ReserveError::Failed { op, why: "the device's answer is too short".to_owned() };
    let (generation, rest) = answer.split_first_chunk::<4>().ok_or_else(short)?;
    let (len, list) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    let len = usize::try_from(u32::from_be_bytes(*len)).unwrap_or(usize::MAX);
    // A list that was cut short must not be taken for the whole one.
    let list = list.get(..len).ok_or_else(short)?;
    Ok((u32::from_be_bytes(*generation), list))
}

impl Reservations for KernelReservations {
    fn register(&self, key: u64) -> Result<(), ReserveError> {
        let argument = Registration { old_key: 0, new_key: key, flags: FLAG_IGNORE_KEY, pad: 0 };
        self.change("register", REGISTER, &argument)
    }

    fn unregister(&self, key: u64) -> Result<(), ReserveError> {
        let argument = Registration { old_key: key, new_key: 0, flags: 0, pad: 0 };
        self.change("unregister", REGISTER, &argument)
    }

    fn reserve(&self, key: u64) -> Result<(), ReserveError> {
        let argument = Reservation { key, kind: TYPE_WRITE_EXCLUSIVE_ALL_REGISTRANTS, flags: 0 };
        self.change("reserve", RESERVE, &argument)
    }

    fn preempt_and_abort(&self, own: u64, victim: u64) -> Result<(), ReserveError> {
        let kind = TYPE_WRITE_EXCLUSIVE_ALL_REGISTRANTS;
        let argument = Preemption { old_key: own, new_key: victim, kind, flags: 0 };
        self.change("preempt", PREEMPT_ABORT, &argument)
    }

    fn clear(&self, own: u64) -> Result<(), ReserveError> {
        self.change("clear", CLEAR, &Clearing { key: own, flags: 0, pad: 0 })
    }

    fn read_keys(&self) -> Result<Keys, ReserveError> {
        let op = "read keys";
        let mut answer = [0; ANSWER_HEADER_BYTES + 8 * KEYS_MAX];
        let len = self.read(op, READ_KEYS, &mut answer)?;
        let (generation, list) = listed(op, &answer[..len])?;
        let (keys, _) = list.as_chunks::<8>();
        Ok(Keys { generation, keys: keys.iter().map(|key| u64::from_be_bytes(*key)).collect() })
    }

    fn read_reservation(&self) -> Result<Option<ReservationType>, ReserveError> {
        let op = "read reservation";
        let mut answer = [0; 64];
        let len = self.read(op, READ_RESERVATION, &mut answer)?;
        let (_, list) = listed(op, &answer[..len])?;
        // Key, four bytes that mean nothing any more, one reserved, then scope and type.
        Ok(list.get(13).map(|byte| match byte & 0x0f {
            SCSI_WRITE_EXCLUSIVE_ALL_REGISTRANTS => ReservationType::WriteExclusiveAllRegistrants,
            other => ReservationType::Other(other),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_no_reservations_and_says_so() {
        let file = tempfile::tempfile().expect("a file for the test");
        let none = KernelReservations::new(file.into());
        for outcome in [none.read_keys().map(drop), none.register(7), none.preempt_and_abort(7, 8)] {
            assert!(matches!(outcome, Err(ReserveError::Unsupported { .. })), "{outcome:?}");
        }
    }

    #[test]
    fn an_answer_that_was_cut_short_is_not_taken_for_a_list_without_the_rest() {
        let mut answer = [0; 32];
        answer[..12].copy_from_slice(&[0, 0, 0, 9, 0, 0, 0, 16, 1, 2, 3, 4]);
        assert_eq!(
            listed("read keys", &answer).map(|(generation, list)| (generation, list.len())),
            Ok((9, 16))
        );
        assert!(listed("read keys", &answer[..23]).is_err());
        assert!(listed("read keys", &answer[..6]).is_err());
    }

    // Seen with Linux 6.1: a conflict comes as 0x118.
    #[test]
    fn the_status_of_a_command_is_the_lowest_byte_of_its_result() {
        assert_eq!(of_result("x", 0), Ok(()));
        assert_eq!(of_result("x", 0x118), Err(ReserveError::Conflict { op: "x" }));
        assert_eq!(of_result("x", 0x0800_0002), Err(ReserveError::Attention { op: "x" }));
        assert!(matches!(of_result("x", 0xe_0000), Err(ReserveError::Failed { .. })), "a path that failed");
    }

    // Invariant A6
    #[test]
    fn a_unit_attention_is_told_from_a_command_that_is_not_known() {
        let mut sense = [0; 64];
        (sense[0], sense[2]) = (0x70, 6);
        assert!(matches!(of_sense("x", &sense), ReserveError::Attention { .. }));
        (sense[0], sense[1]) = (0x72, 5);
        assert!(matches!(of_sense("x", &sense), ReserveError::Unsupported { .. }));
    }
}
