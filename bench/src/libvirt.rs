//! `virsh save` and `virsh restore` of the same guest, and the product's mechanism under libvirt, by a daemon of the
//! bench's own.

use crate::baseline::Scene;
use crate::client::{self, Pace};
use crate::report::Sample;
use anyhow::Context;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use vmatrix_lab::namespace::ip_batch;
use vmatrix_vma_image::machine::Start;
use vmatrix_vma_libvirt::daemon::Daemon;
use vmatrix_vma_libvirt::{Hypervisor, Libvirt as Driver, Parts, Spawn, Tap};

/// Name of the domain that is saved and restored.
const NAME: &str = "vmb-plain";
/// Name of the one whose memory is mapped.
const INSTANT: &str = "vmb-instant";
/// Its tap beside the bridge.
const TAP: &str = "tap1";
/// The guest boots and makes its data.
const BOOT_LIMIT: Duration = Duration::from_secs(600);

/// A guest that libvirt saved.
pub struct Libvirt {
    driver: Driver,
    file: PathBuf,
    // Last: its guests go with it.
    _daemon: Daemon,
}

impl Libvirt {
    /// Boots the guest under libvirt, waits until it serves, and saves it into one file in memory.
    ///
    /// # Errors
    /// libvirt is missing, or its own words.
    pub fn save(scene: &Scene<'_>) -> anyhow::Result<Libvirt> {
        let (bench, runtime) = (scene.bench, &scene.bench.runtime);
        let folder = bench.place.memory().join("lv");
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        for open in [bench.place.memory(), folder.as_path()] {
            std::fs::set_permissions(open, std::fs::Permissions::from_mode(0o711))
                .with_context(|| format!("cannot open {} to libvirt's QEMU", open.display()))?;
        }
        // Of the calling thread: its daemon is made where the bridge is not, which does not matter.
        let daemon = runtime.block_on(Daemon::start(&folder))?;
        let driver = runtime.block_on(Driver::connect(&daemon.uri(), &folder))?.with_logs(&daemon.logs());
        let saved = Libvirt { driver, file: folder.join("saved"), _daemon: daemon };
        bench.say("booting the guest under libvirt, to be saved");
        let spawn = Spawn {
            name: NAME,
            machine: &scene.image.manifest.machine,
            parts: Parts::Whole(scene.files),
            start: Start::Boot,
            tap: saved.tap(scene),
            environment: &[],
        };
        runtime.block_on(saved.driver.boot_plain(&spawn))?;
        saved.tie(scene)?;
        let request = scene.request(0)?;
        let inside = scene.target_site;
        client::until_answered(inside, (&request, Pace::Bare), Instant::now(), BOOT_LIMIT, &bench.stop)?;
        runtime.block_on(saved.driver.save_plain(NAME, &saved.file))?;
        Ok(saved)
    }

    /// Restores it, and ends it again.
    ///
    /// # Errors
    /// libvirt's own words, or no correct answer.
    pub fn restore(&self, scene: &Scene<'_>, run: u64) -> anyhow::Result<Sample> {
        let runtime = &scene.bench.runtime;
        let began = Instant::now();
        let mut load = None;
        let answered = scene.watch(&scene.request(run)?, began, || {
            let restored = self.driver.restore_plain(NAME, &self.file, self.tap(scene), || {
                load = Some(began.elapsed());
                // Said by the next step if it fails: the guest does not answer.
                let _ = self.tie(scene);
                Ok(())
            });
            Ok(runtime.block_on(restored)?)
        });
        let sample = answered.and_then(|answered| scene.after(answered, run, load, 0));
        runtime.block_on(self.driver.quit(NAME))?;
        sample
    }

    /// Starts a domain that maps the memory file, loads the device state beside it, and ends it again.
    ///
    /// # Errors
    /// libvirt's or QEMU's own words, or no correct answer.
    pub fn instant(&self, scene: &Scene<'_>, run: u64) -> anyhow::Result<Sample> {
        let runtime = &scene.bench.runtime;
        let spawn = Spawn {
            name: INSTANT,
            machine: &scene.image.manifest.machine,
            parts: Parts::Whole(scene.files),
            start: Start::Clone,
            tap: self.tap(scene),
            environment: &[],
        };
        let began = Instant::now();
        let mut load = None;
        let answered = scene.watch(&scene.request(run)?, began, || {
            let vm = runtime.block_on(self.driver.spawn(&spawn))?;
            self.tie(scene)?;
            let loading = Instant::now();
            runtime.block_on(self.driver.load_state(&vm, &scene.files.device))?;
            load = Some(loading.elapsed());
            Ok(runtime.block_on(self.driver.cont(&vm))?)
        });
        let sample = answered.and_then(|answered| scene.after(answered, run, load, 0));
        runtime.block_on(self.driver.quit(INSTANT))?;
        sample
    }

    fn tap<'a>(&self, scene: &'a Scene<'_>) -> Tap<'a> {
        Tap { namespace: scene.target_site.name(), name: TAP }
    }

    fn tie(&self, scene: &Scene<'_>) -> anyhow::Result<()> {
        let lines = format!("link set {TAP} master br0 txqueuelen 4\nlink set {TAP} up\n");
        ip_batch(Some(scene.target_site), &lines)
    }
}
