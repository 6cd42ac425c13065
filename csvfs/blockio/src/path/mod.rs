//! Two ways to one device: the direct one, and a detour through somebody who still reaches it.
//!
//! ```text
//!                        +-- direct -- gate -- LUN
//!   submit -> PathDevice |                                one way at a time
//!                        +-- detour -- gate -- NBD -- peer -- LUN
//!
//!   a way fails:  held --> all in flight has ended --> detour settled --> next way opened --> held requests go on
//! ```
//! A request that fails because its way is lost is held, not failed; when there is a way again it is done over that one.
//! While there is none, everything waits. On the detour the direct way is tried again and again, and taken back.
//!
//! What is assumed of the device: a way is lost, not the device. Writes that it has completed stay, and a later flush over
//! any way makes them stable.
//!
//! **Invariants:** no request is submitted over one way while one is unfinished on the other (C9); what was sent over a
//! detour whose end is unknown is settled before anything is sent over another way; an error of the device itself, which
//! the direct way reports although it works, is given to whoever asked (D6).

mod cut;
mod device;
mod failure;
mod steering;

pub use cut::{CutDevice, Switch};
pub use device::{Detour, PathDevice, PathStatus, Route, Ways};
