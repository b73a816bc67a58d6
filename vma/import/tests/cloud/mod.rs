//! Disks to import, of our own: there are none to download. Each is made once (the cloud image in some two minutes)
//! and kept.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use vmatrix_model::Digest;

/// What makes a disk; a change of it makes another one.
#[derive(Clone, Copy)]
pub struct Recipe {
    name: &'static str,
    make: &'static str,
    /// Of its one partition.
    mib: u32,
}

/// Debian with cloud-init.
pub const CLOUD: Recipe = Recipe { name: "cloud-image", make: include_str!("make.sh"), mib: 1023 };
/// A kernel and busybox, made in seconds.
pub const SMALL: Recipe = Recipe { name: "small-disk", make: include_str!("small.sh"), mib: 40 };

/// GRUB's first sector, which finds the rest behind itself.
const BOOT: &str = "/usr/lib/grub/i386-pc/boot.img";
/// Where the partition begins, sectors.
const PARTITION: u32 = 2048;

/// The raw disk.
pub fn disk(recipe: Recipe) -> PathBuf {
    let kept = std::env::var_os("VMATRIX_STORE")
        .map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), |s| PathBuf::from(s).join("cache"));
    let name = format!("{}-{}", recipe.name, &Digest::of(recipe.make.as_bytes()).to_string()[..16]);
    let disk = kept.join(format!("{name}.raw"));
    if disk.exists() {
        return disk;
    }
    fs::create_dir_all(&kept).unwrap();
    let sector = fs::read(BOOT).expect("needs GRUB for BIOS; apt-get install grub-pc-bin grub-common");
    let work = tempfile::Builder::new().prefix(&name).tempdir_in(&kept).unwrap();
    let output = Command::new("sh").args(["-e", "-c", recipe.make, "make"]).arg(work.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "needs root, mmdebstrap, e2fsprogs and grub-common:\n{said}");
    let made = work.path().join("disk.raw");
    first_sector(&made, &sector, recipe.mib);
    fs::rename(made, &disk).unwrap();
    disk
}

fn first_sector(disk: &Path, boot: &[u8], mib: u32) {
    let mut sector = boot[..440].to_vec();
    sector.resize(446, 0);
    // Active; of Linux's kind; its place by number, not by cylinder.
    sector.extend([0x80, 0xfe, 0xff, 0xff, 0x83, 0xfe, 0xff, 0xff]);
    sector.extend(PARTITION.to_le_bytes());
    sector.extend((mib * 2048).to_le_bytes());
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    File::options().write(true).open(disk).unwrap().write_all_at(&sector, 0).unwrap();
}
