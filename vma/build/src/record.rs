//! Suspended VM ─▶ the pages it touches first when it is resumed, in order: its working set.
//!
//! ```text
//! memory, device state ─▶ a clone, resumed as any other (reseed, clock, health) ─▶ 60 requests ─▶ pages touched
//!        ▲                                                                                            │
//!        └── again from the fresh snapshot, with other requests, until little new comes; twice so ────┘
//!            that pages come slowly: the guest's timers are late then, and it runs other code
//! ```
//! A list belongs to one snapshot: another boot of the same guest puts the same things on other pages.

use crate::build::backend::Backend;
use crate::build::give_back::{Kinds, is_zero};
use crate::build::progress::Progress;
use crate::build::requests;
use crate::build::tools;
use crate::recipe::{self, Request};
use crate::workshop::{Cell, Process, Scratch, blocking, memory_place};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use std::collections::HashSet;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;
use vmatrix_model::Digest;
use vmatrix_model::manifest::{GuestSpec, MachineSpec, Manifest, PartKind, WorkingSet};
use vmatrix_vma_image::chunks::{self, Cutter, Need};
use vmatrix_vma_image::error::{Error, Result, io};
use vmatrix_vma_image::machine::{self, Files, Run, Start};
use vmatrix_vma_image::memory::{self, PAGE};
use vmatrix_vma_image::qmp::Qmp;
use vmatrix_vma_image::{Store, guest, health, inspect, sign};
use vmatrix_vma_pager::{Engine, Stall, preload};

/// Requests of one pass: a list of the first answer alone made the second one wait (315 ms instead of 50).
const REQUESTS: u32 = 60;
/// Most passes.
const PASSES: u32 = 5;
/// A pass with no more new pages than this is the last: each of them would cost a guest far away a round trip.
const NEW_MAX: u64 = 1;
/// Passes with stalls, behind the others.
const SLOW_PASSES: u32 = 2;
/// A stall: what a round trip and a pack take on a slow link.
const STALL: Duration = Duration::from_millis(100);
/// Stalls until the first answer: the guest agent has ten seconds.
const STALLS: usize = 50;
/// Between two passes the requests' numbers are this far apart.
const SKIP: u32 = 7;
/// A guest whose every first touch of a page is seen is slower than one that is left alone.
const HEALTH_LIMIT: Duration = Duration::from_secs(20);

/// What was seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Touched {
    /// Pages in order of first touch, zero ones too.
    pub order: Vec<u32>,
    /// Requests that were answered meanwhile.
    pub requests: u32,
    /// Each pass by itself.
    pub passes: Vec<Pass>,
}

/// One pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// Pages touched.
    pub pages: u64,
    /// Of these, until the first answer.
    pub first: u64,
    /// Of these, zero in the image: answered without the network.
    pub zero: u64,
    /// Pages that are not zero and that no pass before this one touched: in a resume with the list of the passes
    /// before, each would have had to be waited for. All of them in the first pass.
    pub outside: u64,
}

/// A suspended VM laid out to be resumed.
pub(crate) struct Suspended<'a> {
    pub name: &'a str,
    pub spec: &'a MachineSpec,
    pub guest: &'a GuestSpec,
    /// Memory and device state, and the disk.
    pub files: &'a Files,
    pub cell: &'a Cell,
    /// On tmpfs.
    pub scratch: &'a Path,
    /// What it is asked; its health if there is nothing.
    pub requests: &'a [Request],
    /// What its pages are in use for, where that is known.
    pub kinds: Option<&'a Kinds>,
}

impl Suspended<'_> {
    /// Resumes it several times and sees which pages it touches.
    ///
    /// # Errors
    /// It does not resume, or a request is not answered as it should be.
    pub async fn record(&self, progress: &Progress) -> Result<Touched> {
        if statfs(self.scratch).is_ok_and(|s| s.filesystem_type() != TMPFS_MAGIC) {
            tracing::warn!(
                image = self.name,
                place = %self.scratch.display(),
                "no working set is recorded, for this is not tmpfs: make room in /dev/shm and run `vmatrix image record`"
            );
            return Ok(Touched::default());
        }
        let memory = File::open(&self.files.memory).map_err(io("open", &self.files.memory))?;
        let mut touched = Touched::default();
        let mut known = HashSet::new();
        let (mut first_of_all, mut then) = (Vec::new(), Vec::new());
        let mut settled = false;
        for number in 0..PASSES + SLOW_PASSES {
            let first = touched.passes.first().map_or(0, |pass| pass.first as usize);
            let stall = (number >= PASSES).then_some(Stall { every: first.div_ceil(STALLS).max(1), time: STALL });
            if settled && stall.is_none() {
                continue;
            }
            let how = if stall.is_some() { " slowly" } else { "" };
            progress.step(&format!("record the working set: resume {}{how} and send {REQUESTS} requests", number + 1));
            let (pages, first) = match self.pass(number, stall).await {
                Ok(seen) => seen,
                // A list without them is as good, but for slow links.
                Err(e) if stall.is_some() => {
                    progress.done(&format!("resume {}{how} is left out: {e}", number + 1));
                    break;
                }
                Err(e) => return Err(e),
            };
            let zero = zero(&memory, &pages).map_err(io("read", &self.files.memory))?;
            let fresh: Vec<u32> = pages.iter().copied().filter(|p| known.insert(*p)).collect();
            let outside = fresh.iter().filter(|p| !zero.contains(p)).count() as u64;
            let pass = Pass { pages: pages.len() as u64, first, zero: zero.len() as u64, outside };
            progress.done(&format!("resume {}{how}: {pass}", number + 1));
            if let Some(kinds) = self.kinds {
                let full = fresh.iter().copied().filter(|p| !zero.contains(p));
                progress.done(&format!("new and not zero, in MiB: {}", kinds.table(full)));
            }
            touched.passes.push(pass);
            let (before, after) = pages.split_at_checked(first as usize).unwrap_or((&pages, &[]));
            first_of_all.extend_from_slice(before);
            then.extend_from_slice(after);
            touched.requests += REQUESTS;
            settled |= outside <= NEW_MAX;
        }
        // What any of the passes needed for its first answer comes before what only the others needed.
        let mut listed = HashSet::new();
        touched.order = first_of_all.into_iter().chain(then).filter(|page| listed.insert(*page)).collect();
        Ok(touched)
    }

    /// One resume from the fresh snapshot: the pages, and how many of them until the first answer.
    async fn pass(&self, number: u32, stall: Option<Stall>) -> Result<(Vec<u32>, u64)> {
        let here = Scratch::new(self.scratch.join(format!("record-{number}")))?;
        let files = Files { memory: here.path().join("memory"), ..self.files.clone() };
        let engine = Engine::record(&files.memory, &self.files.memory, stall).map_err(failed)?;
        let tap = self.cell.tap()?;
        let run = Run {
            name: format!("record-{}", self.name),
            qmp: here.path().join("qmp"),
            guest_agent: here.path().join("agent"),
            tap_fd: tap.as_raw_fd(),
            console: None,
            start: Start::Clone,
        };
        let mut arguments = machine::machine_arguments(self.spec, &files, &run);
        // A process that changes its user outlives a builder that is killed.
        if let Some(at) = arguments.iter().position(|a| a == "-run-with") {
            arguments.drain(at..(at + 2).min(arguments.len()));
        }
        let mut command = machine::command(&arguments, &tap);
        // What it writes to a disk goes there, and with it.
        command.env("TMPDIR", here.path());
        preload(&mut command, &files.memory, false).map_err(failed)?;
        let process = Process::start(command, here.path())?;
        drop(tap);
        let resumed = self.answer(&engine, &process, &run, number).await;
        let said = fs::read_to_string(here.path().join("stderr")).unwrap_or_default();
        // Before the engine: a guest whose faults nobody answers cannot end well.
        drop(process);
        resumed.map_err(|error| match error {
            error if said.trim().is_empty() => error,
            error => Error::Tool {
                what: format!("resuming {} to record its working set", self.name),
                status: error.to_string(),
                said: tools::reason(&said),
            },
        })
    }

    async fn answer(&self, engine: &Engine, process: &Process, run: &Run, number: u32) -> Result<(Vec<u32>, u64)> {
        engine.adopt(process.pid()).await.map_err(failed)?;
        let mut qmp = Qmp::connect(&run.qmp).await?;
        qmp.load_state(&self.files.device).await?;
        qmp.cont().await?;
        guest::awaken(&run.guest_agent).await?;
        health::ask(&self.cell.path(), self.guest.address, &self.guest.health, HEALTH_LIMIT).await?;
        let first = engine.recorded().await.map_err(failed)?.len() as u64;
        let health = [requests::of_health(&self.guest.health)];
        let asked = if self.requests.is_empty() { &health } else { self.requests };
        let list = requests::spread(asked, REQUESTS, number * SKIP);
        let list: Vec<(Request, u32)> = list.into_iter().map(|(request, n)| (request.clone(), n)).collect();
        let (to, netns) = (self.guest.address, self.cell.path());
        let send = move || list.iter().try_for_each(|(request, n)| requests::send(request, to, &netns, *n).map(drop));
        blocking(send).await??;
        Ok((engine.recorded().await.map_err(failed)?, first))
    }
}

fn failed(error: vmatrix_vma_pager::Error) -> Error {
    Error::Unhealthy(format!("recording the working set: {error}"))
}

/// Those of these pages that hold zeros.
fn zero(memory: &File, pages: &[u32]) -> std::io::Result<HashSet<u32>> {
    let mut bytes = [0; PAGE as usize];
    let mut zero = HashSet::new();
    for page in pages {
        memory.read_exact_at(&mut bytes, u64::from(*page) * PAGE)?;
        if is_zero(&bytes) {
            zero.insert(*page);
        }
    }
    Ok(zero)
}

impl std::fmt::Display for Pass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let share = self.zero * 100 / self.pages.max(1);
        let Pass { pages, first, outside, .. } = self;
        write!(f, "{first} pages touched until the first answer, {pages} in all, {share} % zero; {outside} are new")
    }
}

/// An image whose list was made anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// Of the new manifest: names the image.
    pub digest: Digest,
    pub before: WorkingSet,
    pub after: WorkingSet,
}

/// Records the working set of image `name` anew: with the requests of its recipe, if that is given, else by asking
/// for its health. The image gets a new manifest, and packs of the new list beside the old ones.
///
/// # Errors
/// There is no such image, it is not the store's own, it does not resume here, or its recipe's requests are
/// not answered.
pub async fn record(name: &str, store: &Path, recipe: Option<&Path>) -> Result<Recorded> {
    let requests = recipe.map(|file| recipe::read(file).map(|(r, _)| r.warm)).transpose()?.unwrap_or_default();
    let (at, image) = (store.to_owned(), name.to_owned());
    let laid = blocking(move || Laid::out(&at, &image)).await??;
    machine::check_host(&laid.manifest, &blocking(machine::host).await??)?;
    let progress = Progress::new(name);
    let (cell, backend) = {
        let (m, store, dir) = (laid.manifest.clone(), laid.store.clone(), laid.disk.path().to_owned());
        blocking(move || with_backend(&m, &store, &dir)).await??
    };
    let suspended = Suspended {
        name,
        spec: &laid.manifest.machine,
        guest: &laid.manifest.guest,
        files: &laid.files,
        cell: &cell,
        scratch: laid.memory.path(),
        requests: &requests,
        kinds: None,
    };
    let touched = suspended.record(&progress).await?;
    blocking(move || {
        drop((backend, cell));
        laid.rewrite(&touched.order, touched.requests)
    })
    .await?
}

/// An image of a store as files.
struct Laid {
    store: Store,
    manifest: Manifest,
    files: Files,
    // In memory, and on the store's disk.
    memory: Scratch,
    disk: Scratch,
}

impl Laid {
    fn out(store: &Path, name: &str) -> Result<Laid> {
        let manifest = inspect::inspect(store, name, &[])?.manifest;
        let store = Store::open(store)?;
        let key = inspect::owner_key(&manifest, &store)?;
        let absolute = std::path::absolute(store.dir()).map_err(io("find", store.dir()))?;
        let (memory, disk) = (memory_place(manifest.machine.memory_mib), absolute);
        let (memory, disk) = (Scratch::within(&memory, name)?, Scratch::within(&disk, name)?);
        let files = Files {
            memory: memory.path().join("memory"),
            device: memory.path().join("device"),
            ..Files::within(disk.path())
        };
        memory::assemble(&manifest, &store, key.as_ref(), &files.memory)?;
        let need = Need::blob(&manifest.device, manifest.seal.is_some());
        let device = chunks::open(&store.chunk(&need.digest)?, &need, key.as_ref())?;
        fs::write(&files.device, device).map_err(io("write", &files.device))?;
        let disks = [(PartKind::Disk, &files.disk), (PartKind::Base, &files.base), (PartKind::Data, &files.data)];
        for (part, file) in disks.into_iter().filter_map(|(kind, file)| Some((manifest.part(kind)?, file))) {
            chunks::assemble(part, &store, file)?;
        }
        Ok(Laid { store, manifest, files, memory, disk })
    }

    /// Cuts memory anew, in this order, and puts the image's new manifest.
    fn rewrite(mut self, order: &[u32], requests: u32) -> Result<Recorded> {
        let _alone = self.store.lock()?;
        let key = inspect::owner_key(&self.manifest, &self.store)?;
        let cutter = Cutter::new(&self.store, key.as_ref());
        let before = self.manifest.memory.working_set;
        let put = memory::cut(&cutter, &self.files.memory, order, requests, None).and_then(|memory| {
            self.manifest.memory = memory;
            let signed = sign::sign(&self.store, &self.manifest)?;
            self.store.publish(&self.manifest.name, &signed)?;
            Ok(Digest::of(signed.manifest.as_bytes()))
        });
        match put {
            Ok(digest) => Ok(Recorded { digest, before, after: self.manifest.memory.working_set }),
            Err(error) => {
                cutter.undo();
                Err(error)
            }
        }
    }
}

/// The cell of an image, with its back end as it was when the guest was warmed.
fn with_backend(m: &Manifest, store: &Store, scratch: &Path) -> Result<(Cell, Option<Backend>)> {
    let backend = m.guest.backends.first().zip(m.part(PartKind::BackendSeed));
    let cell = Cell::new(m.guest.gateway, backend.map(|(b, _)| b.address))?;
    let Some((backend, seed)) = backend else { return Ok((cell, None)) };
    let file = scratch.join("seed.sql");
    chunks::assemble(seed, store, &file)?;
    let sql = fs::read_to_string(&file).map_err(io("read", &file))?;
    let server = Backend::of(backend.address, backend.port, Some(&sql), &cell)?;
    Ok((cell, Some(server)))
}
