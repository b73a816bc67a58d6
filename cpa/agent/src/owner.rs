//! The one task that owns the core: events in one order, the journal before the deed.

use crate::dispatch::Dispatch;
use crate::journal::{Journal, MEMORY_EVERY};
use crate::now;
use crate::pulse::Pulse;
use crate::watchers::Watchers;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use vmatrix_cpa_core::{Command, Cpa, Event, Memory, Refusal};
use vmatrix_model::fleet::Fleet;
use vmatrix_model::inventory::Inventory;
use vmatrix_model::plan::{Decision, Plan};
use vmatrix_model::wire::{Explanation, JournalEntry, Order, Snapshot};
use vmatrix_model::{NetworkId, ServiceId, Time};

/// Asks that may wait: a second of reports from a hundred networks.
pub(crate) const ASKS_MAX: usize = 256;

/// What others ask of the owner.
pub(crate) enum Ask {
    Hear(Event),
    Inventory(Inventory, oneshot::Sender<Result<(), Refusal>>),
    Plan(Order, oneshot::Sender<Result<Plan, Refusal>>),
    Apply(u64, oneshot::Sender<Result<Decision, Refusal>>),
    Explain(ServiceId, oneshot::Sender<Option<Explanation>>),
    Snapshot(oneshot::Sender<Snapshot>),
}

pub(crate) struct Owner {
    pub cpa: Cpa,
    pub journal: Journal,
    pub dispatch: Dispatch,
    pub watchers: Watchers,
    pub pulse: Pulse,
    pub asks: mpsc::Receiver<Ask>,
}

/// What has to be written down, beside the owner while it runs.
struct Desk {
    remembered: Instant,
    /// Inventories as last journalled, to leave out those that differ in their time alone.
    inventories: BTreeMap<NetworkId, Inventory>,
    /// Whether anything happened since the last memory line.
    news: bool,
    shown: Instant,
}

impl Owner {
    /// Runs until the inbox closes.
    ///
    /// # Errors
    /// The journal cannot be written.
    pub(crate) async fn run(mut self, memory: Option<Memory>, tick: Duration) -> anyhow::Result<()> {
        let mut desk =
            Desk { remembered: Instant::now(), inventories: BTreeMap::new(), news: false, shown: Instant::now() };
        if let Some(memory) = memory {
            tracing::info!(generation = %memory.placement.generation, "going on from the journal");
            self.hear(&mut desk, Event::Restored(Box::new(memory)))?;
        }
        let mut ticks = tokio::time::interval(tick);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    self.hear(&mut desk, Event::Tick)?;
                    self.pulse.beat();
                    if desk.shown.elapsed() >= Duration::from_millis(950) {
                        self.show(&mut desk);
                    }
                    if desk.news && desk.remembered.elapsed() >= MEMORY_EVERY {
                        self.remember(&mut desk, now(), false)?;
                    }
                }
                ask = self.asks.recv() => match ask {
                    Some(ask) => self.answer(&mut desk, ask)?,
                    None => return Ok(()),
                },
            }
        }
    }

    fn answer(&mut self, desk: &mut Desk, ask: Ask) -> anyhow::Result<()> {
        // Whoever asked may have gone away; then the answer is for nobody.
        match ask {
            Ask::Hear(event) => {
                self.hear(desk, event)?;
            }
            Ask::Inventory(inventory, to) => {
                let refused = self.hear(desk, Event::Inventory(inventory))?.into_iter().find_map(absurd);
                let _ = to.send(refused.map_or(Ok(()), Err));
            }
            Ask::Plan(order, to) => {
                let commands = self.hear(desk, Event::Order(order))?;
                let answer = commands.into_iter().find_map(|c| match c {
                    Command::Planned(p) => Some(Ok(p)),
                    Command::Refuse(r) => Some(Err(r)),
                    _ => None,
                });
                if let Some(answer) = answer {
                    let _ = to.send(answer);
                }
            }
            Ask::Apply(plan, to) => {
                let commands = self.hear(desk, Event::Apply { plan })?;
                let answer = commands.into_iter().find_map(|c| match c {
                    Command::Decided(d) if d.plan.id == plan => Some(Ok(d)),
                    Command::Refuse(r) => Some(Err(r)),
                    _ => None,
                });
                if let Some(answer) = answer {
                    let _ = to.send(answer);
                }
            }
            Ask::Explain(service, to) => {
                let _ = to.send(self.cpa.explain(now(), &service));
            }
            Ask::Snapshot(to) => {
                let _ = to.send(self.cpa.snapshot(now()));
            }
        }
        Ok(())
    }

    /// Feeds the core one event, writes down what matters, then carries out its commands.
    fn hear(&mut self, desk: &mut Desk, event: Event) -> anyhow::Result<Vec<Command>> {
        let at = now();
        if let Some(entry) = desk.worth_writing(&event, self.cpa.fleet()) {
            self.journal.write(at, entry)?;
            desk.news = true;
        }
        let seen = match &event {
            Event::Inventory(i) => Some((i.network.clone(), i.generation)),
            _ => None,
        };
        let commands = self.cpa.handle(at, event);
        let believed = !commands.iter().any(|c| matches!(c, Command::Refuse(Refusal::Absurd { .. })));
        if let (Some((network, generation)), true) = (seen, believed) {
            self.dispatch.seen(&network, generation);
        }
        let mut said = false;
        for entry in commands.iter().filter_map(entry) {
            self.journal.write(at, entry)?;
            said = true;
        }
        if said {
            self.remember(desk, at, true)?;
        }
        for command in &commands {
            self.carry_out(command);
        }
        if said {
            self.show(desk);
        }
        Ok(commands)
    }

    fn remember(&mut self, desk: &mut Desk, at: Time, sync: bool) -> anyhow::Result<()> {
        // A sync takes milliseconds; other tasks of this thread move elsewhere meanwhile.
        tokio::task::block_in_place(|| self.journal.remember(at, self.cpa.memory(), sync))?;
        desk.remembered = Instant::now();
        desk.news = false;
        Ok(())
    }

    fn carry_out(&self, command: &Command) {
        match command {
            Command::Assign(network, assignment) => self.dispatch.assign(network, assignment),
            Command::Announce(steering) => {
                tracing::info!(generation = %steering.generation, "answers changed");
                self.dispatch.announce(steering);
            }
            Command::Decided(decision) => {
                let progress = if decision.done_at.is_some() {
                    "done"
                } else if decision.serving_at.is_some() {
                    "serving"
                } else {
                    "began"
                };
                for m in &decision.plan.moves {
                    tracing::info!(plan = decision.plan.id, generation = %decision.generation, progress, "{m}");
                }
                self.watchers.tell("decision", decision);
            }
            Command::Refuse(refusal) => tracing::warn!("{refusal}"),
            Command::Planned(_) | Command::Placed(_) => {}
        }
    }

    /// Shows watchers the world, if there are any.
    fn show(&mut self, desk: &mut Desk) {
        desk.shown = Instant::now();
        if self.watchers.any() {
            self.watchers.tell("snapshot", &self.cpa.snapshot(now()));
        }
    }
}

impl Desk {
    /// The journal entry of an event: no empty demand reports, no inventory that only grew older.
    fn worth_writing(&mut self, event: &Event, fleet: &Fleet) -> Option<JournalEntry> {
        match event {
            Event::Demand(report) => (!report.counts.is_empty()).then(|| JournalEntry::Demand(report.clone())),
            Event::Inventory(inventory) if fleet.network(&inventory.network).is_none() => None,
            Event::Inventory(inventory) => {
                let timeless = Inventory { at: Time(0), ..inventory.clone() };
                let old = self.inventories.insert(inventory.network.clone(), timeless.clone());
                (old.as_ref() != Some(&timeless)).then(|| JournalEntry::Inventory(inventory.clone()))
            }
            Event::Order(order) => Some(JournalEntry::Order(order.clone())),
            // Applied plans are written as decisions; the rest is not news.
            Event::Apply { .. } | Event::Tick | Event::Image(..) | Event::Answering { .. } | Event::Restored(_) => None,
        }
    }
}

/// What is told to the network whose inventory it was; other refusals concern plans.
fn absurd(command: Command) -> Option<Refusal> {
    match command {
        Command::Refuse(refusal @ Refusal::Absurd { .. }) => Some(refusal),
        _ => None,
    }
}

/// The journal entry of a command, for those that say something to someone.
fn entry(command: &Command) -> Option<JournalEntry> {
    match command {
        Command::Planned(plan) => Some(JournalEntry::Planned(Box::new(plan.clone()))),
        Command::Decided(decision) => Some(JournalEntry::Decided(Box::new(decision.clone()))),
        Command::Placed(placement) => Some(JournalEntry::Placed { placement: placement.clone() }),
        Command::Announce(steering) => Some(JournalEntry::Announced { generation: steering.generation }),
        Command::Assign(..) | Command::Refuse(_) => None,
    }
}
