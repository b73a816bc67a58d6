//! The first process of every guest: starts the service, reaps, and does what the host asks.
//!
//! ```text
//! /etc/vmatrix/start ─sh─▶ the service's daemons        (reaped here when they end)
//! host ─virtio-serial─▶ one JSON line ─order─┬▶ kernel: reseed, clock ─▶ identity: machine id, hooks ─┬▶ one JSON line back
//!                                            └▶ memory: trimmed, lent, taken back ────────────────────┘
//! ```
//! Clones of one image begin with the same random pool, the same stopped clock and the same keys; the host sends a
//! reseed and the time, and has them renewed, before it lets traffic in.

mod children;
mod identity;
mod kernel;
mod memory;
mod order;
mod port;

use std::process::{Command, ExitCode};

/// The service's start, written by the image builder.
const START: &str = "/etc/vmatrix/start";

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("--version") {
        println!("vmatrix-vma-guest {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    if std::process::id() == 1 {
        std::thread::spawn(start);
    }
    std::thread::spawn(children::reap);
    if let Err(problem) = kernel::prepare() {
        eprintln!("vmatrix-vma-guest: {problem}");
    }
    match port::serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            // Process 1 must not end, or the kernel panics: the service goes on, the host hears nothing and says so.
            eprintln!("vmatrix-vma-guest: {problem}");
            while std::process::id() == 1 {
                std::thread::park();
            }
            ExitCode::FAILURE
        }
    }
}

/// A guest lives so far in the past until it is awakened. Programs with a random generator of their own (OpenSSL's)
/// seed it anew when an hour has passed since the last time: so every one does on its first use in a clone, and none
/// goes on from the state that all clones share.
const BEHIND_US: u64 = 2 * 3600 * 1_000_000;

fn start() {
    if let Err(problem) = kernel::clock().and_then(|now| kernel::set_clock(now.saturating_sub(BEHIND_US))) {
        eprintln!("vmatrix-vma-guest: the clock stays as it is: {problem}");
    }
    // Its children are reaped by the loop beside; this only starts it.
    if let Err(problem) = Command::new("/bin/sh").arg(START).spawn() {
        eprintln!("vmatrix-vma-guest: {START}: {problem}");
    }
}
