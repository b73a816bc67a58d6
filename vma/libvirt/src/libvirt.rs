//! QEMU as a domain of libvirt: started by its daemon, driven through its monitor.
//!
//! ```text
//! grant files ─▶ tap ─▶ XML ─▶ create, paused (-incoming defer) ─▶ tap into the cell ─▶ Vm
//! ```
//! Domains are transient: when one ends, libvirt keeps nothing of it. The caller and the daemon share a network
//! namespace and the caller is root there. What the daemon's `qemu.conf` must say is in [`crate::daemon::QEMU_CONF`].

use crate::domain::{self, Domain as Described};
use crate::error::{Error, Result, io};
use crate::grant::{self, User};
use crate::hypervisor::{Hypervisor, Spawn, Vm};
use crate::process::{self, Mark};
use crate::{monitor, tap};
use async_trait::async_trait;
use serde_json::json;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::ErrorNumber;
use virt_sys::{VIR_DOMAIN_RUNNING, VIR_DOMAIN_START_PAUSED, virDomainCreateFlags};
use vmatrix_vma_image::machine::{QEMU, Start};

/// Device state loads in 5 ms and saves in 8; a busy machine may need seconds.
const STATE_LIMIT: Duration = Duration::from_secs(60);
/// Between questions for the state of a migration, of which QEMU tells nobody but libvirt.
const STATE_EVERY: Duration = Duration::from_millis(2);
/// Libvirt waits for a process that it ended, and so does this.
const END_LIMIT: Duration = Duration::from_secs(3);
/// A call of libvirt has no end of its own. The longest, the start of a QEMU, is given up by libvirt itself after 30 s.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// Where libvirt's daemon writes what QEMU says.
pub const LOGS: &str = "/var/log/libvirt/qemu";

/// The hypervisor of a fleet that has libvirt.
#[derive(Debug, Clone)]
pub struct Libvirt {
    uri: String,
    folder: PathBuf,
    logs: PathBuf,
    emulator: String,
    /// The group of libvirt's QEMU.
    group: u32,
    confines: Vec<String>,
    shared: Arc<Mutex<Option<Arc<Connection>>>>,
}

/// A connection, closed with its last user.
#[derive(Debug)]
pub(crate) struct Connection(Connect);

impl Drop for Connection {
    fn drop(&mut self) {
        if let Err(e) = self.0.close() {
            tracing::debug!(error = %e, "the connection to libvirt did not close");
        }
    }
}

impl Connection {
    pub(crate) fn open(uri: &str) -> Result<Connection> {
        // It would print every error, which its caller says anyway.
        virt::error::clear_error_callback();
        let said = |said: String| Error::NoDaemon { uri: uri.to_owned(), said };
        if uri.contains('\0') {
            return Err(said("a zero byte is in its name".to_owned()));
        }
        Ok(Connection(Connect::open(Some(uri)).map_err(|e| said(e.message().to_owned()))?))
    }

    pub(crate) fn get(&self) -> &Connect {
        &self.0
    }

    /// The domain of this name, if libvirt knows one.
    pub(crate) fn domain(&self, name: &str) -> Result<Option<Domain>> {
        match Domain::lookup_by_name(&self.0, name) {
            Ok(domain) => Ok(Some(domain)),
            Err(e) if e.code() == ErrorNumber::NoDomain => Ok(None),
            Err(e) => Err(monitor::refused("look for the domain", &e)),
        }
    }
}

impl Libvirt {
    /// Connects to a daemon (`qemu:///system`). Keeps the guest agents' sockets in folders under `folder`, which
    /// libvirt's QEMU must be able to reach and whose path has at most 70 bytes.
    ///
    /// # Errors
    /// [`Error::NoDaemon`], or it does not say as whom it runs QEMU.
    pub async fn connect(uri: &str, folder: &Path) -> Result<Libvirt> {
        let (uri, folder) = (uri.to_owned(), folder.to_owned());
        let late = Error::Timeout { what: format!("libvirt at {uri}"), after: CALL_LIMIT };
        let connected = blocking(move || {
            let connection = Connection::open(&uri)?;
            let said = connection.get().get_capabilities();
            let said = domain::daemon(&said.map_err(|e| monitor::refused("say what it can do", &e))?);
            let (_, group) = said.user.ok_or(Error::NoUser)?;
            let shared = Arc::new(Mutex::new(Some(Arc::new(connection))));
            let (confines, logs) = (said.confines, PathBuf::from(LOGS));
            Ok(Libvirt { uri, folder, logs, emulator: emulator()?, group, confines, shared })
        });
        tokio::time::timeout(CALL_LIMIT, connected).await.map_err(|_| late)?
    }

    /// The same, where the daemon writes QEMU's words elsewhere.
    #[must_use]
    pub fn with_logs(self, logs: &Path) -> Libvirt {
        Libvirt { logs: logs.to_owned(), ..self }
    }

    fn vm(&self, name: &str, pid: i32) -> Vm {
        Vm { name: name.to_owned(), pid, guest_agent: self.agent(name) }
    }

    fn agent(&self, name: &str) -> PathBuf {
        self.folder.join(name).join("agent")
    }

    fn mark(&self, name: &str) -> Mark {
        Mark::new(format!("guest={name}"), &self.agent(name))
    }

    /// The name of a VM's tap until it is in its cell.
    pub(crate) fn outside(&self, name: &str) -> String {
        tap::outside(&self.agent(name))
    }

    pub(crate) fn user(&self, name: &str) -> User {
        User::of(&self.agent(name), self.group)
    }

    pub(crate) fn emulator(&self) -> &str {
        &self.emulator
    }

    pub(crate) fn confines(&self) -> &[String] {
        &self.confines
    }

    /// The folder of a VM's sockets, made for QEMU's user.
    pub(crate) fn own_folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        process::forget(&folder)?;
        self.user(name).own_folder(&folder)?;
        Ok(folder)
    }

    /// What QEMU said last.
    fn words(&self, name: &str) -> String {
        process::tail(&self.logs.join(format!("{name}.log")))
    }

    /// Does something with the connection, made again if the daemon was.
    pub(crate) async fn with<T: Send + 'static>(
        &self,
        f: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.within(CALL_LIMIT, f).await
    }

    /// The same, for what takes as long as memory is large.
    pub(crate) async fn within<T: Send + 'static>(
        &self,
        limit: Duration,
        f: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (shared, uri) = (self.shared.clone(), self.uri.clone());
        let done = blocking(move || {
            let connection = {
                let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                match shared.as_ref().filter(|c| c.get().get_lib_version().is_ok()) {
                    Some(alive) => alive.clone(),
                    None => shared.insert(Arc::new(Connection::open(&uri)?)).clone(),
                }
            };
            f(&connection)
        });
        let late = |_| Error::Timeout { what: format!("libvirt at {}", self.uri), after: limit };
        tokio::time::timeout(limit, done).await.map_err(late)?
    }

    /// Does something with a running domain. Libvirt sees a moment late that a process was killed.
    async fn on<T: Send + 'static>(&self, vm: &Vm, f: impl FnOnce(&Domain) -> Result<T> + Send + 'static) -> Result<T> {
        let name = vm.name.clone();
        if !self.mark(&name).is(vm.pid) {
            return Err(Error::Gone { name });
        }
        self.with(move |connection| f(&connection.domain(&name)?.ok_or(Error::Gone { name })?)).await
    }

    /// Starts a domain that waits, and gives its tap into the cell.
    pub(crate) async fn start(&self, name: &str, xml: String, tap: crate::Tap<'_>) -> Result<i32> {
        let flags: virDomainCreateFlags = VIR_DOMAIN_START_PAUSED;
        self.with(move |c| {
            Domain::create_xml(c.get(), &xml, flags).map(drop).map_err(|e| monitor::refused("start", &e))
        })
        .await
        .map_err(|e| self.say(name, "start", e))?;
        self.adopt(name, tap)
    }

    /// Gives the tap of a domain that was just started into the cell.
    pub(crate) fn adopt(&self, name: &str, tap: crate::Tap<'_>) -> Result<i32> {
        let pid = self.mark(name).find()?.ok_or_else(|| Error::Gone { name: name.to_owned() })?;
        tap::give(&self.outside(name), pid, tap)?;
        Ok(pid)
    }

    /// Adds QEMU's own words to a refusal: libvirt repeats the first of them only.
    fn say(&self, name: &str, what: &'static str, e: Error) -> Error {
        match e {
            Error::Libvirt { said, .. } => {
                Error::Refused { name: name.to_owned(), what, said: format!("{said} ({})", self.words(name)) }
            }
            other => other,
        }
    }

    async fn begin(&self, spawn: &Spawn<'_>) -> Result<Vm> {
        let name = spawn.name;
        let arguments = spawn.arguments(PathBuf::new(), self.own_folder(name)?.join("agent"));
        let user = self.user(name);
        grant::admit(user, &arguments, spawn.environment)?;
        let outside = self.outside(name);
        let xml = domain::xml(&Described {
            name,
            machine: spawn.machine,
            arguments: &arguments,
            environment: spawn.environment,
            tap: &outside,
            emulator: &self.emulator,
            user: (user.uid, user.gid),
            unconfined: &self.confines,
        })?;
        tap::make(&outside, user.uid)?;
        let pid = self.start(name, xml, spawn.tap).await?;
        let vm = self.vm(name, pid);
        if spawn.start == Start::Boot {
            self.cont(&vm).await?;
        }
        Ok(vm)
    }

    /// Waits for a migration to end, and then has QEMU close the file it went through.
    async fn migrated(&self, vm: &Vm, what: &'static str, set: u64) -> Result<()> {
        let deadline = Instant::now() + STATE_LIMIT;
        loop {
            let name = vm.name.clone();
            let (status, why) = self.on(vm, move |domain| monitor::migration(domain, &name, what)).await?;
            match status.as_str() {
                "completed" => break,
                "failed" | "cancelled" => {
                    let said = format!("{}; {why}", self.words(&vm.name));
                    return Err(Error::Refused { name: vm.name.clone(), what, said });
                }
                _ if Instant::now() > deadline => {
                    return Err(Error::Timeout { what: format!("to {what} of {}", vm.name), after: STATE_LIMIT });
                }
                _ => tokio::time::sleep(STATE_EVERY).await,
            }
        }
        let name = vm.name.clone();
        self.on(vm, move |domain| monitor::take_back(domain, &name, set)).await
    }

    async fn load(&self, vm: &Vm, device: &Path) -> Result<()> {
        const WHAT: &str = "load device state";
        let file = File::open(device).map_err(io("open", device))?;
        let name = vm.name.clone();
        let begin = move |domain: &Domain| {
            monitor::ignore_shared(domain, &name, WHAT)?;
            let set = monitor::give(domain, &name, WHAT, &file)?;
            // Left alive on failure, so that it can say why.
            let arguments = json!({ "uri": format!("file:/dev/fdset/{set}"), "exit-on-error": false });
            monitor::ask(domain, &name, WHAT, "migrate-incoming", arguments)?;
            Ok(set)
        };
        let set = self.on(vm, begin).await?;
        self.migrated(vm, WHAT, set).await
    }

    async fn end(&self, name: &str) -> Result<()> {
        let mark = self.mark(name);
        let (domain, socket) = (name.to_owned(), domain::escape(mark.socket())?);
        let destroyed = self.with(move |connection| destroy(connection, &domain, &socket)).await;
        // A daemon that is not there cannot end it; its process can be ended all the same.
        if let Err(e) = &destroyed {
            tracing::warn!(vm = name, error = %e, "libvirt does not end it; ending the process");
        }
        if let Some(pid) = mark.find()?
            && !(destroyed.is_ok() && mark.gone(pid, END_LIMIT).await)
        {
            mark.end(pid).await?;
        }
        tap::remove(&self.outside(name))?;
        process::forget(&self.folder.join(name))
    }
}

/// Ends the domain that has this socket; well if there is none. The daemon may have one of this name from somebody else,
/// and one whose process was killed a moment ago.
fn destroy(connection: &Connection, name: &str, socket: &str) -> Result<()> {
    let Some(domain) = connection.domain(name)? else { return Ok(()) };
    let well = |e: &virt::error::Error| matches!(e.code(), ErrorNumber::NoDomain | ErrorNumber::OperationInvalid);
    let ended = domain.get_xml_desc(0).and_then(|xml| if xml.contains(socket) { domain.destroy() } else { Ok(()) });
    match ended {
        Err(e) if !well(&e) => Err(monitor::refused("end the domain", &e)),
        _ => Ok(()),
    }
}

#[async_trait]
impl Hypervisor for Libvirt {
    async fn spawn(&self, spawn: &Spawn<'_>) -> Result<Vm> {
        process::check_name(spawn.name)?;
        if let Some(pid) = self.mark(spawn.name).find()? {
            return Err(Error::Runs { name: spawn.name.to_owned(), pid });
        }
        match self.begin(spawn).await {
            Ok(vm) => Ok(vm),
            Err(e) => {
                self.end(spawn.name).await?;
                Err(e)
            }
        }
    }

    async fn find(&self, name: &str) -> Result<Option<Vm>> {
        Ok(self.mark(name).find()?.map(|pid| self.vm(name, pid)))
    }

    async fn load_state(&self, vm: &Vm, device: &Path) -> Result<()> {
        match self.load(vm, device).await {
            Ok(()) => Ok(()),
            Err(e) => {
                self.end(&vm.name).await?;
                Err(e)
            }
        }
    }

    async fn cont(&self, vm: &Vm) -> Result<()> {
        let run = |domain: &Domain| match (domain.resume(), domain.get_state()) {
            // Libvirt takes no order that is carried out already.
            (Ok(_), _) | (Err(_), Ok((VIR_DOMAIN_RUNNING, _))) => Ok(()),
            (Err(e), _) => Err(monitor::refused("let the guest run", &e)),
        };
        self.on(vm, run).await
    }

    async fn save_state(&self, vm: &Vm, device: &Path) -> Result<()> {
        const WHAT: &str = "save device state";
        let file = File::create(device).map_err(io("write", device))?;
        let name = vm.name.clone();
        let begin = move |domain: &Domain| {
            domain.suspend().map_err(|e| monitor::refused("stop the guest", &e))?;
            monitor::ignore_shared(domain, &name, WHAT)?;
            let set = monitor::give(domain, &name, WHAT, &file)?;
            monitor::ask(domain, &name, WHAT, "migrate", json!({ "uri": format!("file:/dev/fdset/{set}") }))?;
            Ok(set)
        };
        let set = self.on(vm, begin).await?;
        self.migrated(vm, WHAT, set).await
    }

    async fn quit(&self, name: &str) -> Result<()> {
        process::check_name(name)?;
        self.end(name).await
    }
}

/// The program with its folder, as libvirt wants it: the same that a direct start runs.
fn emulator() -> Result<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut found = std::env::split_paths(&path).map(|folder| folder.join(QEMU)).filter(|file| file.is_file());
    let missing = || io("find on PATH", Path::new(QEMU))(std::io::ErrorKind::NotFound.into());
    Ok(found.next().ok_or_else(missing)?.display().to_string())
}

/// Libvirt's calls block.
async fn blocking<T: Send + 'static>(f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(f).await {
        Ok(done) => done,
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(e) => Err(Error::Libvirt { what: "answer".to_owned(), said: e.to_string() }),
        },
    }
}
