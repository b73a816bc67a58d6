//! What tests that resume real images share: cells, processes, staging.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]
#![allow(dead_code, reason = "each test uses what it needs")]

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Instant;
use vmatrix_model::manifest::{Manifest, PartKind};
use vmatrix_vma_build::build;
use vmatrix_vma_image::chunks::{self, Need};
use vmatrix_vma_image::machine::{self, Files, Run, Start};
use vmatrix_vma_image::qmp::Qmp;
use vmatrix_vma_image::{Store, inspect, memory, netns};
use vmatrix_vma_testing::{Cell, Process};

/// Where built images are kept from one run of the tests to the next.
pub fn kept() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("store")
}

/// Builds a recipe, or finds its image.
pub async fn built(recipe: &str) -> (Store, Manifest) {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join(recipe);
    let built = build::build(&recipe, &kept(), &build::Options::default()).await.unwrap();
    let manifest = inspect::inspect(&kept(), &built.name, &[]).unwrap().manifest;
    machine::check_host(&manifest, &machine::host().unwrap()).unwrap();
    (Store::read(kept()).unwrap(), manifest)
}

/// An image that was built beforehand (`make images`), or is built now.
pub async fn image(name: &str) -> (Store, Manifest) {
    if let Some(store) = std::env::var_os("VMATRIX_STORE").map(PathBuf::from)
        && let Ok(seen) = inspect::inspect(&store, name, &[])
    {
        return (Store::read(store).unwrap(), seen.manifest);
    }
    built(&format!("../../scenarios/guests/{name}.toml")).await
}

pub fn stage(manifest: &Manifest, store: &Store, dir: &Path) -> Files {
    let files = Files::within(dir);
    let key = inspect::owner_key(manifest, store).unwrap();
    memory::assemble(manifest, store, key.as_ref(), &files.memory).unwrap();
    let device = Need::blob(&manifest.device, manifest.seal.is_some());
    let device = chunks::open(&store.chunk(&device.digest).unwrap(), &device, key.as_ref()).unwrap();
    std::fs::write(&files.device, device).unwrap();
    for (kind, file) in [(PartKind::Disk, &files.disk), (PartKind::Base, &files.base), (PartKind::Data, &files.data)] {
        if let Some(part) = manifest.part(kind) {
            chunks::assemble(part, store, file).unwrap();
        }
    }
    files
}

pub async fn resume(manifest: &Manifest, files: &Files, cell: &Cell, dir: &Path, name: &str) -> (Process, PathBuf) {
    resume_as(Start::Clone, manifest, files, cell, dir, name).await
}

pub async fn resume_as(
    start: Start,
    manifest: &Manifest,
    files: &Files,
    cell: &Cell,
    dir: &Path,
    name: &str,
) -> (Process, PathBuf) {
    let tap = netns::open_tap(&cell.path(), "tap0").expect("needs /dev/net/tun");
    netns::ip_batch(Some(&cell.0), &["link set tap0 master br0 up".into()]).unwrap();
    let run = Run {
        name: name.into(),
        qmp: dir.join(format!("{name}.qmp")),
        guest_agent: dir.join(format!("{name}.agent")),
        tap_fd: tap.as_raw_fd(),
        console: None,
        start,
    };
    let mut command = machine::command(&machine::arguments(manifest, files, &run), &tap);
    let process = Process(command.env("TMPDIR", dir).spawn().unwrap());
    let mut qmp = Qmp::connect(&run.qmp).await.unwrap();
    let began = Instant::now();
    qmp.load_state(&files.device).await.unwrap();
    qmp.cont().await.unwrap();
    eprintln!("{name}: loaded in {:?}", began.elapsed());
    (process, run.guest_agent)
}
