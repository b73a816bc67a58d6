//! The virtio-serial port: sleeps until the host speaks, a line at a time.

use crate::order::{LINE_MAX, obey};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

/// The port's name, as the virtual machine has it.
const NAME: &str = "vmatrix.guest";
/// Looks for the port before giving up; the module that makes it is loaded before this program.
const LOOKS: u32 = 100;
/// How long the host may take to read a piece of a long answer.
const TAKEN_MS: u16 = 10_000;

/// Serves until the port is gone.
pub fn serve() -> Result<(), String> {
    let device = find()?;
    let told = |e: &dyn std::fmt::Display| format!("{}: {e}", device.display());
    let mut port = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
        .open(&device)
        .map_err(|e| told(&e))?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|e| told(&e))?;
    // Edges only: while nobody is connected the port reads as ended for ever, and a level would spin.
    epoll.add(&port, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0)).map_err(|e| told(&e))?;
    let mut held = Vec::new();
    loop {
        drain(&mut port, &mut held).map_err(|e| told(&e))?;
        match epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(told(&e)),
        }
    }
}

/// Reads all there is, answering each whole line.
fn drain(port: &mut File, held: &mut Vec<u8>) -> std::io::Result<()> {
    let mut buffer = [0; 1024];
    loop {
        match port.read(&mut buffer) {
            // Nobody is connected: half a line of somebody who left is nobody's.
            Ok(0) => {
                held.clear();
                return Ok(());
            }
            Ok(n) => {
                for byte in buffer.iter().take(n) {
                    if *byte == b'\n' {
                        answer(port, &obey(held));
                        held.clear();
                    } else if held.len() < LINE_MAX {
                        held.push(*byte);
                    }
                }
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// An answer nobody waits for is dropped.
fn answer(port: &mut File, line: &str) {
    let mut rest = line.as_bytes();
    while !rest.is_empty() {
        // Asked first, always: whether the kernel has heard of the host's end before its question is chance, and a
        // guest should run the same code either way.
        let mut room = [PollFd::new(port.as_fd(), PollFlags::POLLOUT)];
        if let Ok(0) | Err(_) = poll(&mut room, TAKEN_MS) {
            return eprintln!("vmatrix-vma-guest: the host does not take its answer");
        }
        match port.write(rest) {
            Ok(n) => rest = rest.get(n..).unwrap_or_default(),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(e) => return eprintln!("vmatrix-vma-guest: the host does not take answers: {e}"),
        }
    }
}

fn find() -> Result<PathBuf, String> {
    for _ in 0..LOOKS {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            if fs::read_to_string(entry.path().join("name")).is_ok_and(|n| n.trim() == NAME) {
                return Ok(PathBuf::from("/dev").join(entry.file_name()));
            }
        }
        std::thread::park_timeout(Duration::from_millis(50));
    }
    Err(format!("there is no virtio-serial port named {NAME}"))
}
