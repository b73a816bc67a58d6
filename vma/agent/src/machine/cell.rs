//! Cells: namespace, pair of interfaces, bridge, rules and tunnel, built and taken down.

use super::image::Level;
use super::record::{Phase, Record};
use super::{Machine, process};
use anyhow::{Context, bail};
use serde::Deserialize;
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmatrix_model::InstanceId;
use vmatrix_vma_core::cell::{BRIDGE, Rules, SETTINGS, SINGLETON_SETTINGS, TAP, TUNNEL, UPLINK, rules};
use vmatrix_vma_core::steps::CellSpec;
use vmatrix_vma_image::machine::BRIDGE_MAC;
use vmatrix_vma_image::netns;

/// How long a cell waits for its image's manifest: some KiB over the longest path, from a source that is being
/// connected to.
const MANIFEST_LIMIT: Duration = Duration::from_secs(10);
/// A tunnel's first handshake crosses the WAN once or twice, and the origin may be starting.
const TUNNEL_LIMIT: Duration = Duration::from_secs(15);
/// A tunnel tells the origin that it leaves; that takes a round trip.
const TUNNEL_GRACE: Duration = Duration::from_secs(2);

/// What a tunnel writes into its status file.
#[derive(Debug, Deserialize)]
struct TunnelStatus {
    ready: bool,
}

impl Machine {
    /// Builds the cell, unless it is there whole.
    ///
    /// What its guest needs is fetched meanwhile, and the process it will run in is started: that of a first resume
    /// takes longer than a cell.
    pub(super) async fn prepare(self: &Arc<Self>, spec: &CellSpec) -> anyhow::Result<()> {
        let known = self.records.get(&spec.instance);
        if let Some(record) =
            known.as_ref().filter(|r| r.phase != Phase::Building && self.is_whole(r) && same(&r.spec, spec))
        {
            if record.spec != *spec {
                self.records.respec(spec)?;
            }
            if record.phase == Phase::Handed {
                // It is wanted back.
                self.records.note(&spec.instance, Phase::Ready, None)?;
            }
            if spec.singleton.is_some() && matches!(record.phase, Phase::Ready | Phase::Handed) {
                let wanted = Record { spec: spec.clone(), ..record.clone() };
                let known = self.until(&spec.image, Level::Known, MANIFEST_LIMIT).await?;
                self.begin_meeting(&wanted, &known);
                self.make_ready(&wanted, &known);
            }
            return self.start_tunnel(record).await;
        }
        if let Some(held) = self.tenures.get(&spec.instance.service).filter(|_| spec.singleton.is_none())
            && held.holds().is_some()
        {
            bail!("{} is held here as a singleton and is not run as a replica beside it", spec.instance.service);
        }
        if known.is_some() {
            self.release(&spec.instance).await?;
        }
        let began = Instant::now();
        self.until(&spec.image, Level::Known, MANIFEST_LIMIT).await?;
        let spare = match spec.singleton {
            None => self.images.known(&spec.image).and_then(|known| self.take_spare(&known)),
            Some(_) => None,
        };
        let record = self.records.begin(spec, self.config.cells, spare.as_ref().map(|s| s.name.clone()))?;
        // Looked up again: once the cell is begun, no newer image takes this one's place.
        let gone = || format!("image {} was dropped meanwhile; stage it", spec.image);
        let known = self.images.known(&spec.image).with_context(gone)?;
        if spec.singleton.is_some() {
            self.begin_meeting(&record, &known);
        }
        self.make_room().await?;
        // What the guest will run in is made while its cell is built and what it needs first comes.
        let pager = spec.singleton.is_none().then(|| self.pager_for(&known));
        let building =
            |done: anyhow::Result<()>| done.with_context(|| format!("cannot build the cell of {}", spec.instance));
        let given = match spare {
            Some(spare) => building(self.give_spare(&spare, &record).await)
                .inspect_err(|e| tracing::warn!(error = format!("{e:#}"), "a QEMU that waited is not used"))
                .is_ok(),
            None => false,
        };
        if !given {
            self.unbuild(&spec.instance)?;
            let (name, gateway) = (self.namespace(&spec.instance), known.manifest.guest.gateway);
            building(tokio::task::spawn_blocking(move || found(&name, gateway)).await?)?;
        }
        if spec.singleton.is_some() {
            self.make_ready(&record, &known);
        }
        let (machine, part, guest) = (self.clone(), record.clone(), known.manifest.guest.clone());
        let built = tokio::task::spawn_blocking(move || machine.build(&part, guest.address, &guest.mac));
        let spawned = async {
            if let Some(pager) = pager.filter(|_| !given) {
                pager.up().await?;
                self.spawn_waiting(&spec.instance, &known).await?;
            }
            anyhow::Ok(())
        };
        let (built, spawned) = tokio::join!(built, spawned);
        building(built?)?;
        spawned?;
        tracing::debug!(instance = %spec.instance, took_ms = began.elapsed().as_millis(), "cell prepared");
        self.start_tunnel(&record).await?;
        self.records.note(&spec.instance, Phase::Ready, None)
    }

    fn is_whole(&self, record: &Record) -> bool {
        netns::path(&self.namespace(&record.spec.instance)).exists()
            && nix::net::if_::if_nametoindex(outer_name(record).as_str()).is_ok()
    }

    /// Links the namespace with the network's and gives it its rules.
    fn build(&self, record: &Record, guest: Ipv4Addr, mac: &str) -> anyhow::Result<()> {
        let name = self.namespace(&record.spec.instance);
        let outside = outer_name(record);
        let (outer, cell) = (record.link.outer, record.link.cell);
        let ports = &record.spec.ports;
        let text = rules(&Rules { cell, guest, mac, ports, backends: &record.spec.backends });
        // Beside each other: either program takes some milliseconds to start.
        std::thread::scope(|scope| {
            let ruled = scope.spawn(|| nft(&netns::path(&name), &text));
            netns::ip_batch(
                None,
                &[
                    format!("link add {outside} type veth peer name {UPLINK} netns {name}"),
                    format!("addr add {outer}/30 dev {outside}"),
                    format!("link set {outside} up"),
                ],
            )?;
            netns::ip_batch(
                Some(&name),
                &[
                    format!("addr add {cell}/30 dev {UPLINK}"),
                    format!("link set {UPLINK} up"),
                    format!("route add default via {outer}"),
                ],
            )?;
            ruled.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        // Last, for some settings exist only once the rules have brought their modules in.
        let more = if record.spec.singleton.is_some() { SINGLETON_SETTINGS } else { &[] };
        netns::enter(&netns::path(&name), || settings(SETTINGS.iter().chain(more)))?
    }

    /// Starts the tunnel if the cell needs one and has none, and waits until it is up.
    pub(super) async fn start_tunnel(&self, record: &Record) -> anyhow::Result<()> {
        let instance = &record.spec.instance;
        if record.spec.backends.is_empty() || self.find_tunnel(instance).is_some() {
            return Ok(());
        }
        let folder = self.records.folder(instance);
        let (status, log) = (folder.join("tunnel.json"), folder.join("tunnel.log"));
        match std::fs::remove_file(&status) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("cannot remove {}", status.display()));
            }
            _ => {}
        }
        let output = std::fs::File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut child = tokio::process::Command::new(&self.program)
            .arg("tunnel")
            .arg("--netns")
            .arg(netns::path(&self.namespace(instance)))
            .args(["--network", self.config.network.as_str()])
            .args(["--cell", &instance.to_string()])
            .args(["--origin", &self.config.origin])
            .arg("--token-file")
            .arg(&self.config.token_file)
            .args(["--device", TUNNEL])
            .arg("--status")
            .arg(&status)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {} tunnel", self.program.display()))?;
        let deadline = Instant::now() + TUNNEL_LIMIT;
        loop {
            let ready = std::fs::read(&status)
                .ok()
                .and_then(|t| serde_json::from_slice::<TunnelStatus>(&t).ok())
                .is_some_and(|s| s.ready);
            if ready {
                return Ok(());
            }
            if let Some(ended) = child.try_wait().context("cannot wait for the tunnel")? {
                bail!("the tunnel of {instance} ended ({ended}): {}", process::tail(&log));
            }
            if Instant::now() > deadline {
                bail!(
                    "the tunnel of {instance} was not up after {} s; is {} reachable? {}",
                    TUNNEL_LIMIT.as_secs(),
                    self.config.origin,
                    process::tail(&log)
                );
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(super) fn find_tunnel(&self, instance: &InstanceId) -> Option<process::Process> {
        let namespace = netns::path(&self.namespace(instance)).display().to_string();
        process::all()
            .into_iter()
            .find(|p| p.arguments.iter().any(|a| a == "tunnel") && p.value("--netns") == Some(namespace.as_str()))
    }

    /// Takes the cell down, with whatever still runs in it.
    pub(super) async fn release(self: &Arc<Self>, instance: &InstanceId) -> anyhow::Result<()> {
        let Some(record) = self.records.get(instance) else { return Ok(()) };
        if record.spec.singleton.is_some() {
            // What it did since it was resumed is kept.
            self.suspend_singleton(&record).await?;
            self.end_relays(&record).await?;
        }
        self.take_down(instance).await
    }

    /// Takes down whatever goes by an instance's name, with or without a record of it.
    pub(super) async fn take_down(&self, instance: &InstanceId) -> anyhow::Result<()> {
        self.end_vm(instance).await?;
        if let Some(tunnel) = self.find_tunnel(instance) {
            process::end(&tunnel, TUNNEL_GRACE)
                .await
                .with_context(|| format!("cannot end the tunnel of {instance}"))?;
        }
        self.unbuild(instance).with_context(|| format!("cannot take down the cell of {instance}"))?;
        self.records.forget(instance)
    }

    fn unbuild(&self, instance: &InstanceId) -> anyhow::Result<()> {
        let name = self.namespace(instance);
        if let Some(outside) = self.records.get(instance).as_ref().map(outer_name)
            && nix::net::if_::if_nametoindex(outside.as_str()).is_ok()
        {
            netns::ip_batch(None, &[format!("link del {outside}")])?;
        }
        if netns::path(&name).exists() {
            // The kernel takes a namespace down later; the pair is to be gone now, also without a record of it.
            // Not there: the namespace was made and nothing in it.
            let _ = netns::ip_batch(Some(&name), &[format!("link del {UPLINK}")]);
            netns::ip_batch(None, &[format!("netns del {name}")])?;
        }
        Ok(())
    }
}

/// Makes a namespace and the bridge in it: all that a guest's QEMU needs to be started.
///
/// # Errors
/// What `ip` said.
pub fn found(name: &str, gateway: Ipv4Addr) -> anyhow::Result<()> {
    netns::ip_batch(None, &[format!("netns add {name}")])?;
    Ok(netns::ip_batch(
        Some(name),
        &[
            "link set lo up".to_owned(),
            format!("link add {BRIDGE} address {BRIDGE_MAC} type bridge"),
            format!("addr add {gateway}/24 dev {BRIDGE}"),
            format!("link set {BRIDGE} up"),
        ],
    )?)
}

/// Makes the guest's tap, on the bridge.
///
/// # Errors
/// What the kernel or `ip` said.
pub fn tap(name: &str) -> anyhow::Result<OwnedFd> {
    let tap = netns::open_tap(&netns::path(name), TAP)?;
    netns::ip_batch(Some(name), &[format!("link set {TAP} master {BRIDGE}"), format!("link set {TAP} up")])?;
    Ok(tap)
}

/// Whether a cell need not be built anew: where a singleton came from does not matter any more.
fn same(has: &CellSpec, wanted: &CellSpec) -> bool {
    let as_wanted = CellSpec { singleton: has.singleton.and(wanted.singleton), ..has.clone() };
    has.singleton.is_some() == wanted.singleton.is_some() && as_wanted == *wanted
}

/// The pair's end outside the cell. Named by the cell's address, for a namespace may hold several machines.
fn outer_name(record: &Record) -> String {
    format!("vx{:08x}", record.link.cell.to_bits())
}

fn settings<'a>(all: impl Iterator<Item = &'a (&'a str, &'a str)>) -> anyhow::Result<()> {
    for (file, value) in all {
        let path = Path::new("/proc/sys").join(file);
        match std::fs::write(&path, value) {
            // Without its module there is nothing to switch off.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            other => other.with_context(|| format!("cannot set {}", path.display()))?,
        }
    }
    Ok(())
}

/// Gives a namespace rules, all of them or none.
///
/// # Errors
/// What `nft` said.
pub fn nft(namespace: &Path, text: &str) -> anyhow::Result<()> {
    let said = netns::enter(namespace, || -> anyhow::Result<std::process::Output> {
        let mut child = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run nft; install it with `apt-get install nftables`")?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(text.as_bytes()).context("cannot write to nft")?;
        }
        child.wait_with_output().context("cannot wait for nft")
    })??;
    if !said.status.success() {
        let words: String = String::from_utf8_lossy(&said.stderr).trim().chars().take(500).collect();
        bail!("nft refused the cell's rules: {words}");
    }
    Ok(())
}
