//! One hypervisor with what its VMs stand in: cells, files, and nothing left afterwards.

use crate::guest::{Guest, folder};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, atomic::AtomicU32, atomic::Ordering};
use std::time::Duration;
use vmatrix_vma_image::machine::{Files, Start};
use vmatrix_vma_image::netns;
use vmatrix_vma_libvirt::daemon::Daemon;
use vmatrix_vma_libvirt::{Hypervisor, Libvirt, Parts, Qemu, Spawn, Tap, Vm};

pub const CLONE: Start = Start::Clone;
/// The tap's name in each cell.
pub const TAP: &str = "tap0";

/// A hypervisor that is tested.
pub trait Backend {
    fn hypervisor(&self) -> &dyn Hypervisor;
    /// Another one over the same VMs, as its caller makes it after a restart.
    fn again(&self) -> impl Future<Output = Box<dyn Hypervisor>>;
    /// Folder of a VM's sockets.
    fn sockets(&self, name: &str) -> PathBuf;
}

pub struct Direct {
    qemu: Qemu,
    folder: tempfile::TempDir,
}

impl Direct {
    pub fn new() -> Direct {
        let folder = folder();
        Direct { qemu: Qemu::new(folder.path()), folder }
    }
}

impl Backend for Direct {
    fn hypervisor(&self) -> &dyn Hypervisor {
        &self.qemu
    }
    async fn again(&self) -> Box<dyn Hypervisor> {
        Box::new(Qemu::new(self.folder.path()))
    }
    fn sockets(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

pub struct Under {
    libvirt: Libvirt,
    daemon: Daemon,
    folder: tempfile::TempDir,
}

impl Under {
    pub async fn start() -> Under {
        let folder = folder();
        // What libvirt learns of QEMU takes it seconds; it is kept from run to run.
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libvirt-cache");
        std::fs::create_dir_all(&kept).unwrap();
        std::fs::create_dir(folder.path().join("daemon")).unwrap();
        std::os::unix::fs::symlink(kept, folder.path().join("daemon/cache")).unwrap();
        let daemon = Daemon::start(&folder.path().join("daemon")).await.expect("needs root and libvirtd");
        let libvirt = connect(&daemon, folder.path()).await;
        Under { libvirt, daemon, folder }
    }

    /// A hypervisor over the same daemon that keeps its VMs in another folder.
    pub async fn elsewhere(&self, folder: &Path) -> Libvirt {
        connect(&self.daemon, folder).await
    }

    /// Kills libvirtd as a crash would, and waits for the next.
    pub async fn kill_daemon(&self) {
        let pid = self.daemon.pid().expect("libvirtd runs");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
        for _ in 0..400 {
            let answers = Libvirt::connect(&self.daemon.uri(), self.folder.path()).await.is_ok();
            if answers && self.daemon.pid().is_some_and(|next| next != pid) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!("libvirtd was not started again");
    }
}

async fn connect(daemon: &Daemon, folder: &Path) -> Libvirt {
    Libvirt::connect(&daemon.uri(), folder).await.expect("libvirtd answers").with_logs(&daemon.logs())
}

impl Backend for Under {
    fn hypervisor(&self) -> &dyn Hypervisor {
        &self.libvirt
    }
    async fn again(&self) -> Box<dyn Hypervisor> {
        Box::new(connect(&self.daemon, self.folder.path()).await)
    }
    fn sockets(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// A backend, a guest, and the VMs that were begun.
pub struct World<'a, B> {
    pub guest: &'a Guest,
    pub backend: B,
    begun: Mutex<Vec<i32>>,
}

impl<'a, B: Backend> World<'a, B> {
    pub fn new(guest: &'a Guest, backend: B) -> World<'a, B> {
        World { guest, backend, begun: Mutex::default() }
    }

    pub fn hypervisor(&self) -> &dyn Hypervisor {
        self.backend.hypervisor()
    }

    pub fn cell(&self, name: &str) -> Cell {
        Cell::new(name, self.guest)
    }

    /// Starts a VM of the guest in a cell.
    pub async fn spawn(&self, cell: &Cell, name: &str, files: &Files, start: Start) -> vmatrix_vma_libvirt::Result<Vm> {
        let environment = [("VMATRIX_MEMORY".to_owned(), "of a test".to_owned())];
        let tap = Tap { namespace: &cell.name, name: TAP };
        let spawn = Spawn {
            name,
            machine: &self.guest.machine,
            parts: Parts::Whole(files),
            start,
            tap,
            environment: &environment,
        };
        let vm = self.start(&spawn).await?;
        cell.plug();
        Ok(vm)
    }

    pub async fn start(&self, spawn: &Spawn<'_>) -> vmatrix_vma_libvirt::Result<Vm> {
        let vm = self.hypervisor().spawn(spawn).await?;
        self.begun.lock().unwrap().push(vm.pid);
        Ok(vm)
    }
}

impl<B> Drop for World<'_, B> {
    /// A test that failed leaves its VMs; they are QEMUs still, or their numbers are somebody else's.
    fn drop(&mut self) {
        for pid in self.begun.lock().unwrap().drain(..) {
            let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if line.contains("qemu-system") {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
            }
        }
    }
}

static CELLS: AtomicU32 = AtomicU32::new(0);

/// A namespace with a bridge that has the gateway's address; gone with the test.
pub struct Cell {
    pub name: String,
}

impl Cell {
    fn new(name: &str, guest: &Guest) -> Cell {
        let count = CELLS.fetch_add(1, Ordering::Relaxed);
        let name = format!("vmx-lib-{}-{count}-{name}", std::process::id());
        netns::ip_batch(None, &[format!("netns add {name}")]).expect("needs root and iproute2");
        let cell = Cell { name };
        let gateway = guest.spec.gateway;
        let lines =
            ["link add br0 type bridge".into(), format!("address add {gateway}/24 dev br0"), "link set br0 up".into()];
        netns::ip_batch(Some(&cell.name), &lines).unwrap();
        cell
    }

    pub fn path(&self) -> PathBuf {
        netns::path(&self.name)
    }

    pub fn plug(&self) {
        netns::ip_batch(Some(&self.name), &[format!("link set {TAP} master br0 up")]).expect("the tap is in the cell");
    }

    /// Who was asked for before it was there would be held to be absent for a while.
    pub fn forget_neighbours(&self) {
        netns::ip_batch(Some(&self.name), &["neigh flush dev br0".into()]).unwrap();
    }

    pub fn has_tap(&self) -> bool {
        netns::enter(&self.path(), || nix::net::if_::if_nametoindex(TAP).is_ok()).unwrap()
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        let _ = netns::ip_batch(None, &[format!("netns del {}", self.name)]);
    }
}
