//! A later snapshot of a guest: resumed where its writes stay, asked a thousand times, suspended again.
//!
//! ```text
//! image S0 ─▶ memory file (shared) + QEMU ─requests─▶ save ─▶ cut with S0 as parent ─▶ image S1 in the store
//! ```

use crate::Bench;
use crate::baseline::Scene;
use crate::client;
use crate::guests::{Image, Temporary};
use crate::vm::{Begin, Ram, Vm};
use anyhow::Context;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use vmatrix_model::manifest::Manifest;
use vmatrix_vma_image::machine::Files;
use vmatrix_vma_image::memory::{self, PAGE, Parent};
use vmatrix_vma_image::{chunks, guest, inspect};

const REQUEST_LIMIT: Duration = Duration::from_secs(60);
/// One request in ten is for text that nobody read before.
const COLD_EACH: u64 = 10;

/// A later snapshot, in the store and as files.
pub struct Later {
    pub image: Temporary,
    pub files: Files,
}

/// Resumes `from`, sends `requests`, suspends it again under `name`, and puts that into the store.
///
/// # Errors
/// QEMU's own words, a wrong answer, or no room.
pub fn take(scene: &Scene<'_>, from: &Files, name: &str, requests: u64, folder: PathBuf) -> anyhow::Result<Later> {
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
    drop(vm);
    Ok(Later { image: put(bench, image, (from, &files), name)?, files })
}

/// Cuts and signs it; pages that are byte for byte as before stay where the parent has them.
fn put(bench: &Bench, parent: &Image, (old, new): (&Files, &Files), name: &str) -> anyhow::Result<Temporary> {
    let store = &bench.store;
    let key = inspect::owner_key(&parent.manifest, store)?;
    let map = memory::map(&parent.manifest, store)?;
    let order: Vec<u32> =
        map.packs().iter().take(map.working_set()).flat_map(|p| p.pages().map(|(_, page)| page)).collect();
    let open = |path: &Path| File::open(path).with_context(|| format!("cannot open {}", path.display()));
    let (before, after) = (open(&old.memory)?, open(&new.memory)?);
    let unchanged = |page: u32| {
        let (mut a, mut b) = ([0; PAGE as usize], [0; PAGE as usize]);
        let at = u64::from(page) * PAGE;
        before.read_exact_at(&mut a, at).is_ok() && after.read_exact_at(&mut b, at).is_ok() && a == b
    };
    let cutter = chunks::Cutter::new(store, key.as_ref());
    let from = Parent { map: &map, unchanged: &unchanged };
    let recorded = parent.manifest.memory.working_set.requests;
    let memory = memory::cut(&cutter, &new.memory, &order, recorded, Some(&from))?;
    let state = std::fs::read(&new.device).with_context(|| format!("cannot read {}", new.device.display()))?;
    let manifest = Manifest {
        name: name.to_owned(),
        parent: Some(parent.digest),
        epoch: parent.manifest.epoch + 1,
        memory,
        device: cutter.blob(&state, key.is_some())?,
        ..parent.manifest.clone()
    };
    Temporary::put(store, parent.kind, manifest)
}
