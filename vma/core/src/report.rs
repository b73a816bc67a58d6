//! The inventory: what is seen ─▶ what the CPA is told, in the CPA's words.

use crate::machine::Machine;
use crate::steps::{CellSeen, Life, Step};
use crate::{Vma, wanted};
use std::collections::BTreeMap;
use vmatrix_model::inventory::{Holder, ImageSeen, InstanceSeen, InstanceState, Inventory, MachineSeen};
use vmatrix_model::{Bytes, InstanceId, MachineId, ServiceId, Span, Time};

/// An inventory is sent at least this often.
pub const EVERY: Span = Span::secs(1);

/// What an instance was, so that people see since when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    state: InstanceState,
    since: Time,
    /// When it was first wanted; None if it was there before the agent.
    ordered: Option<Time>,
    resumed_in: Option<Span>,
}

/// Compares every instance with what it was and notes changes.
pub fn note_changes(vma: &mut Vma, now: Time) {
    let states: Vec<(InstanceId, InstanceState, Option<Span>)> =
        states(vma).into_iter().map(|(id, (_, state, cell))| (id, state, cell.and_then(|c| c.resumed_in))).collect();
    let first = vma.reported.is_none();
    vma.history.retain(|id, _| states.iter().any(|(s, _, _)| s == id));
    for (id, state, resumed_in) in states {
        let ordered = (state == InstanceState::Preparing).then_some(now);
        let history = vma.history.entry(id).or_insert(History {
            state,
            since: now,
            ordered: ordered.filter(|_| !first),
            resumed_in: None,
        });
        if history.state != state {
            history.state = state;
            history.since = now;
        }
        if matches!(state, InstanceState::Healthy | InstanceState::Serving) && history.resumed_in.is_none() {
            history.resumed_in = history.ordered.map(|o| now.since(o)).or(resumed_in);
        }
        if matches!(state, InstanceState::Suspending) {
            history.ordered = None;
            history.resumed_in = None;
        }
    }
}

/// The whole inventory.
pub fn inventory(vma: &Vma, now: Time) -> Inventory {
    let instances = states(vma)
        .into_iter()
        .map(|(id, (machine, state, cell))| {
            let history = vma.history.get(&id);
            let effort = vma.cells.get(&(machine.clone(), id.clone()));
            let trouble = effort
                .and_then(|e| e.trouble.as_ref())
                .map(|f| f.problem.clone())
                .or_else(|| cell.and_then(|c| c.trouble.clone()))
                .or_else(|| silence(vma, &machine))
                .or_else(|| half_here(vma, &machine, &id));
            InstanceSeen {
                machine,
                state,
                since: history.map_or(now, |h| h.since),
                resumed_in: history.and_then(|h| h.resumed_in),
                trouble,
                id,
            }
        })
        .collect();
    Inventory {
        network: vma.network.clone(),
        at: now,
        generation: vma.generation(),
        machines: vma.machines.values().map(|m| MachineSeen { free_mib: free(m), ..m.seen.clone() }).collect(),
        images: images(vma),
        instances,
        holds: holds(vma),
        refused: vma.refused.clone(),
    }
}

fn silence(vma: &Vma, machine: &MachineId) -> Option<String> {
    let silent = vma.machines.get(machine).is_some_and(Machine::is_silent);
    silent.then(|| format!("machine {machine} is silent and can be told nothing; start `vmatrix machine` there again"))
}

/// What runs from an image that does not become whole depends on that image's sources.
fn half_here(vma: &Vma, machine: &MachineId, id: &InstanceId) -> Option<String> {
    let image = &vma.shares().find(|(service, _)| **service == id.service)?.1.image;
    let fault = vma.stages.get(&(machine.clone(), image.clone()))?.trouble.as_ref()?;
    Some(format!("the rest of its image does not come: {}", fault.problem))
}

/// Memory for new cells; a silent machine takes none.
fn free(machine: &Machine) -> u64 {
    if machine.is_silent() {
        return 0;
    }
    let taken = machine.has.iter().flat_map(|h| &h.cells).map(|c| c.memory_mib).fold(0, u64::saturating_add);
    machine.seen.memory_mib.saturating_sub(taken)
}

/// Per service the copy that is furthest along; bytes fetched are summed over machines.
fn images(vma: &Vma) -> BTreeMap<vmatrix_model::ServiceId, ImageSeen> {
    let mut images = BTreeMap::new();
    for (service, share) in vma.shares() {
        let copies: Vec<&ImageSeen> =
            vma.machines.values().filter_map(|m| m.staged(&share.image)?.seen.as_ref()).collect();
        let fetched: Bytes = copies.iter().map(|c| c.fetched).sum();
        let resumable = copies.iter().any(|c| c.resumable);
        if let Some(best) = copies.into_iter().max_by_key(|c| c.present) {
            images.insert(service.clone(), ImageSeen { fetched, resumable, ..best.clone() });
        }
    }
    images
}

/// Who has which singleton. A machine that others cannot ask for it is not told of.
fn holds(vma: &Vma) -> BTreeMap<ServiceId, Holder> {
    let holds = |(m, c): (&MachineId, &CellSeen)| {
        let transfer = vma.machines.get(m)?.seen.transfer?;
        Some((c.instance.service.clone(), Holder { machine: m.clone(), transfer, epoch: c.holds? }))
    };
    vma.all_cells().filter_map(holds).collect()
}

type State<'a> = (MachineId, InstanceState, Option<&'a CellSeen>);

fn states(vma: &Vma) -> BTreeMap<InstanceId, State<'_>> {
    let keep = if vma.assignment.is_some() {
        wanted::choose(vma).keep
    } else {
        vma.all_cells().map(|(m, c)| (m.clone(), c.instance.clone())).collect()
    };
    let mut states: BTreeMap<InstanceId, State<'_>> = BTreeMap::new();
    // Cells that go first, so that of two with one name the one that stays is told.
    let mut cells: Vec<(&MachineId, &CellSeen, bool)> =
        vma.all_cells().map(|(m, c)| (m, c, keep.contains(&(m.clone(), c.instance.clone())))).collect();
    cells.sort_by_key(|(_, _, stays)| *stays);
    for (machine, cell, stays) in cells {
        let outstanding = vma.cells.get(&(machine.clone(), cell.instance.clone())).and_then(|e| e.outstanding());
        states.insert(cell.instance.clone(), (machine.clone(), state(vma, cell, stays, outstanding), Some(cell)));
    }
    for ((machine, instance), effort) in &vma.cells {
        let known = states.contains_key(instance);
        if !known && matches!(effort.outstanding(), Some(Step::Prepare(_))) {
            states.insert(instance.clone(), (machine.clone(), InstanceState::Preparing, None));
        }
    }
    states
}

fn state(vma: &Vma, cell: &CellSeen, stays: bool, outstanding: Option<&Step>) -> InstanceState {
    if matches!(outstanding, Some(Step::Suspend { .. } | Step::Release { .. })) {
        return InstanceState::Suspending;
    }
    match (cell.life, stays) {
        (Life::Healthy | Life::Handed, true) if vma.rotation.is_in(cell.address) => InstanceState::Serving,
        (Life::Healthy | Life::Handed, true) => InstanceState::Healthy,
        (Life::Healthy | Life::Sick | Life::Handed, false) => InstanceState::Draining,
        (_, false) => InstanceState::Suspending,
        (Life::Building, true) => InstanceState::Preparing,
        (Life::Ready, true) if !matches!(outstanding, Some(Step::Resume { .. })) => InstanceState::Preparing,
        (Life::Ready | Life::Resuming | Life::Sick | Life::Lost, true) => InstanceState::Resuming,
    }
}
