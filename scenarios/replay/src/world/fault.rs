//! Daemons killed and started again: what they had written down is there, everything else is gone.
//!
//! What the kernel holds stays: packet filter, guests, connections. That is what "the data plane
//! outlives the control plane" means.

use super::{Happening, World};
use crate::scenario::{Daemon, Fault};
use std::collections::BTreeMap;
use vmatrix_cpa_core::{Cpa, Event as CpaEvent};
use vmatrix_model::{NetworkId, Span};
use vmatrix_vma_core::Vma;
use vmatrix_vma_core::steps::Event as VmaEvent;

impl World {
    /// A crowd has caused its first decision: the faults that wait for it get their time.
    pub(super) fn first_burst(&mut self) {
        let waiting: Vec<(usize, f64)> =
            self.scenario.faults.iter().enumerate().filter_map(|(i, f)| Some((i, f.after_decision_s?))).collect();
        for (index, seconds) in waiting {
            self.after(Span((seconds.max(0.0) * 1e6) as u64), Happening::Kill(index));
        }
        // Only the first decision counts.
        self.scenario.faults.iter_mut().for_each(|f| f.after_decision_s = None);
    }

    pub(super) fn kill(&mut self, index: usize) {
        let Some(fault) = self.scenario.faults.get(index).cloned() else { return };
        self.record.fault(self.now, "kill", &name(&fault));
        match (&fault.kill, &fault.network) {
            (Daemon::Cpa, _) => {
                if let Some(core) = self.cpa.core.take() {
                    self.cpa.written = core.memory().clone();
                }
            }
            (Daemon::Origin, _) => self.kill_origin(),
            (Daemon::Vma, Some(network)) => {
                if let Some(site) = self.sites.get_mut(network) {
                    site.vma.core = None;
                    site.vma.run += 1;
                }
            }
            (Daemon::Edge, Some(network)) => {
                if let Some(site) = self.sites.get_mut(network) {
                    site.edge.up = false;
                }
            }
            (Daemon::Machine, Some(network)) => self.kill_machines(network),
            (Daemon::Vma | Daemon::Edge | Daemon::Machine, None) => {}
        }
        self.after(Span::secs(u64::from(fault.restart_after_s)), Happening::Restart(index));
    }

    pub(super) fn restart(&mut self, index: usize) {
        let Some(fault) = self.scenario.faults.get(index).cloned() else { return };
        self.record.fault(self.now, "restart", &name(&fault));
        match (&fault.kill, &fault.network) {
            (Daemon::Cpa, _) if self.cpa.core.is_none() => {
                self.cpa.core = Some(Cpa::new(self.scenario.fleet.clone(), BTreeMap::new()).under(self.cpa.policy));
                let memory = self.cpa.written.clone();
                self.feed_cpa(CpaEvent::Restored(Box::new(memory)));
            }
            (Daemon::Origin, _) => self.origin_up = true,
            (Daemon::Vma, Some(network)) => {
                let Some(site) = self.sites.get_mut(network).filter(|s| s.vma.core.is_none()) else { return };
                site.vma.core = Some(Vma::new(network.clone()));
                if let Some(assignment) = site.vma.written.clone() {
                    self.feed_vma(network, VmaEvent::Assignment(assignment));
                }
            }
            (Daemon::Edge, Some(network)) => {
                if let Some(site) = self.sites.get_mut(network).filter(|s| !s.edge.up) {
                    site.edge.restart();
                }
            }
            (Daemon::Machine, Some(network)) => {
                let machines = self.sites.get_mut(network).into_iter().flat_map(|s| &mut s.machines);
                machines.for_each(|m| m.up = true);
            }
            // Killed twice and started twice: it runs already.
            (Daemon::Cpa, _) | (Daemon::Vma | Daemon::Edge | Daemon::Machine, None) => {}
        }
    }

    /// Images and tunnels end at the origin's gateway: transfers break off, and requests that need
    /// the database wait.
    fn kill_origin(&mut self) {
        self.origin_up = false;
        let networks: Vec<NetworkId> = self.sites.keys().cloned().collect();
        for network in networks {
            self.break_transfers(&network);
        }
    }

    fn kill_machines(&mut self, network: &NetworkId) {
        self.break_transfers(network);
        let machines = self.sites.get_mut(network).into_iter().flat_map(|s| &mut s.machines);
        machines.for_each(super::machine::Machine::kill);
    }

    /// What has arrived stays; the rest is asked for again.
    fn break_transfers(&mut self, network: &NetworkId) {
        self.transferred(network);
        let Some(site) = self.sites.get_mut(network) else { return };
        site.wire.stop();
        for staged in site.machines.iter_mut().flat_map(|m| m.images.values_mut()) {
            staged.fetching = false;
        }
    }
}

fn name(fault: &Fault) -> String {
    let daemon = match fault.kill {
        Daemon::Cpa => "the CPA",
        Daemon::Vma => "the VM agent",
        Daemon::Machine => "the machines' daemons",
        Daemon::Edge => "the edge's daemon",
        Daemon::Origin => "the origin's gateway",
    };
    fault.network.as_ref().map_or(daemon.to_owned(), |n| format!("{daemon} of {n}"))
}
