//! Where new instances go: n of them, each as large as M (SODA's `<n, M>`), all or none.
//!
//! ```text
//!  for each of the n: machines that have room ─▶ not shared with its like ─▶ has the image ─▶ least score ─▶ lower name
//! ```

use super::ledger::{INSTANCES_MAX, Ledger, NEED_MAX};
use super::{ALL, Amounts, Instance, KINDS, Kind, Machine, Odd, Rules};
use crate::pack::Held;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use vmatrix_model::{InstanceId, MachineId, ServiceId};

/// What a service asks for: n machines' worth of a machine configuration (SODA's `<n, M>`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    pub service: ServiceId,
    /// n.
    pub instances: u32,
    /// M: what each has.
    pub each: Amounts,
    /// Whether they are to be on different machines.
    pub apart: Apart,
}

/// Whether instances of one service are to be on different machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Apart {
    /// It does not matter.
    No,
    /// While there are enough machines.
    WherePossible,
    /// Rather not at all than on the same.
    Always,
}

/// Why a want is not granted.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refused {
    #[error(transparent)]
    Odd(#[from] Odd),
    #[error("no machine is subscribed; start `vmatrix machine` on one")]
    NoMachine,
    #[error("{service} wants {wanted} instances and there is room for {granted}: {lacks}; add a machine or want less")]
    NoRoom { service: ServiceId, wanted: u32, granted: u32, lacks: Lacks },
}

/// What the machine lacks that came nearest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lacks {
    /// No machine has so much of it left.
    Room { kind: Kind, needs: u64, most: u64 },
    /// Of each kind some machine has enough, and none of all.
    Together,
    /// The machines that have room have an instance of it already.
    Another,
}

impl std::fmt::Display for Lacks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Lacks::Room { kind, needs, most } => {
                write!(f, "each needs {needs} of {kind} and no machine has more than {most} left")
            }
            Lacks::Together => f.write_str("no machine has enough of everything at once"),
            Lacks::Another => f.write_str("each machine that has room runs one of it, and they are to be apart"),
        }
    }
}

/// A new instance, and why it is there.
#[derive(Debug, Clone, PartialEq)]
pub struct Placed {
    pub instance: Instance,
    /// Whether it shares its machine with another of its service.
    pub shares: bool,
    /// How much of the image its machine has.
    pub held: Held,
    /// The score before it came, sharing left aside.
    pub before: f64,
    pub after: f64,
}

/// Finds a machine for each new instance of a service: one that has room, and of these first one that has none of the
/// service (if they are to be apart), then one that holds most of the image, then the one that leaves the network
/// most even, then the lower name. Their numbers are the lowest that are free.
///
/// # Errors
/// Why there is no room for all of them; then none is placed.
pub fn place(
    machines: &[Machine],
    present: &[Instance],
    held: &BTreeMap<MachineId, Held>,
    want: &Want,
    rules: &Rules,
) -> Result<Vec<Placed>, Refused> {
    if machines.is_empty() {
        return Err(Refused::NoMachine);
    }
    let mut ledger = Ledger::new(machines, present, rules)?;
    let needs = checked(&ledger, want)?;
    let like: Vec<&Instance> = present.iter().filter(|i| i.id.service == want.service).collect();
    let taken: BTreeSet<u32> = like.iter().map(|i| i.id.number).collect();
    let on: BTreeSet<&MachineId> = like.iter().map(|i| &i.machine).collect();
    let mut shared: Vec<bool> = ledger.machines.iter().map(|m| on.contains(&m.id)).collect();
    let held: Vec<Held> = ledger.machines.iter().map(|m| held.get(&m.id).copied().unwrap_or(Held::Nothing)).collect();
    let mut placed = Vec::new();
    for number in (0..=u32::MAX).filter(|n| !taken.contains(n)).take(want.instances as usize) {
        let Some(m) = best(&ledger, &shared, &held, &needs, want.apart) else {
            let lacks = lacks(&ledger, want, &needs);
            let (service, granted) = (want.service.clone(), placed.len() as u32);
            return Err(Refused::NoRoom { service, wanted: want.instances, granted, lacks });
        };
        let before = ledger.score();
        ledger.add(m, needs);
        let id = InstanceId { service: want.service.clone(), number };
        let machine = ledger.machines[m].id.clone();
        let instance = Instance { id, machine, needs: want.each, apart: want.apart != Apart::No };
        placed.push(Placed { instance, shares: shared[m], held: held[m], before, after: ledger.score() });
        shared[m] = true;
    }
    Ok(placed)
}

/// What each needs, if so many can be reckoned with.
fn checked(ledger: &Ledger, want: &Want) -> Result<[f64; KINDS], Odd> {
    let seen = ledger.items.len().saturating_add(want.instances as usize);
    if seen > INSTANCES_MAX {
        return Err(Odd::TooMany { what: "instances", seen, max: INSTANCES_MAX });
    }
    let needs = want.each.by_kind();
    let instance = InstanceId { service: want.service.clone(), number: 0 };
    match ALL.into_iter().zip(needs).find(|(_, need)| *need > NEED_MAX) {
        Some((kind, seen)) => Err(Odd::TooLarge { instance, kind, seen, max: NEED_MAX }),
        None => Ok(needs.map(|n| n as f64)),
    }
}

/// The machine for one more.
fn best(ledger: &Ledger, shared: &[bool], held: &[Held], needs: &[f64; KINDS], apart: Apart) -> Option<usize> {
    let none = [0.0; KINDS];
    let mut best: Option<((bool, Held), f64, usize)> = None;
    for m in 0..ledger.spots.len() {
        let (on, alike) = (ledger.spots[m].here.len() + 1, shared[m] && apart != Apart::No);
        if (alike && apart == Apart::Always) || !ledger.fits(m, needs, &none, on) {
            continue;
        }
        let first = (alike, held[m]);
        let gain = ledger.gain(m, &ledger.shift(m, needs, &none, on), m, &none);
        let better = best.is_none_or(|(most, gained, _)| match first.cmp(&most) {
            Ordering::Equal => gain > gained,
            order => order == Ordering::Less,
        });
        if better {
            best = Some((first, gain, m));
        }
    }
    best.map(|(_, _, m)| m)
}

/// What is missing where nothing was found.
fn lacks(ledger: &Ledger, want: &Want, needs: &[f64; KINDS]) -> Lacks {
    let mut most = [0.0_f64; KINDS];
    let mut fits = false;
    for m in 0..ledger.spots.len() {
        let left = ledger.left(m);
        (0..KINDS).for_each(|k| most[k] = most[k].max(left[k]));
        fits |= ledger.fits(m, needs, &[0.0; KINDS], ledger.spots[m].here.len() + 1);
    }
    let short = ALL.into_iter().enumerate().find(|(k, _)| needs[*k] > most[*k]);
    match short {
        Some((k, kind)) => Lacks::Room { kind, needs: want.each.by_kind()[k], most: most[k] as u64 },
        None if fits => Lacks::Another,
        None => Lacks::Together,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1024;

    fn machine(name: &str, cpus: u64, gib: u64) -> Machine {
        let room = Amounts { cpu_millis: cpus * 1000, memory_mib: gib * GIB, disk_mib: 100 * GIB, load: 1000 };
        Machine::new(name.parse().unwrap(), room)
    }

    fn want(instances: u32, cpus: u64, gib: u64, apart: Apart) -> Want {
        let each = Amounts { cpu_millis: cpus * 1000, memory_mib: gib * GIB, disk_mib: GIB, load: 1000 };
        Want { service: "maps".parse().unwrap(), instances, each, apart }
    }

    fn at(machines: &[Machine], held: &[(&str, Held)], want: &Want) -> Vec<String> {
        let held = held.iter().map(|(m, h)| (m.parse().unwrap(), *h)).collect();
        let placed = place(machines, &[], &held, want, &Rules::default()).unwrap();
        placed.iter().map(|p| format!("{}@{}", p.instance.id, p.instance.machine)).collect()
    }

    #[test]
    fn n_instances_go_on_n_machines() {
        let machines = [machine("m1", 16, 64), machine("m2", 4, 8), machine("m3", 4, 8)];
        let placed = at(&machines, &[], &want(3, 2, 4, Apart::Always));
        assert_eq!(placed, ["maps-0@m1", "maps-1@m2", "maps-2@m3"]);
    }

    #[test]
    fn the_fourth_shares_only_where_it_may() {
        let machines = [machine("m1", 16, 64), machine("m2", 4, 8), machine("m3", 4, 8)];
        assert_eq!(at(&machines, &[], &want(4, 2, 4, Apart::WherePossible))[3], "maps-3@m1");
        let refused = place(&machines, &[], &BTreeMap::new(), &want(4, 2, 4, Apart::Always), &Rules::default());
        let refused = refused.unwrap_err();
        assert!(matches!(refused, Refused::NoRoom { granted: 3, lacks: Lacks::Another, .. }));
        assert!(refused.to_string().contains("add a machine or want less"), "{refused}");
    }

    #[test]
    fn a_holder_of_the_image_comes_before_an_even_network_and_after_being_apart() {
        let machines = [machine("m1", 8, 16), machine("m2", 4, 8), machine("m3", 4, 8)];
        let held = [("m3", Held::Whole), ("m2", Held::Part)];
        assert_eq!(at(&machines, &held, &want(2, 1, 1, Apart::No)), ["maps-0@m3", "maps-1@m3"]);
        assert_eq!(at(&machines, &held, &want(2, 1, 1, Apart::WherePossible)), ["maps-0@m3", "maps-1@m2"]);
    }

    #[test]
    fn an_instance_that_is_slowed_down_by_another_needs_more() {
        let machines = [machine("m1", 4, 64)];
        let two = want(2, 2, 1, Apart::No);
        assert_eq!(at(&machines, &[], &two).len(), 2);
        let slow = Rules { slow_down: 150, ..Rules::default() };
        let refused = place(&machines, &[], &BTreeMap::new(), &two, &slow).unwrap_err();
        let Refused::NoRoom { granted, lacks, .. } = refused else { panic!("{refused}") };
        // Alone it has its two processors; two that share need six of four, and the first takes three of them.
        assert_eq!((granted, lacks), (1, Lacks::Room { kind: Kind::Cpu, needs: 2000, most: 666 }));
    }

    #[test]
    fn free_numbers_are_used_first() {
        let machines = [machine("m1", 8, 16)];
        let has = |number| Instance {
            id: InstanceId { service: "maps".parse().unwrap(), number },
            machine: "m1".parse().unwrap(),
            needs: Amounts::default(),
            apart: false,
        };
        let (none, rules) = (BTreeMap::new(), Rules::default());
        let placed = place(&machines, &[has(0), has(2)], &none, &want(2, 1, 1, Apart::No), &rules).unwrap();
        assert_eq!(placed.iter().map(|p| p.instance.id.number).collect::<Vec<_>>(), [1, 3]);
    }

    #[test]
    fn a_refusal_says_what_is_missing() {
        let refused =
            |m: &[Machine], w: &Want| place(m, &[], &BTreeMap::new(), w, &Rules::default()).unwrap_err().to_string();
        assert!(refused(&[], &want(1, 1, 1, Apart::No)).contains("no machine is subscribed"));
        let said = refused(&[machine("m1", 8, 16)], &want(1, 1, 17, Apart::No));
        assert!(said.contains("each needs 17408 of memory and no machine has more than 16384 left"), "{said}");
        let odd = [machine("m1", 8, 1), machine("m2", 1, 16)];
        assert!(refused(&odd, &want(1, 8, 16, Apart::No)).contains("no machine has enough of everything"));
        let huge = Want { instances: u32::MAX, ..want(1, 1, 1, Apart::No) };
        assert!(refused(&odd, &huge).contains("split the network"));
    }
}
