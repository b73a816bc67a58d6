//! The contract, fact by fact.

use crate::guest::folder;
use crate::world::{Backend, CLONE, Cell, TAP, World};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use vmatrix_model::Digest;
use vmatrix_vma_image::machine::{Files, Start};
use vmatrix_vma_image::{health, netns};
use vmatrix_vma_libvirt::{Parts, Spawn, Tap, Vm};

/// One request, on a machine with other things to do.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// 2001 and 2033: clocks that a guest has only if it was told.
const EARLY: u64 = 1_000_000_000;
const LATE: u64 = 2_000_000_000;

/// Every fact but that of a shared VM, each said as it is shown.
pub async fn of_clones<B: Backend>(world: &World<'_, B>) {
    let began = Instant::now();
    let say = |fact: &str| eprintln!("{:6.1} s  {fact}", began.elapsed().as_secs_f32());
    a_clone_waits_loads_in_place_and_answers(world).await;
    say("a clone waits, loads in place, answers; it is nobody, and has the environment it was given");
    two_clones_do_not_see_each_others_writes(world).await;
    say("two clones of one image do not see each other's writes, and the image does not either");
    what_does_not_fit_is_refused_in_qemus_words(world).await;
    say("a wrong machine type, CPU model or state is refused in QEMU's words, and nothing is left");
    a_name_is_taken_once(world).await;
    say("a name is taken once, and a name that is none is refused");
    a_killed_vm_is_seen_and_its_name_is_free(world).await;
    say("a killed VM is seen, its tap is gone, and its name is free");
    a_caller_that_began_again_finds_and_drives_its_vms(world).await;
    say("a caller that began again finds and drives its VMs");
}

async fn a_clone_waits_loads_in_place_and_answers<B: Backend>(world: &World<'_, B>) {
    let (h, cell) = (world.hypervisor(), world.cell("clone"));
    let vm = world.spawn(&cell, "clone", &world.guest.files, CLONE).await.unwrap();
    let health = &world.guest.spec.health;
    let early = health::ask(&cell.path(), world.guest.spec.address, health, Duration::from_millis(300)).await;
    assert!(early.is_err(), "the guest answered before its state was loaded");
    cell.forget_neighbours();
    is_powerless(vm.pid);
    let environ = std::fs::read(format!("/proc/{}/environ", vm.pid)).unwrap();
    assert!(environ.split(|b| *b == 0).any(|v| v == b"VMATRIX_MEMORY=of a test"), "the environment did not reach QEMU");
    let began = Instant::now();
    h.load_state(&vm, &world.guest.files.device).await.unwrap();
    let loaded = began.elapsed();
    h.cont(&vm).await.unwrap();
    h.cont(&vm).await.expect("a guest that runs may run");
    answers(world, &cell).await;
    eprintln!("          loaded in {loaded:?}, first answer after {:?}", began.elapsed());
    gone_after_quit(world, &cell, &vm).await;
}

/// A guest that breaks out finds itself without a capability, for ever.
fn is_powerless(pid: i32) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let words = |key: &str| -> Vec<String> {
        let line = status.lines().find(|l| l.starts_with(key)).unwrap_or_default();
        line.split_whitespace().skip(1).map(str::to_owned).collect()
    };
    assert!(words("Uid:").iter().all(|uid| uid != "0"), "{status}");
    assert!(words("Gid:").iter().all(|gid| gid != "0"), "{status}");
    assert_eq!(words("CapPrm:"), ["0000000000000000"]);
    assert_eq!(words("CapEff:"), ["0000000000000000"]);
    assert_eq!(words("NoNewPrivs:"), ["1"]);
    assert_eq!(words("Seccomp:"), ["2"]);
}

async fn two_clones_do_not_see_each_others_writes<B: Backend>(world: &World<'_, B>) {
    let image = &world.guest.files.memory;
    let before = Digest::of(&std::fs::read(image).unwrap());
    let (one, two) = (world.cell("one"), world.cell("two"));
    let first = wake(world, &one, "one", &world.guest.files, CLONE).await;
    let second = wake(world, &two, "two", &world.guest.files, CLONE).await;
    set_clock(&first, EARLY);
    set_clock(&second, LATE);
    near(clock(world, &one), EARLY);
    near(clock(world, &two), LATE);
    assert!(Digest::of(&std::fs::read(image).unwrap()) == before, "a clone wrote into the image");
    gone_after_quit(world, &one, &first).await;
    gone_after_quit(world, &two, &second).await;
}

/// A guest booted into a memory file of its own and suspended, with its folder.
pub struct Saved {
    pub files: Files,
    _folder: tempfile::TempDir,
}

/// Boots the guest, sets its clock to [`EARLY`], suspends it.
pub async fn boot_and_save<B: Backend>(world: &World<'_, B>, name: &str) -> Saved {
    let (h, cell, folder) = (world.hypervisor(), world.cell(name), folder());
    let files = Files {
        memory: folder.path().join("memory"),
        device: folder.path().join("device"),
        ..world.guest.files.clone()
    };
    std::fs::File::create(&files.memory).unwrap().set_len(world.guest.machine.memory_mib << 20).unwrap();
    let vm = world.spawn(&cell, name, &files, Start::Boot).await.unwrap();
    answers(world, &cell).await;
    set_clock(&vm, EARLY);
    h.save_state(&vm, &files.device).await.unwrap();
    gone_after_quit(world, &cell, &vm).await;
    Saved { files, _folder: folder }
}

/// Resumes a clone of what [`boot_and_save`] made.
pub async fn resume<B: Backend>(world: &World<'_, B>, name: &str, saved: &Saved) {
    let cell = world.cell(name);
    let vm = wake(world, &cell, name, &saved.files, CLONE).await;
    near(clock(world, &cell), EARLY);
    gone_after_quit(world, &cell, &vm).await;
}

pub async fn a_shared_vm_is_saved_and_goes_on_where_it_was<B: Backend>(world: &World<'_, B>) {
    let h = world.hypervisor();
    let saved = boot_and_save(world, "booted").await;
    let files = &saved.files;
    for time in [LATE, EARLY] {
        let cell = world.cell("shared");
        let vm = wake(world, &cell, "shared", files, Start::Shared).await;
        near(clock(world, &cell), if time == LATE { EARLY } else { LATE });
        set_clock(&vm, time);
        let began = Instant::now();
        h.save_state(&vm, &files.device).await.unwrap();
        eprintln!("          saved again in {:?}", began.elapsed());
        gone_after_quit(world, &cell, &vm).await;
    }
    resume(world, "from-shared", &saved).await;
}

async fn what_does_not_fit_is_refused_in_qemus_words<B: Backend>(world: &World<'_, B>) {
    let (h, guest) = (world.hypervisor(), world.guest);
    let cell = world.cell("misfit");
    let folder = folder();
    let half = folder.path().join("half");
    let whole = std::fs::read(&guest.files.device).unwrap();
    std::fs::write(&half, &whole[..whole.len() / 2]).unwrap();
    let noise = folder.path().join("noise");
    std::fs::write(&noise, vec![0xa5; 4096]).unwrap();
    let older = |machine: &mut vmatrix_model::manifest::MachineSpec| machine.machine_type = "pc-q35-9.2".to_owned();
    let fewer = |machine: &mut vmatrix_model::manifest::MachineSpec| drop(machine.devices.remove(2));
    let same = |_: &mut vmatrix_model::manifest::MachineSpec| {};
    type Change<'a> = &'a dyn Fn(&mut vmatrix_model::manifest::MachineSpec);
    let cases: [(Change<'_>, &Path, &str); 4] = [
        (&older, &guest.files.device, "Machine type received is 'pc-q35-10.0'"),
        (&fewer, &guest.files.device, "0000:00:0"),
        (&same, &half, "error while loading state"),
        (&same, &noise, "Not a migration stream"),
    ];
    for (change, device, words) in cases {
        let mut machine = guest.machine.clone();
        change(&mut machine);
        let tap = Tap { namespace: &cell.name, name: TAP };
        let spawn = Spawn {
            name: "misfit",
            machine: &machine,
            parts: Parts::Whole(&guest.files),
            start: CLONE,
            tap,
            environment: &[],
        };
        let vm = world.start(&spawn).await.unwrap();
        let said = h.load_state(&vm, device).await.unwrap_err().to_string();
        assert!(said.contains(words), "expected {words:?}: {said}");
        nothing_is_left(world, &cell, &vm).await;
    }
    let mut machine = guest.machine.clone();
    machine.cpu_model = "Nehalen".to_owned();
    let tap = Tap { namespace: &cell.name, name: TAP };
    let spawn = Spawn {
        name: "misfit",
        machine: &machine,
        parts: Parts::Whole(&guest.files),
        start: CLONE,
        tap,
        environment: &[],
    };
    let said = h.spawn(&spawn).await.unwrap_err().to_string();
    assert!(said.contains("unable to find CPU model 'Nehalen'"), "{said}");
    assert_eq!(h.find("misfit").await.unwrap(), None);
    assert!(!cell.has_tap() && !world.backend.sockets("misfit").exists());
}

async fn a_name_is_taken_once<B: Backend>(world: &World<'_, B>) {
    let cell = world.cell("name");
    let vm = world.spawn(&cell, "name", &world.guest.files, CLONE).await.unwrap();
    let other = world.cell("other");
    let said = world.spawn(&other, "name", &world.guest.files, CLONE).await.unwrap_err().to_string();
    assert!(said.contains("runs already"), "{said}");
    assert_eq!(world.hypervisor().find("name").await.unwrap(), Some(vm.clone()), "the first one went");
    assert_eq!(world.hypervisor().find("nam").await.unwrap(), None);
    let said = world.spawn(&other, "../name", &world.guest.files, CLONE).await.unwrap_err().to_string();
    assert!(said.contains("is no name of a VM"), "{said}");
    gone_after_quit(world, &cell, &vm).await;
    world.hypervisor().quit("name").await.expect("ending nothing is well");
}

async fn a_killed_vm_is_seen_and_its_name_is_free<B: Backend>(world: &World<'_, B>) {
    let cell = world.cell("killed");
    let vm = wake(world, &cell, "killed", &world.guest.files, CLONE).await;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(vm.pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    let until = Instant::now() + Duration::from_secs(5);
    while world.hypervisor().find("killed").await.unwrap().is_some() {
        assert!(Instant::now() < until, "a killed VM is still found");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(world.hypervisor().cont(&vm).await.is_err(), "a killed VM let its guest run");
    world.hypervisor().quit("killed").await.unwrap();
    nothing_is_left(world, &cell, &vm).await;
    let vm = wake(world, &cell, "killed", &world.guest.files, CLONE).await;
    gone_after_quit(world, &cell, &vm).await;
}

async fn a_caller_that_began_again_finds_and_drives_its_vms<B: Backend>(world: &World<'_, B>) {
    let cell = world.cell("again");
    let vm = world.spawn(&cell, "again", &world.guest.files, CLONE).await.unwrap();
    let again = world.backend.again().await;
    let found = again.find("again").await.unwrap().expect("the VM is found");
    assert_eq!(found, vm);
    again.load_state(&found, &world.guest.files.device).await.unwrap();
    again.cont(&found).await.unwrap();
    answers(world, &cell).await;
    again.quit("again").await.unwrap();
    nothing_is_left(world, &cell, &vm).await;
}

/// A VM that was loaded and runs.
pub async fn wake<B: Backend>(world: &World<'_, B>, cell: &Cell, name: &str, files: &Files, start: Start) -> Vm {
    let vm = world.spawn(cell, name, files, start).await.unwrap();
    world.hypervisor().load_state(&vm, &files.device).await.unwrap();
    world.hypervisor().cont(&vm).await.unwrap();
    vm
}

/// Waits until the guest answers on its address.
pub async fn answers<B: Backend>(world: &World<'_, B>, cell: &Cell) {
    let spec = &world.guest.spec;
    let until = Instant::now() + ANSWER_LIMIT;
    while let Err(e) = health::ask(&cell.path(), spec.address, &spec.health, Duration::from_secs(3)).await {
        assert!(Instant::now() < until, "the guest does not answer: {e}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Sets the guest's clock, to the second; a write to its memory that it can be asked for.
fn set_clock(vm: &Vm, unix_s: u64) {
    let mut socket = UnixStream::connect(&vm.guest_agent).expect("the guest agent's socket is there");
    socket.set_read_timeout(Some(ANSWER_LIMIT)).unwrap();
    let seed = format!("{}==", "A".repeat(86));
    writeln!(socket, "{{\"reseed\":\"{seed}\",\"clock_unix_us\":{}}}", unix_s * 1_000_000).unwrap();
    let mut line = String::new();
    BufReader::new(socket).read_line(&mut line).unwrap();
    assert!(line.contains("\"ok\":true"), "{line}");
}

/// What the guest says the time is.
fn clock<B: Backend>(world: &World<'_, B>, cell: &Cell) -> u64 {
    netns::enter(&cell.path(), || {
        let mut stream = TcpStream::connect((world.guest.spec.address, 80)).unwrap();
        stream.set_read_timeout(Some(ANSWER_LIMIT)).unwrap();
        stream.write_all(b"GET /cgi-bin/random HTTP/1.0\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text.lines().last().unwrap_or_default().trim().parse().unwrap_or_else(|e| panic!("{e}: {text}"))
    })
    .unwrap()
}

fn near(clock: u64, set: u64) {
    assert!((set..set + 120).contains(&clock), "the guest's clock is {clock}, it was set to {set}");
}

async fn gone_after_quit<B: Backend>(world: &World<'_, B>, cell: &Cell, vm: &Vm) {
    world.hypervisor().quit(&vm.name).await.unwrap();
    nothing_is_left(world, cell, vm).await;
}

/// No process, no socket, no tap, no name taken.
async fn nothing_is_left<B: Backend>(world: &World<'_, B>, cell: &Cell, vm: &Vm) {
    assert_eq!(world.hypervisor().find(&vm.name).await.unwrap(), None, "the process is left");
    assert!(!vm.guest_agent.exists() && !world.backend.sockets(&vm.name).exists(), "its sockets are left");
    let until = Instant::now() + Duration::from_secs(2);
    while cell.has_tap() {
        assert!(Instant::now() < until, "its tap is left");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
