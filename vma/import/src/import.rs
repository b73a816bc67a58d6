//! A disk ─▶ a suspended image.
//!
//! ```text
//! file ─source─▶ raw disk ─┐
//! options ─▶ seed ─────────┴─boot─▶ memory, device state, disk ─cut, sign─▶ image in the store
//! ```
//!
//! # Invariants
//! 1. Everything happens in scratch folders and a namespace that go when the import ends, however it ends.
//! 2. The manifest is put last: an image that has a name is whole.
//! 3. An import that fails takes its chunks out again.

use crate::boot::{Guest, Slept};
use crate::cell::Cell;
use crate::error::{Error, Result, io};
use crate::progress::{Event, Observer};
use crate::seed;
use crate::source::{self, Disk, Format};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmatrix_model::manifest::{FORMAT, GuestSpec, Health, MachineSpec, Manifest, Measured, PartKind};
use vmatrix_model::{Bytes, Digest};
use vmatrix_vma_build::workshop::{ADDRESS, GATEWAY, MAC, Scratch, blocking, memory_place, owner_key};
use vmatrix_vma_image::chunks::{Cutter, DISK_CHUNK};
use vmatrix_vma_image::machine::{self as qemu, Files};
use vmatrix_vma_image::seal::OwnerKey;
use vmatrix_vma_image::{Error as ImageError, Store, memory, sign};

/// Guest memory where nobody says how much, MiB.
const MEMORY_MIB: u64 = 512;
/// Most paths a guest is warmed with, and most times each is asked.
const WARM_MAX: usize = 64;
const TIMES_MAX: u32 = 200;

/// How to import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Of the image: 1 to 30 of `a-z 0-9 -`, beginning with a letter.
    pub name: String,
    /// What the file is; by its name if not said.
    pub format: Option<Format>,
    /// MiB, 64 to 65536; else what an OVA says, else 512.
    pub memory_mib: Option<u64>,
    /// TCP ports it answers on; only these are let in.
    pub ports: Vec<u16>,
    /// How to tell that it serves.
    pub health: Health,
    /// Paths asked for on the health check's port to warm it, answered by the same status; its own is always asked.
    pub warm: Vec<String>,
    /// How often each is asked, 1 to 200.
    pub times: u32,
    /// The owner's cloud-init user-data, if there is any.
    pub user_data: Option<String>,
    /// The guest agent's program.
    pub guest_agent: PathBuf,
    /// How long it may take from power on to serving.
    pub boot_limit: Duration,
    /// How long after that our agent may take to answer: cloud-init installs it in its last stage, under TCG a minute
    /// later. A guest that is known to have none need not be waited for.
    pub agent_limit: Duration,
}

/// What was imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    pub name: String,
    /// Of the manifest's text: names the image.
    pub digest: Digest,
    pub took: Duration,
    /// Stored bytes, each chunk counted once.
    pub stored: Bytes,
    pub measured: Measured,
    /// Whether our agent answers in it; clones of one where it does not share random numbers and the time.
    pub reseeds: bool,
    /// What came in.
    pub disk: Disk,
}

/// Imports the disk in `path` into the store at `store`.
///
/// # Errors
/// The step that failed, with what, where and what to do next; nothing is left behind.
pub async fn import(path: &Path, options: &Options, store: &Path, observer: Arc<Observer>) -> Result<Built> {
    let began = Instant::now();
    options.check()?;
    let (path, options, store) = (path.to_owned(), options.clone(), store.to_owned());
    let heard = observer.clone();
    let prepared = blocking(move || Prepared::new(&path, options, &store, &*heard)).await??;
    let slept = prepared.sleep(&*observer).await?;
    let reseeds = slept.reseeds;
    let (manifest, digest, disk) = blocking(move || prepared.keep(slept, &*observer)).await??;
    Ok(Built {
        name: manifest.name.clone(),
        digest,
        took: began.elapsed(),
        stored: manifest.stored(),
        measured: manifest.measured,
        reseeds,
        disk,
    })
}

impl Options {
    fn check(&self) -> Result<()> {
        let bad = |problem: String| Err(Error::BadOptions(problem));
        if !vmatrix_vma_image::store::is_image_name(&self.name) {
            return Err(ImageError::BadName { name: self.name.chars().take(80).collect() }.into());
        }
        if self.ports.is_empty() || self.ports.contains(&0) {
            return bad("an image needs at least one port, 1 to 65535".to_owned());
        }
        if let Some(mib) = self.memory_mib.filter(|mib| !(64..=65_536).contains(mib)) {
            return bad(format!("{mib} MiB of memory are not 64 to 65536"));
        }
        if self.warm.len() > WARM_MAX || !(1..=TIMES_MAX).contains(&self.times) {
            return bad(format!("a guest is warmed with at most {WARM_MAX} paths, each asked 1 to {TIMES_MAX} times"));
        }
        let plain = |p: &String| p.starts_with('/') && p.len() <= 512 && p.bytes().all(|b| b.is_ascii_graphic());
        match self.warm.iter().chain([&self.health.path]).find(|p| !plain(p)) {
            Some(path) => bad(format!("{path:?} is no path of a request: it begins with / and has no space")),
            None => Ok(()),
        }
    }
}

/// Ready to be powered on.
struct Prepared {
    // In this order: the namespace goes before the folders.
    cell: Cell,
    options: Options,
    store: Store,
    spec: MachineSpec,
    guest: GuestSpec,
    files: Files,
    disk: Disk,
    /// Of what was brought, and how.
    recipe: Digest,
    /// On the store's disk: the raw disk, the seed.
    _large: Scratch,
    /// In memory where there is a tmpfs: guest memory, sockets (whose names must be short).
    small: Scratch,
}

impl Prepared {
    fn new(path: &Path, options: Options, store: &Path, observer: &Observer) -> Result<Prepared> {
        let store = Store::open(store)?;
        let host = qemu::host()?;
        let folder = std::path::absolute(store.dir()).map_err(io("find", store.dir()))?;
        let large = Scratch::within(&folder, &options.name)?;
        let format = options.format.map_or_else(|| Format::of(path), Ok)?;
        let disk = source::raw(path, format, &large.file("disk"), observer)?;
        if !disk.aside.is_empty() {
            observer(Event::Note(&format!("left aside: {}", disk.aside.join(", "))));
        }
        let memory_mib = options.memory_mib.or(disk.memory_mib).unwrap_or(MEMORY_MIB);
        if disk.cpus.is_some_and(|n| n > 1) {
            observer(Event::Note(
                "it gets one processor: a suspended VM is resumed on as many as it had, and one is everywhere",
            ));
        }
        let guest = GuestSpec {
            address: ADDRESS,
            gateway: GATEWAY,
            mac: MAC.to_owned(),
            ports: options.ports.clone(),
            health: options.health.clone(),
            backends: Vec::new(),
            reseeds: false,
        };
        let small = Scratch::within(&memory_place(memory_mib), &options.name)?;
        // QEMU is nobody when it opens the device state; there is nothing else it may open.
        fs::set_permissions(small.path(), Permissions::from_mode(0o711))
            .map_err(io("set the mode of", small.path()))?;
        let files = Files { memory: small.file("memory"), device: small.file("device"), ..Files::within(large.path()) };
        seed::write(&files.seed(), &options.name, &guest, options.user_data.as_deref(), &options.guest_agent)?;
        let spec = MachineSpec {
            qemu_version: host.qemu_version.clone(),
            machine_type: qemu::MACHINE_TYPE.to_owned(),
            cpu_model: qemu::cpu_model(&host.accelerator).to_owned(),
            accelerator: host.accelerator,
            smp: 1,
            memory_mib,
            devices: qemu::imported_devices(MAC),
            netdev: qemu::NETDEV.to_owned(),
            append: String::new(),
        };
        let source = fs::metadata(path).map_err(io("read", path))?;
        let recipe =
            Digest::of(format!("{} {:?} {:?} {options:?}", path.display(), source.len(), source.modified()).as_bytes());
        let cell = Cell::new(&guest)?;
        Ok(Prepared { cell, options, store, spec, guest, files, disk, recipe, _large: large, small })
    }

    async fn sleep(&self, observer: &Observer) -> Result<Slept> {
        let guest = Guest {
            name: &self.options.name,
            spec: &self.spec,
            guest: &self.guest,
            files: &self.files,
            scratch: self.small.path(),
            warm: &self.options.warm,
            times: self.options.times,
            boot_limit: self.options.boot_limit,
            agent_limit: self.options.agent_limit,
        };
        guest.sleep(&self.cell, observer).await
    }

    /// Cuts, signs and puts the image.
    fn keep(self, slept: Slept, observer: &Observer) -> Result<(Manifest, Digest, Disk)> {
        observer(Event::Step("cut into chunks"));
        let key = owner_key(&self.store)?;
        // Until the manifest is there: nobody else's image can have come to need what is taken out again.
        let _alone = self.store.lock()?;
        let cutter = Cutter::new(&self.store, Some(&key));
        match self.put(slept, &key, &cutter) {
            Ok((manifest, digest)) => Ok((manifest, digest, self.disk)),
            Err(error) => {
                cutter.undo();
                Err(error)
            }
        }
    }

    fn put(&self, slept: Slept, key: &OwnerKey, cutter: &Cutter) -> Result<(Manifest, Digest)> {
        let device = fs::read(&self.files.device).map_err(io("read", &self.files.device))?;
        let manifest = Manifest {
            format: FORMAT,
            name: self.options.name.clone(),
            recipe: self.recipe,
            parent: None,
            epoch: 0,
            seal: Some(key.id()),
            machine: self.spec.clone(),
            guest: GuestSpec { reseeds: slept.reseeds, ..self.guest.clone() },
            memory: memory::cut(cutter, &self.files.memory, &[], 0, None)?,
            device: cutter.blob(&device, true)?,
            parts: vec![cutter.part(&self.files.disk, PartKind::Disk, DISK_CHUNK)?],
            measured: slept.measured,
        };
        let signed = sign::sign(&self.store, &manifest)?;
        self.store.put_image(&manifest.name, &signed)?;
        Ok((manifest, Digest::of(signed.manifest.as_bytes())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options {
            name: "shop".to_owned(),
            format: None,
            memory_mib: None,
            ports: vec![80],
            health: Health { port: 80, path: "/".to_owned(), status: 200 },
            warm: vec![],
            times: 1,
            user_data: None,
            guest_agent: PathBuf::from("vmatrix-vma-guest"),
            boot_limit: Duration::from_secs(60),
            agent_limit: Duration::from_secs(60),
        }
    }
    fn refused(word: &str, change: impl FnOnce(&mut Options)) {
        let mut options = options();
        assert!(options.check().is_ok());
        change(&mut options);
        let error = options.check().expect_err(word).to_string();
        assert!(error.contains(word), "{error} does not say {word}");
    }

    #[test]
    fn what_no_image_can_be_is_refused_before_anything_begins() {
        refused("not the name of an image", |o| o.name = "../shop".into());
        refused("at least one port", |o| o.ports.clear());
        refused("at least one port", |o| o.ports.push(0));
        refused("MiB of memory", |o| o.memory_mib = Some(1 << 40));
        refused("no path of a request", |o| o.warm.push("/ HTTP/1.0\r\nX: y".into()));
        refused("no path of a request", |o| o.health.path = "health".into());
        refused("at most 64 paths", |o| o.warm = vec!["/".into(); 65]);
        refused("1 to 200 times", |o| o.times = 0);
    }
}
