//! The bare-metal test guest, built with the system's C compiler.
