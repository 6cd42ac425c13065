//! Guests that end, fail or cannot go on: the VM is kept and says why. And kernels entered in 64 bits.

use hv::{BootSource, DEVICES_VERSION, Firmware, RunState, Vm, VmConfig, VmError};

use crate::support::{Disks, kvm_is_here, text};

const IMAGE_START: u64 = 0x10_0000;

fn boot(kernel: &[u8], cmdline: &str, disks: &Disks) -> Vm {
    let boot = BootSource { kernel, initrd: None, cmdline, firmware: Firmware::CommandLine };
    let disks = disks.configs(true);
    Vm::build(VmConfig {
        memory_bytes: 16 << 20,
        cpus: 1,
        boot: Some(boot),
        disks,
        net: None,
        console_bytes: 4096,
        devices: DEVICES_VERSION,
    })
    .unwrap()
}

/// Runs until the guest's end.
fn run(vm: &Vm) -> RunState {
    vm.resume().unwrap();
    vm.end().wait()
}

/// A 64-bit ELF image without a PVH note, of nothing but this code.
fn linux_like(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 0x1000];
    image[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64
    put(24, &IMAGE_START.to_le_bytes()); // entry
    put(32, &64_u64.to_le_bytes()); // program headers
    put(52, &[64, 0, 56, 0, 1, 0]);
    put(64, &[1, 0, 0, 0, 7, 0, 0, 0]); // loadable
    for (at, value) in
        [(72, 0x1000), (80, IMAGE_START), (88, IMAGE_START), (96, 0x1000), (104, 0x1000), (112, 0x1000)]
    {
        put(at, &u64::to_le_bytes(value));
    }
    image.extend(code);
    image.resize(0x2000, 0);
    image
}

#[test]
fn a_kernel_without_pvh_is_entered_in_64_bits() {
    if !kvm_is_here() {
        return;
    }
    // Prints the boot protocol's magic from RSI + 0x202, then ends with code 0: mov ebx, [rsi + 0x202]; mov dx, 0x3f8;
    // mov ecx, 4; (mov al, bl; out dx, al; shr rbx, 8; loop); mov dx, 0xf4; xor eax, eax; out dx, eax; hlt
    let code = [
        0x8b, 0x9e, 0x02, 0x02, 0x00, 0x00, 0x66, 0xba, 0xf8, 0x03, 0xb9, 0x04, 0x00, 0x00, 0x00, 0x88, 0xd8,
        0xee, 0x48, 0xc1, 0xeb, 0x08, 0xe2, 0xf7, 0x66, 0xba, 0xf4, 0x00, 0x31, 0xc0, 0xef, 0xf4,
    ];
    let vm = boot(&linux_like(&code), "console=ttyS0", &Disks::new());
    assert_eq!(run(&vm), RunState::Stopped("the guest ended".into()));
    assert_eq!(text(&vm), "HdrS");
    assert!(vm.console().is_closed());
}

#[test]
fn a_guest_that_resets_its_machine_is_told_from_one_that_ends() {
    if !kvm_is_here() {
        return;
    }
    let code = [0xb0, 0xfe, 0xe6, 0x64, 0xf4]; // mov al, 0xfe; out 0x64, al; hlt
    let vm = boot(&linux_like(&code), "", &Disks::new());
    assert_eq!(run(&vm), RunState::Reset);
    assert!(vm.resume().is_err(), "it is over");
}

#[test]
fn a_guest_that_cannot_go_on_is_kept_with_its_registers_and_code() {
    if !kvm_is_here() {
        return;
    }
    // mov ebx, 0x1234; ud2: without an interrupt table that is a triple fault. (Where KVM stops at ud2 itself, the report
    // is of that.)
    let code = [0xbb, 0x34, 0x12, 0x00, 0x00, 0x0f, 0x0b];
    let vm = boot(&linux_like(&code), "", &Disks::new());
    let RunState::Crashed(why) = run(&vm) else { panic!("{:?}", vm.run_state()) };
    assert!(why.contains("rip=") && why.contains("instruction bytes"), "{why}");
    // AMD's processors forget the registers in a triple fault.
    if why.contains("rip=0x100005") {
        assert!(why.contains("rbx=0x1234") && why.contains("[0f, 0b,"), "the failing instruction: {why}");
    }
    // It can be looked at, and goes nowhere.
    let mut seen = [0; 2];
    vm.ram().read(IMAGE_START + 5, &mut seen).unwrap();
    assert_eq!(seen, [0x0f, 0x0b]);
    assert!(matches!(vm.resume(), Err(VmError::WrongState { .. })));
    assert!(matches!(vm.pause(), Err(VmError::WrongState { .. })));
    vm.detach_disks().unwrap();
}

#[test]
fn a_guest_that_finds_a_fault_says_which() {
    if !kvm_is_here() {
        return;
    }
    let vm = boot(hv_guest::SECTOR_WRITER, "verify=0 write=1 range=999999", &Disks::new());
    assert!(matches!(run(&vm), RunState::Crashed(why) if why.contains("failure 1")));
    assert!(text(&vm).contains("FAIL disk: smaller than the range"), "{}", text(&vm));
}

#[test]
fn a_guest_notices_a_disk_that_loses_a_write() {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let vm = boot(hv_guest::SECTOR_WRITER, crate::support::CMDLINE, &disks);
    vm.resume().unwrap();
    crate::support::wait_ack_beyond(&vm, 300);
    vm.pause().unwrap();
    vm.drain().unwrap();
    // The disk goes back to what it was when it was new.
    blockio::BlockDevice::write_at(&*disks.scratch, 0, &vec![0; 256 * 4096]).unwrap();
    vm.resume().unwrap();
    assert!(matches!(vm.end().wait(), RunState::Crashed(_)));
    assert!(text(&vm).contains("FAIL disk: "), "{}", text(&vm));
}
