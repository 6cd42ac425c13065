//! Length-prefixed frames over mutual TLS between cluster processes.
