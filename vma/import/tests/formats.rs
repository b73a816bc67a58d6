//! Disks in every format that comes in, whole and hostile, through the real qemu-img.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmatrix_vma_import::{Disk, Error, Event, Format, digests, source, tar};
use vmatrix_vma_testing::Small;

/// Bytes of the disk that comes in, most of it holes.
const SIZE: u64 = 48 << 20;

/// A disk with a boot sector, text at its beginning and random bytes near its end.
fn disk(dir: &Path) -> PathBuf {
    let path = dir.join("disk.raw");
    let file = File::create(&path).unwrap();
    file.set_len(SIZE).unwrap();
    let mut sector = [0x90; 512];
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    file.write_all_at(&sector, 0).unwrap();
    let bytes: Vec<u8> = (0..3u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    file.write_all_at(&bytes, 40 << 20).unwrap();
    path
}

fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output().expect("needs qemu-img; apt-get install qemu-utils");
    assert!(output.status.success(), "qemu-img {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn converted(raw: &Path, to: &str, how: &[&str]) -> PathBuf {
    let path = raw.with_file_name(to);
    let (from, to) = (raw.display().to_string(), path.display().to_string());
    qemu_img(&[&["convert", "-f", "raw"], how, &[&from, &to]].concat());
    path
}

fn silent(_: Event<'_>) {}

fn bring(path: &Path, format: Format) -> Result<(Disk, PathBuf), Error> {
    let to = path.with_extension("came");
    let began = Instant::now();
    let came = source::raw(path, format, &to, &silent);
    assert!(began.elapsed() < Duration::from_secs(40), "it took {:?}", began.elapsed());
    assert_eq!(to.exists(), came.is_ok(), "half a disk is left, or none");
    came.map(|disk| (disk, to))
}

fn refusal(path: &Path, format: Format) -> String {
    bring(path, format).expect_err("it is taken").to_string()
}

fn same(a: &Path, b: &Path) {
    assert!(fs::read(a).unwrap() == fs::read(b).unwrap(), "{} and {} differ", a.display(), b.display());
    let stored = fs::metadata(b).unwrap().blocks() * 512;
    assert!(stored < SIZE / 4, "the holes are filled: {stored} bytes are stored");
}

fn archive(path: &Path, files: &[(&str, &[u8])]) {
    let mut file = File::create(path).unwrap();
    for (name, bytes) in files {
        file.write_all(&tar::header(name, bytes.len() as u64)).unwrap();
        file.write_all(bytes).unwrap();
        file.write_all(&vec![0; bytes.len().next_multiple_of(512) - bytes.len()]).unwrap();
    }
    file.write_all(&[0; 1024]).unwrap();
}

fn description(href: &str) -> String {
    format!(
        r#"<Envelope xmlns="o" xmlns:r="r"><References><File id="f" href="{href}"/></References>
        <DiskSection><Disk diskId="d" fileRef="f" capacity="{SIZE}"/></DiskSection>
        <VirtualSystem id="shop"><EulaSection/><VirtualHardwareSection>
        <Item><r:ResourceType>4</r:ResourceType><r:VirtualQuantity>256</r:VirtualQuantity></Item>
        </VirtualHardwareSection></VirtualSystem></Envelope>"#
    )
}

fn sha256(bytes: &[u8]) -> Vec<u8> {
    ring::digest::digest(&ring::digest::SHA256, bytes).as_ref().to_vec()
}

#[test]
fn machine_a_disk_comes_in_the_same_from_every_format() {
    let dir = tempfile::tempdir().unwrap();
    let raw = disk(dir.path());
    let heard = Arc::new(Mutex::new(Vec::new()));
    let to = heard.clone();
    let observer = move |event: Event<'_>| {
        if let Event::Done { done, total } = event {
            to.lock().unwrap().push((done.0, total.0));
        }
    };
    source::raw(&raw, Format::Raw, &dir.path().join("copy"), &observer).unwrap();
    same(&raw, &dir.path().join("copy"));
    for (name, how) in [
        ("a.qcow2", &["-O", "qcow2"][..]),
        ("b.qcow2", &["-O", "qcow2", "-c", "-o", "compression_type=zstd,cluster_size=2M"]),
        ("c.qcow2", &["-O", "qcow2", "-o", "compat=0.10"]),
        ("d.qcow2", &["-O", "qcow2", "-o", "extended_l2=on,lazy_refcounts=on,cluster_size=128k"]),
        ("e.vmdk", &["-O", "vmdk", "-o", "subformat=streamOptimized"]),
        ("f.vmdk", &["-O", "vmdk"]),
    ] {
        let path = converted(&raw, name, how);
        let to = path.with_extension("came");
        let _ = fs::remove_file(&to);
        let came =
            source::raw(&path, Format::of(&path).unwrap(), &to, &observer).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(came.size.0, SIZE);
        same(&raw, &to);
    }
    let heard = heard.lock().unwrap();
    assert!(heard.iter().all(|(done, total)| done <= total && *total == SIZE), "{heard:?}");
    assert!(heard.iter().filter(|(done, _)| *done == SIZE).count() == 7, "not each of them ended at its total");
}

#[test]
fn machine_an_ova_comes_in_whole_and_one_that_was_changed_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let raw = disk(dir.path());
    let vmdk = fs::read(converted(&raw, "x.vmdk", &["-O", "vmdk", "-o", "subformat=streamOptimized"])).unwrap();
    let text = description("disk-1.vmdk");
    let list = digests::line("vm.ovf", &sha256(text.as_bytes())) + &digests::line("disk-1.vmdk", &sha256(&vmdk));
    let path = dir.path().join("shop.ova");
    let pack = |text: &str, list: &str, vmdk: &[u8]| {
        archive(
            &path,
            &[("vm.ovf", text.as_bytes()), ("vm.mf", list.as_bytes()), ("disk-1.vmdk", vmdk), ("vm.cert", b"x")],
        );
    };
    pack(&text, &list, &vmdk);
    let (came, to) = bring(&path, Format::Ova).unwrap();
    same(&raw, &to);
    assert_eq!((came.name.as_deref(), came.memory_mib, came.cpus), (Some("shop"), Some(256), None));
    assert_eq!(came.aside, ["EulaSection", "file vm.cert"]);
    fs::remove_file(to).unwrap();

    let mut changed = vmdk.clone();
    *changed.last_mut().unwrap() ^= 1;
    pack(&text, &list, &changed);
    assert!(refusal(&path, Format::Ova).contains("not what its digest says"));
    pack(&text.replace("256", "512"), &list, &vmdk);
    assert!(refusal(&path, Format::Ova).contains("\"vm.ovf\" is not what its digest says"));
    archive(&path, &[("vm.ovf", description("other.vmdk").as_bytes()), ("disk-1.vmdk", &vmdk)]);
    assert!(refusal(&path, Format::Ova).contains("lacks the disk"));
    archive(&path, &[("vm.ovf", description("../../etc/shadow").as_bytes()), ("disk-1.vmdk", &vmdk)]);
    assert!(refusal(&path, Format::Ova).contains("not a file in the archive"));
    archive(&path, &[("vm.ovf", text.as_bytes()), ("../../../tmp/vmx-escaped.vmdk", &vmdk)]);
    assert!(refusal(&path, Format::Ova).contains("plain names"));
    assert!(!Path::new("/tmp/vmx-escaped.vmdk").exists());
    archive(&path, &[("vm.ovf", text.as_bytes()), ("disk-1.vmdk", b"KDMV")]);
    assert!(refusal(&path, Format::Ova).contains("VMDK"));
}

#[test]
fn machine_a_qcow2_file_that_leads_to_another_file_opens_none() {
    let dir = tempfile::tempdir().unwrap();
    let raw = disk(dir.path());
    let path = dir.path().join("a.qcow2");
    let (base, made) = (raw.display().to_string(), path.display().to_string());
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &made]);
    assert!(refusal(&path, Format::Qcow2).contains("backing file"));
    let data = format!("data_file={},data_file_raw=on", dir.path().join("data").display());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &data, &made, "48M"]);
    assert!(refusal(&path, Format::Qcow2).contains("another file"));
    // A raw disk whose guest wrote such a header to its beginning.
    fs::copy(&path, dir.path().join("b.raw")).unwrap();
    assert!(refusal(&dir.path().join("b.raw"), Format::Raw).contains("said to be raw"));
}

#[test]
fn machine_a_small_file_that_unpacks_to_a_huge_disk_is_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let raw = disk(dir.path());
    let file = File::options().write(true).open(&raw).unwrap();
    let ones = vec![1; 1 << 20];
    for mib in 1..700 {
        file.write_all_at(&ones, mib << 20).unwrap();
    }
    let how = ["-O", "qcow2", "-c", "-o", "compression_type=zstd"];
    let path = converted(&raw, "bomb.qcow2", &how);
    assert!(fs::metadata(&path).unwrap().len() < 4 << 20, "that is no bomb");
    let error = bring(&path, Format::Qcow2).expect_err("it is taken");
    assert!(matches!(error, Error::Bomb { .. }), "{error}");
}

#[test]
fn machine_what_is_cut_short_empty_or_no_file_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let raw = disk(dir.path());
    for (name, how) in
        [("a.qcow2", &["-O", "qcow2"][..]), ("b.vmdk", &["-O", "vmdk", "-o", "subformat=streamOptimized"])]
    {
        let path = converted(&raw, name, how);
        let length = fs::metadata(&path).unwrap().len();
        for part in [0, 3, 100, 600, 70_000, length / 2] {
            File::options().write(true).open(&path).unwrap().set_len(length.min(part)).unwrap();
            refusal(&path, Format::of(&path).unwrap());
            converted(&raw, name, how);
        }
    }
    let pipe = dir.path().join("pipe.raw");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(refusal(&pipe, Format::Raw).contains("no plain file"));
    let none = dir.path().join("none.raw");
    File::create(&none).unwrap().set_len(2 << 20).unwrap();
    assert!(refusal(&none, Format::Raw).contains("no boot sector"));
    assert!(matches!(Format::of(Path::new("debian.img")), Err(Error::UnknownFormat { .. })));
}

#[test]
fn machine_a_full_disk_is_told_and_nothing_is_left_on_it() {
    let dir = tempfile::tempdir().unwrap();
    let raw = disk(dir.path());
    let small = Small::new(dir.path().join("small"), "1m");
    for path in [raw.clone(), converted(&raw, "a.qcow2", &["-O", "qcow2"])] {
        let format = Format::of(&path).unwrap();
        let error = source::raw(&path, format, &small.0.join("disk"), &silent).unwrap_err();
        assert!(matches!(error, Error::DiskFull { .. }), "{format:?}: {error}");
        assert!(error.to_string().contains("no space left"), "{error}");
        assert_eq!(fs::read_dir(&small.0).unwrap().count(), 0);
    }
}
