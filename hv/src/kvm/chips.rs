//! State of what all vCPUs share: clock, PIT, both 8259 and the IOAPIC.

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data,
    kvm_ioapic_state, kvm_irqchip, kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2,
};

use super::{KvmError, Machine, Tried};
use crate::state::{self, StateError, byte, exactly, half};
use crate::vm::VmError;

/// Lines of the IOAPIC.
const IO_APIC_LINES: usize = 24;
const PIC_REGISTERS: usize = 16;

impl Machine {
    /// The guest's clock now. Read as soon as the vCPUs have stopped.
    pub(crate) fn clock(&self) -> Result<state::Clock, KvmError> {
        let clock = self.vm.get_clock().tried("reading the clock")?;
        let realtime_ns = if clock.flags & KVM_CLOCK_REALTIME == 0 { 0 } else { clock.realtime };
        Ok(state::Clock { clock_ns: clock.clock, realtime_ns })
    }

    fn set_clock(&self, saved: &state::Clock) -> Result<(), KvmError> {
        let exact = kvm_clock_data { clock: saved.clock_ns, ..Default::default() };
        if saved.realtime_ns != 0 && self.kvm.check_extension_int(kvm_ioctls::Cap::AdjustClock) & 4 != 0 {
            let advanced = kvm_clock_data { flags: KVM_CLOCK_REALTIME, realtime: saved.realtime_ns, ..exact };
            return self.vm.set_clock(&advanced).tried("advancing the clock");
        }
        self.vm.set_clock(&exact).tried("setting the clock")
    }

    /// Adds the chips to a saved state. All interrupts must have settled.
    pub(crate) fn save_chips(&self, machine: &mut state::SavedMachine) -> Result<(), KvmError> {
        machine.pit = Some(pit_to_state(&self.vm.get_pit2().tried("reading the PIT")?));
        machine.pic_master = pic_to_state(&self.pic(KVM_IRQCHIP_PIC_MASTER)?);
        machine.pic_slave = pic_to_state(&self.pic(KVM_IRQCHIP_PIC_SLAVE)?);
        machine.io_apic = Some(io_apic_to_state(&self.io_apic()?));
        Ok(())
    }

    /// Sets PIT, clock, PICs and IOAPIC, in this order and before any vCPU runs.
    pub(crate) fn restore_chips(&self, machine: &state::SavedMachine) -> Result<(), VmError> {
        let pit = pit_from_state(state::part(machine.pit.as_ref(), "PIT")?)?;
        let clock = state::part(machine.clock.as_ref(), "clock")?;
        let master = pic_from_state(&machine.pic_master)?;
        let slave = pic_from_state(&machine.pic_slave)?;
        let io_apic = io_apic_from_state(state::part(machine.io_apic.as_ref(), "IOAPIC")?)?;
        self.vm.set_pit2(&pit).tried("setting the PIT")?;
        self.set_clock(clock)?;
        for (chip_id, pic) in [(KVM_IRQCHIP_PIC_MASTER, master), (KVM_IRQCHIP_PIC_SLAVE, slave)] {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            chip.chip.pic = pic;
            self.vm.set_irqchip(&chip).tried("setting a PIC")?;
        }
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        chip.chip.ioapic = io_apic;
        self.vm.set_irqchip(&chip).tried("setting the IOAPIC")?;
        Ok(())
    }

    fn pic(&self, chip_id: u32) -> Result<kvm_pic_state, KvmError> {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        self.vm.get_irqchip(&mut chip).tried("reading a PIC")?;
        // SAFETY: for this chip number KVM fills the PIC's part of the union; all its fields are plain numbers.
        Ok(unsafe { chip.chip.pic })
    }

    fn io_apic(&self) -> Result<kvm_ioapic_state, KvmError> {
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        self.vm.get_irqchip(&mut chip).tried("reading the IOAPIC")?;
        // SAFETY: for this chip number KVM fills the IOAPIC's part of the union; all its fields are plain numbers.
        Ok(unsafe { chip.chip.ioapic })
    }
}

fn pit_to_state(pit: &kvm_pit_state2) -> state::Pit {
    let channel = |c: &kvm_pit_channel_state| state::PitChannel {
        count: c.count,
        latched_count: c.latched_count.into(),
        count_latched: c.count_latched.into(),
        status_latched: c.status_latched.into(),
        status: c.status.into(),
        read_state: c.read_state.into(),
        write_state: c.write_state.into(),
        write_latch: c.write_latch.into(),
        rw_mode: c.rw_mode.into(),
        mode: c.mode.into(),
        bcd: c.bcd.into(),
        gate: c.gate.into(),
        count_load_time: c.count_load_time,
    };
    state::Pit { channels: pit.channels.iter().map(channel).collect(), flags: pit.flags }
}

fn pit_from_state(saved: &state::Pit) -> Result<kvm_pit_state2, StateError> {
    let channel = |c: &state::PitChannel| -> Result<kvm_pit_channel_state, StateError> {
        Ok(kvm_pit_channel_state {
            count: c.count,
            latched_count: half(c.latched_count)?,
            count_latched: byte(c.count_latched)?,
            status_latched: byte(c.status_latched)?,
            status: byte(c.status)?,
            read_state: byte(c.read_state)?,
            write_state: byte(c.write_state)?,
            write_latch: byte(c.write_latch)?,
            rw_mode: byte(c.rw_mode)?,
            mode: byte(c.mode)?,
            bcd: byte(c.bcd)?,
            gate: byte(c.gate)?,
            count_load_time: c.count_load_time,
        })
    };
    let channels = saved.channels.iter().map(channel).collect::<Result<Vec<_>, _>>()?;
    let channels = exactly(&channels, "a PIT has three channels")?;
    Ok(kvm_pit_state2 { channels, flags: saved.flags, ..Default::default() })
}

/// The registers in a fixed order; `state.proto` names this function as its definition.
fn pic_to_state(pic: &kvm_pic_state) -> Vec<u8> {
    vec![
        pic.last_irr,
        pic.irr,
        pic.imr,
        pic.isr,
        pic.priority_add,
        pic.irq_base,
        pic.read_reg_select,
        pic.poll,
        pic.special_mask,
        pic.init_state,
        pic.auto_eoi,
        pic.rotate_on_auto_eoi,
        pic.special_fully_nested_mode,
        pic.init4,
        pic.elcr,
        pic.elcr_mask,
    ]
}

fn pic_from_state(saved: &[u8]) -> Result<kvm_pic_state, StateError> {
    let r: [u8; PIC_REGISTERS] = exactly(saved, "a PIC has 16 registers")?;
    Ok(kvm_pic_state {
        last_irr: r[0],
        irr: r[1],
        imr: r[2],
        isr: r[3],
        priority_add: r[4] & 7, // a line number
        irq_base: r[5],
        read_reg_select: r[6],
        poll: r[7],
        special_mask: r[8],
        init_state: r[9],
        auto_eoi: r[10],
        rotate_on_auto_eoi: r[11],
        special_fully_nested_mode: r[12],
        init4: r[13],
        elcr: r[14],
        elcr_mask: r[15],
    })
}

fn io_apic_to_state(chip: &kvm_ioapic_state) -> state::IoApic {
    state::IoApic {
        base: chip.base_address,
        select: chip.ioregsel,
        id: chip.id,
        pending: chip.irr,
        // SAFETY: both views of the union are 64 bits without padding.
        redirections: chip.redirtbl.iter().map(|line| unsafe { line.bits }).collect(),
    }
}

fn io_apic_from_state(saved: &state::IoApic) -> Result<kvm_ioapic_state, StateError> {
    let lines: [u64; IO_APIC_LINES] = exactly(&saved.redirections, "an IOAPIC has 24 lines")?;
    let mut chip = kvm_ioapic_state {
        base_address: saved.base,
        ioregsel: saved.select,
        id: saved.id,
        irr: saved.pending,
        ..Default::default()
    };
    for (line, bits) in chip.redirtbl.iter_mut().zip(lines) {
        line.bits = bits;
    }
    Ok(chip)
}
