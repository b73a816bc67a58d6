//! What this machine lacks, each with what to do about it.

use anyhow::Result;
use std::process::ExitCode;

pub fn run() -> Result<ExitCode> {
    let mut fine = true;
    let mut tell = |what: String, trouble: Option<String>| {
        fine &= trouble.is_none();
        match trouble {
            None => println!("ok    {what}"),
            Some(t) => println!("FAIL  {what}: {t}"),
        }
    };
    tell(
        "programs, root and /dev/net/tun for the lab".into(),
        vmatrix_lab::needs::check(true).err().map(|e| e.to_string()),
    );
    match vmatrix_vma_image::machine::host() {
        Ok(host) => tell(format!("QEMU {}, guests run under {}", host.qemu_version, host.accelerator), None),
        Err(e) => tell("QEMU".into(), Some(e.to_string())),
    }
    Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
