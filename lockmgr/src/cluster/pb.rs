//! Messages generated from `proto/cluster.proto`, which documents them.
#![expect(unreachable_pub, reason = "generated code")]

include!(concat!(env!("OUT_DIR"), "/cluster.rs"));
