//! Recipe ─▶ image.
//!
//! ```text
//! base ─▶ disk, made once ─────────────────────────┐
//! recipe ─▶ root (packages) ─less the base─▶ disk ─┤
//!           kernel ─▶ initrd ──────────────────────┴▶ warm (boot, requests, suspend) ─▶ record ─▶ chunks ─▶ signed manifest
//! ```
//!
//! # Invariants
//! 1. Everything happens in scratch folders and a namespace that go when the build ends, however it ends.
//! 2. The manifest is put last: an image that has a name is whole.
//! 3. A build that fails takes its chunks out again.

pub(crate) mod backend;
mod base;
mod ext4;
pub(crate) mod give_back;
mod kernel;
pub(crate) mod progress;
pub(crate) mod requests;
mod root;
pub(crate) mod tools;
mod tree;
mod warm;

use crate::recipe::{self, Hashed, Recipe};
use crate::record::{Suspended, Touched};
use crate::workshop::{self, ADDRESS, Cell, GATEWAY, MAC, Scratch, blocking, memory_place};
use backend::Backend;
use base::Base;
use progress::Progress;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vmatrix_model::Digest;
use vmatrix_model::manifest::{BackendSpec, FORMAT, GuestSpec, MachineSpec, Manifest, Measured, PartKind};
use vmatrix_vma_image::Store;
use vmatrix_vma_image::chunks::{Cutter, DATA_CHUNK, DISK_CHUNK};
use vmatrix_vma_image::error::{Error, Result, io};
use vmatrix_vma_image::machine::{self, Files, Host};
use vmatrix_vma_image::memory;
use vmatrix_vma_image::seal::OwnerKey;
use vmatrix_vma_image::sign;
use vmatrix_vma_image::store::needs;
use warm::Boot;

/// Rises when the builder makes another image of the same recipe.
const BUILDER: u32 = 7;
/// `panic`: a broken guest ends at once. `init_on_alloc`: memory that is moved into the pool of free memory is not
/// touched for it, or a guest of 8 GiB would be all touched; programs get cleared pages anyway.
/// `transparent_hugepage`: a program that wants a page gets one, not the 512 round it.
const APPEND: &str =
    "console=ttyS0 quiet panic=-1 init_on_alloc=0 transparent_hugepage=never random.trust_cpu=off net.ifnames=0";
/// What the guest agent beside this program was compiled from. The program itself differs from one
/// checkout to the next by the paths in it, and an image is good for all of them.
const AGENT_SOURCE: [&[u8]; 7] = [
    include_bytes!("../../guest/src/main.rs"),
    include_bytes!("../../guest/src/children.rs"),
    include_bytes!("../../guest/src/identity.rs"),
    include_bytes!("../../guest/src/kernel.rs"),
    include_bytes!("../../guest/src/memory.rs"),
    include_bytes!("../../guest/src/order.rs"),
    include_bytes!("../../guest/src/port.rs"),
];

/// How to build.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The guest agent's program instead of `vmatrix-vma-guest` beside the running one.
    pub guest_agent: Option<PathBuf>,
    /// Where downloaded packages are kept; by default `<store>/cache`.
    pub cache: Option<PathBuf>,
    /// Builds even if the store has the image.
    pub again: bool,
    /// Names the image instead of the recipe.
    pub name: Option<String>,
    /// Guest memory instead of the recipe's, MiB.
    pub memory_mib: Option<u64>,
}

/// What was built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    pub name: String,
    /// Of the manifest's text: names the image.
    pub digest: Digest,
    /// Whether it was there already.
    pub cached: bool,
    pub took: Duration,
    /// Stored bytes, each chunk counted once.
    pub stored: vmatrix_model::Bytes,
    pub measured: Measured,
}

/// Builds the image of recipe file `file` into the store at `store`, or finds it there.
///
/// # Errors
/// The step that failed, with what, where and what to do next; nothing is left behind.
pub async fn build(file: &Path, store: &Path, options: &Options) -> Result<Built> {
    let began = Instant::now();
    let (mut recipe, text_digest) = recipe::read(file)?;
    recipe.change(file, options.name.as_deref(), options.memory_mib)?;
    let base = recipe.base.as_deref().map(|name| Base::read(file, name)).transpose()?;
    let store = Store::open(store)?;
    let key = workshop::owner_key(&store)?;
    let agent = agent(options)?;
    let version = machine::qemu_version()?;
    let mut digest = Hashed::default();
    digest.add(&text_digest.0);
    match &options.guest_agent {
        Some(own) => digest.add(&fs::read(own).map_err(io("read the guest agent", own))?),
        None => AGENT_SOURCE.iter().for_each(|file| digest.add(file)),
    }
    let rest = (&version, BUILDER, APPEND, machine::devices(MAC, &recipe.disks()), recipe.memory_mib);
    digest.add(format!("{rest:?}").as_bytes());
    if let Some(base) = &base {
        digest.add(&base.digest.0);
    }
    let digest = digest.end();
    if !options.again
        && let Some((manifest, id)) = held(&store, &recipe.name, digest, &key)?
    {
        let (stored, measured) = (manifest.stored(), manifest.measured);
        return Ok(Built { name: recipe.name, digest: id, cached: true, took: began.elapsed(), stored, measured });
    }
    tools::check()?;
    let job = Job { file: file.to_owned(), recipe, base, digest, agent, cache: cache(&store, options), store, key };
    let name = job.recipe.name.clone();
    let (manifest, id) = job.run().await?;
    Ok(Built {
        name,
        digest: id,
        cached: false,
        took: began.elapsed(),
        stored: manifest.stored(),
        measured: manifest.measured,
    })
}

/// An image of this very recipe, if the store has all of it.
fn held(store: &Store, name: &str, recipe: Digest, key: &OwnerKey) -> Result<Option<(Manifest, Digest)>> {
    let Some(signed) = store.image(name)? else { return Ok(None) };
    let signer = sign::builder_public(store)?;
    // One that is not ours, or of another format, or has lost a chunk, is simply built again.
    Ok(sign::verify(&signed, &[signer])
        .ok()
        .filter(|(m, _)| m.recipe == recipe && m.seal == Some(key.id()))
        .filter(|(m, _)| is_whole(m, store)))
}

fn is_whole(m: &Manifest, store: &Store) -> bool {
    needs(m, store).is_ok_and(|all| all.iter().all(|need| store.has(&need.digest)))
}

fn cache(store: &Store, options: &Options) -> PathBuf {
    let path = options.cache.clone().unwrap_or_else(|| store.dir().join("cache"));
    std::path::absolute(&path).unwrap_or(path)
}

fn agent(options: &Options) -> Result<PathBuf> {
    let beside = || {
        let program = std::env::current_exe().ok()?;
        // A test program lies one folder deeper than the others.
        program.ancestors().skip(1).take(2).map(|f| f.join("vmatrix-vma-guest")).find(|p| p.exists())
    };
    options.guest_agent.clone().or_else(beside).ok_or_else(|| Error::Missing {
        program: "the guest agent `vmatrix-vma-guest` (`cargo build -p vmatrix-vma-guest`, or give its path)"
            .to_owned(),
        package: "cargo",
    })
}

/// One build on its way.
struct Job {
    file: PathBuf,
    recipe: Recipe,
    base: Option<Base>,
    digest: Digest,
    agent: PathBuf,
    cache: PathBuf,
    store: Store,
    key: OwnerKey,
}

/// Where everything of one build lies.
struct Places {
    /// On the store's disk: root file system, disk, kernel.
    disk: Scratch,
    /// In memory where there is a tmpfs: guest memory, sockets (whose paths must be short).
    memory: Scratch,
}

impl Job {
    async fn run(self) -> Result<(Manifest, Digest)> {
        let progress = Progress::new(&self.recipe.name);
        let (name, memory) = (&self.recipe.name, memory_place(self.recipe.memory_mib));
        let disk = std::path::absolute(self.store.dir()).map_err(io("find", self.store.dir()))?;
        let places = Places { disk: Scratch::within(&disk, name)?, memory: Scratch::within(&memory, name)? };
        let scratch = places.disk.path().to_owned();
        let prepared = blocking(move || self.prepare(places, progress)).await?;
        prepared.map_err(|e| e.or_disk_full("build in", &scratch))?.suspend().await
    }

    /// Everything before the guest is powered on.
    fn prepare(self, places: Places, progress: Progress) -> Result<Prepared> {
        let host = machine::host()?;
        fs::create_dir_all(&self.cache).map_err(io("create", &self.cache))?;
        let guest = self.guest();
        let (large, small) = (places.disk.path(), places.memory.path());
        let mut files = Files { memory: small.join("memory"), device: small.join("device"), ..Files::within(large) };
        progress.step("kernel");
        let kernel = kernel::get(&self.cache)?;
        tools::copy(&kernel.image, &files.kernel)?;
        kernel::initrd(&kernel, guest.address, guest.gateway, &files.initrd)?;
        let base = match &self.base {
            Some(base) => {
                progress.step(&format!("base: {}", base.recipe.about));
                Some(base.get(&self.cache)?)
            }
            None => None,
        };
        progress.step(&format!("packages: {}", self.packages()));
        let root = large.join("root");
        root::make(&self.file, &self.recipe, self.base.as_ref(), &root, &self.cache, &self.agent)?;
        progress.step("disk");
        match base {
            Some(base) => {
                let layer = large.join("layer");
                fs::create_dir(&layer).map_err(io("create", &layer))?;
                tree::over(&root, &base.tree, &layer)?;
                ext4::of(&layer, &files.disk)?;
                files.base = base.disk;
            }
            None => ext4::of(&root, &files.disk)?,
        }
        if let Some(data) = &self.recipe.data {
            ext4::empty(data.mib, &files.data)?;
        }
        let cell = Cell::new(guest.gateway, self.recipe.backend.as_ref().map(|b| b.address))?;
        let backend = match &self.recipe.backend {
            Some(backend) => {
                progress.step("back end");
                Some(Backend::start(backend, &root, &cell)?)
            }
            None => None,
        };
        Ok(Prepared { spec: self.machine(&host), guest, files, cell, backend, job: self, places, progress })
    }

    fn packages(&self) -> String {
        let all: Vec<&str> = self
            .recipe
            .packages
            .iter()
            .chain(self.recipe.extracts.iter().map(|e| &e.package))
            .map(String::as_str)
            .collect();
        all.join(" ")
    }

    fn machine(&self, host: &Host) -> MachineSpec {
        MachineSpec {
            qemu_version: host.qemu_version.clone(),
            machine_type: machine::MACHINE_TYPE.to_owned(),
            cpu_model: machine::cpu_model(&host.accelerator).to_owned(),
            accelerator: host.accelerator.clone(),
            smp: 1,
            memory_mib: self.recipe.memory_mib,
            devices: machine::devices(MAC, &self.recipe.disks()),
            netdev: machine::NETDEV.to_owned(),
            append: APPEND.to_owned(),
        }
    }

    fn guest(&self) -> GuestSpec {
        GuestSpec {
            address: ADDRESS,
            gateway: GATEWAY,
            mac: MAC.to_owned(),
            ports: self.recipe.ports.clone(),
            health: self.recipe.health.clone(),
            backends: self
                .recipe
                .backend
                .iter()
                .map(|b| BackendSpec { name: b.name.clone(), address: b.address, port: b.port })
                .collect(),
            reseeds: true,
        }
    }
}

/// Ready to be powered on.
struct Prepared {
    // In this order: the server stops before its namespace goes, everything before the folders.
    backend: Option<Backend>,
    cell: Cell,
    spec: MachineSpec,
    guest: GuestSpec,
    files: Files,
    job: Job,
    places: Places,
    progress: Progress,
}

impl Prepared {
    async fn suspend(self) -> Result<(Manifest, Digest)> {
        let p = &self;
        let boot = Boot {
            recipe: &p.job.recipe,
            spec: &p.spec,
            guest: &p.guest,
            files: &p.files,
            cell: &p.cell,
            scratch: p.places.memory.path(),
            progress: &p.progress,
        };
        let (measured, kinds) = boot.suspend().await?;
        // The guest goes on from here wherever it is resumed, and so must what it is resumed with.
        let this = blocking(move || self.dump().map(|()| self)).await??;
        let suspended = Suspended {
            name: &this.job.recipe.name,
            spec: &this.spec,
            guest: &this.guest,
            files: &this.files,
            cell: &this.cell,
            scratch: this.places.memory.path(),
            requests: &this.job.recipe.warm,
            kinds: Some(&kinds),
        };
        let touched = suspended.record(&this.progress).await?;
        blocking(move || this.keep(measured, &touched)).await?
    }

    fn seed(&self) -> PathBuf {
        self.places.disk.path().join("seed.sql")
    }

    /// Writes down what the back end holds.
    fn dump(&self) -> Result<()> {
        let Some(backend) = &self.backend else { return Ok(()) };
        let seed = self.seed();
        fs::write(&seed, backend.server.dump()?).map_err(io("write", &seed))
    }

    /// Cuts, signs and puts the image.
    fn keep(self, measured: Measured, touched: &Touched) -> Result<(Manifest, Digest)> {
        self.progress.step("cut into chunks");
        let store = &self.job.store;
        // Until the manifest is there: nobody else's image can have come to need what is taken out again.
        let _alone = store.lock()?;
        let cutter = Cutter::new(store, Some(&self.job.key));
        let put = self.put(measured, touched, &cutter);
        if put.is_err() {
            cutter.undo();
        }
        put
    }

    fn put(&self, measured: Measured, touched: &Touched, cutter: &Cutter) -> Result<(Manifest, Digest)> {
        let store = &self.job.store;
        let device = fs::read(&self.files.device).map_err(io("read", &self.files.device))?;
        let part = |file: &Path, kind| cutter.part(file, kind, DISK_CHUNK);
        let (recipe, files) = (&self.job.recipe, &self.files);
        let memory = memory::cut(cutter, &self.files.memory, &touched.order, touched.requests, None)?;
        let mut parts = vec![
            part(&files.disk, PartKind::Disk)?,
            part(&files.kernel, PartKind::Kernel)?,
            part(&files.initrd, PartKind::Initrd)?,
        ];
        if recipe.base.is_some() {
            parts.push(part(&files.base, PartKind::Base)?);
        }
        if recipe.data.is_some() {
            parts.push(cutter.part(&files.data, PartKind::Data, DATA_CHUNK)?);
        }
        if self.backend.is_some() {
            parts.push(part(&self.seed(), PartKind::BackendSeed)?);
        }
        let manifest = Manifest {
            format: FORMAT,
            name: self.job.recipe.name.clone(),
            recipe: self.job.digest,
            parent: None,
            epoch: 0,
            seal: Some(self.job.key.id()),
            machine: self.spec.clone(),
            guest: self.guest.clone(),
            memory,
            device: cutter.blob(&device, true)?,
            parts,
            measured,
        };
        let signed = sign::sign(store, &manifest)?;
        store.publish(&manifest.name, &signed)?;
        self.progress.done(&format!("{} stored", manifest.stored()));
        Ok((manifest, Digest::of(signed.manifest.as_bytes())))
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_source_of_the_guest_agent_makes_another_image_when_it_changes() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest/src");
        let files = std::fs::read_dir(folder).unwrap().map(|e| std::fs::read(e.unwrap().path()).unwrap());
        let missing = files.filter(|text| !super::AGENT_SOURCE.contains(&text.as_slice())).count();
        assert_eq!(missing, 0, "list them in AGENT_SOURCE");
    }
}
