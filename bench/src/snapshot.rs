//! A later snapshot of a guest: resumed where its writes stay, asked a thousand times, suspended again.
//!
//! ```text
//! image S0 ─▶ memory file (shared) + QEMU ─requests─▶ save ─▶ cut with S0 as parent ─▶ image S1 in S0's place
//! ```

use crate::baseline::Scene;
use crate::client;
use crate::guests::Image;
use crate::vm::{Begin, Ram, Vm};
use anyhow::Context;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use vmatrix_vma_build::snapshot::{Child, order, snapshot};
use vmatrix_vma_image::machine::Files;
use vmatrix_vma_image::memory::{self, PAGE};
use vmatrix_vma_image::{Store, guest, inspect};

const REQUEST_LIMIT: Duration = Duration::from_secs(60);
/// One request in ten is for text that nobody read before.
const COLD_EACH: u64 = 10;

/// Resumes `from`, sends `requests`, and suspends it again; answers with the files it is then.
///
/// # Errors
/// QEMU's own words, or a wrong answer.
pub fn run_on(scene: &Scene<'_>, from: &Files, requests: u64, folder: PathBuf) -> anyhow::Result<Files> {
    let (bench, runtime, image) = (scene.bench, &scene.bench.runtime, scene.image);
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let files = Files { memory: folder.join("memory"), device: folder.join("device"), ..from.clone() };
    let mut copy = Command::new("cp");
    crate::process::output(copy.arg("--sparse=always").arg(&from.memory).arg(&files.memory), "coreutils")?;
    let spec = &image.manifest.machine;
    let waiting = (Ram::Shared, Begin::Waiting);
    let mut vm = Vm::start(runtime, spec, &files, scene.target, bench.place.memory(), waiting)?;
    vm.load_state(runtime, &from.device)?;
    vm.cont(runtime)?;
    runtime.block_on(guest::awaken(vm.agent()))?;
    let inside = scene.target_site;
    let pace = client::Pace::Bare;
    client::until_answered(inside, (&scene.request(0)?, pace), Instant::now(), REQUEST_LIMIT, &bench.stop)?;
    for n in 1..requests {
        bench.stop.check()?;
        let cold = if n % COLD_EACH == 0 { image.kind.cold_request(image.manifest.guest.address, n) } else { None };
        let request = cold.map_or_else(|| scene.request(n), Ok)?;
        client::ask(inside, &request, REQUEST_LIMIT)?;
    }
    vm.save_state(runtime, &files.device)?;
    Ok(files)
}

/// Cuts and signs what a guest of `parent` has become, under the parent's name, which is this snapshot's from then
/// on. Pages that are byte for byte as before stay where the parent has them.
///
/// # Errors
/// The store is full or not the builder's own.
pub fn put(store: &Store, parent: &Image, (old, new): (&Files, &Files)) -> anyhow::Result<Image> {
    let key = inspect::owner_key(&parent.manifest, store)?;
    let map = memory::map(&parent.manifest, store)?;
    let open = |path: &Path| File::open(path).with_context(|| format!("cannot open {}", path.display()));
    let (before, after) = (open(&old.memory)?, open(&new.memory)?);
    let unchanged = |page: u32| {
        let (mut a, mut b) = ([0; PAGE as usize], [0; PAGE as usize]);
        let at = u64::from(page) * PAGE;
        before.read_exact_at(&mut a, at).is_ok() && after.read_exact_at(&mut b, at).is_ok() && a == b
    };
    let child = Child {
        name: &parent.manifest.name,
        memory: &new.memory,
        device: &new.device,
        parent: (&parent.manifest, parent.digest),
        map: &map,
        unchanged: &unchanged,
        order: &order(&map),
        key: key.as_ref(),
        data: None,
    };
    let (manifest, digest) = snapshot(store, &child)?;
    Ok(Image { kind: parent.kind, manifest, digest })
}
