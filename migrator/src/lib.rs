//! Moving a virtual machine between nodes.
