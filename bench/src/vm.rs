//! A QEMU of the bench's own: the product's command line with another memory, in a plain bridge's namespace.
//!
//! The baselines are what a user of QEMU has without the product, on the same virtual machine: same devices,
//! same processor, same disk.

use crate::process::Running;
use anyhow::Context;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use vmatrix_lab::namespace::{Namespace, ip_batch};
use vmatrix_model::manifest::{GuestSpec, MachineSpec};
use vmatrix_vma_image::machine::{BRIDGE_MAC, Files, QEMU, Run, Start, machine_arguments};
use vmatrix_vma_image::netns;
use vmatrix_vma_image::qmp::Qmp;

/// Bytes a second: more than any link of a bench, so that QEMU does not limit itself.
const UNLIMITED: u64 = 10 << 30;

/// Where a guest's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ram {
    /// The process's own, empty.
    Own,
    /// A private, copy-on-write mapping of the guest's memory file.
    Clone,
    /// The memory file itself, as when it was built.
    Shared,
}

/// How a guest begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// It waits for a state.
    Waiting,
    /// It is powered on.
    Boot,
}

/// A namespace's bridge, to which a guest's tap is tied.
#[derive(Debug)]
pub struct Bridge<'a> {
    namespace: &'a Namespace,
}

impl Bridge<'_> {
    /// Makes the guest's gateway in `namespace`; it goes with the namespace.
    ///
    /// # Errors
    /// `ip` refuses.
    pub fn make<'a>(namespace: &'a Namespace, guest: &GuestSpec) -> anyhow::Result<Bridge<'a>> {
        ip_batch(
            Some(namespace),
            &format!(
                "link add br0 address {BRIDGE_MAC} type bridge\naddr add {}/24 dev br0\nlink set br0 up\n",
                guest.gateway
            ),
        )?;
        namespace.run(neighbours)??;
        Ok(Bridge { namespace })
    }
}

/// A guest in a QEMU of its own. Dropped, it is killed.
#[derive(Debug)]
pub struct Vm {
    process: Running,
    qmp: Qmp,
    agent: PathBuf,
}

impl Vm {
    /// Starts QEMU at a bridge and waits for its monitor. One guest at a bridge at a time.
    ///
    /// # Errors
    /// QEMU is missing, or ends at once, with its own words.
    pub fn start(
        runtime: &Runtime,
        machine: &MachineSpec,
        files: &Files,
        bridge: &Bridge<'_>,
        scratch: &Path,
        (ram, begin): (Ram, Begin),
    ) -> anyhow::Result<Vm> {
        let name = format!("{}-{:?}-{:?}", bridge.namespace.name(), ram, begin).to_lowercase();
        let scratch = scratch.join(&name);
        std::fs::create_dir_all(&scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
        let (qmp, agent) = (scratch.join("qmp"), scratch.join("agent"));
        for socket in [&qmp, &agent] {
            // Of a guest before.
            let _ = std::fs::remove_file(socket);
        }
        let tap = netns::open_tap(&bridge.namespace.path(), "tap0")?;
        // A short queue: what was sent to a guest that did not run yet is of tries long given up.
        ip_batch(
            Some(bridge.namespace),
            "link set tap0 master br0 txqueuelen 4\nlink set tap0 up\nneigh flush dev br0\n",
        )?;
        let run = Run {
            name,
            qmp: qmp.clone(),
            guest_agent: agent.clone(),
            tap_fd: 0,
            console: None,
            start: if begin == Begin::Boot { Start::Boot } else { Start::Clone },
        };
        let mut command = Command::new(QEMU);
        command.args(arguments(machine, files, &run, ram)).stdin(std::process::Stdio::from(tap));
        let process = Running::start("QEMU", &mut command, bridge.namespace, &scratch.join("log"))?;
        let qmp = runtime
            .block_on(Qmp::connect(&qmp))
            .with_context(|| format!("QEMU said: {}", crate::process::last_words(&scratch.join("log"))))?;
        Ok(Vm { process, qmp, agent })
    }

    /// Loads device state beside memory that is there, and answers how long that took.
    ///
    /// # Errors
    /// QEMU's own words.
    pub fn load_state(&mut self, runtime: &Runtime, device: &Path) -> anyhow::Result<Duration> {
        let began = Instant::now();
        runtime.block_on(self.qmp.load_state(device))?;
        Ok(began.elapsed())
    }

    /// Stops the guest and saves its device state beside its memory file.
    ///
    /// # Errors
    /// QEMU's own words.
    pub fn save_state(&mut self, runtime: &Runtime, device: &Path) -> anyhow::Result<()> {
        Ok(runtime.block_on(self.qmp.save_state(device))?)
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// QEMU's own words.
    pub fn cont(&mut self, runtime: &Runtime) -> anyhow::Result<()> {
        Ok(runtime.block_on(self.qmp.cont())?)
    }

    /// Runs one monitor command.
    ///
    /// # Errors
    /// QEMU's own words.
    pub fn execute(&mut self, runtime: &Runtime, command: &str, arguments: Value) -> anyhow::Result<Value> {
        Ok(runtime.block_on(self.qmp.execute(command, arguments))?)
    }

    /// Sets what a migration does; memory goes along with the state, at full speed. `mapped` puts each page at
    /// its own place of the file.
    ///
    /// # Errors
    /// QEMU's own words.
    pub fn prepare_migration(&mut self, runtime: &Runtime, mapped: bool) -> anyhow::Result<()> {
        let set = |name: &str, state: bool| json!({ "capability": name, "state": state });
        let list = [set("events", true), set("x-ignore-shared", false), set("mapped-ram", mapped)];
        self.execute(runtime, "migrate-set-capabilities", json!({ "capabilities": list }))?;
        self.execute(runtime, "migrate-set-parameters", json!({ "max-bandwidth": UNLIMITED }))?;
        Ok(())
    }

    /// Waits until a migration, in or out, has completed.
    ///
    /// # Errors
    /// It failed, or was not done within `limit`.
    pub fn until_migrated(&mut self, runtime: &Runtime, limit: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let data = runtime.block_on(self.qmp.wait_event("MIGRATION", left))?;
            match data.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => anyhow::bail!("QEMU's migration failed: {data}"),
                _ => {}
            }
        }
    }

    /// Where the program inside the guest listens.
    pub fn agent(&self) -> &Path {
        &self.agent
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Fails if QEMU has ended.
    ///
    /// # Errors
    /// With its last words.
    pub fn check(&mut self) -> anyhow::Result<()> {
        self.process.check()
    }
}

/// Of the bridge in the namespace the calling thread is in. A guest that remembers another gateway's MAC answers
/// into the void for 5 s (seen) unless it learns this one's from an ARP request in time; usually that is repeated
/// after a second only, and what waits for it is many a try that was given up.
fn neighbours() -> anyhow::Result<()> {
    for (key, value) in [("retrans_time_ms", "50"), ("unres_qlen", "3")] {
        let path = format!("/proc/sys/net/ipv4/neigh/br0/{key}");
        std::fs::write(&path, value).with_context(|| format!("cannot set {path}"))?;
    }
    Ok(())
}

/// The product's arguments, with the memory a baseline has and as the user who runs the bench.
fn arguments(machine: &MachineSpec, files: &Files, run: &Run, ram: Ram) -> Vec<String> {
    let size = machine.memory_mib;
    let file = files.memory.display();
    let memory = match ram {
        Ram::Own => format!("memory-backend-ram,id=ram0,size={size}M"),
        Ram::Clone => format!("memory-backend-file,id=ram0,size={size}M,mem-path={file},share=off,readonly=on,rom=off"),
        Ram::Shared => format!("memory-backend-file,id=ram0,size={size}M,mem-path={file},share=on"),
    };
    let mut argv = machine_arguments(machine, files, run);
    for argument in &mut argv {
        if argument.starts_with("memory-backend-file,id=ram0") {
            argument.clone_from(&memory);
        }
    }
    if let Some(at) = argv.iter().position(|a| a == "-run-with") {
        argv.drain(at..(at + 2).min(argv.len()));
    }
    argv
}
