//! Which pages of RAM the guest has written, as KVM logs them.
//!
//! ```text
//!   start     every page counts as written
//!   fetch     a copy of the log; nothing is cleared by it
//!   clear     of the pages that were fetched, those of one chunk, right before that chunk is read
//! ```
//! Clearing a chunk just before it is read, and not all of RAM at the start of a pass, leaves the fewest pages to be sent
//! again, and write-protects RAM in small steps instead of one long stall.
//!
//! **Invariant:** only bits that were fetched are cleared (H4); a page that is written in between stays in the log.
#![expect(unsafe_code, reason = "the library has no call that clears a part of the log")]

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::{KvmError, Machine, Tried};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

impl Machine {
    /// Makes the log one that is cleared piece by piece, where the host can do that. Before the first use of the log.
    pub(super) fn clear_log_by_pieces(&self) -> Result<bool, KvmError> {
        let can = u64::try_from(self.kvm.check_extension_raw(u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)))
            .unwrap_or(0);
        let wanted = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET) & can;
        if wanted & u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE) == 0 {
            return Ok(false);
        }
        let cap = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            args: [wanted, 0, 0, 0],
            ..kvm_enable_cap::default()
        };
        self.vm.enable_cap(&cap).tried("choosing how the dirty log is cleared")?;
        Ok(true)
    }

    /// Switches the log on or off for all of RAM.
    pub(crate) fn log_writes(&self, on: bool) -> Result<(), KvmError> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        for (slot, region) in (0..).zip(self.ram.regions()) {
            let region = kvm_userspace_memory_region {
                slot,
                guest_phys_addr: region.start,
                memory_size: region.bytes,
                userspace_addr: region.host,
                flags,
            };
            // SAFETY: the same range as at the start, a mapping that `ram` keeps as long as the VM lives.
            unsafe { self.vm.set_user_memory_region(region) }.tried("switching the dirty log")?;
        }
        Ok(())
    }

    /// The log of one piece of RAM, a bit for each page. On a host that cannot clear by pieces this clears it.
    pub(crate) fn written_pages(&self, slot: u32, bytes: u64) -> Result<Vec<u64>, KvmError> {
        let len = usize::try_from(bytes).expect("a mapping's length");
        self.vm.get_dirty_log(slot, len).tried("reading the dirty log")
    }

    /// Clears bits that were fetched: `bits` for the pages from `first` on, 64 a word.
    pub(crate) fn clear_written(
        &self,
        slot: u32,
        first: u64,
        pages: u32,
        bits: &[u64],
    ) -> Result<(), KvmError> {
        if !self.clears_by_pieces {
            return Ok(());
        }
        assert!(first.is_multiple_of(64) && pages.div_ceil(64) as usize <= bits.len());
        let request = kvm_clear_dirty_log {
            slot,
            num_pages: pages,
            first_page: first,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bits.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: the kernel reads the request, and from the bitmap one bit for each page: it is long enough, as asserted.
        match unsafe { ioctl_with_ref(&self.vm, KVM_CLEAR_DIRTY_LOG(), &request) } {
            0 => Ok(()),
            _ => Err(errno::Error::last()).tried("clearing a part of the dirty log"),
        }
    }
}
