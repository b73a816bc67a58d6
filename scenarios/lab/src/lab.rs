//! A lab that is up: namespaces, WAN, databases, daemons and the door to the dashboard.
//!
//! ```text
//! up: place ─▶ namespaces ─▶ WAN ─▶ databases ─▶ daemons      (a failure takes all down)
//! down: daemons ─▶ databases ─▶ whatever process is left ─▶ namespaces ─▶ folder
//! ```

use crate::daemons::{Daemons, Program};
use crate::forward::Forwarder;
use crate::layout::{self, CPA_PORT, Place};
use crate::namespace::{Namespace, ip_batch};
use crate::outcome::NotInTime;
use crate::place::{self, LabState};
use crate::{logs, needs, wan::WanConfig};
use anyhow::{Context, bail};
use nix::sys::signal::Signal;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};
use vmatrix_model::ServiceId;
use vmatrix_model::fleet::Fleet;
use vmatrix_model::manifest::PartKind;
use vmatrix_replay::scenario::Scenario;
use vmatrix_vma_build::postgres::Server;
use vmatrix_vma_image::inspect::inspect;
use vmatrix_vma_image::{Store, chunks, sign};

/// The WAN opens its ports in milliseconds; a loaded machine takes longer.
const WAN_PATIENCE: Duration = Duration::from_secs(20);
const WAN: &str = "wan";

/// What people are told while a lab works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// A step begins, or something worth knowing happened.
    Step(String),
    /// Where the dashboard is.
    Dashboard(String),
    /// Stored bytes of images at the networks, of those that shall be.
    Staging { present: u64, total: u64 },
    /// Second of the play.
    Playing { second: u32, length_s: u32 },
}

/// How a scenario is played.
#[derive(Clone)]
pub struct PlayOptions {
    /// The image store.
    pub store: PathBuf,
    /// The program whose subcommands are the daemons; this one if none.
    pub binary: Option<PathBuf>,
    /// Leave the lab up after the play, until SIGINT or SIGTERM.
    pub keep: bool,
    /// Capture the WAN and look for the canary.
    pub capture: bool,
    /// Where the dashboard shall be, on 127.0.0.1; a free port if that is taken.
    pub port: u16,
    /// Called with everything people may want to see, from any thread.
    pub tell: Arc<dyn Fn(Told) + Send + Sync>,
}

impl PlayOptions {
    /// Plays with images of `store`, captured, the dashboard at port 8440, telling nobody.
    pub fn with_store(store: &Path) -> PlayOptions {
        PlayOptions {
            store: store.to_owned(),
            binary: None,
            keep: false,
            capture: true,
            port: CPA_PORT,
            tell: Arc::new(|_| {}),
        }
    }

    pub(crate) fn step(&self, text: impl Into<String>) {
        let text = text.into();
        tracing::info!("{text}");
        (self.tell)(Told::Step(text));
    }
}

/// A lab that is up.
pub struct Lab {
    /// Its id and folder.
    pub place: Place,
    /// Everything that runs, the WAN emulator too.
    pub daemons: Daemons,
    /// The fleet token.
    pub token: String,
    /// Where the CPA and its page are reached from this machine.
    pub dashboard: SocketAddr,
    /// Ports that the guests themselves listen on: the declared ones and that of the health check.
    pub listening: BTreeMap<ServiceId, BTreeSet<u16>>,
    databases: Vec<Server>,
    door: Option<Forwarder>,
    gone: bool,
}

impl Lab {
    /// Brings everything up, or nothing. `going` is asked between the steps and ends it by an error.
    ///
    /// # Errors
    /// What is missing, or which step failed.
    pub fn up(
        scenario: &Scenario,
        options: &PlayOptions,
        going: &dyn Fn() -> anyhow::Result<()>,
    ) -> anyhow::Result<Lab> {
        let fleet = &scenario.fleet;
        needs::check_for(fleet)?;
        for id in place::dead() {
            options.step(format!("lab {id} was not ended properly; `vmatrix lab down {id}` removes what it left"));
        }
        let store = Store::open(&options.store)?;
        let seeds = seeds(fleet, &store)?;
        let listening = listening(fleet, &store)?;
        let signer = sign::builder_public(&store)?;
        let binary = options
            .binary
            .clone()
            .map_or_else(std::env::current_exe, Ok)
            .context("cannot tell which program this is")?;

        let place = place::make(&options.store)?;
        let token = random_token()?;
        let own = std::process::id().cast_signed();
        let state = |dashboard: String| LabState {
            id: place.id.clone(),
            pid: own,
            pid_began: place::began(own).unwrap_or(0),
            folder: place.folder.clone(),
            scenario: scenario.name.clone(),
            dashboard,
            token_file: place.token_file(),
        };
        let daemons = state(String::new()).write().and_then(|()| Daemons::begin());
        let daemons = match daemons {
            Ok(daemons) => daemons,
            Err(e) => return Err(e.context(format!("{:?}", place::remove(&place.id)))),
        };
        let no_door = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let mut lab = Lab {
            place: place.clone(),
            daemons,
            token,
            dashboard: no_door,
            listening,
            databases: Vec::new(),
            door: None,
            gone: false,
        };
        let built = lab
            .build(scenario, options, &binary, &signer, &seeds, going)
            .and_then(|()| state(format!("http://{}/", lab.dashboard)).write());
        match built {
            Ok(()) => Ok(lab),
            Err(error) => {
                let error = if going().is_ok() { lab.explained(error) } else { error };
                match lab.down() {
                    Ok(()) => Err(error),
                    Err(also) => Err(error.context(format!("{also:#}"))),
                }
            }
        }
    }

    fn build(
        &mut self,
        scenario: &Scenario,
        options: &PlayOptions,
        binary: &Path,
        signer: &str,
        seeds: &BTreeMap<SocketAddrV4, Option<String>>,
        going: &dyn Fn() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let fleet = &scenario.fleet;
        let place = self.place.clone();
        let specs = layout::daemons(fleet, &place, &[signer.to_owned()])?;
        layout::write(fleet, &place, &specs, &self.token)?;
        std::fs::set_permissions(place.token_file(), std::os::unix::fs::PermissionsExt::from_mode(0o600))?;

        let sites = layout::sites(fleet, &place);
        options.step(format!("lab {}: {} namespaces", place.id, sites.len()));
        for site in &sites {
            going()?;
            let namespace = Namespace::named(&site.namespace);
            namespace.create()?;
            ip_batch(Some(&namespace), &site.lines)?;
        }
        self.start_wan(&layout::wan(scenario, &place, options.capture), binary)?;
        going()?;

        let origin = Namespace::named(&place.namespace(fleet.origin.name.as_str()));
        let databases = place.databases();
        if !seeds.is_empty() {
            options.step(format!("{} PostgreSQL at the origin", seeds.len()));
            place::give_to_postgres(&databases)?;
        }
        for (number, (address, seed)) in seeds.iter().enumerate() {
            let data = databases.join(number.to_string());
            self.databases.push(Server::start(
                Some(&origin.path()),
                &data,
                *address.ip(),
                address.port(),
                seed.as_deref(),
            )?);
            going()?;
        }

        let door = Forwarder::open(options.port, &origin, layout::PAGE)?;
        self.dashboard = door.address();
        self.door = Some(door);
        if self.dashboard.port() != options.port {
            options.step(format!("port {} is taken; the dashboard is at port {}", options.port, self.dashboard.port()));
        }

        options.step(format!("{} daemons", specs.len()));
        for spec in &specs {
            self.daemons.keep(Program {
                name: spec.name.clone(),
                namespace: Some(Namespace::named(&spec.namespace)),
                program: binary.to_owned(),
                arguments: vec![spec.verb.into(), "--config".into(), spec.config_file().display().to_string()],
                log: spec.folder.join("log"),
            })?;
        }
        (options.tell)(Told::Dashboard(format!("http://{}/", self.dashboard)));
        Ok(())
    }

    fn start_wan(&self, config: &WanConfig, binary: &Path) -> anyhow::Result<()> {
        let file = self.place.wan_file();
        std::fs::write(&file, toml::to_string(config).context("cannot write the WAN as TOML")?)
            .with_context(|| format!("cannot write {}", file.display()))?;
        let own = [WAN.to_owned(), "--config".to_owned(), file.display().to_string()];
        // A link's delay is as exact as the emulator's turn on a core: it goes before everyone else.
        let realtime = ["--fifo", "10"].map(str::to_owned);
        let allowed = Command::new("chrt")
            .args(&realtime)
            .arg("true")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|s| s.success());
        let (program, arguments) = if allowed {
            (PathBuf::from("chrt"), realtime.into_iter().chain([binary.display().to_string()]).chain(own).collect())
        } else {
            (binary.to_owned(), own.to_vec())
        };
        let program =
            Program { name: WAN.into(), namespace: None, program, arguments, log: self.place.folder.join("wan.log") };
        self.daemons.keep(program.clone())?;
        let deadline = Instant::now() + WAN_PATIENCE;
        let (_never, tick) = channel::<()>();
        while !config.stats_file.exists() {
            if Instant::now() > deadline {
                let what = format!("the WAN emulator: {}", program.last_words());
                return Err(NotInTime { what, patience: WAN_PATIENCE }.into());
            }
            let _ = tick.recv_timeout(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Begins the capture of the WAN.
    pub fn capture(&self) -> bool {
        self.daemons.signal(WAN, Signal::SIGUSR1)
    }

    /// Adds to `error` the last words of daemons that do not run, and where all their logs are kept.
    pub fn explained(&self, error: anyhow::Error) -> anyhow::Error {
        let troubles = self.daemons.troubles();
        let error = if troubles.is_empty() { error } else { error.context(troubles.join("\n")) };
        match logs::keep(&self.place, &self.daemons.logs()) {
            Ok(None) => error,
            Ok(Some(folder)) => error.context(format!("the daemons' logs are kept in {}", folder.display())),
            Err(e) => error.context(format!("the daemons' logs are lost ({e:#})")),
        }
    }

    /// Takes everything down.
    ///
    /// # Errors
    /// Something could not be removed.
    pub fn down(mut self) -> anyhow::Result<()> {
        self.take_down()
    }

    fn take_down(&mut self) -> anyhow::Result<()> {
        if std::mem::replace(&mut self.gone, true) {
            return Ok(());
        }
        self.door = None;
        self.daemons.end();
        self.databases.clear();
        place::remove(&self.place.id)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = self.take_down() {
            tracing::error!("{error:#}");
        }
    }
}

/// Per back end's address, the SQL it begins with: of the first service that brings one.
fn seeds(fleet: &Fleet, store: &Store) -> anyhow::Result<BTreeMap<SocketAddrV4, Option<String>>> {
    let mut seeds = BTreeMap::new();
    for service in &fleet.services {
        let image = &service.image;
        let Some(signed) = store.image(image)? else {
            bail!(
                "image {image} is not in the store {}\n\nhint: vmatrix image build scenarios/guests/{image}.toml",
                store.dir().display()
            );
        };
        let signer = sign::builder_public(store)?;
        let (manifest, _) = sign::verify(&signed, &[signer]).with_context(|| format!("image {image}"))?;
        let Some(backend) = &service.backend else { continue };
        let seed: &mut Option<String> = seeds.entry(SocketAddrV4::new(backend.address, backend.port)).or_default();
        let Some(part) = manifest.part(PartKind::BackendSeed) else { continue };
        if seed.is_none() {
            let folder = tempfile_in(&std::env::temp_dir())?;
            let file = folder.join("seed.sql");
            let text = chunks::assemble(part, store, &file)
                .map_err(anyhow::Error::from)
                .and_then(|()| Ok(std::fs::read_to_string(&file)?));
            std::fs::remove_dir_all(&folder)?;
            *seed = Some(text.with_context(|| format!("the seed of image {image}"))?);
        }
    }
    Ok(seeds)
}

fn listening(fleet: &Fleet, store: &Store) -> anyhow::Result<BTreeMap<ServiceId, BTreeSet<u16>>> {
    let mut all = BTreeMap::new();
    for service in &fleet.services {
        let guest = inspect(store.dir(), &service.image, &[])?.manifest.guest;
        all.insert(service.name.clone(), guest.ports.into_iter().chain([guest.health.port]).collect());
    }
    Ok(all)
}

/// A new folder only root can read: a seed holds password hashes.
fn tempfile_in(base: &Path) -> anyhow::Result<PathBuf> {
    let folder = base.join(format!("vmatrix-seed-{}", random_token()?));
    std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700)
        .create(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

/// 32 hex digits nobody can guess.
fn random_token() -> anyhow::Result<String> {
    let mut random = [0_u8; 16];
    getrandom::fill(&mut random).map_err(|e| anyhow::anyhow!("no random numbers: {e}"))?;
    Ok(random.iter().map(|b| format!("{b:02x}")).collect())
}
