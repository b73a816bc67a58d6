//! The edge's daemons against a real kernel: namespaces, nft, sockets, TUN devices.
//!
//! Each test builds its own namespaces and removes them, also when it fails. Needs root.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends at the first thing that is not as it should be"
)]

mod names;
mod nat;
mod relay;
mod site;
mod tunnel;
