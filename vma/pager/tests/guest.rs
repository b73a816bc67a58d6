//! A real guest, resumed from a store over the network with nothing of it here.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod common;

use common::dir;
use std::fs::Permissions;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use vmatrix_model::manifest::{Manifest, SignedManifest};
use vmatrix_vma_image::chunks::{self, Need};
use vmatrix_vma_image::machine::{self, Run, Start};
use vmatrix_vma_image::qmp::Qmp;
use vmatrix_vma_image::seal::OwnerKey;
use vmatrix_vma_image::{Store, health, inspect, memory, netns, sign};
use vmatrix_vma_pager::{Control, PUSHED_VARIABLE, Status, preload};
use vmatrix_vma_testing::{Cell, Process, get};
use vmatrix_vma_transfer::identity::{Authority, Identity, Role};
use vmatrix_vma_transfer::{Server, ServerConfig};

/// Not a test of its own: a process with memory.
#[test]
fn process_that_maps_memory() {
    common::process();
}

/// Not a test of its own: the pager's process.
#[test]
fn process_that_pages() {
    let Some(config) = std::env::var_os("VMATRIX_TEST_PAGER").map(PathBuf::from) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(vmatrix_vma_pager::run(&config)).unwrap();
}

/// A store that serves the image `tiny`, and a machine that has nothing of it.
struct World {
    dir: tempfile::TempDir,
    /// The server's store; only read.
    kept: PathBuf,
    signed: SignedManifest,
    manifest: Manifest,
    key: Option<OwnerKey>,
    address: SocketAddr,
    server: JoinHandle<()>,
    signer: String,
}

/// A store that has the image: one that was filled beforehand, or one of the tests' own.
async fn built() -> PathBuf {
    let filled = std::env::var_os("VMATRIX_STORE").map(PathBuf::from);
    if let Some(store) = filled.filter(|store| inspect::inspect(store, "tiny", &[]).is_ok()) {
        return store;
    }
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios/guests/tiny.toml");
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("store");
    vmatrix_vma_build::build(&recipe, &kept, &vmatrix_vma_build::Options::default()).await.unwrap();
    kept
}

/// A server of the store, at an address of its own or at this one.
async fn serve(store: &Path, dir: &tempfile::TempDir, at: Option<SocketAddr>) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind(at.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)))).await.unwrap();
    let (identity, store) = (Identity::read(dir.path().join("server")).unwrap(), Store::read(store).unwrap());
    let server = Server::new(ServerConfig { identity, store, keys: None, rate_mbit: None }).unwrap();
    let address = listener.local_addr().unwrap();
    (address, tokio::spawn(async move { server.run(listener, std::future::pending()).await }))
}

impl World {
    async fn new() -> World {
        let kept = built().await;
        let store = Store::read(&kept).unwrap();
        let signer = sign::public(&store).unwrap();
        let signed = store.image("tiny").unwrap().unwrap();
        let (manifest, _) = sign::verify(&signed, std::slice::from_ref(&signer)).unwrap();
        let dir = dir();
        std::fs::create_dir(dir.path().join("disks")).unwrap();
        // QEMU has become nobody when it connects to its disk again.
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o711)).unwrap();
        let authority = Authority::create(dir.path().join("authority")).unwrap();
        authority.issue(Role::Machine, "m1").unwrap().write(dir.path().join("identity")).unwrap();
        let identity = authority.issue(Role::Store, "s1").unwrap();
        identity.write(dir.path().join("server")).unwrap();
        let (address, server) = serve(&kept, &dir, None).await;
        let key = inspect::owner_key(&manifest, &Store::read(&kept).unwrap()).unwrap();
        key.iter().for_each(|key| key.write(dir.path().join("key")).unwrap());
        std::fs::write(dir.path().join("manifest.json"), serde_json::to_vec(&signed).unwrap()).unwrap();
        World { dir, kept, signed, manifest, key, address, server, signer }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn configure(&self, more: serde_json::Value) -> PathBuf {
        let mut config = serde_json::json!({
            "image": self.path("manifest.json"), "signers": [self.signer], "memory": self.path("memory"),
            "disks": { "dir": self.path("disks"), "socket": self.path("disk.sock") }, "control": self.path("control"),
            "store": self.path("store"),
            "sources": { "identity": self.path("identity"), "addresses": [self.address] },
        });
        if self.key.is_some() {
            config["key"] = self.path("key").to_str().into();
        }
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let path = self.path("pager.json");
        std::fs::write(&path, config.to_string()).unwrap();
        path
    }

    async fn pager(&self) -> (Process, Control) {
        self.pager_with(&[]).await
    }

    async fn pager_with(&self, environment: &[(&str, &str)]) -> (Process, Control) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "process_that_pages", "--nocapture", "--test-threads=1"]).stdout(Stdio::null());
        command.envs(environment.iter().copied());
        let process = Process(command.env("VMATRIX_TEST_PAGER", self.path("pager.json")).spawn().unwrap());
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match Control::connect(&self.path("control")).await {
                Ok(control) => return (process, control),
                Err(e) => assert!(Instant::now() < deadline, "no pager: {e}"),
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Starts a waiting QEMU and has its memory served.
    async fn guest(&self, cell: &Cell, name: &str, control: &mut Control, singleton: bool) -> Guest {
        let tap = netns::open_tap(&cell.path(), "tap0").expect("needs /dev/net/tun");
        netns::ip_batch(Some(&cell.0), &["link set tap0 master br0 up".into()]).unwrap();
        let run = Run {
            name: name.into(),
            qmp: self.path(&format!("{name}.qmp")),
            guest_agent: self.path(&format!("{name}.agent")),
            tap_fd: tap.as_raw_fd(),
            console: None,
            start: Start::Clone,
        };
        let (memory, disk) = (self.path("memory"), self.path("disk.sock"));
        let mut arguments = machine::lazy_arguments(&self.manifest.machine, &memory, &disk, &run);
        if singleton {
            arguments.iter_mut().for_each(|a| *a = a.replace("share=off,readonly=on,rom=off", "share=on"));
        }
        let mut command = machine::command(&arguments, &tap);
        preload(&mut command, &memory, singleton).unwrap();
        let process = Process(command.spawn().unwrap());
        control.adopt(process.pid()).await.unwrap();
        let qmp = Qmp::connect(&run.qmp).await.unwrap();
        Guest { process, qmp }
    }

    /// Device state, as the pager has fetched it into the local store.
    fn device(&self) -> PathBuf {
        let need = Need::blob(&self.manifest.device, self.key.is_some());
        let store = Store::read(self.path("store")).unwrap();
        let path = self.path("device");
        std::fs::write(&path, chunks::open(&store.chunk(&need.digest).unwrap(), &need, self.key.as_ref()).unwrap())
            .unwrap();
        path
    }

    /// The first answer, once the guest runs.
    async fn answer(&self, cell: &Cell) -> Duration {
        let health = &self.manifest.guest.health;
        health::ask(&cell.path(), self.manifest.guest.address, health, Duration::from_secs(30)).await.unwrap()
    }
}

struct Guest {
    process: Process,
    qmp: Qmp,
}

async fn until(control: &mut Control, what: impl Fn(&Status) -> bool) -> Status {
    let deadline = Instant::now() + Duration::from_secs(40);
    loop {
        let status = control.status().await.unwrap();
        if what(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "never came: {status:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_clone_answers_before_it_has_arrived_and_outlives_its_pager() {
    let world = World::new().await;
    assert_eq!(world.signed.signer, world.signer);
    let gateway = world.manifest.guest.gateway;
    world.configure(serde_json::json!({ "background_mbit": 8 }));
    let began = Instant::now();
    let (pager, mut control) = world.pager().await;
    let cell = Cell::new("lazy", gateway);
    let mut guest = world.guest(&cell, "lazy", &mut control, false).await;
    let waiting = began.elapsed();
    let status = until(&mut control, |s| s.critical).await;
    assert!(!status.hydrated && status.pages_present * 4 < status.pages_total, "{status:?}");
    let critical = began.elapsed();
    guest.qmp.load_state(&world.device()).await.unwrap();
    guest.qmp.cont().await.unwrap();
    let running = began.elapsed();
    world.answer(&cell).await;
    let first = began.elapsed();
    let status = control.status().await.unwrap();
    eprintln!("QEMU waits {waiting:?}, critical {critical:?}, runs {running:?}, first answer {first:?}: {status:?}");
    assert!(!status.hydrated, "all of it came before the first answer");

    // Killed in the middle: what it was asked is asked again of the next one.
    drop(pager);
    let (path, address) = (cell.path(), world.manifest.guest.address);
    let asked = tokio::task::spawn_blocking(move || get(&path, address, "/cgi-bin/random"));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!asked.is_finished(), "the guest answers from a disk that is not there");
    let began = Instant::now();
    let (_pager, mut control) = world.pager().await;
    control.adopt(guest.process.pid()).await.unwrap();
    let text = asked.await.unwrap();
    eprintln!("answered {:?} after the next pager began", began.elapsed());
    assert_eq!(text.lines().next().map(str::len), Some(32), "{text}");
    let status = control.status().await.unwrap();
    assert!(status.pages_present > 1000, "the next pager began anew: {status:?}");
    guest.qmp.quit().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_with_demand_alone_two_clones_answer_and_first_touches_are_recorded() {
    let world = World::new().await;
    let gateway = world.manifest.guest.gateway;
    world.configure(serde_json::json!({ "working_set": false, "record": true }));
    let (_pager, mut control) = world.pager().await;
    let mut guests = Vec::new();
    for name in ["one", "two"] {
        let cell = Cell::new(name, gateway);
        let mut guest = world.guest(&cell, name, &mut control, false).await;
        let before = until(&mut control, |s| s.critical).await;
        let began = Instant::now();
        guest.qmp.load_state(&world.device()).await.unwrap();
        guest.qmp.cont().await.unwrap();
        world.answer(&cell).await;
        let after = control.status().await.unwrap();
        eprintln!(
            "{name}: first answer {:?} after the order to load, {} pages, {} misses, {} zero faults",
            began.elapsed(),
            after.pages_present - before.pages_present,
            after.misses - before.misses,
            after.zeros - before.zeros,
        );
        guests.push((guest, cell));
    }
    let recorded = control.recorded().await.unwrap();
    assert!((300..20_000).contains(&recorded.len()), "{} pages were touched", recorded.len());
    for (guest, _cell) in guests {
        guest.qmp.quit().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_source_that_is_lost_is_said_and_one_that_comes_back_is_used() {
    let mut world = World::new().await;
    world.configure(serde_json::json!({ "working_set": false, "disks": null, "stuck_ms": 1000 }));
    let (_pager, mut control) = world.pager().await;
    until(&mut control, |s| s.critical).await;
    let mut guest = common::Guest::start(&world.path("memory"), "private", false);
    control.adopt(guest.pid()).await.unwrap();
    assert_eq!(guest.ask("touch 10"), "touched", "the working set's first pages");
    world.server.abort();
    guest.tell("touch 0");
    let status = until(&mut control, |s| s.stuck.is_some()).await;
    let said = status.stuck.unwrap();
    assert!(said.contains("page ") && said.contains("cannot be had since"), "{said}");
    eprintln!("{said}");
    world.server = serve(&world.kept, &world.dir, Some(world.address)).await.1;
    assert_eq!(guest.answer(), "touched");
    assert_eq!(until(&mut control, |s| s.waiting == 0).await.stuck, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_the_kernel_knows_every_page_that_a_singleton_changes() {
    let world = World::new().await;
    world.configure(serde_json::json!({ "shared": true }));
    let (_pager, mut control) = world.pager().await;
    let cell = Cell::new("alone", world.manifest.guest.gateway);
    let mut guest = world.guest(&cell, "alone", &mut control, true).await;
    let pid = guest.process.pid();
    until(&mut control, |s| s.critical).await;
    guest.qmp.load_state(&world.device()).await.unwrap();
    guest.qmp.cont().await.unwrap();
    world.answer(&cell).await;
    until(&mut control, |s| s.hydrated).await;

    guest.qmp.execute("stop", serde_json::json!({})).await.unwrap();
    let before = std::fs::read(world.path("memory")).unwrap();
    let began = Instant::now();
    control.protect(pid).await.unwrap();
    let protect = began.elapsed();
    guest.qmp.cont().await.unwrap();
    for _ in 0..20 {
        let (path, address) = (cell.path(), world.manifest.guest.address);
        let text = tokio::task::spawn_blocking(move || get(&path, address, "/cgi-bin/random")).await.unwrap();
        assert_eq!(text.lines().next().map(str::len), Some(32), "{text}");
    }
    guest.qmp.execute("stop", serde_json::json!({})).await.unwrap();
    let began = Instant::now();
    let dirty = control.dirty(pid).await.unwrap();
    let scan = began.elapsed();
    let after = std::fs::read(world.path("memory")).unwrap();
    let pages = before.chunks(4096).zip(after.chunks(4096)).enumerate();
    let changed: Vec<u32> = pages.filter(|(_, (b, a))| b != a).map(|(page, _)| page as u32).collect();
    let known = |page: &u32| dirty.iter().any(|run| run.contains(page));
    assert!(!changed.is_empty() && changed.iter().all(known), "a page changed and nobody knows");
    let written: usize = dirty.iter().map(|run| run.len()).sum();
    eprintln!("{} pages changed, {written} were written; marked in {protect:?}, found in {scan:?}", changed.len());
    assert!(written < before.len() / 4096 / 4, "{written} pages count as written");
    guest.qmp.quit().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_what_another_process_brings_is_not_asked_for_again() {
    let world = World::new().await;
    world.server.abort();
    world.configure(serde_json::json!({ "disks": null, "background": false }));
    let (from, to) = (Store::read(&world.kept).unwrap(), Store::open(world.path("store")).unwrap());
    let (_pager, mut control) = world.pager_with(&[(PUSHED_VARIABLE, "5000")]).await;
    let memory = &world.manifest.memory;
    let map = memory::map(&world.manifest, &from).unwrap();
    let set = map.packs().iter().take(map.working_set()).map(|pack| pack.digest);
    let needed = [memory.first.digest, world.manifest.device.digest].into_iter().chain(set);
    for digest in needed {
        to.put_chunk(&digest, &from.chunk(&digest).unwrap()).unwrap();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let began = Instant::now();
    let status = until(&mut control, |s| s.critical).await;
    eprintln!("critical {:?} after the last chunk was pushed", began.elapsed());
    assert!(!status.hydrated && status.stuck.is_none(), "{status:?}");
    let pages: u64 = map.packs().iter().take(map.working_set()).map(|pack| pack.pages().count() as u64).sum();
    assert_eq!(status.pages_present, pages);
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_second_pager_ends_and_the_first_goes_on() {
    let world = World::new().await;
    world.configure(serde_json::json!({ "disks": null, "background": false }));
    let (_first, mut control) = world.pager().await;
    until(&mut control, |s| s.critical).await;
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "process_that_pages", "--test-threads=1"]);
    command.env("VMATRIX_TEST_PAGER", world.path("pager.json"));
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("is served by another pager"), "{said}");
    let mut again = Control::connect(&world.path("control")).await.unwrap();
    assert!(again.status().await.unwrap().critical);
    again.quit().await.unwrap();
}
