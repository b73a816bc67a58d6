//! An image's disk goes out in every format, and comes in again the same; or nothing is left.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use vmatrix_model::manifest::{Manifest, PartKind};
use vmatrix_vma_image::chunks::{Cutter, DISK_CHUNK, table};
use vmatrix_vma_image::machine::imported_devices;
use vmatrix_vma_image::{Store, memory, sign};
use vmatrix_vma_import::{Error, Event, Format, export, source};
use vmatrix_vma_testing::{self as testing, Small};

const SIZE: u64 = 32 << 20;
const FORMATS: [Format; 4] = [Format::Raw, Format::Qcow2, Format::Vmdk, Format::Ova];

/// A store with one image, whose disk has something at both ends.
struct Image {
    dir: tempfile::TempDir,
    store: Store,
    disk: PathBuf,
    manifest: Manifest,
}

impl Image {
    fn new() -> Image {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        let (disk, ram) = (dir.path().join("disk"), dir.path().join("memory"));
        let file = File::create(&disk).unwrap();
        file.set_len(SIZE).unwrap();
        let mut sector = [0x90; 512];
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        file.write_all_at(&sector, 0).unwrap();
        let bytes: Vec<u8> = (0..1u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        file.write_all_at(&bytes, SIZE - (1 << 20)).unwrap();
        File::create(&ram).unwrap().set_len(64 << 20).unwrap();
        let cutter = Cutter::new(&store, None);
        let mut manifest = Manifest {
            memory: memory::cut(&cutter, &ram, &[], 0, None).unwrap(),
            device: cutter.blob(b"device state", false).unwrap(),
            parts: vec![cutter.part(&disk, PartKind::Disk, DISK_CHUNK).unwrap()],
            ..testing::manifest("shop", 64, &[])
        };
        manifest.machine.devices = imported_devices(testing::MAC);
        store.put_image("shop", &sign::sign(&store, &manifest).unwrap()).unwrap();
        Image { dir, store, disk, manifest }
    }
    fn trusted(&self) -> [String; 1] {
        [sign::public(&self.store).unwrap()]
    }
    fn out(&self, folder: &Path, format: Format) -> Result<PathBuf, Error> {
        let to = folder.join(format!("out-{format:?}"));
        export("shop", &self.store, &[], format, &to, &silent).map(|_| to)
    }
}

fn silent(_: Event<'_>) {}

#[test]
fn machine_a_disk_comes_back_the_same_from_every_format_it_went_out_in() {
    let image = Image::new();
    let heard = Arc::new(Mutex::new((Vec::new(), String::new())));
    let to = heard.clone();
    let observer = move |event: Event<'_>| match event {
        Event::Done { done, total } => to.lock().unwrap().0.push((done.0, total.0)),
        Event::Note(note) => to.lock().unwrap().1.push_str(note),
        Event::Step(_) => {}
    };
    for format in FORMATS {
        let (out, back) = (image.dir.path().join("out"), image.dir.path().join("back"));
        let exported = export("shop", &image.store, &image.trusted(), format, &out, &observer).unwrap();
        let meta = fs::metadata(&out).unwrap();
        assert_eq!((exported.disk.0, exported.file.0), (SIZE, meta.len()));
        assert_eq!(meta.mode() & 0o777, 0o600, "others may read a guest's disk");
        let came = source::raw(&out, format, &back, &observer).unwrap();
        assert!(fs::read(&back).unwrap() == fs::read(&image.disk).unwrap(), "another disk comes back from {format:?}");
        if format == Format::Ova {
            assert_eq!((came.name.as_deref(), came.memory_mib, came.cpus), (Some("shop"), Some(64), Some(1)));
        }
        fs::remove_file(out).unwrap();
        fs::remove_file(back).unwrap();
    }
    let heard = heard.lock().unwrap();
    assert!(heard.0.iter().all(|(done, total)| done <= total) && heard.1.contains("memory and device state stay"));
    let left: Vec<_> = fs::read_dir(image.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "something in between is left: {left:?}");
}

#[test]
fn machine_an_ova_is_read_by_tar_and_its_digests_by_sha256sum() {
    let image = Image::new();
    let ova = image.out(image.dir.path(), Format::Ova).unwrap();
    let unpacked = Command::new("tar").arg("-xf").arg(&ova).current_dir(image.dir.path()).status();
    assert!(unpacked.expect("tar is missing").success());
    let list = fs::read_to_string(image.dir.path().join("shop.mf")).unwrap();
    let mut checked = 0;
    for line in list.lines() {
        let (name, digest) = line.trim_start_matches("SHA256(").split_once(")= ").unwrap();
        let output = Command::new("sha256sum").arg(image.dir.path().join(name)).output().expect("sha256sum is missing");
        assert!(String::from_utf8_lossy(&output.stdout).starts_with(digest), "{line}");
        checked += 1;
    }
    assert_eq!(checked, 2);
}

#[test]
fn machine_what_cannot_go_out_whole_leaves_nothing() {
    let image = Image::new();
    let folder = image.dir.path().join("folder");
    fs::create_dir(&folder).unwrap();
    let stranger = ["00".repeat(32)];
    let error = export("shop", &image.store, &stranger, Format::Raw, &folder.join("x"), &silent).unwrap_err();
    assert!(error.to_string().contains("not trusted"), "{error}");
    let error = export("none", &image.store, &stranger, Format::Raw, &folder.join("x"), &silent).unwrap_err();
    assert!(error.to_string().contains("no image"), "{error}");

    fs::write(folder.join("out-Raw"), "precious").unwrap();
    image.out(&folder, Format::Raw).unwrap_err();
    assert_eq!(fs::read(folder.join("out-Raw")).unwrap(), b"precious", "a file of somebody else is written over");
    fs::remove_file(folder.join("out-Raw")).unwrap();

    let chunks = table(image.manifest.part(PartKind::Disk).unwrap(), &image.store).unwrap();
    let last = chunks.iter().flatten().last().unwrap();
    let mut bytes = image.store.chunk(&last.digest).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    image.store.replace_chunk(&last.digest, &bytes).unwrap();
    for format in FORMATS {
        let error = image.out(&folder, format).unwrap_err();
        assert!(error.to_string().contains(&last.digest.to_string()), "{format:?}: {error}");
    }
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
}

#[test]
fn machine_a_disk_that_fills_up_under_an_export_is_told_and_left_empty() {
    let image = Image::new();
    let small = Small::new(image.dir.path().join("small"), "1500k");
    let ballast = small.0.join("ballast");
    fs::write(&ballast, vec![1; 300 << 10]).unwrap();
    for format in FORMATS {
        let error = image.out(&small.0, format).unwrap_err();
        assert!(matches!(error, Error::DiskFull { .. }), "{format:?}: {error}");
        assert_eq!(fs::read_dir(&small.0).unwrap().count(), 1);
    }
}
