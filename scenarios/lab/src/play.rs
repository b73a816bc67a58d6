//! Plays a scenario: brings a lab up, lets the crowd loose, records, checks, takes everything down.
//!
//! ```text
//! up ─▶ staged, serving at home ─▶ knock ─▶ clients ∥ orders ∥ faults ∥ watching ─▶ dormant again ─▶ scan
//!    ─▶ the outcome is told ─▶ (kept up) ─▶ down
//! ```

use crate::clients::{ClientRegion, Clients, regions};
use crate::cpa::Cpa;
use crate::lab::{Lab, PlayOptions, Told};
use crate::outcome::{ChecksFailed, LeftBehind, NotInTime, shortfalls};
use crate::stop::{going, interrupted};
use crate::wan::WanStats;
use crate::watch::Watched;
use crate::{leftovers, probe, scan};
use anyhow::{Context, bail};
use std::net::Ipv4Addr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};
use vmatrix_model::plan::{Cause, Decision};
use vmatrix_model::{NetworkId, Span, Time};
use vmatrix_replay::arrivals::arrivals;
use vmatrix_replay::recording::{Ports, Recording, Request, StepAt};
use vmatrix_replay::scenario::{Daemon, Fault, Scenario};

/// Until every image is at every network and every service serves at home.
const READY_PATIENCE: Duration = Duration::from_secs(420);
/// Until everything sleeps again after the play.
const DORMANT_PATIENCE: Duration = Duration::from_secs(120);
/// How often the CPA is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A second more than the emulator takes to flush its capture.
const FLUSH: Duration = Duration::from_millis(2000);
/// Lines of explanation kept.
const EXPLAIN_MAX: usize = 200;

/// Plays `scenario` for real. Blocks; not to be called from inside a runtime. SIGINT and SIGTERM take
/// everything down and end it with an error.
///
/// `tell` gets the outcome while the lab is still up, so that it is told before the lab is kept up for
/// hours; what it makes of the outcome is the result. It is not called if the lab did not come up.
///
/// # Errors
/// [`Missing`](crate::needs::Missing), [`NotInTime`], [`ChecksFailed`], [`LeftBehind`], or the step that failed.
pub fn play<T>(
    scenario: &Scenario,
    options: &PlayOptions,
    tell: impl FnOnce(anyhow::Result<Recording>) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("no runtime")?;
    let before = leftovers::look(None);
    let (told, id) = runtime.block_on(async {
        let stop = interrupted()?;
        let lab = Lab::up(scenario, options, &|| going(&stop))?;
        let id = lab.place.id.clone();
        let play = Play::new(scenario, options, &lab, stop.clone())?;
        let mut stopped = stop.clone();
        let result = tokio::select! {
            result = play.run() => result,
            _ = stopped.wait_for(|s| *s) => going(&stop).map(|()| Recording::default()),
        };
        let result = result.and_then(|recording| play.judged(recording));
        // Whoever pressed Ctrl-C knows why.
        let result = result.map_err(|e| if *stop.borrow() { e } else { lab.explained(e) });
        let told = tell(result);
        if options.keep && !*stop.borrow() {
            options
                .step(format!("the lab stays up at http://{}/ until Ctrl-C or `vmatrix lab down {id}`", lab.dashboard));
            let _ = stop.clone().wait_for(|s| *s).await;
        }
        options.step("taking the lab down");
        let ended = lab.down();
        // What went wrong first is what matters.
        let told = told?;
        ended?;
        anyhow::Ok((told, id))
    })?;
    let left = leftovers::diff(&before, &leftovers::look(Some(&id)));
    if left.is_empty() { Ok(told) } else { Err(LeftBehind { id, left }.into()) }
}

/// Brings a lab up without a crowd and keeps it up until SIGINT, SIGTERM or [`down`](crate::down).
///
/// # Errors
/// As [`play`].
pub fn up(scenario: &Scenario, options: PlayOptions) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("no runtime")?;
    runtime.block_on(async {
        let stop = interrupted()?;
        let lab = Lab::up(scenario, &options, &|| going(&stop))?;
        options.step(format!("lab {} is up; Ctrl-C or `vmatrix lab down {}` ends it", lab.place.id, lab.place.id));
        let _ = stop.clone().wait_for(|s| *s).await;
        lab.down()
    })
}

/// What the capture of the WAN held.
#[derive(Default)]
struct Seen {
    canary_bytes: u64,
    control: u64,
}

struct Play<'a> {
    scenario: &'a Scenario,
    options: &'a PlayOptions,
    lab: &'a Lab,
    cpa: Cpa,
    clients: std::sync::Arc<Clients>,
    regions: Vec<ClientRegion>,
    stop: watch::Receiver<bool>,
    watched: Mutex<Watched>,
    explain: Mutex<Vec<String>>,
    notes: Mutex<Vec<String>>,
    steps: Mutex<Vec<StepAt>>,
    ports: Mutex<Ports>,
    /// What broke a promise, one sentence each.
    failures: Mutex<Vec<String>>,
}

impl<'a> Play<'a> {
    fn new(
        scenario: &'a Scenario,
        options: &'a PlayOptions,
        lab: &'a Lab,
        stop: watch::Receiver<bool>,
    ) -> anyhow::Result<Play<'a>> {
        Ok(Play {
            scenario,
            options,
            lab,
            cpa: Cpa::at(lab.dashboard, &lab.token)?,
            clients: Clients::of(scenario)?,
            regions: regions(&scenario.fleet, |s| lab.place.namespace(s)),
            stop,
            watched: Mutex::default(),
            explain: Mutex::default(),
            notes: Mutex::default(),
            steps: Mutex::default(),
            ports: Mutex::default(),
            failures: Mutex::default(),
        })
    }

    async fn run(&self) -> anyhow::Result<Recording> {
        self.until_ready().await?;
        self.knock()?;
        if self.options.capture && !self.lab.capture() {
            bail!("the WAN emulator does not run, so nothing is captured");
        }
        self.options.step("the play begins");
        let start = now();
        let requests = self.perform(start).await?;
        self.read_back()?;
        let returned_to_dormant = self.until_dormant().await;
        self.explain_all().await;
        let seen = if self.options.capture { self.scan().await? } else { Seen::default() };
        self.note_crashes();

        let (writes, lost_writes, read_across) = {
            let ledger = self.clients.ledger();
            (ledger.writes(), ledger.lost(), ledger.across())
        };
        let watched = lock(&self.watched);
        let (instances, decisions) = watched.since(start);
        Ok(Recording {
            accelerator: watched.accelerator(),
            requests,
            decisions,
            instances,
            steps: lock(&self.steps).clone(),
            bytes_moved: watched.bytes_moved(),
            returned_to_dormant,
            writes,
            lost_writes,
            read_across,
            plaintext_bytes_on_wan: seen.canary_bytes,
            control_seen: seen.control,
            ports: *lock(&self.ports),
            explain: lock(&self.explain).clone(),
            notes: lock(&self.notes).clone(),
        })
    }

    async fn until_ready(&self) -> anyhow::Result<()> {
        self.options.step("staging images at every network and resuming every service at home");
        let deadline = Instant::now() + READY_PATIENCE;
        let mut said = (0, 0);
        loop {
            self.look().await;
            let (waits, staged) = {
                let watched = lock(&self.watched);
                (watched.not_ready(), watched.staged())
            };
            if said != (staged.0.0, staged.1.0) {
                said = (staged.0.0, staged.1.0);
                (self.options.tell)(Told::Staging { present: said.0, total: said.1 });
            }
            if waits.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(NotInTime { what: waits.join("; "), patience: READY_PATIENCE }.into());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Hears a snapshot, if the CPA gives one; asks for the reasons of what is new.
    async fn look(&self) {
        let Ok(snapshot) = self.cpa.snapshot().await else { return };
        let fresh = lock(&self.watched).hear(now(), snapshot);
        for decision in fresh {
            self.explain_one(&decision).await;
        }
    }

    async fn explain_one(&self, decision: &Decision) {
        if decision.plan.cause == Cause::Start {
            return;
        }
        let moves = decision.plan.moves.iter().map(ToString::to_string);
        self.explained(moves.chain(decision.plan.not.iter().map(ToString::to_string)).collect());
    }

    async fn explain_all(&self) {
        for service in &self.scenario.fleet.services {
            if let Ok(explanation) = self.cpa.explain(&service.name).await {
                self.explained(explanation.lines);
            }
        }
    }

    fn explained(&self, lines: Vec<String>) {
        let mut explain = lock(&self.explain);
        for line in lines {
            if explain.len() < EXPLAIN_MAX && !explain.contains(&line) {
                explain.push(line);
            }
        }
    }

    /// While every service serves at home, so that cells have neighbours.
    fn knock(&self) -> anyhow::Result<()> {
        let fleet = &self.scenario.fleet;
        let Some(region) = self.regions.first() else { return Ok(()) };
        let outside = probe::from_region(fleet, &region.namespace)?;
        let snapshot = lock(&self.watched).latest.clone().context("the CPA has not answered")?;
        let inside = probe::from_cells(&self.lab.place, &snapshot, &self.lab.listening)?;
        *lock(&self.ports) = Ports {
            tried_from_wan: outside.tried as u64,
            tried_from_cells: inside.tried as u64,
            answered: (outside.answered.len() + inside.answered.len()) as u64,
        };
        lock(&self.failures).extend(
            outside.answered.into_iter().chain(inside.answered).map(|a| format!("{a}, although nothing declares it")),
        );
        Ok(())
    }

    /// The play itself: everything at once, until the last client has its answer.
    async fn perform(&self, start: Time) -> anyhow::Result<Vec<Request>> {
        let began = Instant::now();
        let (results, mut heard) = mpsc::unbounded_channel();
        let all = arrivals(self.scenario);
        let mut threads = Vec::new();
        for region in &self.regions {
            let own = all.iter().filter(|a| a.region == region.name).cloned().collect();
            threads.push(self.clients.begin(region.clone(), own, began, self.stop.clone(), results.clone())?);
        }
        drop(results);
        let over = began + Duration::from_secs(u64::from(self.scenario.length_s));
        let clients = async {
            let mut requests = Vec::new();
            while let Some(request) = heard.recv().await {
                requests.push(request);
            }
            tokio::time::sleep_until(over.into()).await;
            requests
        };
        let aside = async { tokio::join!(self.watch(began), self.give_orders(began), self.strike(began, start)) };
        let mut requests = tokio::select! {
            requests = clients => requests,
            _ = aside => bail!("watching ended before the play"),
        };
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("a client thread panicked"))??;
        }
        requests.sort_by(|a, b| (a.at, &a.service, &a.region).cmp(&(b.at, &b.service, &b.region)));
        Ok(requests)
    }

    async fn watch(&self, began: Instant) {
        let mut second = 0;
        loop {
            self.look().await;
            let passed = began.elapsed().as_secs() as u32;
            if passed > second && passed <= self.scenario.length_s {
                second = passed;
                (self.options.tell)(Told::Playing { second, length_s: self.scenario.length_s });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn give_orders(&self, began: Instant) {
        let mut orders: Vec<_> = self.scenario.orders.iter().collect();
        orders.sort_by_key(|o| o.at_s);
        for timed in orders {
            tokio::time::sleep_until((began + Duration::from_secs(u64::from(timed.at_s))).into()).await;
            match self.cpa.order(&timed.order()).await {
                Ok(decision) => self
                    .options
                    .step(format!("an operator's order for {} became {}", timed.service, decision.generation)),
                Err(e) => {
                    self.fail(format!("the order for {} at {} s was not carried out: {e:#}", timed.service, timed.at_s))
                }
            }
        }
        std::future::pending::<()>().await;
    }

    async fn strike(&self, began: Instant, start: Time) {
        let mut left: Vec<&Fault> = self.scenario.faults.iter().collect();
        loop {
            let (passed, burst) = (began.elapsed().as_secs_f64(), lock(&self.watched).burst_at(start));
            let due = |f: &Fault| match (f.at_s, f.after_decision_s) {
                (Some(at), _) => passed >= f64::from(at),
                (None, Some(after)) => burst.is_some_and(|b| passed >= b.since(start).as_secs_f64() + after),
                (None, None) => false,
            };
            let (now_due, later): (Vec<&Fault>, Vec<&Fault>) = left.into_iter().partition(|f| due(f));
            left = later;
            for fault in now_due {
                let name = daemon_name(fault);
                let killed = self.lab.daemons.fail(&name, Duration::from_secs(u64::from(fault.restart_after_s)));
                let how = if killed { "killed" } else { "to be killed, but was not running," };
                let line = format!(
                    "{name} {how} at {:.1} s, to be started again {} s later",
                    began.elapsed().as_secs_f64(),
                    fault.restart_after_s
                );
                let at = Time(began.elapsed().as_micros() as u64);
                lock(&self.steps).push(StepAt { at, verb: "kill".into(), what: name });
                self.options.step(line.clone());
                self.note(line);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Reads every write through every network that serves, while more than one may.
    fn read_back(&self) -> anyhow::Result<()> {
        let fleet = &self.scenario.fleet;
        let Some(region) = self.regions.last() else { return Ok(()) };
        for service in &fleet.services {
            if self.clients.ledger().acknowledged(&service.name).next().is_none() {
                continue;
            }
            let serving = lock(&self.watched).serving(&service.name);
            let networks: Vec<(NetworkId, Ipv4Addr)> =
                serving.into_iter().filter_map(|n| Some((n.clone(), fleet.vip(&service.name, &n)?))).collect();
            self.options.step(format!(
                "reading every write of {} back through {} networks",
                service.name,
                networks.len()
            ));
            let unread = self.clients.read_all(region, &service.name, &networks)?;
            lock(&self.notes).extend(unread);
        }
        Ok(())
    }

    async fn until_dormant(&self) -> bool {
        self.options.step("waiting until everything sleeps again");
        let deadline = Instant::now() + DORMANT_PATIENCE;
        loop {
            self.look().await;
            let waits = lock(&self.watched).not_dormant();
            if waits.is_empty() {
                return true;
            }
            if Instant::now() > deadline {
                self.note(format!("not dormant after {} s: {}", DORMANT_PATIENCE.as_secs(), waits.join("; ")));
                return false;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Looks for the canary and the control in the capture.
    async fn scan(&self) -> anyhow::Result<Seen> {
        tokio::time::sleep(FLUSH).await;
        let stats: WanStats = std::fs::read(self.lab.place.stats_file())
            .map_err(anyhow::Error::from)
            .and_then(|b| Ok(serde_json::from_slice(&b)?))
            .context("the WAN's counters")?;
        let found = scan::occurrences(
            &self.lab.place.capture_file(),
            &[self.clients.canary.as_bytes(), self.clients.control.as_bytes()],
        )?;
        let (canary, control) = (found.first().copied().unwrap_or(0), found.get(1).copied().unwrap_or(0));
        self.note(format!("{} packets were captured; the control was seen {control} times", stats.captured));
        if stats.capture_full {
            self.fail("the capture ran full, so the end of the play was not looked at".into());
        }
        if control == 0 && self.clients.any_plain() {
            self.fail("the capture is blind: the control, which was sent unencrypted, is not in it".into());
        }
        Ok(Seen { canary_bytes: canary * self.clients.canary.len() as u64, control })
    }

    fn fail(&self, line: String) {
        lock(&self.failures).push(line);
    }

    /// The recording, if the play kept its promises.
    fn judged(&self, recording: Recording) -> anyhow::Result<Recording> {
        let mut failures = std::mem::take(&mut *lock(&self.failures));
        failures.extend(shortfalls(&recording));
        if failures.is_empty() {
            Ok(recording)
        } else {
            Err(ChecksFailed { failures, recording: Box::new(recording) }.into())
        }
    }

    fn note(&self, line: String) {
        lock(&self.notes).push(line);
    }

    /// Daemons that ended by themselves; for the emulator that is a failure, for its capture has a gap.
    fn note_crashes(&self) {
        let notes = self.lab.daemons.notes();
        lock(&self.failures).extend(
            notes.iter().filter(|n| n.starts_with("wan ")).map(|n| format!("{n}; part of the play was not captured")),
        );
        lock(&self.notes).extend(notes);
    }
}

/// The name that `layout` gave to a fault's daemon; of a network's machines the first.
fn daemon_name(fault: &Fault) -> String {
    let network = fault.network.as_ref().map_or("", NetworkId::as_str);
    match fault.kill {
        Daemon::Cpa => "cpa".into(),
        Daemon::Origin => "origin".into(),
        Daemon::Vma => format!("vma-{network}"),
        Daemon::Edge => format!("edge-{network}"),
        Daemon::Machine => format!("machine-{network}-1"),
    }
}

fn now() -> Time {
    Time(0) + Span(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64)
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{self, Place};
    use std::collections::BTreeSet;

    #[test]
    fn every_fault_names_a_daemon_that_the_lab_starts() {
        let scenario =
            Scenario::read(std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../library/flash-crowd.toml")))
                .unwrap();
        let place = Place { id: "a1b2".into(), folder: "/run/lab".into(), store: "/store".into() };
        let names: BTreeSet<String> =
            layout::daemons(&scenario.fleet, &place, &[]).unwrap().into_iter().map(|d| d.name).collect();
        for kill in [Daemon::Cpa, Daemon::Origin, Daemon::Vma, Daemon::Edge, Daemon::Machine] {
            let network = (!matches!(kill, Daemon::Cpa | Daemon::Origin)).then(|| "tokyo".parse().unwrap());
            let name = daemon_name(&Fault { at_s: Some(1), after_decision_s: None, kill, network, restart_after_s: 1 });
            assert!(names.contains(&name), "{name} is not among {names:?}");
        }
    }
}
