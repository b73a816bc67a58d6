//! Handing a singleton from machine to machine.
//!
//! ```text
//! taker                                             holder
//! relay end, key  ── meet ────────────────────────▶ relay end, key; the guest runs on
//! relay up, old state, tap ◀── build, state, relay ─┘
//! ── hand over ───────────────────────────────────▶ Saving ▸ packets go to the taker ▸ stop ▸ save ▸ Handed
//! Held ▸ state ▸ run ▸ what waits at the tap ◀── epoch, snapshot ─┘                    ▸ its QEMU ends
//! ```
//! Any machine of the fleet is handed what it asks for: which one is to ask, the placement says.
//!
//! Each state of [`vmatrix_vma_core::tenure`] is written down before what follows from it, on either side. Whoever was
//! killed goes on from there: a holder by itself, a taker when it is told to resume again. A question that is not
//! answered is asked again, and answered the same.

use super::image::Known;
use super::record::{Phase, Record};
use super::relay::{Offer, Way};
use super::singleton::{Held, SOURCES_MAX, Snapshot, Taker, Took, find};
use super::{Machine, process};
use anyhow::{Context, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::OwnedMutexGuard;
use tokio::task::JoinSet;
use vmatrix_model::assignment::Singleton;
use vmatrix_model::manifest::SignedManifest;
use vmatrix_model::{Digest, ServiceId};
use vmatrix_vma_core::tenure::{Asked, Part, Refused, Tenure};
use vmatrix_vma_image::qmp::Qmp;
use vmatrix_vma_image::sign::verify;
use vmatrix_vma_transfer::identity::Name;
use vmatrix_vma_transfer::{Error as TransferError, Fault};

/// Machines asked one after the other for who has it: a fleet's worth of moves that this one did not hear of.
const HOPS_MAX: u32 = 16;
/// A holder that says nothing for so long is asked again: saving takes a second on a busy machine.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Between questions that are not answered.
const AGAIN: Duration = Duration::from_millis(200);
/// Ends of a relay find each other within a round trip or two; without them the guest moves all the same.
const SHAKE_LIMIT: Duration = Duration::from_secs(3);

/// Longest beginning that is told with a hand-over: an answer has 64 KiB, in which text is escaped. What is longer is
/// opened like any image.
const BEGINNING_MAX: usize = 24 << 10;

/// What one machine asks another.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case", deny_unknown_fields)]
enum Question {
    /// What is needed to take it, while it runs on.
    Meet { service: ServiceId, asker: Taker },
    /// To have it.
    Hand { service: ServiceId, asker: Taker },
}

/// What it is answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case", deny_unknown_fields)]
enum Answer {
    Meets { state: State, relay: Option<Offer> },
    Handed { epoch: u64, state: State, begin: Option<Box<Beginning>>, relay: Option<Offer>, took: Took },
    Elsewhere { at: SocketAddr },
}

/// What of a snapshot is told with the hand-over itself, a round trip before anything can be asked for: enough to have
/// memory and disks served.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Beginning {
    pub manifest: SignedManifest,
    /// The first table as stored, in base64.
    pub first: String,
}

/// A singleton's state, by names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    image: String,
    built: Digest,
    /// None: the built image.
    snapshot: Option<Snapshot>,
    /// Who has what the answerer has not.
    sources: Vec<SocketAddr>,
}

impl State {
    fn of(held: &Held) -> State {
        let (image, built, snapshot) = (held.image.clone(), held.built, held.state.clone());
        State { image, built, snapshot, sources: held.sources.clone() }
    }
}

/// A singleton that was taken, and the tap at which what has come for it waits, unless a QEMU has that already.
pub struct Taken {
    pub held: Held,
    pub tap: Option<OwnedFd>,
}

/// What came of asking one machine.
#[derive(Debug)]
enum Got<T> {
    Here(T),
    Elsewhere(SocketAddr),
}

/// What a holder said of a singleton that runs on.
#[derive(Debug)]
struct Met {
    state: State,
    /// Our end of a relay, and theirs.
    relay: Option<(Way, Offer)>,
    asker: Taker,
    /// Our end, which is coming up.
    up: JoinSet<anyhow::Result<()>>,
}

/// A holder that is being met, and at which address. It ends with whoever waits for it.
type Meeting = (SocketAddr, JoinSet<anyhow::Result<Got<Met>>>);

/// Holders that are being met while the cell is built, by service. Its bound is that of cells.
#[derive(Debug, Default)]
pub struct Meetings(Mutex<BTreeMap<ServiceId, Meeting>>);

impl Meetings {
    /// Gives a meeting up.
    pub(super) async fn end(&self, service: &ServiceId) {
        let meeting = self.take(service);
        if let Some((_, mut meeting)) = meeting {
            meeting.shutdown().await;
        }
    }

    pub(super) fn has(&self, service: &ServiceId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(service)
    }

    fn take(&self, service: &ServiceId) -> Option<Meeting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(service)
    }
}

impl Machine {
    /// Answers another machine's question.
    ///
    /// # Errors
    /// Why not, for that machine.
    pub(super) async fn answer(self: Arc<Self>, name: Name, question: Vec<u8>) -> Result<Vec<u8>, String> {
        let answered = async {
            match serde_json::from_slice(&question).context("the question cannot be understood")? {
                Question::Meet { service, asker } => self.meet(&name.id, &service, &asker).await,
                Question::Hand { service, asker } => self.hand(&name.id, &service, &asker).await,
            }
        };
        let answer = answered.await.and_then(|answer| Ok(serde_json::to_vec(&answer)?));
        answer.map_err(|e| {
            tracing::warn!(asker = name.id, problem = format!("{e:#}"), "a singleton is not handed over");
            format!("{e:#}")
        })
    }

    /// What is here of a singleton, in its turn; or who is to be asked instead of this machine.
    async fn held_for(
        &self,
        to: &str,
        service: &ServiceId,
    ) -> anyhow::Result<Result<(Held, OwnedMutexGuard<()>), Answer>> {
        let elsewhere = || -> anyhow::Result<(Held, Option<Answer>)> {
            let held = self.tenures.get(service).with_context(|| format!("{service} was never here"))?;
            let gone = match &held.tenure.part {
                Part::Handed { to: other } | Part::Saving { to: other } => other != to,
                Part::Held => false,
            };
            let at = held.taker.as_ref().filter(|_| gone).map(|t| Answer::Elsewhere { at: t.serving });
            Ok((held, at))
        };
        // Not in turn: whoever takes it asks in its own turn, and may be asked.
        if let (_, Some(answer)) = elsewhere()? {
            return Ok(Err(answer));
        }
        let turn = self.tenures.turn(service).lock_owned().await;
        Ok(match elsewhere()? {
            (_, Some(answer)) => Err(answer),
            (held, None) => Ok((held, turn)),
        })
    }

    /// What is told of a snapshot with the hand-over.
    fn beginning(&self, service: &ServiceId, state: &Snapshot) -> anyhow::Result<Option<Beginning>> {
        let Some(manifest) = find(&self.images.store, service, &state.digest)? else { return Ok(None) };
        let (known, _) = verify(&manifest, std::slice::from_ref(&state.signer))?;
        let first = self.images.store.chunk(&known.memory.first.digest)?;
        let fits = manifest.manifest.len() + first.len() <= BEGINNING_MAX;
        Ok(fits.then(|| Beginning { manifest, first: STANDARD.encode(first) }))
    }

    async fn meet(self: &Arc<Self>, to: &str, service: &ServiceId, asker: &Taker) -> anyhow::Result<Answer> {
        let (held, turn) = match self.held_for(to, service).await? {
            Ok(here) => here,
            Err(answer) => return Ok(answer),
        };
        let relay = self.relay_to(service, asker).await;
        // It comes up while the answer is on its way; whoever asks to have the guest next waits for its turn.
        let (machine, met) = (self.clone(), service.clone());
        tokio::spawn(async move {
            let _turn = turn;
            machine.relay_up(&met).await;
        });
        Ok(Answer::Meets { state: State::of(&held), relay })
    }

    async fn hand(self: &Arc<Self>, to: &str, service: &ServiceId, asker: &Taker) -> anyhow::Result<Answer> {
        let (mut held, turn) = match self.held_for(to, service).await? {
            Ok(here) => here,
            Err(answer) => return Ok(answer),
        };
        let relay = self.relay_to(service, asker).await;
        self.relay_up(service).await;
        let took = match held.tenure.ask(to) {
            Ok(Asked::Save) => {
                held.taker = Some(asker.clone());
                self.tenures.write(service, &held)?;
                let took;
                (held, took) = self.hand_on(service, held).await?;
                took
            }
            Ok(Asked::Answer { .. }) => {
                if held.taker.as_ref() != Some(asker) {
                    held.taker = Some(asker.clone());
                    self.tenures.write(service, &held)?;
                }
                self.go_out(service, true)?;
                Took::default()
            }
            Err(Refused::Elsewhere { to, .. } | Refused::Promised { to }) => bail!("it went to {to}, by no known way"),
            Err(refused) => return Err(refused.into()),
        };
        // Where it went it is most often taken back from.
        self.warm_peer(asker.serving);
        let epoch = held.tenure.epoch;
        tracing::info!(%service, to, epoch, pages = took.pages, "handed over");
        // Its guest stands still and never runs again here; the asker need not wait for its process to end.
        let (machine, left) = (self.clone(), service.clone());
        tokio::spawn(async move {
            let _turn = turn;
            if let Err(e) = machine.leave(&left).await {
                tracing::warn!(service = %left, error = format!("{e:#}"), "what is left of it stays for now");
            }
        });
        let begin = match &held.state {
            // What cannot be told so is asked for.
            Some(state) => self.beginning(service, state).unwrap_or_default().map(Box::new),
            None => None,
        };
        Ok(Answer::Handed { epoch, state: State::of(&held), begin, relay, took })
    }

    /// From Saving to Handed, or back where it cannot be saved.
    async fn hand_on(self: &Arc<Self>, service: &ServiceId, mut held: Held) -> anyhow::Result<(Held, Took)> {
        let saved = async {
            let Some(record) = self.cell_of(service) else { return Ok(None) };
            self.end_unused(&record.spec.instance).await?;
            if self.find_vm(&record, &process::all()).is_none() {
                return Ok(None);
            }
            let built = self.images.known(&held.image).with_context(|| format!("image {} is gone", held.image))?;
            let (known, _) = self.state(service, &held, &built).await?;
            self.first_bytes(&known, None, &held).await?;
            // What arrives from then on waits at the taker, and is not lost with the guest that stops here.
            self.save(&record, &held, &known, || self.go_out(service, true)).await
        };
        match saved.await {
            Ok(saved) => {
                let took = saved.as_ref().map(|(_, took)| *took).unwrap_or_default();
                if let Some((snapshot, _)) = saved {
                    held.saved(snapshot);
                }
                held.tenure.saved();
                self.tenures.write(service, &held)?;
                Ok((held, took))
            }
            Err(e) => {
                held.tenure.keep();
                held.taker = None;
                self.tenures.write(service, &held)?;
                self.go_out(service, false)?;
                if let Some(record) = self.cell_of(service).filter(|r| self.find_vm(r, &process::all()).is_some()) {
                    let qmp = super::spawn::Sockets::within(self.records.folder(&record.spec.instance)).qmp();
                    Qmp::connect(&qmp).await?.cont().await?;
                }
                Err(e.context(format!("{service} stays here")))
            }
        }
    }

    /// Ends what ran of a singleton that was handed on.
    async fn leave(&self, service: &ServiceId) -> anyhow::Result<()> {
        let handed = self.tenures.get(service).filter(|h| matches!(h.tenure.part, Part::Handed { .. }));
        let Some(handed) = handed else { return Ok(()) };
        self.drop_old_snapshots(service, &handed);
        if let Some(record) = self.cell_of(service) {
            self.end_vm(&record.spec.instance).await?;
            self.forgive(&record.spec.instance);
            if record.phase != Phase::Building {
                self.records.note(&record.spec.instance, Phase::Handed, None)?;
            }
        }
        self.end_run(service).await
    }

    /// After a restart: what was being handed on is, what was handed on does not run, what runs is served.
    pub(super) async fn settle(self: &Arc<Self>) {
        for (service, _) in self.tenures.all() {
            let settled = async {
                let _turn = self.tenures.turn(&service).lock_owned().await;
                // Whoever had the turn before may have written more.
                let Some(held) = self.tenures.get(&service) else { return Ok(()) };
                match &held.tenure.part {
                    Part::Saving { .. } => {
                        self.hand_on(&service, held).await?;
                        self.leave(&service).await
                    }
                    Part::Handed { .. } => {
                        if let Some(taker) = &held.taker {
                            self.warm_peer(taker.serving);
                        }
                        self.leave(&service).await
                    }
                    Part::Held => {
                        if let Some(record) = self.cell_of(&service) {
                            self.end_unused(&record.spec.instance).await?;
                        }
                        let runs = self.cell_of(&service).and_then(|r| self.find_vm(&r, &process::all()));
                        if let (Some(_), Some(built)) = (runs, self.images.known(&held.image)) {
                            let (known, _) = self.state(&service, &held, &built).await?;
                            self.singles_pager(&service, &known, &held);
                        }
                        Ok(())
                    }
                }
            };
            if let Err(e) = settled.await {
                tracing::warn!(%service, error = format!("{e:#}"), "a singleton is not settled; it stays as it is");
            }
        }
    }

    /// The cell of a singleton.
    pub(super) fn cell_of(&self, service: &ServiceId) -> Option<Record> {
        self.records.all().into_iter().find(|r| r.spec.instance.service == *service && r.spec.singleton.is_some())
    }

    /// This machine's end of a relay to the asker; without one the guest moves all the same.
    async fn relay_to(&self, service: &ServiceId, asker: &Taker) -> Option<Offer> {
        let (record, peer) = (self.cell_of(service)?, asker.relay.as_ref()?);
        match self.relay_out(&record, asker.serving, peer).await {
            Ok(own) => own,
            Err(e) => {
                tracing::warn!(%service, error = format!("{e:#}"), "no relay: connections to it end");
                None
            }
        }
    }

    /// Has the relays of a singleton's cell run.
    async fn relay_up(&self, service: &ServiceId) {
        let Some(record) = self.cell_of(service) else { return };
        let Some(built) = self.images.known(&record.spec.image) else { return };
        if let Err(e) = self.relays_up(&record, &built.manifest.guest).await {
            tracing::warn!(%service, error = format!("{e:#}"), "a relay does not run: connections to it end");
        }
    }

    fn go_out(&self, service: &ServiceId, away: bool) -> anyhow::Result<()> {
        let (Some(record), Some(held)) = (self.cell_of(service), self.tenures.get(service)) else { return Ok(()) };
        match self.images.known(&held.image) {
            Some(built) => self.guest_goes(&record, &built.manifest.guest, away),
            None => Ok(()),
        }
    }

    /// Takes a singleton from whoever has it, beginning with the machine at `at`.
    ///
    /// # Errors
    /// No machine hands it over, or it is of another build than the image here.
    pub(super) async fn take(
        self: &Arc<Self>,
        record: &Record,
        built: &Arc<Known>,
        mut at: SocketAddr,
    ) -> anyhow::Result<Taken> {
        let service = &record.spec.instance.service;
        for _ in 0..HOPS_MAX {
            match self
                .take_from(record, built, at)
                .await
                .with_context(|| format!("{at} does not hand {service} over"))?
            {
                Got::Here(taken) => return Ok(taken),
                Got::Elsewhere(next) => at = next,
            }
        }
        bail!("{HOPS_MAX} machines say that another one has {service}; ask again when it has stopped moving")
    }

    /// Begins to meet the machine from which the singleton of a cell that is being built is to be taken, if there is one.
    pub(super) fn begin_meeting(self: &Arc<Self>, record: &Record, built: &Arc<Known>) {
        let service = record.spec.instance.service.clone();
        let Some(Singleton::Take(at)) = record.spec.singleton else { return };
        if self.tenures.get(&service).is_some_and(|held| held.holds().is_some()) {
            return;
        }
        let (machine, part, built) = (self.clone(), record.clone(), built.clone());
        let mut meeting = JoinSet::new();
        meeting.spawn(async move { machine.meet_at(&part, &built, at).await });
        self.meetings.0.lock().unwrap_or_else(PoisonError::into_inner).insert(service, (at, meeting));
    }

    /// Learns what is needed to take a singleton, while it runs on; what it runs from is here then.
    async fn meet_at(
        self: &Arc<Self>,
        record: &Record,
        built: &Arc<Known>,
        at: SocketAddr,
    ) -> anyhow::Result<Got<Met>> {
        let service = &record.spec.instance.service;
        let serving = self.config.transfer_listen.context("a machine without transfer_listen takes no singletons")?;
        if at == serving {
            bail!("it is asked for at this machine, which does not have it; name the one that does");
        }
        // While it is met: what is pushed when it stops is not to wait for a window that grows.
        self.warm_peer(at);
        let before = self.tenures.get(service);
        let end = self.relay_in(record, at).await?;
        let asker = Taker { serving, relay: end.as_ref().map(|(_, own)| own.clone()) };
        let (state, theirs) =
            match self.ask(at, &Question::Meet { service: service.clone(), asker: asker.clone() }).await? {
                Answer::Elsewhere { at } => return Ok(Got::Elsewhere(at)),
                Answer::Meets { state, relay } => (state, relay),
                Answer::Handed { .. } => bail!("it answers what it was not asked"),
            };
        let relay = end.map(|(way, _)| way).zip(theirs);
        let mut up = JoinSet::new();
        if let Some((way, theirs)) = &relay
            && let Some(end) = self.relay_known(record, *way, theirs)?
        {
            // While the cell is built and what the guest runs from is brought here.
            let (machine, part, way) = (self.clone(), record.clone(), *way);
            up.spawn(async move {
                machine.until_founded(&part).await?;
                machine.start_relay(&part, way, &end).await
            });
        }
        let held = self.held_by(at, &state, Tenure::first(), before.as_ref());
        self.bring_before(service, &held, before.as_ref(), built).await?;
        Ok(Got::Here(Met { state, relay, asker, up }))
    }

    async fn take_from(
        self: &Arc<Self>,
        record: &Record,
        built: &Arc<Known>,
        at: SocketAddr,
    ) -> anyhow::Result<Got<Taken>> {
        let began = Instant::now();
        let (service, guest) = (&record.spec.instance.service, &built.manifest.guest);
        let begun = match self.meetings.take(service).filter(|(with, _)| *with == at) {
            Some((_, mut meeting)) => match meeting.join_next().await {
                Some(Ok(Ok(met))) => Some(met),
                _ => None,
            },
            None => None,
        };
        let met = match begun {
            Some(met) => met,
            None => self.meet_at(record, built, at).await?,
        };
        let Met { state: known, relay, asker, mut up } = match met {
            Got::Here(met) => met,
            Got::Elsewhere(at) => return Ok(Got::Elsewhere(at)),
        };
        // What the holder sends from then on finds its end.
        while let Some(started) = up.join_next().await {
            started.context("the relay was cut off")??;
        }
        let (known, met) = (known.snapshot, began.elapsed());
        let before = self.tenures.get(service);
        // Before the holder sends packets here: they wait at the tap until the guest reads it.
        let tap = match self.earlies.has(service) {
            true => None,
            false => Some(self.open_tap(&record.spec.instance)?),
        };
        let way = relay.as_ref().map(|(way, _)| *way);
        let was_away = self.relays(record)?.away;
        self.guest_expected(record, guest, way)?;
        let asked = self.ask(at, &Question::Hand { service: service.clone(), asker }).await;
        if was_away && !matches!(asked, Ok(Answer::Handed { .. })) {
            self.guest_goes(record, guest, true)?;
        }
        let (epoch, state, begin, relay, took) = match asked? {
            Answer::Elsewhere { at } => return Ok(Got::Elsewhere(at)),
            Answer::Handed { epoch, state, begin, relay, took } => (epoch, state, begin, relay, took),
            Answer::Meets { .. } => bail!("it answers what it was not asked"),
        };
        let tenure = match Tenure::take(before.as_ref().map(|b| &b.tenure), epoch) {
            Ok(tenure) => tenure,
            // It was here since, and went on from here.
            Err(Refused::Older { .. }) => match before.and_then(|b| b.taker) {
                Some(taker) if taker.serving != at => return Ok(Got::Elsewhere(taker.serving)),
                _ => bail!("what it hands over, epoch {epoch}, was here already"),
            },
            Err(refused) => return Err(refused.into()),
        };
        let mut held = self.held_by(at, &state, tenure, before.as_ref());
        held.before = known.filter(|k| Some(k) != held.state.as_ref()).or(held.before);
        self.tenures.write(service, &held)?;
        if let Some(begin) = begin
            && let Err(e) = self.keep_beginning(service, &held, &begin)
        {
            // It is asked for as anything else is.
            tracing::warn!(%service, from = %at, error = format!("{e:#}"), "what came with the hand-over is not used");
        }
        let relayed = async {
            if let (Some(way), Some(relay)) = (way, &relay) {
                if let Some(end) = self.relay_known(record, way, relay)? {
                    self.start_relay(record, way, &end).await?;
                }
                self.mind_relay(record, way, at);
            }
            anyhow::Ok(())
        };
        if let Err(e) = relayed.await {
            tracing::warn!(%service, error = format!("{e:#}"), "no relay: connections to it end");
        }
        tracing::info!(
            %service,
            from = %at,
            epoch,
            met_ms = met.as_millis(),
            handed_ms = (began.elapsed() - met).as_millis(),
            stop_us = took.stop_us,
            save_us = took.save_us,
            cut_us = took.cut_us,
            pages = took.pages,
            "taken"
        );
        Ok(Got::Here(Taken { held, tap }))
    }

    /// Says so if the relay to where the guest was does not come up.
    fn mind_relay(self: &Arc<Self>, record: &Record, way: Way, at: SocketAddr) {
        let (machine, record) = (self.clone(), record.clone());
        tokio::spawn(async move {
            if !machine.relay_shaken(&record, way, SHAKE_LIMIT).await {
                tracing::warn!(instance = %record.spec.instance, from = %at, "no relay: connections to it end");
            }
        });
    }

    /// What is to be written down of a singleton that the machine at `at` had.
    fn held_by(&self, at: SocketAddr, state: &State, tenure: Tenure, before: Option<&Held>) -> Held {
        let mut sources = vec![at];
        let others = state.sources.iter().filter(|s| **s != at && Some(**s) != self.config.transfer_listen);
        sources.extend(others.take(SOURCES_MAX - 1));
        Held {
            tenure,
            image: state.image.clone(),
            built: state.built,
            state: state.snapshot.clone(),
            before: before.and_then(|b| b.state.clone()),
            sources,
            taker: None,
        }
    }

    /// Has the state that the guest runs from be here while it still runs there: of the next one only what changed
    /// since has to come.
    async fn bring_before(
        self: &Arc<Self>,
        service: &ServiceId,
        held: &Held,
        before: Option<&Held>,
        built: &Arc<Known>,
    ) -> anyhow::Result<()> {
        let here = match &held.state {
            Some(state) => find(&self.images.store, service, &state.digest)?.is_some(),
            None => true,
        };
        let (known, pushed) = match before {
            // Its snapshot keeps its name: of what is here it may be the only one.
            Some(before) if !here => {
                let kept = Held { before: before.state.clone(), ..held.clone() };
                self.state(service, &kept, built).await?
            }
            _ => self.state(service, held, built).await?,
        };
        self.first_bytes(&known, pushed, held).await
    }

    /// Asks a machine until it answers.
    async fn ask(&self, at: SocketAddr, question: &Question) -> anyhow::Result<Answer> {
        let mut silent = false;
        loop {
            match self.peer(at)?.ask(question, ANSWER_LIMIT).await {
                Ok(answer) => return Ok(answer),
                Err(TransferError::Source { fault: Fault::Refused(why), .. }) => bail!("{why}"),
                // Heard or not: it answers the same when it is asked again. The resume has a limit of its own.
                Err(e) if std::mem::replace(&mut silent, true) => tracing::debug!(%at, error = %e, "asking again"),
                Err(e) => tracing::warn!(%at, error = %e, "a machine does not answer; it is asked again and again"),
            }
            tokio::time::sleep(AGAIN).await;
        }
    }
}
