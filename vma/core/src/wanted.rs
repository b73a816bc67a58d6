//! Which cells stay and what is missing: assignment + what is seen ─▶ cells to keep, cells to
//! prepare, images to stage, wishes refused.
//!
//! A cell does not wait for its image: the machine resumes the guest as soon as it has what a guest needs first,
//! and the rest comes while the guest runs.

use crate::Vma;
use crate::machine::Machine;
use crate::pack::{Candidate, Held, pick};
use crate::steps::{BackendAddress, CellSeen, CellSpec, Life, Step};
use std::collections::{BTreeMap, BTreeSet};
use vmatrix_model::assignment::{ServiceShare, Singleton};
use vmatrix_model::{InstanceId, MachineId, ServiceId};

/// What one round works towards.
#[derive(Debug, Default)]
pub struct Chosen {
    pub keep: BTreeSet<(MachineId, InstanceId)>,
    pub prepare: Vec<(MachineId, CellSpec)>,
    pub stage: Vec<(MachineId, Step)>,
    pub refused: BTreeMap<ServiceId, String>,
}

/// Chooses for every service of the assignment, in order of name.
pub fn choose(vma: &Vma) -> Chosen {
    let mut chosen = Chosen::default();
    let mut taken = taken(vma);
    for (service, share) in vma.assignment.iter().flat_map(|a| &a.services) {
        let kept = keep(vma, &taken, service, share);
        let mut missing = (share.instances as usize).saturating_sub(kept.len());
        chosen.keep.extend(kept);
        if missing > 0 && share.singleton == Some(Singleton::Keep) {
            // Whoever makes one from its image makes a second one.
            let why = "no machine here holds it, and nobody said from whom to take it";
            chosen.refused.insert(service.clone(), why.to_owned());
            missing = 0;
        }
        for instance in free_names(vma, service, &chosen.keep).take(missing) {
            if let Some(machine) = ordered(vma, &instance) {
                chosen.prepare.push((machine, spec(instance, share)));
                continue;
            }
            match place(vma, &taken, share) {
                Ok(picked) => {
                    let machine = picked.machine;
                    take(&mut taken, &machine, share.memory_mib);
                    if picked.held != Held::Whole {
                        want_staged(vma, &mut chosen, machine.clone(), service, share, true);
                    }
                    // What will not be taken there must be taken once more before anything is built for it.
                    if !picked.refuses {
                        chosen.prepare.push((machine, spec(instance, share)));
                    }
                }
                // What does not fit now does not fit once more either, however many are wanted.
                Err(why) => {
                    chosen.refused.insert(service.clone(), why);
                    break;
                }
            }
        }
        // Cells whose image is missing, and dormant shares: the image is to be here all the same.
        let keepers: Vec<MachineId> =
            chosen.keep.iter().filter(|(_, i)| i.service == *service).map(|(m, _)| m.clone()).collect();
        for machine in keepers {
            if vma.machines.get(&machine).is_some_and(|m| !m.is_silent() && !m.holds(&share.image)) {
                want_staged(vma, &mut chosen, machine, service, share, true);
            }
        }
        if share.instances == 0 && !vma.heard().any(|(_, m)| m.holds(&share.image)) {
            let dormant = ServiceShare { memory_mib: 0, ..share.clone() };
            match place(vma, &taken, &dormant) {
                Ok(picked) => want_staged(vma, &mut chosen, picked.machine, service, share, false),
                Err(why) => {
                    chosen.refused.insert(service.clone(), why);
                }
            }
        }
        let nowhere = !vma.heard().any(|(_, m)| m.holds(&share.image));
        let granted = share.instances > 0 && healthy(vma, &chosen.keep, service) >= share.instances as usize;
        if let Some((machine, fault)) = vma.stage_trouble(&share.image).filter(|_| nowhere && !granted) {
            chosen.refused.entry(service.clone()).or_insert_with(|| format!("{machine}: {fault}"));
        }
    }
    chosen
}

/// What a cell of this share is built for.
pub fn spec(instance: InstanceId, share: &ServiceShare) -> CellSpec {
    let backends = share.backends.iter().map(|b| BackendAddress { address: b.address, port: b.port }).collect();
    CellSpec {
        instance,
        image: share.image.clone(),
        ports: share.ports.clone(),
        backends,
        memory_mib: share.memory_mib,
        singleton: share.singleton,
    }
}

fn want_staged(
    vma: &Vma,
    chosen: &mut Chosen,
    machine: MachineId,
    service: &ServiceId,
    share: &ServiceShare,
    urgent: bool,
) {
    let busy = vma.machines.get(&machine).and_then(|m| m.staged(&share.image)).is_some_and(|s| s.fetching);
    let is_it = |step: &Step| matches!(step, Step::Stage { image, .. } if *image == share.image);
    let asked = chosen.stage.iter().any(|(m, step)| *m == machine && is_it(step));
    if !busy && !asked {
        let step = Step::Stage { service: service.clone(), image: share.image.clone(), urgent };
        chosen.stage.push((machine, step));
    }
}

fn healthy(vma: &Vma, keep: &BTreeSet<(MachineId, InstanceId)>, service: &ServiceId) -> usize {
    let kept = |m: &MachineId, c: &CellSeen| keep.contains(&(m.clone(), c.instance.clone()));
    vma.all_cells()
        .filter(|(m, c)| c.instance.service == *service && matches!(c.life, Life::Healthy | Life::Handed) && kept(m, c))
        .count()
}

/// The cells of `service` that stay: the furthest along first, then those whose machine is heard, then the
/// lower number, then the lower machine; never two of one name.
fn keep(
    vma: &Vma,
    taken: &BTreeMap<MachineId, u64>,
    service: &ServiceId,
    share: &ServiceShare,
) -> Vec<(MachineId, InstanceId)> {
    let stays = |m: &MachineId, c: &CellSeen| !has_to_move(vma, taken, m, c, share);
    let mut cells: Vec<(&MachineId, &CellSeen)> =
        vma.all_cells().filter(|(m, c)| c.instance.service == *service && stays(m, c)).collect();
    let silent = |m: &MachineId| vma.machines.get(m).is_some_and(Machine::is_silent);
    cells.sort_by_key(|(m, c)| (rank(c.life), silent(m), c.instance.number, (*m).clone()));
    let mut names = BTreeSet::new();
    cells
        .into_iter()
        .filter(|(_, c)| names.insert(c.instance.number))
        .take(share.instances as usize)
        .map(|(m, c)| (m.clone(), c.instance.clone()))
        .collect()
}

/// Whether nothing serves in a cell and nothing will: its machine refuses the image for good, or cannot get it
/// while another one can. A guest whose memory stopped coming was ended, and is resumed where it comes.
fn has_to_move(
    vma: &Vma,
    taken: &BTreeMap<MachineId, u64>,
    machine: &MachineId,
    cell: &CellSeen,
    share: &ServiceShare,
) -> bool {
    let idle = matches!(cell.life, Life::Building | Life::Ready | Life::Lost);
    let Some(here) = vma.machines.get(machine).filter(|m| idle && !m.is_silent()) else { return false };
    if refuses(vma, machine, &share.image) && !here.holds(&share.image) {
        return true;
    }
    let better = |c: &Candidate| c.machine != *machine && c.free_mib >= share.memory_mib && !c.barren && !c.refuses;
    is_barren(here, &share.image) && candidates(vma, taken, share).iter().any(better)
}

/// Whether a machine does not get what it still lacks of an image.
fn is_barren(machine: &Machine, image: &str) -> bool {
    !machine.holds(image) && machine.staged(image).is_some_and(|s| s.trouble.is_some())
}

fn rank(life: Life) -> u8 {
    match life {
        Life::Healthy | Life::Handed => 0,
        Life::Resuming => 1,
        Life::Ready => 2,
        Life::Building => 3,
        Life::Sick => 4,
        Life::Lost => 5,
    }
}

/// Names for new instances: the lowest numbers no cell has, not even one that is going.
fn free_names<'a>(
    vma: &Vma,
    service: &'a ServiceId,
    keep: &BTreeSet<(MachineId, InstanceId)>,
) -> impl Iterator<Item = InstanceId> + use<'a> {
    let used: BTreeSet<u32> = vma
        .all_cells()
        .map(|(_, c)| &c.instance)
        .chain(keep.iter().map(|(_, i)| i))
        .filter(|i| i.service == *service)
        .map(|i| i.number)
        .collect();
    (0..).filter(move |n| !used.contains(n)).map(|number| InstanceId { service: service.clone(), number })
}

/// Memory of each machine that cells have, MiB: those seen and those ordered, wanted or not.
fn taken(vma: &Vma) -> BTreeMap<MachineId, u64> {
    let mut taken: BTreeMap<MachineId, u64> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for (m, c) in vma.all_cells() {
        seen.insert((m, &c.instance));
        take(&mut taken, m, c.memory_mib);
    }
    for ((m, i), effort) in &vma.cells {
        if let (Some(Step::Prepare(spec)), false) = (effort.outstanding(), seen.contains(&(m, i))) {
            take(&mut taken, m, spec.memory_mib);
        }
    }
    taken
}

fn take(taken: &mut BTreeMap<MachineId, u64>, machine: &MachineId, mib: u64) {
    let memory = taken.entry(machine.clone()).or_default();
    *memory = memory.saturating_add(mib);
}

/// Where a cell was ordered that is not seen yet: it stays there.
fn ordered(vma: &Vma, instance: &InstanceId) -> Option<MachineId> {
    let sent = |e: &crate::Effort| matches!(e.outstanding(), Some(Step::Prepare(_)));
    vma.cells.iter().find(|((_, i), e)| i == instance && sent(e)).map(|((machine, _), _)| machine.clone())
}

fn place(vma: &Vma, taken: &BTreeMap<MachineId, u64>, share: &ServiceShare) -> Result<Candidate, String> {
    pick(&candidates(vma, taken, share), share.memory_mib).cloned()
}

fn candidates(vma: &Vma, taken: &BTreeMap<MachineId, u64>, share: &ServiceShare) -> Vec<Candidate> {
    vma.heard()
        .filter(|(_, m)| m.has.is_some())
        .map(|(id, m)| Candidate {
            machine: id.clone(),
            free_mib: m.seen.memory_mib.saturating_sub(taken.get(id).copied().unwrap_or(0)),
            held: held(m, &share.image),
            refuses: refuses(vma, id, &share.image),
            barren: is_barren(m, &share.image),
        })
        .collect()
}

fn held(machine: &Machine, image: &str) -> Held {
    match machine.staged(image) {
        Some(s) if s.seen.as_ref().is_some_and(|s| s.complete()) => Held::Whole,
        Some(s) if s.seen.as_ref().is_some_and(|s| s.resumable) => Held::Critical,
        Some(s) if s.fetching || s.seen.is_some() => Held::Part,
        _ => Held::Nothing,
    }
}

/// Whether a machine said for good that it will not take an image.
pub fn refuses(vma: &Vma, machine: &MachineId, image: &str) -> bool {
    let effort = vma.stages.get(&(machine.clone(), image.to_owned()));
    let staged = vma.machines.get(machine).and_then(|m| m.staged(image));
    // What was wrong is mended if the image comes after all.
    let comes = staged.is_some_and(|s| s.trouble.is_none() && s.seen.as_ref().is_some_and(|s| s.resumable));
    !comes && effort.and_then(|e| e.trouble.as_ref()).is_some_and(|f| f.lasting)
}
