//! Recipe ─▶ image.
//!
//! ```text
//! recipe ─▶ root (packages) ─▶ disk ┐
//!           kernel ─▶ initrd ───────┴▶ warm (boot, requests, suspend) ─▶ chunks ─▶ signed manifest
//! ```
//!
//! # Invariants
//! 1. Everything happens in scratch folders and a namespace that go when the build ends, however it ends.
//! 2. The manifest is put last: an image that has a name is whole.
//! 3. A build that fails takes its chunks out again.

mod cell;
mod kernel;
mod progress;
mod root;
mod tools;
mod warm;

use crate::chunks::{DISK_CHUNK, MEMORY_CHUNK, cut_noting};
use crate::error::{Error, Result, io};
use crate::machine::{self, Files, Host};
use crate::postgres::Server;
use crate::recipe::{self, BackendRecipe, Hashed, Recipe};
use crate::sign;
use crate::store::Store;
use cell::Cell;
use nix::sys::statvfs::statvfs;
use progress::Progress;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tools::Scratch;
use vmatrix_model::Digest;
use vmatrix_model::manifest::{BackendSpec, FORMAT, GuestSpec, MachineSpec, Manifest, Measured, Part, PartKind};

/// Every guest has this private address wherever it runs; its cell makes it unique (paper §4.1).
const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 10);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
const MAC: &str = "52:54:00:12:34:56";
/// What lies beside guest memory, MiB: device state and a console's output, some hundred KiB; the rest is for others.
const BESIDE_MEMORY_MIB: u64 = 64;
/// Rises when the builder makes another image of the same recipe.
const BUILDER: u32 = 1;
/// `init_on_free`: freed pages are zeros, which an image does not store. `panic`: a broken guest ends at once.
const APPEND: &str = "console=ttyS0 quiet panic=-1 init_on_free=1 random.trust_cpu=off net.ifnames=0";

/// What the guest agent beside this program was compiled from. The program itself differs from one
/// checkout to the next by the paths in it, and an image is good for all of them.
const AGENT_SOURCE: [&[u8]; 4] = [
    include_bytes!("../../guest/src/main.rs"),
    include_bytes!("../../guest/src/kernel.rs"),
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
    let (recipe, text_digest) = recipe::read(file)?;
    let store = Store::open(store)?;
    let agent = agent(options)?;
    let version = machine::qemu_version()?;
    let mut digest = Hashed::default();
    digest.add(&text_digest.0);
    match &options.guest_agent {
        Some(own) => digest.add(&fs::read(own).map_err(io("read the guest agent", own))?),
        None => AGENT_SOURCE.iter().for_each(|file| digest.add(file)),
    }
    digest.add(format!("{version} {BUILDER} {APPEND} {:?}", machine::devices(MAC)).as_bytes());
    let digest = digest.end();
    if !options.again
        && let Some((manifest, id)) = held(&store, &recipe.name, digest)?
    {
        let (stored, measured) = (manifest.stored(), manifest.measured);
        return Ok(Built { name: recipe.name, digest: id, cached: true, took: began.elapsed(), stored, measured });
    }
    tools::check()?;
    let job = Job { file: file.to_owned(), recipe, digest, agent, cache: cache(&store, options), store };
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
fn held(store: &Store, name: &str, recipe: Digest) -> Result<Option<(Manifest, Digest)>> {
    let Some(signed) = store.image(name)? else { return Ok(None) };
    let signer = sign::builder_public(store)?;
    // One that is not ours, or of another format, is simply built again.
    Ok(sign::verify(&signed, &[signer])
        .ok()
        .filter(|(m, _)| m.recipe == recipe)
        .filter(|(m, _)| m.parts.iter().flat_map(|p| p.chunks.iter().flatten()).all(|c| store.has(&c.digest))))
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

/// Memory that a guest writes belongs into memory. Where there is not enough of it (a container's /dev/shm
/// often has 64 MiB) the kernel would end QEMU in the middle of a boot, so a disk has to do.
fn memory_place(guest_mib: u64) -> PathBuf {
    let shm = Path::new("/dev/shm");
    let free = statvfs(shm).map_or(0, |s| s.blocks_available().saturating_mul(s.fragment_size()));
    if free >> 20 >= guest_mib + BESIDE_MEMORY_MIB { shm.to_owned() } else { std::env::temp_dir() }
}

/// One build on its way.
struct Job {
    file: PathBuf,
    recipe: Recipe,
    digest: Digest,
    agent: PathBuf,
    cache: PathBuf,
    store: Store,
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
        let tag = format!("{}{}-{}", tools::SCRATCH, self.recipe.name, std::process::id());
        let memory = memory_place(self.recipe.memory_mib);
        let disk = std::path::absolute(self.store.dir()).map_err(io("find", self.store.dir()))?;
        tools::sweep(&[&disk, &memory]);
        let places = Places { disk: Scratch::new(disk.join(&tag))?, memory: Scratch::new(memory.join(&tag))? };
        let scratch = places.disk.path().to_owned();
        let prepared = blocking(move || self.prepare(places, progress)).await?;
        prepared.map_err(|e| e.or_disk_full("build in", &scratch))?.suspend().await
    }

    /// Everything before the guest is powered on.
    fn prepare(self, places: Places, progress: Progress) -> Result<Prepared> {
        let host = machine::host()?;
        fs::create_dir_all(&self.cache).map_err(io("create", &self.cache))?;
        let guest = self.guest();
        let files = Files {
            memory: places.memory.path().join("memory"),
            device: places.memory.path().join("device"),
            disk: places.disk.path().join("disk"),
            kernel: places.disk.path().join("kernel"),
            initrd: places.disk.path().join("initrd"),
        };
        progress.step("kernel");
        let kernel = kernel::get(&self.cache)?;
        tools::copy(&kernel.image, &files.kernel)?;
        kernel::initrd(&kernel, &guest, &self.recipe.name, &files.initrd)?;
        progress.step(&format!("packages: {}", self.packages()));
        let root = places.disk.path().join("root");
        root::make(&self.file, &self.recipe, &root, &self.cache, &self.agent)?;
        progress.step("disk");
        root::disk(&root, &files.disk)?;
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
            devices: machine::devices(MAC),
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
        }
    }
}

/// The back end a guest is warmed against.
#[derive(Debug)]
struct Backend {
    // In this order: the server stops before its folder goes.
    server: Server,
    _dir: Scratch,
}

impl Backend {
    fn start(b: &BackendRecipe, root: &Path, cell: &Cell) -> Result<Backend> {
        let dir = Scratch::new(std::env::temp_dir().join(format!("{}-pg", cell.name())))?;
        let server = Server::start(Some(&cell.path()), dir.path(), b.address, b.port, None)?;
        server.trust_own_address(b.address)?;
        for line in &b.schema {
            let mut command = tools::inside(root, line);
            command.env("PGHOST", b.address.to_string()).env("PGPORT", b.port.to_string()).env("PGUSER", "postgres");
            cell.run(&format!("schema line {line:?}"), &mut command)?;
        }
        if !b.sql.is_empty() {
            server.sql(&b.database, &b.sql)?;
        }
        let password = b.password.replace('\'', "''");
        server.sql("postgres", &format!("ALTER ROLE {} LOGIN PASSWORD '{password}'", b.user))?;
        Ok(Backend { server, _dir: dir })
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
        let scratch = self.places.memory.path();
        let p = &self;
        let measured = warm::suspend(&p.job.recipe, &p.spec, &p.guest, &p.files, &p.cell, scratch, &p.progress).await?;
        blocking(move || self.keep(measured)).await?
    }

    /// Cuts, signs and puts the image.
    fn keep(self, measured: Measured) -> Result<(Manifest, Digest)> {
        self.progress.step("cut into chunks");
        let store = &self.job.store;
        // Until the manifest is there: nobody else's image can have come to need what is taken out again.
        let _alone = store.lock()?;
        let mut new = Vec::new();
        let put = self.put(measured, &mut new);
        if put.is_err() {
            new.iter().for_each(|digest| store.remove_chunk(digest));
        }
        put
    }

    fn put(&self, measured: Measured, new: &mut Vec<Digest>) -> Result<(Manifest, Digest)> {
        let store = &self.job.store;
        let mut cut = |file: &Path, kind, chunk| cut_noting(file, kind, chunk, store, new);
        let mut parts: Vec<Part> = vec![
            cut(&self.files.memory, PartKind::Memory, MEMORY_CHUNK)?,
            cut(&self.files.device, PartKind::Device, DISK_CHUNK)?,
            cut(&self.files.disk, PartKind::Disk, DISK_CHUNK)?,
            cut(&self.files.kernel, PartKind::Kernel, DISK_CHUNK)?,
            cut(&self.files.initrd, PartKind::Initrd, DISK_CHUNK)?,
        ];
        if let Some(backend) = &self.backend {
            let seed = self.places.disk.path().join("seed.sql");
            fs::write(&seed, backend.server.dump()?).map_err(io("write", &seed))?;
            parts.push(cut(&seed, PartKind::BackendSeed, DISK_CHUNK)?);
        }
        let manifest = Manifest {
            format: FORMAT,
            name: self.job.recipe.name.clone(),
            recipe: self.job.digest,
            machine: self.spec.clone(),
            guest: self.guest.clone(),
            parts,
            measured,
        };
        let signed = sign::sign(store, &manifest)?;
        store.put_image(&manifest.name, &signed)?;
        self.progress.done(&format!("{} stored", manifest.stored()));
        Ok((manifest, Digest::of(signed.manifest.as_bytes())))
    }
}

/// Runs what waits for programs and disks away from the runtime's own threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::Unhealthy(format!("a build step was cut off: {e}")))
}
