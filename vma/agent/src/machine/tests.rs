//! Cells on a real kernel: each test makes a namespace that stands for a network, and takes away all it made.

use super::record::Phase;
use super::{Machine, cell};
use crate::config::MachineConfig;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use vmatrix_model::manifest::{Manifest, Measured, PartKind, SignedManifest, WorkingSet};
use vmatrix_model::{Bytes, InstanceId};
use vmatrix_vma_core::cell::{BRIDGE, TAP, open};
use vmatrix_vma_core::steps::{CellSpec, Life, Step};
use vmatrix_vma_image::chunks::Cutter;
use vmatrix_vma_image::machine::{Host, check_host, host};
use vmatrix_vma_image::{Store, memory, netns, sign};
use vmatrix_vma_transfer::identity::{Authority, Role};

const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 10);
const MAC: &str = "52:54:00:76:6d:01";
const DECLARED: u16 = 80;
const UNDECLARED: u16 = 9999;

mod images;
mod singletons;

/// A network's namespace, and everything below its name.
struct Network {
    name: String,
    dir: tempfile::TempDir,
}

impl Network {
    fn new(what: &str) -> Network {
        let name = format!("vmxt{}{what}", std::process::id());
        netns::ip_batch(None, &[format!("netns add {name}")]).expect("these tests need root and iproute2");
        netns::ip_batch(Some(&name), &["link set lo up".into()]).unwrap();
        let network = Network { name, dir: tempfile::tempdir().unwrap() };
        network.inside(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap());
        network
    }

    fn inside<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        netns::enter(&netns::path(&self.name), f).unwrap()
    }

    fn block_on<T: Send>(&self, f: impl Future<Output = T> + Send) -> T {
        self.inside(|| tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f))
    }

    /// A machine whose tunnels are this script.
    fn machine_with_tunnel(&self, script: &str) -> Arc<Machine> {
        let machine = self.built();
        Arc::new(Machine { program: self.script(script), ..machine })
    }

    fn machine(&self) -> Arc<Machine> {
        Arc::new(self.built())
    }

    /// A machine that trusts whoever built what it has, and whose one source is `127.0.0.1:8446`.
    fn built(&self) -> Machine {
        let authority = self.authority();
        let identity = self.dir.path().join("identity");
        authority.issue(Role::Machine, "m1").unwrap().write(&identity).unwrap();
        let config = MachineConfig {
            name: "m1".parse().unwrap(),
            network: "ashburn".parse().unwrap(),
            listen: "127.0.0.1:8451".parse().unwrap(),
            state_dir: self.dir.path().join("state"),
            token_file: self.dir.path().join("token"),
            vma: "http://127.0.0.1:1".into(),
            identity,
            sources: vec!["127.0.0.1:8446".parse().unwrap()],
            transfer_listen: None,
            memory_dir: "/dev/shm".into(),
            rate_mbit: None,
            warm: 0,
            origin: "http://127.0.0.1:1".into(),
            cpus: 1,
            memory_mib: 1024,
            cells: "100.64.7.0/24".parse().unwrap(),
            cell_prefix: self.name.clone(),
            signers: vec![
                sign::builder_public(&self.store("state/store")).unwrap(),
                sign::builder_public(&self.store("origin")).unwrap(),
            ],
        };
        // Connections to sources belong to a runtime, and that to the network's namespace.
        self.inside(|| {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            let machine = {
                let _entered = runtime.enter();
                Machine::new(config, "secret").unwrap()
            };
            std::mem::forget(runtime);
            Machine { program: self.script("exit 1"), ..machine }
        })
    }

    /// A program that is a pager if it is to be one, and else does this.
    fn script(&self, text: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let program = self.dir.path().join("program");
        let real = std::env::current_exe().unwrap().with_file_name("../examples/daemons");
        let pager = format!("[ \"$1\" = pager ] && exec {} \"$@\"", real.display());
        std::fs::write(&program, format!("#!/bin/sh\n{pager}\nfor last; do :; done\n{text}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        program
    }

    fn authority(&self) -> Authority {
        let dir = self.dir.path().join("authority");
        Authority::open(&dir).or_else(|_| Authority::create(&dir)).unwrap()
    }

    fn store(&self, name: &str) -> Store {
        Store::open(self.dir.path().join(name)).unwrap()
    }

    /// Names of namespaces and interfaces that belong to it.
    fn left(&self) -> Vec<String> {
        let namespaces =
            std::fs::read_dir("/run/netns").unwrap().filter_map(|e| e.unwrap().file_name().into_string().ok());
        let below = format!("{}-", self.name);
        let mut left: Vec<String> = namespaces.filter(|n| n.starts_with(&below)).collect();
        let links = Command::new("ip").args(["-n", &self.name, "-o", "link"]).output().unwrap();
        left.extend(String::from_utf8_lossy(&links.stdout).lines().filter(|l| l.contains(": vx")).map(str::to_owned));
        left
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let dir = self.dir.path().to_str().unwrap();
        for process in super::process::all() {
            if process.arguments.iter().any(|a| a.contains(dir)) {
                let _ =
                    nix::sys::signal::kill(nix::unistd::Pid::from_raw(process.pid), nix::sys::signal::Signal::SIGKILL);
            }
        }
        for name in
            std::fs::read_dir("/run/netns").into_iter().flatten().filter_map(|e| e.ok()?.file_name().into_string().ok())
        {
            if name == self.name || name.starts_with(&format!("{}-", self.name)) {
                let _ = netns::ip_batch(None, &[format!("netns del {name}")]);
            }
        }
        let _ = std::fs::remove_dir_all(format!("/dev/shm/{}", self.name));
    }
}

fn instance(number: u32) -> InstanceId {
    InstanceId { service: "tiny".parse().unwrap(), number }
}

fn spec(number: u32) -> CellSpec {
    CellSpec {
        instance: instance(number),
        image: "tiny".into(),
        ports: vec![DECLARED],
        backends: vec![],
        memory_mib: 128,
        singleton: None,
    }
}

/// An image that this host could resume, all zeros; `answer_ms` makes one differ from another.
fn offered(store: &Store, host: &Host, answer_ms: u64) -> SignedManifest {
    let cutter = Cutter::new(store, None);
    let zeros = tempfile::NamedTempFile::new().unwrap();
    zeros.as_file().set_len(16 << 20).unwrap();
    let guest = memory::cut(&cutter, zeros.path(), &[], 0, None).unwrap();
    assert_eq!(guest.working_set, WorkingSet::default());
    zeros.as_file().set_len(1 << 20).unwrap();
    let mut m = Manifest {
        memory: guest,
        device: cutter.blob(b"device state", true).unwrap(),
        parts: [PartKind::Disk, PartKind::Kernel, PartKind::Initrd]
            .map(|kind| cutter.part(zeros.path(), kind, Bytes(1 << 20)).unwrap())
            .to_vec(),
        measured: Measured { boot_ms: 1, answer_ms },
        ..vmatrix_vma_testing::manifest("tiny", 16, &[])
    };
    m.machine.append = String::new();
    m.guest.mac = MAC.into();
    m.guest.ports = vec![DECLARED];
    m.guest.health.port = DECLARED;
    // Once for each thing that can differ.
    for _ in 0..6 {
        let Err(bad) = check_host(&m, host) else { break };
        match bad.what {
            "accelerator" => m.machine.accelerator = bad.has,
            "QEMU version" => m.machine.qemu_version = bad.has,
            "machine type" => m.machine.machine_type = bad.has,
            "CPU model" => m.machine.cpu_model = bad.has,
            "network back end" => m.machine.netdev = bad.has,
            _ => m.machine.devices = serde_json::from_str(&bad.has).unwrap(),
        }
    }
    sign::sign(store, &m).unwrap()
}

/// Puts such an image where an earlier run of the machine would have, whole.
fn stage_whole(network: &Network) -> Manifest {
    let store = network.store("state/store");
    let signed = offered(&store, &host().unwrap(), 1);
    store.put_image("tiny", &signed).unwrap();
    serde_json::from_str(&signed.manifest).unwrap()
}

/// As much of it as a cell needs, and no guest.
fn stage(network: &Network) {
    let manifest = stage_whole(network);
    network.store("state/store").remove_chunk(&manifest.device.digest);
}

/// Puts a namespace where the guest would be, behind the interface that would be its tap; it answers
/// every connection on both ports with its name.
fn stand_in(network: &Network, number: u32) -> String {
    let (inner, guest) = (format!("{}-{}", network.name, instance(number)), format!("{}-guest{number}", network.name));
    netns::ip_batch(None, &[format!("netns add {guest}")]).unwrap();
    netns::ip_batch(
        Some(&inner),
        &[
            format!("link add {TAP} type veth peer name eth0 netns {guest}"),
            format!("link set {TAP} master {BRIDGE}"),
            format!("link set {TAP} up"),
        ],
    )
    .unwrap();
    netns::ip_batch(
        Some(&guest),
        &[
            format!("link set eth0 address {MAC}"),
            format!("addr add {GUEST}/24 dev eth0"),
            "link set eth0 up".into(),
            "link set lo up".into(),
            "route add default via 192.168.1.1".into(),
        ],
    )
    .unwrap();
    for port in [DECLARED, UNDECLARED] {
        let listener =
            netns::enter(&netns::path(&guest), || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap()).unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _ = stream.write_all(format!("guest {number}").as_bytes());
            }
        });
    }
    guest
}

/// What answers there, from this thread's namespace.
fn ask(address: Ipv4Addr, port: u16) -> Option<String> {
    let mut stream =
        TcpStream::connect_timeout(&SocketAddr::new(address.into(), port), Duration::from_millis(700)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

#[test]
fn machine_two_cells_with_one_private_address_are_apart_and_leave_nothing() {
    let network = Network::new("a");
    stage(&network);
    let machine = network.machine();
    let cells: Vec<Ipv4Addr> = network.block_on(async {
        for n in [0, 1] {
            machine.step(Step::Prepare(spec(n))).await.unwrap();
            // Asked again, it finds everything done.
            machine.step(Step::Prepare(spec(n))).await.unwrap();
        }
        machine.seen().cells.iter().map(|c| c.address).collect()
    });
    assert!(machine.seen().cells.iter().all(|c| c.life == Life::Ready));
    for n in [0, 1] {
        // The QEMU that waits in the cell has the tap whose place the stand-in takes.
        network.block_on(machine.end_vm(&instance(n))).unwrap();
    }
    let guests = [stand_in(&network, 0), stand_in(&network, 1)];

    assert_eq!(network.inside(|| ask(cells[0], DECLARED)), None, "a cell let traffic in before its guest was awakened");
    for n in [0, 1] {
        cell::nft(&netns::path(&machine.namespace(&instance(n))), &open(&[DECLARED])).unwrap();
    }
    assert_eq!(network.inside(|| ask(cells[0], DECLARED)).as_deref(), Some("guest 0"));
    assert_eq!(network.inside(|| ask(cells[1], DECLARED)).as_deref(), Some("guest 1"));
    assert_eq!(network.inside(|| ask(cells[0], UNDECLARED)), None, "an undeclared port answers");

    let outside = network.inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 7000)).unwrap());
    let neighbour = cells[1];
    let host = machine.records.get(&instance(0)).unwrap().link.outer;
    let reached = netns::enter(&netns::path(&guests[0]), || {
        [ask(neighbour, DECLARED), ask(host, 7000), ask([192, 168, 1, 1].into(), 7000)]
    })
    .unwrap();
    assert_eq!(reached, [None, None, None], "a guest reached its neighbour, its host or its cell");
    drop(outside);

    network.block_on(async {
        for n in [0, 1] {
            machine.step(Step::Release { instance: instance(n) }).await.unwrap();
            machine.step(Step::Release { instance: instance(n) }).await.unwrap();
        }
    });
    for guest in guests {
        netns::ip_batch(None, &[format!("netns del {guest}")]).unwrap();
    }
    assert_eq!(network.left(), Vec::<String>::new());
    assert_eq!(std::fs::read_dir(network.dir.path().join("state/cells")).unwrap().count(), 0);
}

#[test]
fn machine_cells_are_found_again_after_the_daemon_was_killed() {
    let network = Network::new("b");
    stage(&network);
    let before = network.machine();
    network.block_on(before.step(Step::Prepare(spec(0)))).unwrap();
    let address = before.seen().cells[0].address;
    network.block_on(before.end_vm(&instance(0))).unwrap();
    // Killed while it resumed: the record says so, and no VM runs.
    before.records.note(&instance(0), Phase::Resuming, None).unwrap();
    drop(before);
    let after = network.machine();
    let seen = after.seen();
    assert_eq!((seen.cells[0].address, seen.cells[0].life), (address, Life::Lost));
    assert_eq!(after.images.known("tiny").map(|k| k.manifest.guest.address), Some(GUEST));
    network.block_on(async {
        after.step(Step::Suspend { instance: instance(0) }).await.unwrap();
        assert_eq!(after.seen().cells[0].life, Life::Ready);
        let refused = after.step(Step::DropImage { image: "tiny".into() }).await.unwrap_err();
        assert!(refused.problem.contains("in use by tiny-0"), "{refused}");
        after.step(Step::Release { instance: instance(0) }).await.unwrap();
        after.step(Step::DropImage { image: "tiny".into() }).await.unwrap();
    });
    assert_eq!(network.left(), Vec::<String>::new());
    assert_eq!(network.store("state/store").names().unwrap(), Vec::<String>::new());
}

#[test]
fn machine_a_cell_whose_record_cannot_be_read_is_taken_down_by_name() {
    let network = Network::new("s");
    stage(&network);
    let before = network.machine();
    network.block_on(before.step(Step::Prepare(spec(0)))).unwrap();
    let folder = before.records.folder(&instance(0));
    drop(before);
    std::fs::write(folder.join("cell.json"), "{\"of\": \"another version\"}").unwrap();
    let after = network.machine();
    assert_eq!(after.records.strays(), [instance(0)]);
    assert!(!network.left().is_empty(), "the cell was gone before it was taken down");
    network.block_on(after.take_down(&instance(0))).unwrap();
    assert_eq!(network.left(), Vec::<String>::new());
    assert!(!folder.exists());
}

#[test]
fn machine_an_image_is_not_resumed_as_something_it_is_not() {
    let network = Network::new("f");
    stage(&network);
    let machine = network.machine();
    let refusal = |wanted: CellSpec| {
        network.block_on(async {
            machine.step(Step::Prepare(wanted)).await.unwrap();
            let refused = machine.step(Step::Resume { instance: instance(0) }).await.unwrap_err();
            machine.step(Step::Release { instance: instance(0) }).await.unwrap();
            format!("{} {}", refused.problem, refused.hint)
        })
    };
    let said = refusal(CellSpec { memory_mib: 1, ..spec(0) });
    assert!(said.contains("MiB") && said.contains("memory_mib"), "{said}");
    let said = refusal(CellSpec { ports: vec![UNDECLARED], ..spec(0) });
    assert!(said.contains(&format!("port {UNDECLARED}")), "{said}");
    assert_eq!(network.left(), Vec::<String>::new());
}

#[test]
fn machine_a_namespace_that_was_deleted_is_built_again() {
    let network = Network::new("c");
    stage(&network);
    let machine = network.machine();
    network.block_on(machine.step(Step::Prepare(spec(0)))).unwrap();
    netns::ip_batch(None, &[format!("netns del {}", machine.namespace(&instance(0)))]).unwrap();
    assert_eq!(machine.seen().cells[0].life, Life::Building);
    network.block_on(machine.step(Step::Prepare(spec(0)))).unwrap();
    assert_eq!(machine.seen().cells[0].life, Life::Ready);
}

fn tunnelled() -> CellSpec {
    let backends = vec![vmatrix_vma_core::steps::BackendAddress { address: [172, 21, 162, 20].into(), port: 5432 }];
    CellSpec { backends, ..spec(0) }
}

#[test]
fn machine_a_cell_with_a_back_end_is_ready_when_its_tunnel_is_and_keeps_it_up() {
    let network = Network::new("e");
    stage(&network);
    // The last word of a tunnel's command line is its status file.
    let machine = network.machine_with_tunnel(r#"sleep 0.2; echo '{"ready":true}' > "$last"; sleep 30"#);
    network.block_on(async {
        machine.step(Step::Prepare(tunnelled())).await.unwrap();
        let first = machine.find_tunnel(&instance(0)).expect("the cell is ready without its tunnel");
        let minder = tokio::spawn(super::mind::tunnels(machine.clone()));
        super::process::end(&first, Duration::ZERO).await.unwrap();
        let began = std::time::Instant::now();
        while machine.find_tunnel(&instance(0)).is_none() {
            assert!(began.elapsed() < Duration::from_secs(10), "the tunnel was not started again");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        machine.step(Step::Release { instance: instance(0) }).await.unwrap();
        minder.abort();
        assert_eq!(machine.find_tunnel(&instance(0)), None);
    });
    assert_eq!(network.left(), Vec::<String>::new());
}

#[test]
fn machine_a_tunnel_that_ends_says_why_the_cell_is_not_ready() {
    let network = Network::new("f");
    stage(&network);
    let machine = network.machine_with_tunnel("echo the origin is not there >&2; exit 1");
    let said = network.block_on(machine.step(Step::Prepare(tunnelled()))).unwrap_err();
    assert!(
        said.problem.contains("the tunnel of tiny-0 ended") && said.problem.contains("the origin is not there"),
        "{said}"
    );
    assert_eq!(machine.seen().cells[0].life, Life::Building);
    network.block_on(machine.step(Step::Release { instance: instance(0) })).unwrap();
    assert_eq!(network.left(), Vec::<String>::new());
}
