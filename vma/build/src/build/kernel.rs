//! Debian's cloud kernel and the little root file system it begins with.
//!
//! package ─▶ vmlinuz + the few modules a guest needs, in order ─▶ initrd (busybox, modules, /init)

use super::root::{AGENT, DATA, download, unpack};
use super::tools::run;
use crate::cpio::{Content, Entry, archive};
use crate::workshop::Scratch;
use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use vmatrix_model::manifest::PartKind;
use vmatrix_vma_image::error::{Error, Result, io};
use vmatrix_vma_image::machine::serial;

/// The package that names the newest one.
const META: &str = "linux-image-cloud-amd64";
/// What a guest's devices need; what these need themselves comes from modules.dep.
const MODULES: [&str; 7] =
    ["virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "virtio_console", "ext4", "overlay"];

/// A kernel, unpacked.
#[derive(Debug, Clone)]
pub struct Kernel {
    pub image: PathBuf,
    /// Module files in the order they must be loaded.
    modules: Vec<PathBuf>,
}

/// Finds the kernel in the cache, or downloads and unpacks it.
pub fn get(cache: &Path) -> Result<Kernel> {
    let package = newest()?;
    let folder = cache.join(&package);
    if !folder.is_dir() {
        let fresh = Scratch::new(cache.join(format!(".{package}-{}", std::process::id())))?;
        let release = package.trim_start_matches("linux-image-").to_owned();
        let tree = fresh.path().join("tree");
        unpack(&download(&package, cache)?, &tree)?;
        run("depmod", Command::new("depmod").arg("-b").arg(&tree).arg(&release))?;
        fs::rename(&tree, &folder).map_err(io("rename into", &folder))?;
    }
    let release = package.trim_start_matches("linux-image-");
    let base = folder.join("lib/modules").join(release);
    let list = base.join("modules.dep");
    let text = fs::read_to_string(&list).map_err(io("read", &list))?;
    let modules = order(&text, &MODULES).map_err(|problem| Error::Tool {
        what: package.clone(),
        status: "unexpected".to_owned(),
        said: problem,
    })?;
    Ok(Kernel {
        image: folder.join("boot").join(format!("vmlinuz-{release}")),
        modules: modules.into_iter().map(|m| base.join(m)).collect(),
    })
}

fn newest() -> Result<String> {
    let output = run("apt-cache depends", Command::new("apt-cache").args(["depends", META]))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines()
        .filter_map(|l| l.trim().strip_prefix("Depends: "))
        .find(|p| p.starts_with("linux-image-"))
        .map(str::to_owned)
        .ok_or_else(|| Error::Tool {
            what: format!("looking for the kernel package {META}"),
            status: "not found".to_owned(),
            said: "run `apt-get update`, then the same again".to_owned(),
        })
}

/// Modules with all they depend on, each after what it needs. modules.dep lists what a module needs
/// with the deepest last.
fn order(modules_dep: &str, wanted: &[&str]) -> std::result::Result<Vec<String>, String> {
    let known: BTreeMap<String, (&str, Vec<&str>)> = modules_dep
        .lines()
        .filter_map(|line| {
            let (path, needs) = line.split_once(':')?;
            let name = path.rsplit('/').next()?.split('.').next()?.replace('-', "_");
            Some((name, (path, needs.split_whitespace().collect())))
        })
        .collect();
    let mut ordered: Vec<String> = Vec::new();
    for name in wanted {
        // One that the kernel has built in is not listed.
        let Some((path, needs)) = known.get(*name) else { continue };
        for file in needs.iter().rev().chain([path]) {
            if !ordered.iter().any(|o| o == file) {
                ordered.push((*file).to_owned());
            }
        }
    }
    if ordered.is_empty() { Err(format!("modules.dep has none of {}", wanted.join(", "))) } else { Ok(ordered) }
}

/// Writes the initrd: loads the modules, lays a writable layer in memory over the read-only disk and its base, mounts
/// the disk that is written, gives the guest its address and hands over to the guest agent. It holds nothing of one
/// service, so that all have the same.
pub fn initrd(kernel: &Kernel, address: Ipv4Addr, gateway: Ipv4Addr, to: &Path) -> Result<()> {
    let busybox = Path::new("/bin/busybox");
    let directory = |path: &str| Entry { path: path.to_owned(), content: Content::Directory };
    let mut entries: Vec<Entry> =
        ["bin", "modules", "proc", "sys", "dev", "lower", "base", "rw", "root"].map(directory).to_vec();
    let program = fs::read(busybox).map_err(io("read", busybox))?;
    entries.push(Entry { path: "bin/busybox".to_owned(), content: Content::Executable(program) });
    let mut load = String::new();
    for (number, module) in kernel.modules.iter().enumerate() {
        let path = format!("modules/{number:02}.ko");
        load += &format!("$b insmod /{path}\n");
        let bytes = fs::read(module).map_err(io("read", module))?;
        entries.push(Entry { path, content: Content::File(bytes) });
    }
    let [root, base, data] = [PartKind::Disk, PartKind::Base, PartKind::Data].map(|kind| serial(kind).unwrap_or(""));
    let script = format!(
        "#!/bin/busybox sh\n\
         b=/bin/busybox\n\
         $b mount -t proc proc /proc\n\
         $b mount -t sysfs sysfs /sys\n\
         $b mount -t devtmpfs dev /dev\n\
         {load}\
         disk() {{\n\
           for d in /sys/block/vd*; do\n\
             read s < $d/serial\n\
             [ \"$s\" = $1 ] && echo /dev/${{d##*/}}\n\
           done\n\
         }}\n\
         # What the console says last is what the build says.\n\
         end() {{\n\
           $b echo $@\n\
           $b poweroff -f\n\
         }}\n\
         lower=/lower\n\
         $b mount -t ext4 -o ro $(disk {root}) /lower || end no root disk\n\
         base=$(disk {base})\n\
         [ \"$base\" ] && $b mount -t ext4 -o ro $base /base && lower=/lower:/base\n\
         $b mount -t tmpfs -o size=60% rw /rw\n\
         $b mkdir /rw/upper /rw/work\n\
         $b mount -t overlay -o lowerdir=$lower,upperdir=/rw/upper,workdir=/rw/work root /root\n\
         if [ -e /root{DATA} ]; then\n\
           read data < /root{DATA}\n\
           $b mount -t ext4 $(disk {data}) /root$data || end no data disk\n\
         fi\n\
         $b hostname -F /root/etc/hostname\n\
         $b ip link set lo up\n\
         $b ip address add {address}/24 dev eth0\n\
         $b ip link set eth0 up\n\
         $b ip route add default via {gateway}\n\
         for d in proc sys dev; do $b mount --move /$d /root/$d; done\n\
         $b mount -t tmpfs run /root/run\n\
         $b mkdir -p /root/dev/pts /root/dev/shm\n\
         $b mount -t devpts devpts /root/dev/pts\n\
         $b mount -t tmpfs shm /root/dev/shm\n\
         exec $b switch_root /root {AGENT}\n",
    );
    entries.push(Entry { path: "init".to_owned(), content: Content::Executable(script.into_bytes()) });
    fs::write(to, archive(&entries)).map_err(io("write", to))
}

#[cfg(test)]
mod tests {
    use super::order;

    #[test]
    fn a_module_is_loaded_after_what_it_needs_and_once() {
        let dep = "k/virtio_pci.ko: k/virtio.ko k/virtio_ring.ko\nk/virtio_blk.ko: k/virtio.ko k/virtio_ring.ko\n\
                   k/virtio.ko: k/virtio_ring.ko\nk/virtio_ring.ko:\nk/other.ko:\n";
        let ordered = order(dep, &["virtio_pci", "virtio_blk", "built_in"]).unwrap();
        assert_eq!(ordered, ["k/virtio_ring.ko", "k/virtio.ko", "k/virtio_pci.ko", "k/virtio_blk.ko"]);
        assert!(order("", &["virtio_pci"]).is_err());
    }
}
