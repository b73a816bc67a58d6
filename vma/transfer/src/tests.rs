//! Real servers and clients over real TLS on loopback, and servers that lie.

mod ask;
mod faults;
mod fleet;
mod liar;
mod push;
mod spread;
mod who;
mod wire;
