//! Whether KVM works: only a guest that ran is proof, for a `/dev/kvm` that opens may still hang.
//!
//! Two things are asked: does the processor have virtualization at all (KVM over paravirtualization runs
//! a boot sector and then hangs when the kernel enters long mode: seen), and does a guest run?

use crate::machine::QEMU;
use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A real-mode boot sector: `mov dx,0xf4; mov al,0x15; out dx,al; hlt; jmp $-1`. QEMU's isa-debug-exit
/// turns the 0x15 into exit status 0x2b.
const SECTOR: [u8; 9] = [0xba, 0xf4, 0x00, 0xb0, 0x15, 0xee, 0xf4, 0xeb, 0xfd];
const STATUS: i32 = 0x2b;
/// A working KVM answers in some 200 ms.
const LIMIT: Duration = Duration::from_secs(3);

/// Runs a few instructions of guest code under KVM.
///
/// # Errors
/// Why KVM is not to be used, in words.
pub fn probe() -> Result<(), String> {
    let cpu = fs::read_to_string("/proc/cpuinfo").map_err(|e| format!("/proc/cpuinfo: {e}"))?;
    if !virtualizes(&cpu) {
        return Err("the processor shows neither vmx nor svm".to_owned());
    }
    run("kvm")
}

fn virtualizes(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|l| l.starts_with("flags")).unwrap_or("");
    flags.split_whitespace().any(|f| f == "vmx" || f == "svm")
}

fn run(accelerator: &str) -> Result<(), String> {
    if accelerator == "kvm" && fs::metadata("/dev/kvm").is_err() {
        return Err("there is no /dev/kvm".to_owned());
    }
    let mut sector = [0; 512];
    for (to, from) in sector.iter_mut().zip(SECTOR) {
        *to = from;
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    let file = std::env::temp_dir().join(format!("vmatrix-probe-{}", std::process::id()));
    fs::File::create(&file).and_then(|mut f| f.write_all(&sector)).map_err(|e| format!("{}: {e}", file.display()))?;
    let outcome = boot(accelerator, &file);
    // A file of 512 bytes in the temporary directory; that it stays is no reason to fail.
    let _ = fs::remove_file(&file);
    outcome
}

fn boot(accelerator: &str, sector: &std::path::Path) -> Result<(), String> {
    let mut child = Command::new(QEMU)
        .args([
            "-accel",
            accelerator,
            "-machine",
            "pc",
            "-m",
            "16",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ])
        .args(["-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-drive"])
        .arg(format!("file={},format=raw,if=floppy,readonly=on", sector.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("{QEMU}: {e}"))?;
    let began = Instant::now();
    loop {
        match child.try_wait().map_err(|e| e.to_string())? {
            Some(status) if status.code() == Some(STATUS) => return Ok(()),
            Some(status) => return Err(format!("a guest under {accelerator} ended with {status}")),
            None if began.elapsed() > LIMIT => {
                // It may be stuck in the kernel: waiting for it would wait for ever.
                let _ = child.kill();
                return Err(format!("a guest under {accelerator} did nothing within {} s", LIMIT.as_secs()));
            }
            None => std::thread::park_timeout(Duration::from_millis(10)),
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_processor_without_vmx_or_svm_does_not_virtualize() {
        assert!(super::virtualizes("model name: svm\nflags\t\t: fpu vmx sse\n"));
        assert!(!super::virtualizes("model name: svm\nflags\t\t: fpu sse\n"));
        assert!(!super::virtualizes(""));
    }

    #[test]
    fn machine_the_probe_tells_a_guest_that_ran_from_one_that_could_not() {
        assert_eq!(super::run("tcg"), Ok(()));
        assert!(super::run("no-such-accelerator").is_err());
    }
}
