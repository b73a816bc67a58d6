//! The pager as a process: configuration ─▶ image, sources, engine, disks, control; until it is told to end.
//!
//! ```text
//! manifest ─▶ device state, first table ─▶ Engine (working set) ─▶ rest table ─▶ background ─▶ disks' chunks
//!             control socket, NBD socket: open from the first moment, what is asked too early waits
//! ```

use crate::config::{Config, DisksConfig};
use crate::control::{self, Answer, Request};
use crate::disk::{Disk, Life};
use crate::engine::{Engine, Fetch, Options, Status};
use crate::error::{Error, io, sys};
use crate::nbd;
use crate::pushed::Pushed;
use crate::socket;
use crate::state::{Class, Hydrate};
use anyhow::Context;
use futures_util::future::try_join_all;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep};
use vmatrix_model::Digest;
use vmatrix_model::manifest::{MANIFEST_MAX, Manifest, PartKind, SignedManifest};
use vmatrix_vma_image::Store;
use vmatrix_vma_image::chunks::{self, Need, decode_table};
use vmatrix_vma_image::machine;
use vmatrix_vma_image::memory::{First, Map, Rest, pages};
use vmatrix_vma_image::seal::OwnerKey;
use vmatrix_vma_image::sign;
use vmatrix_vma_transfer::{Class as Urgency, Sources};

/// Between looks for an image that comes later; a look costs microseconds.
const LOOK: Duration = Duration::from_millis(2);
/// Between attempts to fetch what nothing can go on without.
const AGAIN: Duration = Duration::from_millis(200);
/// Longest signed manifest: as JSON in JSON, with each quote escaped.
const SIGNED_MAX: u64 = 2 * MANIFEST_MAX as u64;
/// Between attempts to fetch what nobody waits for.
const AHEAD_AGAIN: Duration = Duration::from_secs(2);
/// Descriptors for several thousand guests.
const DESCRIPTORS: u64 = 65_536;
/// An adoption waits so long for the first table.
const ENGINE_WITHIN: Duration = Duration::from_secs(20);

/// What all tasks of the process share.
struct Pager {
    config: Config,
    manifest: Manifest,
    sources: Sources,
    key: Option<OwnerKey>,
    /// Somebody brings what is needed first.
    pushed: Option<Arc<Pushed>>,
    engine: Engines,
    progress: Mutex<Progress>,
    disks: Vec<Served>,
    end: Notify,
}

/// The engine, once the first table is here.
type Engines = Arc<watch::Sender<Option<Arc<Engine>>>>;

/// A disk, and where its table is put once that is here.
struct Served {
    disk: Arc<Disk>,
    table: watch::Sender<Table>,
}

/// How far the process is beside its engine.
#[derive(Default)]
struct Progress {
    /// Device state is in the local store.
    device: bool,
    /// Every chunk of the disks is in the local store, or there are no disks.
    disks: bool,
    /// What nothing goes on without, since when it is tried for, and why it does not come.
    trouble: Option<(Instant, String)>,
}

/// Serves one image until it is told to end, or gets SIGTERM or SIGINT.
///
/// # Errors
/// The configuration cannot be read, the image is not trusted, or another pager serves its files.
pub async fn run(path: &Path) -> anyhow::Result<()> {
    let mut config = Config::read(path)?;
    raise_descriptors();
    // Only whoever holds this replaces the sockets of an earlier process.
    let _alone = alone(&config.control)?;
    // From here on a QEMU that starts finds its disks: what it asks too early waits.
    let mut nbd = config.disks.as_ref().map(|at| socket::listen(&at.socket, 0o666)).transpose()?;
    let engine = Arc::new(watch::Sender::new(None));
    let mut sources = Sources::from_config(&config.sources, Store::open(&config.store)?)?;
    let mut disks = Vec::new();
    if let Some(before) = &config.before {
        let (before, _) = read_image(before, &config.signers)?;
        if let (Some(at), None) = (&config.disks, before.part(PartKind::Data)) {
            disks = open_disks(at, &config, &before, &fetch(&sources, None, None))?;
            serve_disks(nbd.take(), &disks, &engine);
            for served in &disks {
                // As far as it is here. If not, it is brought with the rest.
                if let Some(part) = before.part(served.disk.kind())
                    && let Ok(plain) = sources.local_store().chunk(&part.table.digest)
                    && let Ok(plain) = chunks::open(&plain, &Need::blob(&part.table, false), None)
                {
                    served.table.send_replace(Some(Arc::new(decode_table(part, &plain)?)));
                }
            }
        }
        tokio::select! {
            () = there(&config.image) => {}
            ended = asked_to_end() => return ended,
        }
        let now = Config::read(path)?;
        if now.sources.addresses != config.sources.addresses {
            sources = Sources::from_config(&now.sources, Store::open(&now.store)?)?;
        }
        config = now;
    }
    let (manifest, digest) = read_image(&config.image, &config.signers)?;
    let key = match (&config.key, manifest.seal) {
        (Some(path), _) => Some(OwnerKey::read(path)?),
        (None, Some(id)) => Some(sources.key(id).await?),
        (None, None) => None,
    };
    // While what a guest needs first is pushed to somebody else: a page that was not foreseen is asked for at once.
    let connecting = sources.clone();
    tokio::spawn(async move { connecting.connect().await });
    let pushed = Pushed::from_environment(sources.local_store()).map(Arc::new);
    if let (Some(at), true) = (&config.disks, disks.is_empty()) {
        disks = open_disks(at, &config, &manifest, &fetch(&sources, None, None))?;
        serve_disks(nbd.take(), &disks, &engine);
    }
    let listener = socket::listen(&config.control, 0o600)?;
    tracing::info!(image = manifest.name, digest = %digest, memory = %config.memory.display(), "pager begins");
    let pager = Arc::new(Pager {
        config,
        manifest,
        sources,
        key,
        pushed,
        engine,
        progress: Mutex::default(),
        disks,
        end: Notify::new(),
    });
    let asked = pager.clone();
    tokio::spawn(control::serve(listener, move |request| {
        let pager = asked.clone();
        async move { pager.answer(request).await }
    }));
    let device = pager.clone();
    tokio::spawn(async move { device.fetch_device().await });
    tokio::select! {
        result = pager.bring() => {
            result?;
            pager.end.notified().await;
        }
        () = pager.end.notified() => {}
        ended = asked_to_end() => ended?,
    }
    tracing::info!(image = pager.manifest.name, "pager ends");
    Ok(())
}

/// Reads a signed manifest, and believes it if it is signed by one of these.
fn read_image(path: &Path, signers: &[String]) -> anyhow::Result<(Manifest, Digest)> {
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(io("open", path))?;
    file.take(SIGNED_MAX).read_to_string(&mut text).map_err(io("read", path))?;
    let signed: SignedManifest =
        serde_json::from_str(&text).with_context(|| format!("{} is not a signed manifest", path.display()))?;
    Ok(sign::verify(&signed, signers)?)
}

/// Serves disks to guests whose memory is served, and to root's processes.
fn serve_disks(nbd: Option<UnixListener>, disks: &[Served], engine: &Engines) {
    let Some(nbd) = nbd else { return };
    let disks = disks.iter().map(|served| served.disk.clone()).collect();
    let engine = engine.clone();
    let allowed = move |pid| engine.borrow().as_ref().is_some_and(|engine: &Arc<Engine>| engine.is_adopted(pid));
    tokio::spawn(nbd::serve(nbd, disks, Arc::new(allowed)));
}

/// Waits until there is a file.
async fn there(path: &Path) {
    while !path.exists() {
        sleep(LOOK).await;
    }
}

/// Waits for SIGTERM or SIGINT.
async fn asked_to_end() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Opens the image's disks. Its data is written by a singleton, and by nobody else: clones of a guest write over it.
fn open_disks(at: &DisksConfig, config: &Config, manifest: &Manifest, fetch: &Fetch) -> anyhow::Result<Vec<Served>> {
    let mut disks = Vec::new();
    for kind in [PartKind::Disk, PartKind::Base, PartKind::Data] {
        let (Some(part), Some(export)) = (manifest.part(kind), machine::export(kind)) else { continue };
        let writes = config.shared && kind == PartKind::Data;
        let life = writes.then(|| Life::of(&config.memory)).transpose()?;
        let (table, chunks) = watch::channel(None);
        let disk = Disk::open(&at.file(export), part.clone(), life, chunks, fetch.clone())?;
        disks.push(Served { disk: Arc::new(disk), table });
    }
    if disks.is_empty() {
        anyhow::bail!("image {} has no disk to serve; leave `disks` out", manifest.name);
    }
    Ok(disks)
}

/// Takes the lock beside a control socket, as long as it is held.
fn alone(control: &Path) -> anyhow::Result<Flock<std::fs::File>> {
    let path = control.with_extension("lock");
    let file = std::fs::File::create(&path).map_err(io("make", &path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(
            |(_, e)| if e == Errno::EWOULDBLOCK { Error::Taken { path: path.clone() } } else { sys("lock", &path)(e) },
        )
        .map_err(anyhow::Error::from)
}

/// Each guest takes four descriptors, and the usual limit is 1024.
fn raise_descriptors() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most.min(DESCRIPTORS), most));
    if let Err(e) = raised {
        tracing::warn!(error = %e, "cannot raise the limit of descriptors; some 200 guests can be served");
    }
}

/// A fetch from the sources, the local store first; where somebody pushes, what is needed first is waited for.
fn fetch(sources: &Sources, key: Option<OwnerKey>, pushed: Option<Arc<Pushed>>) -> Fetch {
    let sources = sources.clone();
    Arc::new(move |need: Need, class| {
        let (sources, key) = (sources.clone(), key.clone());
        // A guest that runs while it is pushed to waits for what is under way: to ask for it again would send it twice.
        let pushed = pushed.clone().filter(|pushed| class == Class::Critical || pushed.brings(&need.digest));
        let class = match class {
            Class::Miss => Urgency::Miss,
            Class::Critical => Urgency::Critical,
            Class::Background => Urgency::Background,
        };
        Box::pin(async move {
            if let Some(pushed) = pushed {
                pushed.wait(&need.digest).await;
            }
            let got = sources.get(&need, class, key.as_ref()).await;
            got.map_err(|e| format!("{:#}", anyhow::Error::new(e)))
        })
    })
}

type Table = Option<Arc<Vec<Option<vmatrix_model::manifest::Chunk>>>>;

impl Pager {
    /// Brings everything, in order of need; returns when all is here.
    async fn bring(&self) -> anyhow::Result<()> {
        let pages = pages(&self.manifest)?;
        let first = self.blob(&Need::blob(&self.manifest.memory.first, false)).await;
        let map = Map::new(pages, First::decode(&first, pages)?)?;
        if let Some(pushed) = &self.pushed {
            pushed.expect(map.packs().iter().map(|pack| pack.digest));
        }
        let config = &self.config;
        let hydrate = Hydrate {
            working_set: config.working_set && !config.record,
            background: config.background && config.working_set && !config.record,
            background_mbit: config.background_mbit,
            background_from: std::process::id().wrapping_mul(0x9e37_79b9) >> 8,
            precise: config.record,
            // A singleton's list is made anew with each snapshot; where nothing comes ahead of need, all is missed.
            notes: config.working_set && config.background && !config.shared && !config.record,
        };
        let options = Options {
            hydrate,
            shared: config.shared,
            // A guest whose disks are here needs this process anyway.
            release: config.disks.is_none(),
            sealed: self.manifest.seal.is_some(),
            stuck_after: Duration::from_millis(config.stuck_ms),
            ..Options::default()
        };
        let engine = Arc::new(Engine::start(
            &config.memory,
            map,
            options,
            fetch(&self.sources, self.key.clone(), self.pushed.clone()),
        )?);
        self.engine.send_replace(Some(engine.clone()));
        let rest = self.blob(&Need::blob(&self.manifest.memory.rest, false)).await;
        engine.complete(Rest::decode(&rest, pages)?).await?;
        let needs = try_join_all(self.disks.iter().map(|served| self.bring_table(served))).await?;
        if config.background && config.working_set {
            self.bring_disks(&engine, needs.concat()).await;
        }
        self.progress().disks = true;
        Ok(())
    }

    /// Brings the table of a disk; what it names.
    async fn bring_table(&self, served: &Served) -> anyhow::Result<Vec<Need>> {
        let Some(part) = self.manifest.part(served.disk.kind()) else { return Ok(Vec::new()) };
        let chunks = decode_table(part, &self.blob(&Need::blob(&part.table, false)).await)?;
        let needs = chunks.iter().enumerate().filter_map(|(i, c)| Some(Need::part(part, i, c.as_ref()?))).collect();
        served.table.send_replace(Some(Arc::new(chunks)));
        Ok(needs)
    }

    /// Has every chunk of the disks in the local store, behind all of memory.
    async fn bring_disks(&self, engine: &Engine, needs: Vec<Need>) {
        while !engine.status().hydrated {
            sleep(AGAIN).await;
        }
        let local = self.sources.local_store().clone();
        let missing = move || {
            let missing = needs.into_iter().filter(|need| !local.has(&need.digest));
            missing.map(|need| (need.digest, need)).collect()
        };
        let missing = tokio::task::spawn_blocking(missing);
        let mut missing: BTreeMap<Digest, Need> = missing.await.unwrap_or_default();
        while !missing.is_empty() {
            let mut fill = self.sources.fill(missing.values().copied().collect(), None);
            while let Some(got) = fill.next().await {
                match got {
                    Ok(arrived) => drop(missing.remove(&arrived.need.digest)),
                    Err(e) => tracing::debug!(error = %e, "a chunk of a disk does not come ahead of need"),
                }
            }
            if !missing.is_empty() {
                sleep(AHEAD_AGAIN).await;
            }
        }
    }

    async fn fetch_device(&self) {
        self.blob(&Need::blob(&self.manifest.device, self.manifest.seal.is_some())).await;
        self.progress().device = true;
    }

    /// Gets what nothing goes on without; tries for ever, and says so after a while.
    async fn blob(&self, need: &Need) -> Vec<u8> {
        if let Some(pushed) = &self.pushed {
            pushed.wait(&need.digest).await;
        }
        loop {
            match self.sources.get(need, Urgency::Critical, self.key.as_ref().filter(|_| need.sealed)).await {
                Ok(plain) => {
                    self.progress().trouble = None;
                    return plain;
                }
                Err(e) => {
                    let why = format!("{:#}", anyhow::Error::new(e));
                    tracing::debug!(digest = %need.digest, why, "a blob did not come");
                    let mut progress = self.progress();
                    let since = progress.trouble.as_ref().map_or_else(Instant::now, |(since, _)| *since);
                    progress.trouble = Some((since, why));
                }
            }
            sleep(AGAIN).await;
        }
    }

    async fn answer(&self, request: Request) -> Answer {
        let result = match request {
            Request::Status => return Answer::Status(self.status()),
            Request::Quit => {
                self.end.notify_one();
                return Answer::Done;
            }
            Request::Written => self.written(),
            request => self.ask_engine(request).await,
        };
        result.unwrap_or_else(|e| Answer::Failed(format!("{e:#}")))
    }

    fn written(&self) -> anyhow::Result<Answer> {
        let written = self.disks.iter().find_map(|served| served.disk.written());
        Ok(Answer::Chunks(written.context("the image has no data that is written here")?))
    }

    async fn ask_engine(&self, request: Request) -> anyhow::Result<Answer> {
        let mut engines = self.engine.subscribe();
        let engine = tokio::time::timeout(ENGINE_WITHIN, engines.wait_for(Option::is_some)).await;
        let engine = engine.context("the first table of the image has not come yet")??.clone();
        let engine = engine.context("there is no engine")?;
        // Those that ask the kernel about every page take milliseconds.
        let ask = |ask: fn(&Engine, i32) -> crate::Result<Answer>, pid| {
            let engine = engine.clone();
            tokio::task::spawn_blocking(move || ask(&engine, pid))
        };
        Ok(match request {
            Request::Adopt { pid } => {
                engine.adopt(pid).await?;
                Answer::Done
            }
            Request::Recorded => Answer::Pages(engine.recorded().await?),
            Request::Missed => Answer::Pages(engine.missed().await?),
            Request::Pause { paused } => {
                engine.pause_background(paused)?;
                self.sources.pause_background(paused);
                Answer::Done
            }
            Request::Protect { pid } => ask(|engine, pid| engine.protect(pid).map(|()| Answer::Done), pid).await??,
            Request::Dirty { pid } => {
                let runs = |engine: &Engine, pid| {
                    let runs = engine.dirty(pid)?;
                    Ok(Answer::Runs(runs.into_iter().map(|run| (run.start, run.end)).collect()))
                };
                ask(runs, pid).await??
            }
            Request::Status | Request::Written | Request::Quit => Answer::Done,
        })
    }

    fn status(&self) -> Status {
        let mut status = self.engine.borrow().as_ref().map(|engine| engine.status()).unwrap_or_default();
        let progress = self.progress();
        status.critical &= progress.device;
        status.hydrated &= progress.device && progress.disks;
        let limit = Duration::from_millis(self.config.stuck_ms);
        let late = |since: &Duration| *since >= limit;
        let trouble = progress.trouble.as_ref().map(|(since, why)| (since.elapsed(), why.clone()));
        let disks = self.disks.iter().filter_map(|served| served.disk.trouble());
        let trouble = trouble.into_iter().chain(disks).find(|(since, _)| late(since)).map(|(_, why)| why);
        status.stuck = status.stuck.or(trouble);
        status.written_bytes = self.disks.iter().map(|served| served.disk.written_bytes()).sum();
        status.full = self.disks.iter().find_map(|served| served.disk.full());
        status
    }

    fn progress(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
