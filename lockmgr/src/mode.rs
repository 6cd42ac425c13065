//! The four lock modes.
//!
//! | mode | attributes, map | data cache | buffered size/time | who else |
//! |---|---|---|---|---|
//! | NL | - | - | - | anyone |
//! | PR | cached | yes | no | other PR |
//! | CW | cached | no | no | other CW: many direct writers (shared disk) |
//! | EX | cached | yes | yes, and allocation | nobody |

use std::fmt;

/// How much a client may do with a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Mode {
    /// NL: nothing.
    #[default]
    Null,
    /// PR: read and cache, together with other readers.
    ProtectedRead,
    /// CW: write directly without caching data, together with other such writers.
    ConcurrentWrite,
    /// EX: everything, alone.
    Exclusive,
}

impl Mode {
    /// Whether two clients may hold these modes at once.
    #[must_use]
    pub fn compatible(self, other: Self) -> bool {
        use Mode::{ConcurrentWrite, Null, ProtectedRead};
        matches!(
            (self, other),
            (Null, _) | (_, Null) | (ProtectedRead, ProtectedRead) | (ConcurrentWrite, ConcurrentWrite)
        )
    }

    /// Whether holding `self` permits what `other` permits.
    #[must_use]
    pub fn covers(self, other: Self) -> bool {
        self == Self::Exclusive || self == other || other == Self::Null
    }

    /// The strongest mode that this holder may keep beside somebody else's `other`.
    #[must_use]
    pub fn lowered_for(self, other: Self) -> Self {
        if self.compatible(other) {
            self
        } else if self == Self::Exclusive && other != Self::Exclusive {
            other
        } else {
            Self::Null
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Null => "NL",
            Self::ProtectedRead => "PR",
            Self::ConcurrentWrite => "CW",
            Self::Exclusive => "EX",
        })
    }
}
