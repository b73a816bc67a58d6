//! What an edge does: answers DNS, keeps the packet filter, counts demand, carries tunnels.
//!
//! ```text
//! VM agent ─ EdgeConfig ─▶ edge ─▶ nat (nft, addresses)      run              one per network
//! CPA ────── Steering ───▶ edge ─▶ dns                       tunnel::run      one per cell
//! CPA ◀── DemandReport ─── edge ◀─ nat (counters)            origin::run      one, beside the database
//! cell a singleton left ◀═ sealed UDP ═▶ cell it is in       relay::run       one at either end
//! ```
//!
//! What is right to do is decided in `vmatrix-edge-core`; here it is done. An edge that ends leaves its
//! rules and addresses in place, for the data plane outlives the control plane.

mod command;
mod config;
mod connections;
mod demand;
mod device;
mod dns;
mod edge;
mod gateway;
mod http;
mod nat;
pub mod origin;
pub mod relay;
mod sealed;
mod state;
mod store;
pub mod tunnel;
mod wireguard;

pub use edge::run;
