//! A simulated machine: takes the steps of `vma/core`, holds images and cells, and says what it has.
//!
//! ```text
//! Step ─▶ begin ─▶ how long it takes (or: stage these bytes) ─▶ finish ─▶ Seen
//! ```
//!
//! The life of a cell is that of a real one; only the durations come from the service's profile.

use crate::chance::Chance;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use vmatrix_model::fleet::{Fleet, Service, host};
use vmatrix_model::inventory::{ImageSeen, MachineSeen};
use vmatrix_model::{Bytes, Digest, InstanceId, MachineId, NetworkId, Span, Time};
use vmatrix_vma_core::steps::{CellSeen, CellSpec, Fault, Life, Seen, StagedSeen, Step};

/// Building a cell: a namespace, a bridge, a tap and a rule set, as measured on an idle machine.
const PREPARE: Span = Span::ms(150);
/// The part of a resume order that the cell takes cannot be more than a fifth of the whole.
const PREPARE_SHARE: u64 = 5;
/// What has to be here before a guest runs: device state, tables, working set. Images of the library have 3 to 7 MiB
/// of it; the rest comes while the guest serves.
const CRITICAL: Bytes = Bytes(8 << 20);
/// Saving an instance that nobody uses: device state only, its memory is thrown away.
const SUSPEND: Span = Span::ms(200);
/// Taking a cell down.
const RELEASE: Span = Span::ms(100);
/// Saying yes, or looking something up.
const MOMENT: Span = Span::ms(1);

/// One machine.
pub struct Machine {
    pub id: MachineId,
    network: NetworkId,
    memory_mib: u64,
    /// First address that cells get.
    cells_from: Ipv4Addr,
    /// Whether its daemon runs; the guests run on without it.
    pub up: bool,
    /// Counts the runs of its daemon.
    pub run: u64,
    sequence: u64,
    pub cells: BTreeMap<InstanceId, Cell>,
    /// By name of the image.
    pub images: BTreeMap<String, Staged>,
}

/// A cell and the guest in it.
pub struct Cell {
    pub address: Ipv4Addr,
    pub life: Life,
    memory_mib: u64,
    resumed_in: Option<Span>,
    /// When its guest was last resumed: names one life of it.
    pub resume_began: Time,
    /// Whether the daemon is at work on it.
    under_way: bool,
    /// When its processor has answered all that was asked of it.
    free_at: Time,
    chance: Chance,
}

/// An image on the machine.
pub struct Staged {
    pub total: Bytes,
    pub present: Bytes,
    pub fetching: bool,
}

impl Staged {
    fn is_resumable(&self) -> bool {
        self.present >= self.total.min(CRITICAL)
    }
}

/// What beginning a step leads to.
pub enum Begun {
    /// It ends after so long.
    Takes(Span),
    /// Bytes of an image are to be carried here; the step itself has ended.
    Fetch { image: String, bytes: Bytes },
}

impl Machine {
    /// The `number`th machine (from 1) of `network`; other networks' cells may have the same addresses.
    pub fn new(fleet: &Fleet, network: &NetworkId, number: u32, id: MachineId) -> Machine {
        // 100.64/10 is what carriers use inside: cells are reached by their network's edge only.
        let inside = Ipv4Addr::from_bits(Ipv4Addr::new(100, 64, 0, 0).to_bits() + (number << 8));
        Machine {
            id,
            network: network.clone(),
            memory_mib: fleet.network(network).map_or(0, |n| n.machine_memory_mib),
            cells_from: inside,
            up: true,
            run: 1,
            sequence: 0,
            cells: BTreeMap::new(),
            images: BTreeMap::new(),
        }
    }

    /// What it says when it subscribes.
    pub fn subscription(&self) -> MachineSeen {
        let used: u64 = self.cells.values().map(|c| c.memory_mib).sum();
        MachineSeen {
            id: self.id.clone(),
            cpus: 2,
            memory_mib: self.memory_mib,
            free_mib: self.memory_mib.saturating_sub(used),
            accelerator: "replay".into(),
            qemu_version: "10.0.2".into(),
            transfer: None,
        }
    }

    /// Looks at everything it has.
    pub fn seen(&mut self) -> Seen {
        self.sequence += 1;
        let cells = self.cells.iter().map(|(instance, c)| CellSeen {
            instance: instance.clone(),
            address: c.address,
            life: c.life,
            memory_mib: c.memory_mib,
            resumed_in: c.resumed_in,
            trouble: None,
            holds: None,
        });
        let images = self.images.iter().map(|(image, s)| StagedSeen {
            image: image.clone(),
            seen: Some(ImageSeen {
                digest: Digest::of(image.as_bytes()),
                present: s.present,
                total: s.total,
                fetched: s.present,
                resumable: s.is_resumable(),
            }),
            fetching: s.fetching,
            trouble: None,
        });
        Seen {
            machine: self.id.clone(),
            run: self.run,
            sequence: self.sequence,
            cells: cells.collect(),
            images: images.collect(),
        }
    }

    /// Its daemon is killed: what it was at work on stays as it is.
    pub fn kill(&mut self) {
        self.up = false;
        self.run += 1;
        self.cells.values_mut().for_each(|c| c.under_way = false);
        self.images.values_mut().for_each(|s| s.fetching = false);
    }

    /// Begins a step.
    ///
    /// # Errors
    /// What a real machine would answer: an image that is not here, memory that is not free.
    pub fn begin(&mut self, now: Time, step: &Step, service: &Service, seed: u64) -> Result<Begun, Fault> {
        let fault = |problem: String| Fault { problem, hint: "stage the image and look again".into(), lasting: false };
        match step {
            Step::Stage { image, .. } => {
                let total = Bytes(service.profile.image_mib << 20);
                let staged =
                    self.images.entry(image.clone()).or_insert(Staged { total, present: Bytes(0), fetching: false });
                if staged.fetching || staged.present >= staged.total {
                    return Ok(Begun::Takes(MOMENT));
                }
                staged.fetching = true;
                Ok(Begun::Fetch { image: image.clone(), bytes: staged.total - staged.present })
            }
            Step::DropImage { image } => {
                self.images.remove(image);
                Ok(Begun::Takes(MOMENT))
            }
            Step::Prepare(spec) => self.prepare(spec, service, seed).map_err(fault),
            Step::Resume { instance } => {
                let network = &self.network;
                let cell = self
                    .cells
                    .get_mut(instance)
                    .ok_or_else(|| fault(format!("{instance} has no cell in {network}")))?;
                if cell.under_way || !matches!(cell.life, Life::Ready | Life::Resuming) {
                    return Ok(Begun::Takes(MOMENT));
                }
                if !self.images.get(&service.image).is_some_and(Staged::is_resumable) {
                    return Err(fault(format!("what {instance} needs first is not here yet")));
                }
                cell.life = Life::Resuming;
                cell.under_way = true;
                cell.resume_began = now;
                Ok(Begun::Takes(Span::ms(u64::from(service.profile.resume_ms)) - prepare_time(service)))
            }
            Step::Suspend { instance } => {
                let Some(cell) = self.cells.get_mut(instance) else { return Ok(Begun::Takes(MOMENT)) };
                cell.life = Life::Ready;
                Ok(Begun::Takes(SUSPEND))
            }
            Step::Release { instance } => {
                self.cells.remove(instance);
                Ok(Begun::Takes(RELEASE))
            }
        }
    }

    fn prepare(&mut self, spec: &CellSpec, service: &Service, seed: u64) -> Result<Begun, String> {
        if let Some(cell) = self.cells.get_mut(&spec.instance) {
            // What a killed daemon left half done is done again.
            let again = cell.life == Life::Building && !cell.under_way;
            cell.under_way |= again;
            return Ok(Begun::Takes(if again { prepare_time(service) } else { MOMENT }));
        }
        if !self.images.contains_key(&spec.image) {
            return Err(format!("image {} is not known on {}", spec.image, self.id));
        }
        if self.subscription().free_mib < spec.memory_mib {
            return Err(format!("{} MiB are not free on {}", spec.memory_mib, self.id));
        }
        let taken: Vec<Ipv4Addr> = self.cells.values().map(|c| c.address).collect();
        let addresses = (0..64).map(|k| Ipv4Addr::from_bits(self.cells_from.to_bits() + 4 * k + 2));
        let address = addresses
            .filter(|a| !taken.contains(a))
            .min()
            .ok_or_else(|| format!("{} has no address left for a cell", self.id))?;
        let cell = Cell {
            address,
            life: Life::Building,
            memory_mib: spec.memory_mib,
            resumed_in: None,
            resume_began: Time(0),
            under_way: true,
            free_at: Time(0),
            chance: Chance::named(seed, &["guest", self.network.as_str(), &spec.instance.to_string()]),
        };
        self.cells.insert(spec.instance.clone(), cell);
        Ok(Begun::Takes(prepare_time(service)))
    }

    /// Ends a step that took its time.
    pub fn finish(&mut self, now: Time, step: &Step) {
        let Some(cell) = step.instance().and_then(|i| self.cells.get_mut(i)) else { return };
        cell.under_way = false;
        match step {
            Step::Prepare(_) if cell.life == Life::Building => cell.life = Life::Ready,
            Step::Resume { .. } if cell.life == Life::Resuming => {
                cell.life = Life::Healthy;
                cell.resumed_in = Some(now.since(cell.resume_began));
                cell.free_at = now;
            }
            _ => {}
        }
    }

    /// The cell at an address.
    pub fn cell_at(&mut self, address: Ipv4Addr) -> Option<&mut Cell> {
        self.cells.values_mut().find(|c| c.address == address)
    }
}

impl Cell {
    /// Whether a guest in it answers.
    pub fn answers(&self) -> bool {
        self.life == Life::Healthy
    }

    /// Takes a request at `now` and says when its answer is computed: one processor, first come first
    /// served, 90 to 120 per cent of the median each.
    pub fn work(&mut self, now: Time, answer_ms: u32) -> Time {
        let percent = 90 + self.chance.under(31);
        self.free_at = self.free_at.max(now) + Span(Span::ms(u64::from(answer_ms)).0 * percent / 100);
        self.free_at
    }
}

fn prepare_time(service: &Service) -> Span {
    PREPARE.min(Span(Span::ms(u64::from(service.profile.resume_ms)).0 / PREPARE_SHARE))
}

/// The `number`th machine's name, from 1: what the lab calls them, too.
pub fn name(number: u32) -> Option<MachineId> {
    format!("m{number}").parse().ok()
}

/// Where the first client of a region is.
pub fn first_client(prefix: ipnet::Ipv4Net) -> Ipv4Addr {
    host(prefix, 2)
}
