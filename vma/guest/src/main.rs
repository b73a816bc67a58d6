//! The first process of every guest: starts the service, reaps, and does what the host asks.
//!
//! ```text
//! /etc/vmatrix/start ─sh─▶ the service's daemons        (reaped here when they end)
//! host ─virtio-serial─▶ one JSON line ─order─▶ the kernel: reseed, clock, trim ─▶ one JSON line back
//! ```
//! Clones of one image begin with the same random pool and the same stopped clock; the host sends a
//! reseed and the time before it lets traffic in.

mod kernel;
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
        std::thread::spawn(kernel::reap_for_ever);
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

fn start() {
    // Its children are reaped by the loop beside; this only starts it.
    if let Err(problem) = Command::new("/bin/sh").arg(START).spawn() {
        eprintln!("vmatrix-vma-guest: {START}: {problem}");
    }
}
