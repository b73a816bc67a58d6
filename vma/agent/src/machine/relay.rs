//! Relays of a singleton's cell: what a cell that the guest left still gets for it, goes where the guest is.
//!
//! ```text
//! asked to take ─▶ In(from): key, port ─┐                              ┌─ guest came: in, marked and answered
//! asked to give ─▶ Out(to): key, port ──┴▶ both ends run, shaken ─▶ ───┤
//!                                                                      └─ guest went: its address leads out
//! ```
//! What a cell has is written down in its folder, `relays.json`, before anything follows; processes, rules and routes
//! are then made to be so, again and again: [`Machine::relays_up`]. All of it goes with the cell.

use super::record::Record;
use super::{Machine, cell, process};
use anyhow::{Context, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{SocketAddr, SocketAddrV4, UdpSocket};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};
use vmatrix_model::manifest::GuestSpec;
use vmatrix_model::wire::RELAY_PORTS;
use vmatrix_vma_core::cell::{
    BRIDGE, RELAY_IN, RELAY_OUT, RELAYS_MAX, Relays, relay_in_ends, relay_route_rule, relay_routes, relay_rules,
};
use vmatrix_vma_image::netns;
use x25519_dalek::{PublicKey, StaticSecret};

/// A relay makes its device in some milliseconds, a second on a busy machine.
const DEVICE_LIMIT: Duration = Duration::from_secs(5);
/// A relay gives its socket back when asked.
const GRACE: Duration = Duration::from_secs(1);
/// Between looks at a process that starts.
const LOOK: Duration = Duration::from_millis(2);

/// One end of a relay, as the other machine is told of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// Where its datagrams arrive.
    pub at: SocketAddrV4,
    /// Its public key, 32 bytes in base64.
    pub key: String,
}

/// This machine's end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct End {
    /// Transfer address of the machine at the other end: who it is.
    pub with: SocketAddr,
    pub own: Offer,
    /// None: not told yet.
    pub peer: Option<Offer>,
    /// Whether the guest moved with it; until then the next hand-over goes on with it.
    pub used: bool,
}

/// All relays of a cell.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ends {
    /// How often the guest came.
    pub comings: u32,
    /// By number: one for each machine that it came from.
    pub ins: BTreeMap<u8, End>,
    /// Where it came from last.
    pub latest: Option<u8>,
    pub out: Option<End>,
    /// Whether packets for it go out.
    pub away: bool,
}

/// Which relay of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    In(u8),
    Out,
}

impl Way {
    /// Its device in the cell.
    fn device(self) -> String {
        match self {
            Way::In(n) => format!("{RELAY_IN}{n}"),
            Way::Out => RELAY_OUT.to_owned(),
        }
    }

    /// Of the device; nobody is asked for it.
    fn address(self) -> String {
        match self {
            Way::In(n) => format!("{}/30", relay_in_ends(n).0),
            Way::Out => "169.254.76.1/30".to_owned(),
        }
    }
}

/// What `vmatrix relay` is told.
#[derive(Serialize)]
struct RelayFile {
    netns: PathBuf,
    device: String,
    address: String,
    listen: SocketAddrV4,
    peer: SocketAddrV4,
    key_file: PathBuf,
    peer_key: String,
    status: PathBuf,
}

#[derive(Deserialize)]
struct Status {
    ready: bool,
}

impl Machine {
    /// The relays of a cell, as they are written down.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(super) fn relays(&self, record: &Record) -> anyhow::Result<Ends> {
        let path = self.relays_file(record);
        match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).with_context(|| format!("cannot understand {}", path.display())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Ends::default()),
            Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    fn relays_file(&self, record: &Record) -> PathBuf {
        self.records.folder(&record.spec.instance).join("relays.json")
    }

    fn write_relays(&self, record: &Record, ends: &Ends) -> anyhow::Result<()> {
        let path = self.relays_file(record);
        let text = serde_json::to_vec_pretty(ends)?;
        crate::replace(&path, &text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// This machine's end for a guest that is to come from `with`: the one of a hand-over that is under way, or a new
    /// one with a key of its own. None: this machine has no address for relays, or the cell no number left.
    ///
    /// # Errors
    /// No port is free, or it cannot be written down.
    pub(super) async fn relay_in(&self, record: &Record, with: SocketAddr) -> anyhow::Result<Option<(Way, Offer)>> {
        let mut ends = self.relays(record)?;
        let known = ends.ins.iter().find(|(_, end)| end.with == with).map(|(n, _)| *n);
        let Some(n) = known.or_else(|| (1..=RELAYS_MAX).find(|n| !ends.ins.contains_key(n))) else { return Ok(None) };
        if let Some(end) = ends.ins.get(&n).filter(|end| !end.used) {
            return Ok(Some((Way::In(n), end.own.clone())));
        }
        let Some(own) = self.new_end(record, Way::In(n)).await? else { return Ok(None) };
        ends.ins.insert(n, End { with, own: own.clone(), peer: None, used: false });
        self.write_relays(record, &ends)?;
        Ok(Some((Way::In(n), own)))
    }

    /// This machine's end for a guest that is to go to `with`, which has `peer` there. It is written down; it runs
    /// after [`Machine::relays_up`].
    ///
    /// # Errors
    /// As [`Machine::relay_in`].
    pub(super) async fn relay_out(
        &self,
        record: &Record,
        with: SocketAddr,
        peer: &Offer,
    ) -> anyhow::Result<Option<Offer>> {
        let mut ends = self.relays(record)?;
        if let Some(end) = ends.out.as_ref().filter(|end| end.with == with && end.peer.as_ref() == Some(peer)) {
            return Ok(Some(end.own.clone()));
        }
        let Some(own) = self.new_end(record, Way::Out).await? else { return Ok(None) };
        ends.out = Some(End { with, own: own.clone(), peer: Some(peer.clone()), used: false });
        self.write_relays(record, &ends)?;
        Ok(Some(own))
    }

    /// Notes what the other machine's end is; answers with ours if that is to be started, with [`Machine::start_relay`].
    ///
    /// # Errors
    /// It cannot be written down, or the relay is none that brings a guest.
    pub(super) fn relay_known(&self, record: &Record, way: Way, peer: &Offer) -> anyhow::Result<Option<End>> {
        let mut ends = self.relays(record)?;
        let Way::In(n) = way else { bail!("only a guest that comes is met") };
        let end = ends.ins.get_mut(&n).with_context(|| format!("relay {n} of the cell is gone"))?;
        if end.peer.as_ref() == Some(peer) && self.relay_path(record, way, "json").exists() {
            return Ok(None);
        }
        end.peer = Some(peer.clone());
        let end = end.clone();
        self.write_relays(record, &ends)?;
        Ok(Some(end))
    }

    /// Waits until there is a namespace for a relay's device: a cell is built meanwhile.
    ///
    /// # Errors
    /// There is none for long.
    pub(super) async fn until_founded(&self, record: &Record) -> anyhow::Result<()> {
        let namespace = netns::path(&self.namespace(&record.spec.instance));
        let deadline = Instant::now() + DEVICE_LIMIT;
        while !namespace.exists() {
            if Instant::now() > deadline {
                bail!("the cell of {} is not there", record.spec.instance);
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Waits until packets pass, or the time is over; answers whether they do.
    pub(super) async fn relay_shaken(&self, record: &Record, way: Way, limit: Duration) -> bool {
        let status = self.relay_path(record, way, "json");
        let deadline = Instant::now() + limit;
        let ready = || {
            let text = std::fs::read(&status).ok()?;
            serde_json::from_slice::<Status>(&text).ok().map(|s| s.ready)
        };
        while ready() != Some(true) {
            if Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(LOOK).await;
        }
        true
    }

    /// The guest is about to come, along with relay `latest` if there is one: from now on what arrives for it waits
    /// for it here.
    ///
    /// # Errors
    /// It cannot be written down, or the rules are not taken.
    pub(super) fn guest_expected(&self, record: &Record, guest: &GuestSpec, latest: Option<Way>) -> anyhow::Result<()> {
        let mut ends = self.relays(record)?;
        let fresh = ends.comings == 0 && ends.out.is_none();
        ends.away = false;
        ends.comings = ends.comings.wrapping_add(1);
        ends.latest = latest.and_then(|way| if let Way::In(n) = way { Some(n) } else { None });
        self.write_relays(record, &ends)?;
        self.relay_ways(record, guest, &ends, fresh)
    }

    /// The guest has come: the relay to where it was is not needed any more, and the next hand-over has new keys.
    ///
    /// # Errors
    /// It cannot be written down, or the relay does not end.
    pub(super) async fn guest_came(&self, record: &Record) -> anyhow::Result<()> {
        let mut ends = self.relays(record)?;
        if let Some(end) = ends.latest.and_then(|n| ends.ins.get_mut(&n)) {
            end.used = true;
        }
        let gone = ends.out.take();
        self.write_relays(record, &ends)?;
        if gone.is_some() {
            self.end_relay(record, Way::Out).await?;
        }
        Ok(())
    }

    /// The guest goes: from now on what comes for it leaves through the relay, if there is one; or (`away` false) it
    /// stays.
    ///
    /// # Errors
    /// It cannot be written down, or the route is not taken.
    pub(super) fn guest_goes(&self, record: &Record, guest: &GuestSpec, away: bool) -> anyhow::Result<()> {
        let mut ends = self.relays(record)?;
        ends.away = away && ends.out.is_some();
        self.write_relays(record, &ends)?;
        self.guest_way(record, guest, ends.away)
    }

    fn guest_way(&self, record: &Record, guest: &GuestSpec, away: bool) -> anyhow::Result<()> {
        let name = self.namespace(&record.spec.instance);
        let (old, new) = guest_way(guest, away);
        netns::ip_tries(Some(&name), &old)?;
        Ok(netns::ip_batch(Some(&name), &new)?)
    }

    /// Has everything be as it is written down: after a restart, or when a relay ended.
    ///
    /// # Errors
    /// A relay does not start, or the rules are not taken.
    pub(super) async fn relays_up(&self, record: &Record, guest: &GuestSpec) -> anyhow::Result<()> {
        let ends = self.relays(record)?;
        let mut lame = false;
        for (way, end) in all(&ends) {
            if end.peer.is_some() && self.find_relay(record, way).is_none() {
                lame = true;
                self.start_relay(record, way, end).await?;
            }
        }
        if lame { self.relay_ways(record, guest, &ends, false) } else { Ok(()) }
    }

    /// Ends the relays of a cell that is taken down.
    ///
    /// # Errors
    /// One does not end.
    pub(super) async fn end_relays(&self, record: &Record) -> anyhow::Result<()> {
        for (way, _) in all(&self.relays(record)?) {
            self.end_relay(record, way).await?;
        }
        Ok(())
    }

    /// Rules and routes of a cell's relays. The way back through each is made with its device. `fresh`: there are none
    /// yet that would be in the way.
    fn relay_ways(&self, record: &Record, guest: &GuestSpec, ends: &Ends, fresh: bool) -> anyhow::Result<()> {
        let name = self.namespace(&record.spec.instance);
        let ins: Vec<u8> = ends.ins.iter().filter(|(_, end)| end.peer.is_some()).map(|(n, _)| *n).collect();
        let with = |out: &End| ends.ins.iter().find(|(_, end)| end.with == out.with).map(|(n, _)| *n);
        let opposite = ends.out.as_ref().and_then(with);
        let (comings, out) = (ends.comings, ends.out.is_some());
        let relays = Relays { guest: guest.address, ports: &guest.ports, ins: &ins, opposite, comings, out };
        let (mut old, mut new) = guest_way(guest, ends.away);
        old.extend(ins.iter().map(|n| format!("rule del {}", relay_route_rule(*n))));
        if fresh {
            old.clear();
        }
        for n in &ins {
            let [nowhere, _] = relay_routes(*n);
            new.extend([nowhere, format!("rule add {}", relay_route_rule(*n))]);
        }
        // Beside each other: either program takes some milliseconds to start, and a guest may stand still.
        std::thread::scope(|scope| {
            let rules = scope.spawn(|| cell::nft(&netns::path(&name), &relay_rules(&relays)));
            netns::ip_tries(Some(&name), &old)?;
            netns::ip_batch(Some(&name), &new)?;
            rules.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn relay_path(&self, record: &Record, way: Way, extension: &str) -> PathBuf {
        self.records.folder(&record.spec.instance).join(format!("{}.{extension}", way.device()))
    }

    /// A new end: what went by its device before ends, for it has the key's file and maybe the port.
    async fn new_end(&self, record: &Record, way: Way) -> anyhow::Result<Option<Offer>> {
        let Some(SocketAddr::V4(serving)) = self.config.transfer_listen else { return Ok(None) };
        self.end_relay(record, way).await?;
        let mut taken = Vec::new();
        for other in self.records.all().iter().filter(|r| r.spec.singleton.is_some()) {
            let ends = self.relays(other)?;
            let others = all(&ends).filter(|(w, _)| other.spec.instance != record.spec.instance || *w != way);
            taken.extend(others.map(|(_, end)| end.own.at.port()).collect::<Vec<u16>>());
        }
        let free = |port: &u16| !taken.contains(port) && UdpSocket::bind((*serving.ip(), *port)).is_ok();
        let port = RELAY_PORTS.clone().find(free);
        let port = port.with_context(|| {
            format!("UDP ports {} to {} of {} are all taken", RELAY_PORTS.start(), RELAY_PORTS.end(), serving.ip())
        })?;
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(|e| anyhow::anyhow!("this machine has no random bytes: {e}"))?;
        let secret = StaticSecret::from(secret);
        let file = self.relay_path(record, way, "key");
        let write = || {
            use std::io::Write;
            let _ = std::fs::remove_file(&file);
            let mut key = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file)?;
            key.write_all(STANDARD.encode(secret.to_bytes()).as_bytes())
        };
        write().with_context(|| format!("cannot write {}", file.display()))?;
        let key = STANDARD.encode(PublicKey::from(&secret).as_bytes());
        Ok(Some(Offer { at: SocketAddrV4::new(*serving.ip(), port), key }))
    }

    /// Starts a relay that does not run, or runs with something else, and waits until its device is there; then what
    /// came by it finds its way back.
    ///
    /// # Errors
    /// It does not come up.
    pub(super) async fn start_relay(&self, record: &Record, way: Way, end: &End) -> anyhow::Result<()> {
        let Some(peer) = &end.peer else { return Ok(()) };
        let (config, status, log) = (
            self.relay_path(record, way, "toml"),
            self.relay_path(record, way, "json"),
            self.relay_path(record, way, "log"),
        );
        let text = toml::to_string(&RelayFile {
            netns: netns::path(&self.namespace(&record.spec.instance)),
            device: way.device(),
            address: way.address(),
            listen: end.own.at,
            peer: peer.at,
            key_file: self.relay_path(record, way, "key"),
            peer_key: peer.key.clone(),
            status: status.clone(),
        })?;
        let is_it = || std::fs::read_to_string(&config).is_ok_and(|there| there == text);
        let relay = match self.find_relay(record, way).filter(|_| is_it()) {
            Some(relay) => relay,
            None => {
                self.end_relay(record, way).await?;
                let _ = std::fs::remove_file(&status);
                crate::replace(&config, text.as_bytes())
                    .with_context(|| format!("cannot write {}", config.display()))?;
                let output = std::fs::File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
                let child = tokio::process::Command::new(&self.program)
                    .args(["relay", "--config"])
                    .arg(&config)
                    .stdin(Stdio::null())
                    .stdout(output.try_clone()?)
                    .stderr(output)
                    .process_group(0)
                    .spawn()
                    .with_context(|| format!("cannot start {} relay", self.program.display()))?;
                process::started(&child).await?
            }
        };
        // It writes its status when the device is there. Whoever started it may have been given up before the way back
        // was made: that is made again.
        let deadline = Instant::now() + DEVICE_LIMIT;
        while !status.exists() {
            if !process::is_alive(&relay) {
                bail!("the relay of {} ended: {}", record.spec.instance, process::tail(&log));
            }
            if Instant::now() > deadline {
                bail!("the relay of {} does not come up: {}", record.spec.instance, process::tail(&log));
            }
            tokio::time::sleep(LOOK).await;
        }
        if let Way::In(n) = way {
            let [_, back] = relay_routes(n);
            netns::ip_batch(Some(&self.namespace(&record.spec.instance)), &[back])?;
        }
        Ok(())
    }

    fn find_relay(&self, record: &Record, way: Way) -> Option<process::Process> {
        let config = self.relay_path(record, way, "toml");
        let config = config.to_str();
        let is = |p: &process::Process| p.arguments.iter().any(|a| a == "relay") && p.value("--config") == config;
        process::all().into_iter().find(is)
    }

    async fn end_relay(&self, record: &Record, way: Way) -> anyhow::Result<()> {
        match self.find_relay(record, way) {
            Some(relay) => process::end(&relay, GRACE)
                .await
                .with_context(|| format!("cannot end relay {} of {}", way.device(), record.spec.instance)),
            None => Ok(()),
        }
    }
}

/// What `ip` is told so that packets for the guest go where it is: what may not be there to be removed, and what is to be.
fn guest_way(guest: &GuestSpec, away: bool) -> (Vec<String>, Vec<String>) {
    let to = guest.address;
    if away {
        return (Vec::new(), vec![format!("route replace {to}/32 dev {RELAY_OUT}")]);
    }
    // It is not asked for: what comes for it waits until it wakes.
    let near = format!("neigh replace {to} lladdr {} dev {BRIDGE} nud permanent", guest.mac);
    (vec![format!("route del {to}/32 dev {RELAY_OUT}")], vec![near])
}

fn all(ends: &Ends) -> impl Iterator<Item = (Way, &End)> {
    ends.ins.iter().map(|(n, end)| (Way::In(*n), end)).chain(ends.out.iter().map(|end| (Way::Out, end)))
}
