//! `vmatrix machine` at the target, driven as a VM agent drives it.
//!
//! ```text
//! store (source) ══ warm mTLS connection ══ machine (target, empty)
//! order ─▶ POST /v1/step prepare (cell; the image begins to come) ─▶ POST /v1/step resume ─▶ client: answer
//! ```
//! A machine is started anew, with an empty state folder, for each run that must find a cold network.

use crate::Bench;
use crate::client::{self, Pace, Request};
use crate::fleet::{Fleet, ORIGIN_PORT, START_LIMIT, STORE_PORT, daemon, until_listening};
use crate::guests::Image;
use crate::place::Place;
use crate::process::Running;
use crate::report::Sample;
use crate::stop::Stop;
use crate::world::Site;
use anyhow::{Context, bail};
use serde_json::json;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vmatrix_model::InstanceId;
use vmatrix_model::assignment::Singleton;
use vmatrix_model::inventory::ImageSeen;
use vmatrix_vma_core::steps::{BackendAddress, CellSpec, Outcome, Seen, Step};
use vmatrix_vma_image::sign;
use vmatrix_vma_transfer::identity::Role;

const MACHINE_PORT: u16 = 8451;
/// Where a machine gives others what it has.
const PEER_PORT: u16 = 8452;
/// What a step may take: the machine gives up before.
const STEP_LIMIT: Duration = Duration::from_secs(90);
/// One request of a guest that runs.
const REQUEST_LIMIT: Duration = Duration::from_secs(20);
/// Resumes that are asked for before a guest is given up; each brings what the one before lacked.
const RESUMES_MAX: u32 = 8;
/// Largest answer of a machine that is read.
const ANSWER_MAX: u64 = 4 << 20;
/// A daemon ends in some 100 ms; its guests are swept away after it.
const PATIENCE: Duration = Duration::from_secs(3);

/// A machine's daemon, with nothing on it unless its folder was kept.
pub struct Machine<'a> {
    insist: bool,
    place: &'a Place,
    /// Names of its cells begin with it.
    cells: String,
    fleet: &'a Fleet,
    site: &'a Site,
    process: Option<Running>,
    log: PathBuf,
    state: PathBuf,
    listen: SocketAddrV4,
}

/// How a machine is set up.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Whom it asks for images, beside the store.
    pub peers: Vec<Ipv4Addr>,
    /// Cap on what it fetches in the background, Mbit/s.
    pub rate_mbit: Option<u64>,
    /// Memory lent to guests, MiB.
    pub memory_mib: u64,
    /// A resume that the machine gave up is asked for again, as a VM agent does.
    pub insist: bool,
    /// Where the origin's gateway is, if that is not where the store is.
    pub origin: Option<Ipv4Addr>,
    /// What a machine at this site kept is still there.
    pub kept: bool,
}

impl<'a> Machine<'a> {
    /// Starts one at `site` that fetches from the store at `source`, and waits until its connection is warm.
    ///
    /// # Errors
    /// It does not start, with its words.
    pub fn start(
        bench: &'a Bench,
        fleet: &'a Fleet,
        site: &'a Site,
        source: Ipv4Addr,
        setup: &Setup,
    ) -> anyhow::Result<Machine<'a>> {
        let state = bench.place.disk().join(format!("m-{}", site.name));
        if !setup.kept {
            let _ = fs::remove_dir_all(&state);
            let _ = fs::remove_dir_all(bench.place.memory().join(prefix(bench, site)));
        }
        fs::create_dir_all(&state).with_context(|| format!("cannot make {}", state.display()))?;
        let listen = SocketAddrV4::new(site.address, MACHINE_PORT);
        let sources: Vec<SocketAddrV4> = std::iter::once(SocketAddrV4::new(source, STORE_PORT))
            .chain(setup.peers.iter().map(|peer| SocketAddrV4::new(*peer, PEER_PORT)))
            .collect();
        let mut config = json!({
            "name": format!("m-{}", site.name),
            "network": site.name,
            "listen": listen,
            "state_dir": state,
            "token_file": fleet.token_file(),
            // Nobody is there: steps come from the bench.
            "vma": format!("http://{}:8441", site.address),
            "identity": fleet.identity(Role::Machine, &format!("m-{}", site.name))?,
            "sources": sources,
            "transfer_listen": SocketAddrV4::new(site.address, PEER_PORT),
            "memory_dir": bench.place.memory(),
            "origin": format!("http://{}:{ORIGIN_PORT}", setup.origin.unwrap_or(source)),
            "cpus": 64,
            "memory_mib": setup.memory_mib,
            "cells": cells(site)?,
            "cell_prefix": prefix(bench, site),
            "signers": [sign::public(&bench.store)?],
        });
        if let (Some(rate), Some(object)) = (setup.rate_mbit, config.as_object_mut()) {
            object.insert("rate_mbit".to_owned(), json!(rate));
        }
        let name = format!("machine-{}", site.name);
        let mut process = daemon(bench, fleet, "machine", &name, &config, site)?;
        until_listening(&bench.stop, &mut process, site, listen)?;
        let log = bench.place.disk().join(format!("{name}.log"));
        bench.stop.until("the machine's warm connection", START_LIMIT, Duration::from_millis(10), || {
            process.check()?;
            Ok(fs::read_to_string(&log).unwrap_or_default().contains("sources of images").then_some(()))
        })?;
        let cells = format!("{}-", prefix(bench, site));
        Ok(Machine {
            insist: setup.insist,
            place: &bench.place,
            cells,
            fleet,
            site,
            process: Some(process),
            log,
            state,
            listen,
        })
    }

    /// Asks for one step; answers what the machine has after it.
    ///
    /// # Errors
    /// The machine does not answer, or says what went wrong.
    pub fn step(&self, step: &Step) -> anyhow::Result<Seen> {
        let body = serde_json::to_vec(step)?;
        let answer = self.exchange("POST", "/v1/step", &body)?;
        let outcome: Outcome = serde_json::from_slice(&answer).context("cannot understand the machine's answer")?;
        match outcome.fault {
            None => Ok(outcome.seen),
            Some(fault) => bail!("{} on {}: {}; {}", step.verb(), self.site.name, fault.problem, fault.hint),
        }
    }

    /// What the machine has.
    ///
    /// # Errors
    /// The machine does not answer.
    pub fn seen(&self) -> anyhow::Result<Seen> {
        let answer = self.exchange("GET", "/v1/seen", b"")?;
        serde_json::from_slice(&answer).context("cannot understand the machine's answer")
    }

    fn exchange(&self, method: &str, path: &str, body: &[u8]) -> anyhow::Result<Vec<u8>> {
        let what = || format!("{method} {path} of the machine at {}", self.site.name);
        let exchange = || -> std::io::Result<Vec<u8>> {
            let mut stream = TcpStream::connect_timeout(&self.listen.into(), REQUEST_LIMIT)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(STEP_LIMIT))?;
            let head = format!(
                "{method} {path} HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\n\
                 Content-Length: {}\r\nConnection: close\r\n\r\n",
                self.listen,
                self.fleet.token(),
                body.len()
            );
            stream.write_all(&[head.as_bytes(), body].concat())?;
            let mut answer = Vec::new();
            stream.take(ANSWER_MAX).read_to_end(&mut answer)?;
            Ok(answer)
        };
        let answer = self.site.namespace.run(exchange)?.with_context(what)?;
        let end = answer.windows(4).position(|w| w == b"\r\n\r\n").with_context(what)?;
        let (head, body) = answer.split_at(end + 4);
        let head = String::from_utf8_lossy(head);
        if head.split(' ').nth(1) != Some("200") {
            bail!("{}: {}", what(), String::from_utf8_lossy(body));
        }
        Ok(body.to_vec())
    }

    /// Has the whole image come, and waits for it.
    ///
    /// # Errors
    /// It does not come within `limit`.
    pub fn stage_whole(&self, bench: &Bench, image: &str, limit: Duration) -> anyhow::Result<()> {
        self.step(&Step::Stage { service: image.parse()?, image: image.to_owned(), urgent: false })?;
        self.until_whole(bench, image, limit)
    }

    /// Waits until all of an image is here.
    ///
    /// # Errors
    /// It does not come within `limit`.
    pub fn until_whole(&self, bench: &Bench, image: &str, limit: Duration) -> anyhow::Result<()> {
        self.until_image(bench, image, limit, |seen| seen.complete())
    }

    /// Waits until the machine has found by itself that its sources have another image of this name, and has it.
    ///
    /// # Errors
    /// It does not come within `limit`.
    pub fn until_renewed(&self, bench: &Bench, image: &Image, limit: Duration) -> anyhow::Result<()> {
        self.until_image(bench, &image.manifest.name, limit, |seen| seen.complete() && seen.digest == image.digest)
    }

    fn until_image(
        &self,
        bench: &Bench,
        image: &str,
        limit: Duration,
        is_it: impl Fn(&ImageSeen) -> bool,
    ) -> anyhow::Result<()> {
        bench.stop.until(&format!("all of {image} at {}", self.site.name), limit, Duration::from_millis(20), || {
            let seen = self.seen()?;
            let Some(staged) = seen.images.iter().find(|i| i.image == image) else { return Ok(None) };
            if let Some(fault) = &staged.trouble {
                bail!("{image} does not come: {}", fault.problem);
            }
            Ok(staged.seen.as_ref().filter(|s| is_it(s)).map(drop))
        })
    }

    /// Orders an instance of `image` and measures until a client at the target has its answer.
    ///
    /// # Errors
    /// A step fails, or no correct answer comes.
    pub fn order(&self, bench: &Bench, image: &Image, number: u32, run: u64) -> anyhow::Result<(Sample, Request)> {
        self.order_from(bench, image, (number, None), run)
    }

    /// As [`Machine::order`], for the one instance of a singleton, which comes from where `from` says.
    ///
    /// # Errors
    /// A step fails, or no correct answer comes.
    pub fn order_singleton(
        &self,
        bench: &Bench,
        image: &Image,
        from: Singleton,
        run: u64,
    ) -> anyhow::Result<(Sample, Request)> {
        self.order_from(bench, image, (0, Some(from)), run)
    }

    fn order_from(
        &self,
        bench: &Bench,
        image: &Image,
        (number, singleton): (u32, Option<Singleton>),
        run: u64,
    ) -> anyhow::Result<(Sample, Request)> {
        let instance = InstanceId { service: image.manifest.name.parse()?, number };
        let spec = cell_of(image, &instance, singleton);
        let began = Instant::now();
        let seen = self.step(&Step::Prepare(spec))?;
        let prepared = began.elapsed();
        let cell = seen.cells.iter().find(|c| c.instance == instance).context("the cell was not made")?;
        let request = image.kind.request(cell.address, &bench.known, run)?;
        let ended = Stop::default();
        let answered = std::thread::scope(|scope| {
            let stop = bench.stop.or(&ended);
            let (inside, request) = (&self.site.namespace, &request);
            let client =
                scope.spawn(move || client::until_answered(inside, (request, Pace::Guarded), began, STEP_LIMIT, &stop));
            let tries = if self.insist { RESUMES_MAX } else { 1 };
            let resume = |_| self.step(&Step::Resume { instance: instance.clone() });
            let mut resumed = resume(0);
            for again in 1..tries {
                if resumed.is_ok() || bench.stop.check().is_err() {
                    break;
                }
                resumed = resume(again);
            }
            if let Err(e) = resumed {
                ended.ask();
                let _ = client.join();
                return Err(e.context(crate::process::last_words(&self.log)));
            }
            client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        let next = image.kind.request(request.to.ip().to_owned(), &bench.known, run + 1)?;
        let mut sample = crate::baseline::follow(&self.site.namespace, &next, answered)?;
        sample.more.push(("prepare_ms_median", crate::report::ms(prepared)));
        self.note_woken(&instance, &mut sample);
        Ok((sample, request))
    }

    /// Brings the one instance of a singleton here, with the ports of its image.
    ///
    /// # Errors
    /// A step fails.
    pub fn move_here(&self, image: &Image, from: Singleton) -> anyhow::Result<()> {
        let instance = InstanceId { service: image.manifest.name.parse()?, number: 0 };
        self.step(&Step::Prepare(cell_of(image, &instance, Some(from))))?;
        self.step(&Step::Resume { instance }).map(drop)
    }

    /// Takes an instance down, and its cell.
    ///
    /// # Errors
    /// A step fails.
    pub fn release(&self, image: &Image, number: u32) -> anyhow::Result<()> {
        let instance = InstanceId { service: image.manifest.name.parse()?, number };
        self.step(&Step::Release { instance }).map(drop)
    }

    /// The machine's own account of a resume, from its log.
    fn note_woken(&self, instance: &InstanceId, sample: &mut Sample) {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let named = format!("instance={instance} ");
        let Some(line) = log.lines().rev().find(|l| l.contains("woken") && l.contains(&named)) else { return };
        let number = |name: &str| {
            let (_, after) = line.split_once(&format!("{name}="))?;
            after.split(|c: char| !c.is_ascii_digit()).next()?.parse::<f64>().ok()
        };
        for (name, key) in [
            ("critical_ms", "critical_ms_median"),
            ("spawned_ms", "spawned_ms_median"),
            ("served_ms", "served_ms_median"),
            ("loaded_ms", "loaded_ms_median"),
            ("awake_ms", "awake_ms_median"),
            ("healthy_ms", "healthy_ms_median"),
        ] {
            if let Some(value) = number(name) {
                sample.more.push((key, value));
            }
        }
        if let (Some(served), Some(loaded)) = (number("served_ms"), number("loaded_ms")) {
            sample.load_ms = Some(loaded - served);
        }
    }

    /// Where it gives others what it has, and hands over what it holds.
    pub fn peer(&self) -> SocketAddr {
        SocketAddrV4::new(self.site.address, PEER_PORT).into()
    }

    /// The daemon's process, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Running::pid)
    }

    /// Where its log is.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Where it keeps images.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The site it is at.
    pub fn site(&self) -> &Site {
        self.site
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            process.end(PATIENCE);
        }
        // Guests, pagers and cells outlive their machine's daemon, and the next one is to find none.
        self.place.clear(&self.cells, &self.state);
    }
}

/// The cell that an image asks for.
fn cell_of(image: &Image, instance: &InstanceId, singleton: Option<Singleton>) -> CellSpec {
    let guest = &image.manifest.guest;
    CellSpec {
        instance: instance.clone(),
        image: image.manifest.name.clone(),
        ports: guest.ports.clone(),
        backends: guest.backends.iter().map(|b| BackendAddress { address: b.address, port: b.port }).collect(),
        memory_mib: image.manifest.machine.memory_mib,
        singleton,
    }
}

/// Addresses of a site's cells: a /20 each, in the order of the sites' own addresses, so that no two cells that are
/// joined by a relay have the same.
fn cells(site: &Site) -> anyhow::Result<String> {
    let [_, _, number, _] = site.address.octets();
    let first = Ipv4Addr::new(100, 64, 0, 0).to_bits() + (u32::from(number) << 12);
    Ok(ipnet::Ipv4Net::new(Ipv4Addr::from_bits(first), 20)?.to_string())
}

/// Name of what a machine makes: namespaces of cells, its folder of memory.
fn prefix(bench: &Bench, site: &Site) -> String {
    bench.place.namespace_name(&format!("c{}", site.name))
}
