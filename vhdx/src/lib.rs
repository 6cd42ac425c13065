//! The VHDX virtual disk format over any block device.
