//! What the NBD tests share.

use std::path::PathBuf;
use std::sync::Arc;

use blockio::{BlockDevice, NbdAddress, NbdDevice, NbdExport, NbdOptions, NbdServer};
use tempfile::TempDir;

/// A server of one device in a folder of its own.
pub(crate) struct Served {
    pub(crate) server: Option<NbdServer>,
    folder: TempDir,
}

impl Served {
    pub(crate) fn new(export: NbdExport) -> Self {
        let folder = TempDir::new().expect("a folder for the test");
        let server = NbdServer::listen(&folder.path().join("socket"), Arc::new(export)).expect("it listens");
        Self { server: Some(server), folder }
    }

    pub(crate) fn of(device: Arc<dyn BlockDevice>) -> Self {
        Self::new(NbdExport::new(device, false))
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub(crate) fn address(&self) -> NbdAddress {
        NbdAddress::unix(self.socket(), "")
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    pub(crate) fn open(&self) -> NbdDevice {
        NbdDevice::open(&self.address(), NbdOptions::default()).expect("the client connects")
    }
}

/// Bytes that tell where they are from.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}
