//! A cloud image becomes a suspended image, two clones of it run side by side, and its disk goes out again.
//!
//! Three boots of a whole Debian would be too long under TCG: one guest does everything, in some four minutes, and
//! two more the first time, when the disk is made.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod cloud;

use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use vmatrix_model::Digest;
use vmatrix_model::manifest::{Health, Manifest, PartKind};
use vmatrix_vma_image::chunks::{self, Need};
use vmatrix_vma_image::machine::{self as qemu, Files, Run, Start};
use vmatrix_vma_image::qmp::Qmp;
use vmatrix_vma_image::{Store, guest, health, inspect, memory, netns, sign};
use vmatrix_vma_import::{Event, Format, Options, export, import, source};
use vmatrix_vma_testing::{Cell, Process, get};

/// Says what happens, as a command line would.
fn observer() -> (Arc<Mutex<Vec<String>>>, Arc<vmatrix_vma_import::Observer>) {
    let (notes, began) = (Arc::new(Mutex::new(Vec::new())), Instant::now());
    let to = notes.clone();
    let hear = move |event: Event<'_>| match event {
        Event::Step(what) => eprintln!("[{:5.1} s] {what}", began.elapsed().as_secs_f64()),
        Event::Note(what) => {
            eprintln!("[{:5.1} s] note: {what}", began.elapsed().as_secs_f64());
            to.lock().unwrap().push(what.to_owned());
        }
        Event::Done { .. } => {}
    };
    (notes, Arc::new(hear))
}

fn agent() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let beside = program.ancestors().skip(1).take(2).map(|f| f.join("vmatrix-vma-guest")).find(|p| p.exists());
    beside.expect("needs the guest agent; cargo build -p vmatrix-vma-guest")
}

fn lay(manifest: &Manifest, store: &Store, dir: &Path) -> Files {
    let files = Files::within(dir);
    let key = inspect::owner_key(manifest, store).unwrap();
    memory::assemble(manifest, store, key.as_ref(), &files.memory).unwrap();
    let need = Need::blob(&manifest.device, manifest.seal.is_some());
    let device = chunks::open(&store.chunk(&need.digest).unwrap(), &need, key.as_ref()).unwrap();
    fs::write(&files.device, device).unwrap();
    chunks::assemble(manifest.part(PartKind::Disk).unwrap(), store, &files.disk).unwrap();
    files
}

/// With its disk as a file, or over NBD where there is a socket.
async fn resume(
    manifest: &Manifest,
    files: &Files,
    nbd: Option<&Path>,
    cell: &Cell,
    dir: &Path,
    name: &str,
) -> (Process, PathBuf) {
    let tap = netns::open_tap(&netns::path(&cell.0), "tap0").expect("needs /dev/net/tun");
    netns::ip_batch(Some(&cell.0), &["link set tap0 master br0 up".into()]).unwrap();
    let run = Run {
        name: name.into(),
        qmp: dir.join(format!("{name}.qmp")),
        guest_agent: dir.join(format!("{name}.agent")),
        tap_fd: tap.as_raw_fd(),
        console: None,
        start: Start::Clone,
    };
    let spec = &manifest.machine;
    let arguments = match nbd {
        Some(socket) => qemu::lazy_arguments(spec, &files.memory, socket, &run),
        None => qemu::machine_arguments(spec, files, &run),
    };
    let process = Process(qemu::command(&arguments, &tap).env("TMPDIR", dir).spawn().unwrap());
    let mut qmp = Qmp::connect(&run.qmp).await.unwrap();
    let began = Instant::now();
    qmp.load_state(&files.device).await.unwrap();
    qmp.cont().await.unwrap();
    eprintln!("{name}: loaded in {:?}", began.elapsed());
    (process, run.guest_agent)
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_cloud_image_sleeps_wakes_twice_and_goes_out_again() {
    let raw = cloud::disk(cloud::CLOUD);
    let dir = tempfile::Builder::new().prefix("vmx").tempdir().unwrap();
    let qcow2 = dir.path().join("cloud.qcow2");
    let made = Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(&qcow2).status();
    assert!(made.expect("needs qemu-img; apt-get install qemu-utils").success());
    let options = Options {
        name: "cloud".to_owned(),
        format: None,
        memory_mib: Some(384),
        ports: vec![80],
        health: Health { port: 80, path: "/".to_owned(), status: 200 },
        warm: vec!["/cgi-bin/random".to_owned()],
        times: 10,
        user_data: Some(
            "#cloud-config\nwrite_files:\n- {path: /srv/www/owner, content: the owner was here}\n".to_owned(),
        ),
        guest_agent: agent(),
        boot_limit: Duration::from_secs(400),
        agent_limit: Duration::from_secs(300),
    };
    let path = dir.path().join("store");
    let (notes, hear) = observer();
    let built = import(&qcow2, &options, &path, hear.clone()).await.unwrap();
    eprintln!("{built:?}");
    assert!(built.reseeds, "the agent does not answer: {:?}", notes.lock().unwrap());
    fs::remove_file(&qcow2).unwrap();

    let store = Store::open(&path).unwrap();
    let trusted = [sign::public(&store).unwrap()];
    let (manifest, digest) = sign::verify(&store.image("cloud").unwrap().unwrap(), &trusted).unwrap();
    assert_eq!(digest, built.digest);
    assert!(qemu::is_imported(&manifest.machine) && manifest.guest.reseeds);

    let files = lay(&manifest, &store, dir.path());
    let before = Digest::of(&fs::read(&files.disk).unwrap());
    let address = manifest.guest.address;
    let (one, two) = (Cell::new("one", manifest.guest.gateway), Cell::new("two", manifest.guest.gateway));
    let mut seen = Vec::new();
    let nbd = dir.path().join("nbd");
    let mut serve = Command::new("qemu-nbd");
    serve.args(["-r", "-f", "raw", "-x", "disk", "-t", "-k"]).arg(&nbd).arg(&files.disk);
    let _server = Process(serve.spawn().expect("needs qemu-nbd; apt-get install qemu-utils"));
    for (cell, name, nbd) in [(&one, "one", None), (&two, "two", Some(nbd.as_path()))] {
        let (process, socket) = resume(&manifest, &files, nbd, cell, dir.path(), name).await;
        let awake = guest::awaken(&socket).await.unwrap();
        let apart = awake.host_unix_us.abs_diff(awake.clock_unix_us);
        assert!(apart < 50_000, "the clock of {name} is {apart} µs off");
        health::ask(&netns::path(&cell.0), address, &manifest.guest.health, Duration::from_secs(20)).await.unwrap();
        let text = get(&cell.path(), address, "/cgi-bin/random");
        let (random, time) = text.split_once('\n').expect("the CGI answers two lines");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert!(now.abs_diff(time.trim().parse().unwrap()) <= 2, "{name} says {time}, it is {now}");
        assert_eq!(get(&cell.path(), address, "/owner"), "the owner was here");
        // To its root disk, which each has to itself and nobody keeps.
        assert_eq!(get(&cell.path(), address, &format!("/cgi-bin/write?{name}")), name);
        seen.push((random.to_owned(), process));
    }
    assert_ne!(seen[0].0, seen[1].0, "two clones drew the same random bytes");
    drop(seen);
    assert_eq!(Digest::of(&fs::read(&files.disk).unwrap()), before, "a clone wrote to the image's disk");
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|n| n.to_string_lossy().starts_with("vl.")), "an overlay is left: {left:?}");

    let (out, back) = (dir.path().join("out.ova"), dir.path().join("back"));
    let exported = export("cloud", &store, &trusted, Format::Ova, &out, &*hear).unwrap();
    assert_eq!(exported.disk, built.disk.size);
    let came = source::raw(&out, Format::Ova, &back, &*hear).unwrap();
    assert_eq!(came.memory_mib, Some(384));
    assert_eq!(Digest::of(&fs::read(back).unwrap()), before, "another disk comes back");
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_disk_without_cloud_init_gets_its_address_by_dhcp_and_is_flagged() {
    let raw = cloud::disk(cloud::SMALL);
    let dir = tempfile::Builder::new().prefix("vmx").tempdir().unwrap();
    let options = Options {
        name: "small".to_owned(),
        format: Some(Format::Raw),
        memory_mib: Some(96),
        ports: vec![80],
        health: Health { port: 80, path: "/".to_owned(), status: 200 },
        warm: vec![],
        times: 5,
        user_data: None,
        guest_agent: agent(),
        boot_limit: Duration::from_secs(100),
        agent_limit: Duration::from_secs(1),
    };
    let path = dir.path().join("store");
    let (notes, hear) = observer();
    let built = import(&raw, &options, &path, hear).await.unwrap();
    let notes = notes.lock().unwrap().join("; ");
    assert!(!built.reseeds && notes.contains("identity: not reseeded"), "{notes}");

    let store = Store::open(&path).unwrap();
    let trusted = [sign::public(&store).unwrap()];
    let (manifest, _) = sign::verify(&store.image("small").unwrap().unwrap(), &trusted).unwrap();
    assert!(!manifest.guest.reseeds, "the manifest does not say it");
    let files = lay(&manifest, &store, dir.path());
    let before = Digest::of(&fs::read(&files.disk).unwrap());
    // No DHCP here: the address must be the guest's own for ever.
    let cell = Cell::new("small", manifest.guest.gateway);
    let (process, _) = resume(&manifest, &files, None, &cell, dir.path(), "small").await;
    assert_eq!(get(&cell.path(), manifest.guest.address, "/"), "hello from a small disk");
    assert_eq!(get(&cell.path(), manifest.guest.address, "/cgi-bin/write?mine"), "mine");
    drop(process);
    assert_eq!(Digest::of(&fs::read(&files.disk).unwrap()), before, "a clone wrote to the image's disk");
    let left: Vec<_> = fs::read_dir(&path).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(
        !left.iter().any(|n| n.to_string_lossy().contains("vmatrix-build")),
        "something in between is left: {left:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_guest_that_never_serves_is_told_of_with_its_console_and_leaves_nothing() {
    let raw = cloud::disk(cloud::SMALL);
    let dir = tempfile::Builder::new().prefix("vmx").tempdir().unwrap();
    let options = Options {
        name: "mute".to_owned(),
        format: None,
        memory_mib: Some(96),
        ports: vec![80],
        health: Health { port: 81, path: "/".to_owned(), status: 200 },
        warm: vec![],
        times: 5,
        user_data: None,
        guest_agent: agent(),
        boot_limit: Duration::from_secs(12),
        agent_limit: Duration::from_secs(1),
    };
    let path = dir.path().join("store");
    let error = import(&raw, &options, &path, observer().1).await.unwrap_err().to_string();
    assert!(error.contains("not healthy after 12 s") && error.contains("192.168.1.10/24"), "{error}");
    let left: Vec<_> = fs::read_dir(&path).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(
        !left.iter().any(|n| n.to_string_lossy().contains("vmatrix-build")),
        "something in between is left: {left:?}"
    );
    let shm = fs::read_dir("/dev/shm").unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned());
    let ours = format!("mute-{}", std::process::id());
    assert_eq!(shm.filter(|n| n.contains(&ours)).count(), 0);
    assert!(Store::open(&path).unwrap().names().unwrap().is_empty());
}
