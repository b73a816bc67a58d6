//! A VM whose memory comes from the pager as it is touched.

use crate::facts::answers;
use crate::guest::folder;
use crate::world::{Backend, CLONE, TAP, World};
use std::os::unix::fs::PermissionsExt;
use vmatrix_vma_image::machine::Files;
use vmatrix_vma_libvirt::{Parts, Spawn, Tap};
use vmatrix_vma_pager::{Engine, shim};

/// Resumes a clone on an empty memory file, served from the image's.
pub async fn resume<B: Backend>(world: &World<'_, B>) {
    let (cell, folder) = (world.cell("paged"), folder());
    let files = Files { memory: folder.path().join("memory"), ..world.guest.files.clone() };
    let engine = Engine::record(&files.memory, &world.guest.files.memory, None).unwrap();
    // Where any user may read it, as an installed one is.
    let library = folder.path().join("shim.so");
    std::fs::copy(shim().unwrap(), &library).unwrap();
    std::fs::set_permissions(&library, std::fs::Permissions::from_mode(0o755)).unwrap();
    let environment = [("LD_PRELOAD", &library), ("VMATRIX_MEMORY", &files.memory)]
        .map(|(name, path)| (name.to_owned(), path.display().to_string()));
    let (machine, tap) = (&world.guest.machine, Tap { namespace: &cell.name, name: TAP });
    let parts = Parts::Whole(&files);
    let spawn = Spawn { name: "paged", machine, parts, start: CLONE, tap, environment: &environment };
    let vm = world.start(&spawn).await.unwrap();
    cell.plug();
    engine.adopt(vm.pid).await.unwrap();
    world.hypervisor().load_state(&vm, &world.guest.files.device).await.unwrap();
    world.hypervisor().cont(&vm).await.unwrap();
    answers(world, &cell).await;
    let touched = engine.recorded().await.unwrap().len();
    let total = usize::try_from(world.guest.machine.memory_mib << 8).unwrap();
    assert!((100..total / 4).contains(&touched), "{touched} of {total} pages were touched");
    world.hypervisor().quit("paged").await.unwrap();
}
