//! A LUN in memory that several nodes share, with persistent reservations as a SCSI target keeps them.
//!
//! ```text
//!   node 1 -> Nexus --\
//!   node 2 -> Nexus ---> SharedLun: keys, reservation, unit attentions, bytes
//! ```
//! | command | of whom | effect on others |
//! |---|---|---|
//! | register | anybody | none |
//! | reserve | registered | writes of the unregistered are refused from now on |
//! | preempt and abort | registered | the victim's nexuses lose their key and meet a unit attention |
//! | clear | registered | all keys go, everybody else meets a unit attention |

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Keys, ReservationType, Reservations, ReserveError};
use crate::queue::Workers;
use crate::{BlockDevice, Completion, Geometry, IoError, IoOp, IoRequest, MemoryDevice};

/// See the module.
#[derive(Clone)]
pub struct SharedLun {
    target: Arc<Target>,
}

struct Target {
    content: MemoryDevice,
    /// Lock rank: above the content's. Writes are let through under it: one that was let through has landed before a
    /// preemption returns, as an abort demands.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    generation: u32,
    /// By nexus.
    keys: BTreeMap<u32, u64>,
    reserved: bool,
    /// Unit attentions that wait, by nexus.
    attentions: BTreeMap<u32, u32>,
    /// Commands on reservations that still fail, as on a path that is lost.
    failures: u32,
    nexuses: u32,
}

impl SharedLun {
    /// A LUN of `size_bytes` zeros.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        let target = Target { content: MemoryDevice::new(size_bytes), state: Mutex::default() };
        Self { target: Arc::new(target) }
    }

    /// One more node's way to the LUN.
    #[must_use]
    pub fn nexus(&self) -> Nexus {
        let mut state = self.target.lock();
        state.nexuses += 1;
        let id = state.nexuses;
        drop(state);
        let completions = Workers::new("io:shared", 1, |(done, outcome): Ended| done(outcome));
        Nexus { side: Side { target: Arc::clone(&self.target), id }, completions }
    }

    /// The bytes, past all reservations.
    #[must_use]
    pub fn content(&self) -> &MemoryDevice {
        &self.target.content
    }

    /// Every nexus meets `count` unit attentions with its next commands.
    pub fn raise_attentions(&self, count: u32) {
        let mut state = self.target.lock();
        state.attentions = (1..=state.nexuses).map(|nexus| (nexus, count)).collect();
    }

    /// The next `count` commands on reservations fail.
    pub fn fail_commands(&self, count: u32) {
        self.target.lock().failures = count;
    }

    /// A power cut of a target that does not remember reservations.
    pub fn forget_reservations(&self) {
        let mut state = self.target.lock();
        let nexuses = state.nexuses;
        *state = State { nexuses, ..State::default() };
        drop(state);
        self.raise_attentions(1);
    }
}

impl fmt::Debug for SharedLun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedLun").field("geometry", &self.target.content.geometry()).finish_non_exhaustive()
    }
}

impl Target {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn attend(&mut self, nexus: u32) -> bool {
        match self.attentions.get_mut(&nexus) {
            Some(count) if *count > 0 => {
                *count -= 1;
                true
            }
            _ => false,
        }
    }

    fn tell_others(&mut self, me: u32, whom: impl Fn(u32) -> bool) {
        for nexus in (1..=self.nexuses).filter(|nexus| *nexus != me && whom(*nexus)) {
            *self.attentions.entry(nexus).or_default() += 1;
        }
    }

    fn changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        // The reservation of all registrants ends with the last of them.
        self.reserved &= !self.keys.is_empty();
    }
}

#[derive(Clone)]
struct Side {
    target: Arc<Target>,
    id: u32,
}

/// One node's way to a [`SharedLun`].
pub struct Nexus {
    side: Side,
    completions: Workers<Ended>,
}

type Ended = (Completion, Result<(), IoError>);

impl BlockDevice for Nexus {
    fn geometry(&self) -> Geometry {
        self.side.target.content.geometry()
    }

    fn submit(&self, request: IoRequest) {
        let state = self.side.target.lock();
        let writes = !matches!(request.op, IoOp::Read { .. } | IoOp::Flush);
        let outcome = if writes && state.reserved && !state.keys.contains_key(&self.side.id) {
            Err(IoError::Os { op: "write", offset: 0, errno: libc::EBADE })
        } else {
            self.side.target.content.run(request.op)
        };
        drop(state);
        self.completions.push((request.done, outcome));
    }

    fn reservations(&self) -> Option<Arc<dyn Reservations>> {
        Some(Arc::new(self.side.clone()))
    }
}

impl fmt::Debug for Nexus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nexus").field("id", &self.side.id).finish_non_exhaustive()
    }
}

impl Side {
    /// A command as the target begins it: a path that is lost, or a unit attention, comes before everything else.
    fn begin(&self, op: &'static str) -> Result<MutexGuard<'_, State>, ReserveError> {
        let mut state = self.target.lock();
        if state.failures > 0 {
            state.failures -= 1;
            return Err(ReserveError::Failed { op, why: "the path is lost".to_owned() });
        }
        if state.attend(self.id) {
            return Err(ReserveError::Attention { op });
        }
        Ok(state)
    }

    fn begin_as(&self, op: &'static str, key: u64) -> Result<MutexGuard<'_, State>, ReserveError> {
        let state = self.begin(op)?;
        if state.keys.get(&self.id) == Some(&key) { Ok(state) } else { Err(ReserveError::Conflict { op }) }
    }
}

impl Reservations for Side {
    fn register(&self, key: u64) -> Result<(), ReserveError> {
        let mut state = self.begin("register")?;
        state.keys.insert(self.id, key);
        state.changed();
        Ok(())
    }

    fn unregister(&self, key: u64) -> Result<(), ReserveError> {
        let mut state = self.begin_as("unregister", key)?;
        state.keys.remove(&self.id);
        state.changed();
        Ok(())
    }

    fn reserve(&self, key: u64) -> Result<(), ReserveError> {
        self.begin_as("reserve", key)?.reserved = true;
        Ok(())
    }

    fn preempt_and_abort(&self, own: u64, victim: u64) -> Result<(), ReserveError> {
        let op = "preempt";
        let mut state = self.begin_as(op, own)?;
        let victims: Vec<u32> =
            state.keys.iter().filter(|(_, key)| **key == victim).map(|(nexus, _)| *nexus).collect();
        if victims.is_empty() {
            return Err(ReserveError::Conflict { op });
        }
        state.keys.retain(|_, key| *key != victim);
        state.tell_others(self.id, |nexus| victims.contains(&nexus));
        state.changed();
        Ok(())
    }

    fn clear(&self, own: u64) -> Result<(), ReserveError> {
        let mut state = self.begin_as("clear", own)?;
        state.keys.clear();
        state.tell_others(self.id, |_| true);
        state.changed();
        Ok(())
    }

    fn read_keys(&self) -> Result<Keys, ReserveError> {
        let state = self.begin("read keys")?;
        Ok(Keys { generation: state.generation, keys: state.keys.values().copied().collect() })
    }

    fn read_reservation(&self) -> Result<Option<ReservationType>, ReserveError> {
        let state = self.begin("read reservation")?;
        Ok(state.reserved.then_some(ReservationType::WriteExclusiveAllRegistrants))
    }
}
