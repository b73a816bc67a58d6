//! How long a resume takes here: instant under both hypervisors, and as libvirt alone does it.

use crate::facts::answers;
use crate::guest::folder;
use crate::world::{Backend, CLONE, Direct, TAP, Under, World};
use std::time::{Duration, Instant};
use vmatrix_vma_image::health;
use vmatrix_vma_image::machine::Start;
use vmatrix_vma_libvirt::{Parts, Spawn, Tap};

/// Each is done so often, in turn.
const ROUNDS: usize = 5;

/// Milliseconds from the order: until the guest runs, and until its first answer.
#[derive(Default)]
struct Times {
    spawned: Vec<f64>,
    running: Vec<f64>,
    answered: Vec<f64>,
}

impl Times {
    fn medians(&mut self) -> [f64; 3] {
        [&mut self.spawned, &mut self.running, &mut self.answered].map(|times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        })
    }
}

/// Resumes in turn, and returns the median milliseconds until the guest ran: direct, libvirt, `virsh restore`.
pub async fn resumes(direct: &World<'_, Direct>, under: &World<'_, Under>) -> [f64; 3] {
    let libvirt = under.backend.libvirt();
    let folder = folder();
    let file = folder.path().join("saved");
    let cell = under.cell("plain");
    let tap = Tap { namespace: &cell.name, name: TAP };
    let (machine, parts) = (&under.guest.machine, Parts::Whole(&under.guest.files));
    let spawn = Spawn { name: "plain", machine, parts, start: Start::Boot, tap, environment: &[] };
    libvirt.boot_plain(&spawn).await.unwrap();
    cell.plug();
    answers(under, &cell).await;
    let began = Instant::now();
    libvirt.save_plain("plain", &file).await.unwrap();
    eprintln!("virsh save: {:.0} ms, {} bytes", ms(began), std::fs::metadata(&file).unwrap().len());

    let (mut by_direct, mut by_libvirt, mut by_restore) = (Times::default(), Times::default(), Times::default());
    for _ in 0..ROUNDS {
        instant(direct, &mut by_direct).await;
        instant(under, &mut by_libvirt).await;
        let cell = under.cell("restored");
        let tap = Tap { namespace: &cell.name, name: TAP };
        let began = Instant::now();
        let mut waits = 0.0;
        let ready = || {
            waits = ms(began);
            cell.plug();
            Ok(())
        };
        libvirt.restore_plain("plain", &file, tap, ready).await.unwrap();
        by_restore.spawned.push(waits);
        by_restore.running.push(ms(began));
        answer(under, &cell.path()).await;
        by_restore.answered.push(ms(began));
        under.hypervisor().quit("plain").await.unwrap();
    }
    let all = [("direct", by_direct), ("libvirt", by_libvirt), ("virsh restore", by_restore)];
    all.map(|(what, mut times)| {
        let [spawned, running, answered] = times.medians();
        eprintln!(
            "{what:14} waits {spawned:6.0} ms, runs {running:6.0} ms, answers {answered:6.0} ms (medians of {ROUNDS})"
        );
        running
    })
}

async fn instant<B: Backend>(world: &World<'_, B>, times: &mut Times) {
    let cell = world.cell("instant");
    let began = Instant::now();
    let vm = world.spawn(&cell, "instant", &world.guest.files, CLONE).await.unwrap();
    times.spawned.push(ms(began));
    world.hypervisor().load_state(&vm, &world.guest.files.device).await.unwrap();
    world.hypervisor().cont(&vm).await.unwrap();
    times.running.push(ms(began));
    answer(world, &cell.path()).await;
    times.answered.push(ms(began));
    world.hypervisor().quit("instant").await.unwrap();
}

async fn answer<B: Backend>(world: &World<'_, B>, netns: &std::path::Path) {
    let spec = &world.guest.spec;
    while health::ask(netns, spec.address, &spec.health, Duration::from_secs(5)).await.is_err() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn ms(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1000.0
}
