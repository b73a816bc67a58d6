//! QEMU as a child of this process, driven by QMP. It outlives its parent.

use crate::error::{Error, Result, io};
use crate::hypervisor::{Hypervisor, Spawn, Vm};
use crate::process::{self, Mark};
use async_trait::async_trait;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use vmatrix_vma_image::machine::QEMU;
use vmatrix_vma_image::netns;
use vmatrix_vma_image::qmp::Qmp;

/// QEMU ends in milliseconds when asked.
const QUIT_GRACE: Duration = Duration::from_secs(3);
/// A QEMU that does not like its arguments says so and ends at once; on a busy machine later.
const START_LIMIT: Duration = Duration::from_secs(20);
/// A refused state ends QEMU, which is when its log is whole.
const WORDS_LIMIT: Duration = Duration::from_secs(2);

/// The hypervisor that needs no daemon.
#[derive(Debug, Clone)]
pub struct Qemu {
    folder: PathBuf,
}

impl Qemu {
    /// Keeps sockets and logs of its VMs in folders under `folder`, whose path has at most 30 bytes less than a
    /// socket's may have: 77.
    pub fn new(folder: &Path) -> Qemu {
        Qemu { folder: folder.to_owned() }
    }

    fn of(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
    fn qmp(&self, name: &str) -> PathBuf {
        self.of(name).join("qmp")
    }
    fn log(&self, name: &str) -> PathBuf {
        self.of(name).join("log")
    }
    fn agent(&self, name: &str) -> PathBuf {
        self.of(name).join("agent")
    }
    fn mark(&self, name: &str) -> Mark {
        Mark::new(name.to_owned(), &self.agent(name))
    }
    fn vm(&self, name: &str, pid: i32) -> Vm {
        Vm { name: name.to_owned(), pid, guest_agent: self.agent(name) }
    }

    async fn monitor(&self, vm: &Vm) -> Result<Qmp> {
        if !self.mark(&vm.name).is(vm.pid) {
            return Err(Error::Gone { name: vm.name.clone() });
        }
        Ok(Qmp::connect(&self.qmp(&vm.name)).await?)
    }

    /// Starts the process, its tap being its standard input: the one descriptor that a child gets without a moment
    /// in which others get it too.
    fn start(&self, spawn: &Spawn<'_>, tap: OwnedFd) -> Result<tokio::process::Child> {
        let (name, log) = (spawn.name, self.log(spawn.name));
        let output = std::fs::File::create(&log).map_err(io("write", &log))?;
        tokio::process::Command::new(QEMU)
            .args(spawn.arguments(self.qmp(name), self.agent(name)))
            .envs(spawn.environment.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::from(tap))
            .stdout(output.try_clone().map_err(io("share", &log))?)
            .stderr(output)
            .process_group(0)
            .spawn()
            .map_err(io("start", Path::new(QEMU)))
    }

    /// Waits for the monitor's socket, which is made after everything else was opened.
    async fn ready(&self, name: &str, child: &mut tokio::process::Child) -> Result<()> {
        let socket = self.qmp(name);
        let problem = tokio::select! {
            monitor = Qmp::connect(&socket) => match monitor {
                Ok(_) => return Ok(()),
                Err(e) => e.to_string(),
            },
            _ = child.wait() => String::new(),
            () = tokio::time::sleep(START_LIMIT) => {
                return Err(Error::Timeout { what: format!("QEMU of {name} to start"), after: START_LIMIT });
            }
        };
        // What it says last, it says before it ends.
        let how = match tokio::time::timeout(WORDS_LIMIT, child.wait()).await {
            Ok(Ok(status)) => status.to_string(),
            _ => problem,
        };
        let said = format!("{} ({how})", process::tail(&self.log(name)));
        Err(Error::Refused { name: name.to_owned(), what: "start", said })
    }
}

#[async_trait]
impl Hypervisor for Qemu {
    async fn spawn(&self, spawn: &Spawn<'_>) -> Result<Vm> {
        let name = spawn.name;
        process::check_name(name)?;
        if let Some(pid) = self.mark(name).find()? {
            return Err(Error::Runs { name: name.to_owned(), pid });
        }
        let folder = self.of(name);
        process::forget(&folder)?;
        std::fs::create_dir_all(&folder).map_err(io("make", &folder))?;
        let tap = netns::open_tap(&netns::path(spawn.tap.namespace), spawn.tap.name)?;
        let mut child = self.start(spawn, tap)?;
        let pid = child.id().and_then(|id| i32::try_from(id).ok());
        let pid = pid.ok_or_else(|| Error::Gone { name: name.to_owned() })?;
        // The child is dropped, not waited for: the runtime collects it when it ends.
        if let Err(e) = self.ready(name, &mut child).await {
            self.mark(name).end(pid).await?;
            process::forget(&folder)?;
            return Err(e);
        }
        Ok(self.vm(name, pid))
    }

    async fn find(&self, name: &str) -> Result<Option<Vm>> {
        Ok(self.mark(name).find()?.map(|pid| self.vm(name, pid)))
    }

    async fn load_state(&self, vm: &Vm, device: &Path) -> Result<()> {
        let mut monitor = self.monitor(vm).await?;
        let Err(refusal) = monitor.load_state(device).await else { return Ok(()) };
        self.mark(&vm.name).gone(vm.pid, WORDS_LIMIT).await;
        let said = format!("{}; {refusal}", process::tail(&self.log(&vm.name)));
        self.quit(&vm.name).await?;
        Err(Error::Refused { name: vm.name.clone(), what: "load device state", said })
    }

    async fn cont(&self, vm: &Vm) -> Result<()> {
        Ok(self.monitor(vm).await?.cont().await?)
    }

    async fn save_state(&self, vm: &Vm, device: &Path) -> Result<()> {
        Ok(self.monitor(vm).await?.save_state(device).await?)
    }

    async fn quit(&self, name: &str) -> Result<()> {
        process::check_name(name)?;
        if let Some(pid) = self.mark(name).find()? {
            let asked = async { Qmp::connect(&self.qmp(name)).await?.quit().await };
            let asked = tokio::time::timeout(QUIT_GRACE, asked).await.is_ok_and(|quit| quit.is_ok());
            if !(asked && self.mark(name).gone(pid, QUIT_GRACE).await) {
                self.mark(name).end(pid).await?;
            }
        }
        process::forget(&self.of(name))
    }
}
