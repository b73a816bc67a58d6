use super::*;
use vmatrix_model::Bytes;
use vmatrix_model::manifest::{Part, PartKind};
use vmatrix_vma_testing::{MAC, blob};

pub(crate) fn manifest() -> Manifest {
    let part = |kind, size: u64| Part {
        kind,
        size: Bytes(size),
        chunk: Bytes(1 << 20),
        table: blob(4 * size.div_ceil(1 << 20)),
        stored: Bytes(0),
    };
    Manifest {
        parts: vec![part(PartKind::Disk, 1 << 20), part(PartKind::Kernel, 5), part(PartKind::Initrd, 5)],
        ..vmatrix_vma_testing::manifest("tiny", 128, &[PartKind::Disk])
    }
}

fn argv(start: Start) -> String {
    let run = Run {
        name: "tiny-0,x".to_owned(),
        qmp: "/run/q".into(),
        guest_agent: "/run/a,b".into(),
        tap_fd: 9,
        console: None,
        start,
    };
    arguments(&manifest(), &Files::within(Path::new("/i")), &run).join(" ")
}

#[test]
fn a_clone_maps_memory_privately_and_waits_a_boot_writes_it() {
    let clone = argv(Start::Clone);
    assert!(clone.contains("mem-path=/i/memory,share=off,readonly=on,rom=off"), "{clone}");
    assert!(clone.ends_with("-run-with user=nobody -incoming defer"), "{clone}");
    let boot = argv(Start::Boot);
    assert!(boot.contains("mem-path=/i/memory,share=on") && !boot.contains("-incoming"), "{boot}");
}

#[test]
fn a_disk_that_comes_as_it_is_read_takes_the_place_of_the_file() {
    let run = Run {
        name: "tiny-0".to_owned(),
        qmp: "/run/q".into(),
        guest_agent: "/run/a".into(),
        tap_fd: 0,
        console: None,
        start: Start::Clone,
    };
    let lazy = lazy_arguments(&manifest().machine, Path::new("/m"), Path::new("/run/n,bd"), &run);
    let whole = arguments(&manifest(), &Files::within(Path::new("/i")), &run);
    assert_eq!(lazy.len(), whole.len());
    let differs: Vec<&String> = lazy.iter().zip(&whole).filter(|(l, w)| l != w).map(|(l, _)| l).collect();
    assert_eq!(differs.len(), 3, "memory, flag and disk: {differs:?}");
    assert!(differs[2].contains("server.path=/run/n,,bd,export=disk,read-only=on,reconnect-delay=30"), "{differs:?}");
}

fn imported(start: Start) -> (MachineSpec, Run) {
    let mut m = manifest().machine;
    m.devices = imported_devices(MAC);
    let run = Run {
        name: "shop".to_owned(),
        qmp: "/run/q".into(),
        guest_agent: "/run/a".into(),
        tap_fd: 9,
        console: None,
        start,
    };
    (m, run)
}

#[test]
fn an_imported_guest_boots_by_itself_and_writes_its_disk_a_clone_writes_over_it() {
    let argv = |start| {
        let (m, run) = imported(start);
        machine_arguments(&m, &Files::within(Path::new("/i")), &run).join(" ")
    };
    let (boot, clone) = (argv(Start::Boot), argv(Start::Clone));
    assert!(boot.contains("file=/i/disk,if=none,id=disk0,format=raw,readonly=off,auto-read-only=off,"), "{boot}");
    assert!(boot.contains("node-name=seed0,read-only=on,file.driver=file") && boot.contains("/i/seed"), "{boot}");
    assert!(clone.contains("file=/i/disk,if=none,id=disk0,format=raw,snapshot=on,"), "{clone}");
    assert!(clone.contains("driver=null-co,node-name=seed0,read-only=on") && !clone.contains("/i/seed"), "{clone}");
    let (m, run) = imported(Start::Clone);
    let lazy = lazy_arguments(&m, Path::new("/m"), Path::new("/s"), &run).join(" ");
    assert!(lazy.contains("-drive driver=nbd,if=none,id=disk0,server.type=unix,server.path=/s"), "{lazy}");
    assert!(lazy.contains("snapshot=on") && lazy.contains("null-co"), "{lazy}");
}

#[test]
fn an_imported_guest_is_nobody_from_its_first_boot_on_and_brings_its_own_kernel() {
    for start in [Start::Boot, Start::Clone] {
        let (m, run) = imported(start);
        let argv = machine_arguments(&m, &Files::within(Path::new("/i")), &run).join(" ");
        assert!(!argv.contains("-kernel") && !argv.contains("-append") && !argv.contains("/i/initrd"), "{argv}");
        assert_eq!(argv.matches("-run-with user=nobody").count(), 1, "{argv}");
        assert!(argv.contains("-sandbox on,obsolete=deny,spawn=deny") && !argv.contains("elevate"), "{argv}");
        assert!(argv.contains("drive=disk0,id=blk0,serial=root,") && argv.contains("drive=seed0,id=blk1,"), "{argv}");
        assert!(argv.contains(",bootindex=0"), "{argv}");
    }
    let host = Host { qemu_version: "10.0.2".to_owned(), accelerator: "tcg".to_owned() };
    let mut m = manifest();
    m.machine.devices = imported_devices(MAC);
    assert_eq!(check_host(&m, &host), Ok(()));
    m.machine.devices.insert(0, "virtio-balloon-pci".to_owned());
    assert!(check_host(&m, &host).is_err());
}

/// An image on a base, of a guest that writes.
fn written() -> Manifest {
    let mut m = manifest();
    m.parts.extend([PartKind::Data, PartKind::Base].map(|kind| Part { kind, ..m.parts[0].clone() }));
    m.machine.devices = devices(MAC, &m.parts.iter().map(|p| p.kind).collect::<Vec<_>>());
    m
}

#[test]
fn each_disk_has_its_serial_and_those_beside_the_root_come_last() {
    let (plain, all) = (manifest().machine.devices, written().machine.devices);
    assert_eq!(all[..plain.len()], plain);
    assert_eq!(all.len(), 7);
    for (device, serial) in [(&all[0], "serial=root,"), (&all[5], "serial=base,"), (&all[6], "serial=data,")] {
        assert!(device.contains(serial) && device.contains("cyls="), "{device}");
    }
    for kind in [PartKind::Disk, PartKind::Base, PartKind::Data] {
        let serial = format!("serial={},", serial(kind).unwrap());
        assert_eq!(all.iter().filter(|device| device.contains(&serial)).count(), 1, "{serial}");
    }
}

#[test]
fn data_is_written_by_its_one_guest_and_over_by_a_clone_and_a_base_by_nobody() {
    let disks = |start, lazy| {
        let run = Run {
            name: "one".to_owned(),
            qmp: "/run/q".into(),
            guest_agent: "/run/a".into(),
            tap_fd: 0,
            console: None,
            start,
        };
        let (m, files) = (written().machine, Files::within(Path::new("/i")));
        let argv = match lazy {
            true => lazy_arguments(&m, &files.memory, Path::new("/s"), &run),
            false => machine_arguments(&m, &files, &run),
        };
        let named = |node: &str| {
            let names = [format!("id={node}"), format!("node-name={node}")];
            let all = argv.windows(2).filter(|w| w[1].split(',').any(|o| names.iter().any(|n| n == o)));
            let found: Vec<String> = all.map(|w| w.join(" ")).collect();
            assert_eq!(found.len(), 1, "{node}: {found:?}");
            found[0].clone()
        };
        (named("base0"), named("data0"))
    };
    for start in [Start::Boot, Start::Clone, Start::Shared] {
        let (base, _) = disks(start, false);
        assert!(base.starts_with("-drive file=/i/base,") && base.contains("readonly=on"), "{base}");
        let (base, _) = disks(start, true);
        assert!(base.starts_with("-blockdev") && base.contains("export=base,read-only=on"), "{base}");
    }
    for start in [Start::Boot, Start::Shared] {
        let (_, data) = disks(start, false);
        assert!(data.contains("file=/i/data,") && data.contains("readonly=off,auto-read-only=off"), "{data}");
        let (_, data) = disks(start, true);
        assert!(data.starts_with("-blockdev") && data.contains("export=data,read-only=off"), "{data}");
        assert!(!data.contains("no-flush=on") && !data.contains("snapshot"), "{data}");
    }
    for lazy in [false, true] {
        let (_, data) = disks(Start::Clone, lazy);
        assert!(data.starts_with("-drive") && data.contains("snapshot=on"), "{data}");
    }
}

#[test]
fn an_image_has_the_devices_of_its_parts_and_one_from_before_disks_had_names_has_its_one() {
    let host = Host { qemu_version: "10.0.2".to_owned(), accelerator: "tcg".to_owned() };
    assert_eq!(check_host(&written(), &host), Ok(()));
    for kind in [PartKind::Base, PartKind::Data] {
        let mut m = written();
        m.parts.retain(|p| p.kind != kind);
        assert_eq!(check_host(&m, &host).unwrap_err().what, "devices");
    }
    let mut m = manifest();
    m.parts.push(Part { kind: PartKind::Data, ..m.parts[0].clone() });
    assert_eq!(check_host(&m, &host).unwrap_err().what, "devices");
    let mut old = manifest();
    old.machine.devices[0] = "virtio-blk-pci,drive=disk0,id=blk0".to_owned();
    assert_eq!(check_host(&old, &host), Ok(()));
    old.machine.devices[0] = "virtio-blk-pci,drive=disk0,id=blk0,serial=root".to_owned();
    assert_eq!(check_host(&old, &host), Ok(()), "nor with geometry");
    for other in ["serial=other", "cyls=1,heads=16,secs=63", "serial=root,discard=off"] {
        old.machine.devices[0] = format!("virtio-blk-pci,drive=disk0,id=blk0,{other}");
        assert!(check_host(&old, &host).is_err(), "{other}");
    }
    let mut old = manifest();
    old.machine.devices = imported_devices(MAC).iter().map(|d| d.replace(",cyls=16383,heads=16,secs=63", "")).collect();
    assert!(is_imported(&old.machine));
    assert_eq!(check_host(&old, &host), Ok(()));
}

#[test]
fn every_machine_is_the_same_but_for_its_start() {
    for argv in [argv(Start::Boot), argv(Start::Clone)] {
        assert!(argv.contains("-machine pc-q35-10.0,memory-backend=ram0"));
        assert!(argv.contains("-nodefaults -no-user-config") && argv.contains("-sandbox on"));
        assert!(argv.contains("file=/i/disk,if=none,id=disk0,format=raw,readonly=on"));
        assert!(argv.contains("-netdev tap,id=net0,fd=9"));
        assert!(argv.contains("tiny-0,,x") && argv.contains("path=/run/a,,b"), "a comma splits an option");
    }
}

#[test]
fn a_machine_that_differs_is_refused_by_the_name_of_what_differs() {
    let host = Host { qemu_version: "10.0.2".to_owned(), accelerator: "tcg".to_owned() };
    assert_eq!(check_host(&manifest(), &host), Ok(()));
    let differs = |change: fn(&mut Manifest), what: &str| {
        let mut m = manifest();
        change(&mut m);
        let error = check_host(&m, &host).unwrap_err();
        assert_eq!(error.what, what, "{error}");
    };
    differs(|m| m.machine.machine_type = "pc-q35-9.2".to_owned(), "machine type");
    differs(|m| m.machine.cpu_model = "max".to_owned(), "CPU model");
    differs(|m| m.machine.accelerator = "kvm".to_owned(), "accelerator");
    differs(|m| m.machine.qemu_version = "9.2.0".to_owned(), "QEMU version");
    differs(|m| m.machine.netdev = "user".to_owned(), "network back end");
    differs(|m| m.machine.devices.push("virtio-balloon-pci".to_owned()), "devices");
    differs(|m| m.machine.devices = vec![m.machine.devices.join(" ")], "devices");
}

#[test]
fn qemus_version_is_read_from_what_it_says() {
    let says = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright";
    assert_eq!(parse_version(says).as_deref(), Some("10.0.2"));
    assert_eq!(parse_version("no such thing"), None);
}
