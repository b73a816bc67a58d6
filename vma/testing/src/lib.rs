//! What tests of the crates around a VM share: an image's manifest, a cell for its guest, a disk with little room, a
//! process that ends.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;
use vmatrix_model::manifest::{
    Blob, FORMAT, GuestSpec, Health, MachineSpec, Manifest, Measured, Memory, PartKind, WorkingSet,
};
use vmatrix_model::{Bytes, Digest};
use vmatrix_vma_image::machine::{self, MACHINE_TYPE, NETDEV};
use vmatrix_vma_image::netns;

/// The guest's MAC in [`manifest`].
pub const MAC: &str = "52:54:00:12:34:56";

/// A guest on a busy machine answers within that.
const ANSWER_LIMIT: Duration = Duration::from_secs(40);

/// A manifest that passes every check, of a guest with zeros in its memory and no disks; the devices are for disks of
/// these kinds. What a test is about it replaces.
pub fn manifest(name: &str, memory_mib: u64, kinds: &[PartKind]) -> Manifest {
    Manifest {
        format: FORMAT,
        name: name.to_owned(),
        recipe: Digest::of(b"recipe"),
        parent: None,
        epoch: 0,
        seal: None,
        machine: MachineSpec {
            qemu_version: "10.0.2".to_owned(),
            machine_type: MACHINE_TYPE.to_owned(),
            cpu_model: "Nehalem".to_owned(),
            accelerator: "tcg".to_owned(),
            smp: 1,
            memory_mib,
            devices: machine::devices(MAC, kinds),
            netdev: NETDEV.to_owned(),
            append: "quiet".to_owned(),
        },
        guest: GuestSpec {
            address: [192, 168, 1, 10].into(),
            gateway: [192, 168, 1, 1].into(),
            mac: MAC.to_owned(),
            ports: vec![80],
            health: Health { port: 80, path: "/".to_owned(), status: 200 },
            backends: vec![],
            reseeds: true,
        },
        memory: Memory {
            size: Bytes(memory_mib << 20),
            zero_pages: memory_mib << 8,
            parent_pages: 0,
            first: blob(4),
            rest: blob(1),
            working_set: WorkingSet::default(),
            stored: Bytes(0),
        },
        device: blob(400_000),
        parts: vec![],
        measured: Measured { boot_ms: 1, answer_ms: 1 },
    }
}

/// One that says it is so large, and is nowhere.
pub fn blob(plain: u64) -> Blob {
    Blob { digest: Digest::of(b"blob"), stored: Bytes(1), plain: Bytes(plain) }
}

/// What a guest in the network namespace at `netns` answers on port 80: the body, without the space around it.
pub fn get(netns: &Path, address: Ipv4Addr, path: &str) -> String {
    netns::enter(netns, || {
        let mut stream = TcpStream::connect((address, 80)).unwrap();
        stream.set_read_timeout(Some(ANSWER_LIMIT)).unwrap();
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text.rsplit("\r\n\r\n").next().unwrap().trim().to_owned()
    })
    .unwrap()
}

/// A network namespace with a bridge that has the gateway's address, gone with the test.
pub struct Cell(pub String);

impl Cell {
    pub fn new(name: &str, gateway: Ipv4Addr) -> Cell {
        let name = format!("vmx-test-{}-{name}", std::process::id());
        netns::ip_batch(None, &[format!("netns add {name}")]).expect("needs root and iproute2");
        let cell = Cell(name);
        let lines = [
            format!("link add br0 address {} type bridge", machine::BRIDGE_MAC),
            format!("address add {gateway}/24 dev br0"),
            "link set br0 up".into(),
        ];
        netns::ip_batch(Some(&cell.0), &lines).unwrap();
        cell
    }

    pub fn path(&self) -> PathBuf {
        netns::path(&self.0)
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        let _ = netns::ip_batch(None, &[format!("netns del {}", self.0)]);
    }
}

/// A file system of so little room, in memory, over a folder; gone with the test.
pub struct Small(pub PathBuf);

impl Small {
    /// `size` as tmpfs takes it: `1m`. The folder is made if it is not there.
    pub fn new(at: PathBuf, size: &str) -> Small {
        std::fs::create_dir_all(&at).unwrap();
        let small = Small(at);
        small.mount(MsFlags::empty(), size);
        small
    }

    /// Gives it another size.
    pub fn resize(&self, size: &str) {
        self.mount(MsFlags::MS_REMOUNT, size);
    }

    fn mount(&self, flags: MsFlags, size: &str) {
        let options = format!("size={size}");
        mount(Some("tmpfs"), &self.0, Some("tmpfs"), flags, Some(options.as_str())).expect("needs root to mount");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A process that ends with the test.
pub struct Process(pub Child);

impl Process {
    pub fn pid(&self) -> i32 {
        self.0.id().try_into().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
