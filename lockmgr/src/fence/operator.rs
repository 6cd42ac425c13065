//! No fence at all: only a person can tell that a node is off.
//!
//! For clusters on LUNs without reservations and machines without a power switch that a program can reach. Nothing of a
//! silent node is reused until somebody has looked (A4).

use super::{Confirmed, Fence, FenceError};
use crate::cluster::FenceKind;
use crate::{Epoch, NodeId};

/// Confirms nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct OperatorFence;

impl Fence for OperatorFence {
    fn kind(&self) -> FenceKind {
        FenceKind::Agent
    }

    fn fence(&self, node: NodeId, epoch: Epoch) -> Result<Confirmed, FenceError> {
        let reason =
            "no fence is configured; make sure that the node is off, then `csvctl node confirm-dead`"
                .to_owned();
        Err(FenceError::NotConfirmed { node, epoch, reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Invariant A4
    #[test]
    fn without_a_fence_nothing_is_confirmed() {
        let error = OperatorFence.fence(NodeId(2), Epoch(1)).expect_err("nobody has looked");
        assert!(error.to_string().contains("confirm-dead"), "{error}");
    }
}
