//! Carries out what was decided: takes services from the union to the target, and says each network its share.

use crate::Command;
use crate::cpa::{Cpa, DRAIN};
use crate::rounds::running;
use crate::toward::{Next, PATIENCE, Transition, union};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use vmatrix_model::assignment::{Assignment, ServiceShare, Singleton};
use vmatrix_model::fleet::{Kind, Service};
use vmatrix_model::placement::Share;
use vmatrix_model::plan::{Decision, WhyNot};
use vmatrix_model::{NetworkId, ServiceId, Time};

impl Cpa {
    /// Takes every service that is on its way as far as what is seen allows.
    pub(crate) fn settle(&mut self, now: Time, commands: &mut Vec<Command>) {
        let on_their_way: Vec<ServiceId> = self.memory.transitions.keys().cloned().collect();
        for service in on_their_way {
            // At most: turn, tell, done.
            for _ in 0..3 {
                if !self.advance(now, &service, commands) {
                    break;
                }
            }
        }
    }

    fn advance(&mut self, now: Time, service: &ServiceId, commands: &mut Vec<Command>) -> bool {
        let ttl = self.ttl();
        let Some(transition) = self.memory.transitions.get_mut(service) else { return false };
        let plan = transition.plan;
        match transition.next(service, &self.memory.seen, ttl, now) {
            Next::Wait => return false,
            Next::Turn => {
                transition.turned = Some(now);
                self.note(plan, commands, |d, alone| {
                    if alone {
                        d.serving_at.get_or_insert(now);
                    }
                });
            }
            Next::Tell => {
                transition.told = true;
                let mut placement = self.memory.placement.clone();
                placement.generation = placement.generation.next();
                // Leavers are gone once they work towards this generation.
                transition.generation = self.memory.placement.generation;
                transition.until = now + DRAIN + PATIENCE;
                placement.services.insert(service.clone(), transition.target.clone());
                self.put_in_force(placement, commands);
            }
            Next::Done => {
                self.memory.transitions.remove(service);
                self.note(plan, commands, |d, alone| {
                    if alone {
                        d.serving_at.get_or_insert(now);
                        d.done_at.get_or_insert(now);
                    }
                });
            }
            Next::Fail { network, reason } => {
                let (before, target) = (transition.before.clone(), transition.target.clone());
                *transition = Transition {
                    before: union(&before, &target),
                    target: before,
                    turned: None,
                    told: false,
                    ..transition.clone()
                };
                self.memory.holds.entry(service.clone()).or_default().failed.insert(network.clone(), now);
                let word = WhyNot { service: service.clone(), network, reason: format!("taken back: {reason}") };
                self.memory.not.entry(service.clone()).or_default().push(word.clone());
                self.note(plan, commands, |d, _| d.plan.not.push(word));
            }
        }
        true
    }

    /// Adds to the decision of a plan; `alone` tells whether no other service of that plan is still waited for.
    fn note(&mut self, plan: u64, commands: &mut Vec<Command>, change: impl FnOnce(&mut Decision, bool)) {
        let waiting = |t: &&Transition| t.plan == plan && t.turned.is_none();
        let alone = !self.memory.transitions.values().any(|t| waiting(&t));
        let Some(decision) = self.memory.decisions.iter_mut().find(|d| d.plan.id == plan) else { return };
        let before = decision.clone();
        change(decision, alone);
        if *decision != before {
            commands.push(Command::Decided(decision.clone()));
        }
    }

    /// One assignment for every network, all of the generation in force.
    pub(crate) fn assign(&self, commands: &mut Vec<Command>) {
        for network in &self.fleet.networks {
            let share = |s: &Service| {
                Some((
                    s.name.clone(),
                    self.share_of(s, &network.name, self.memory.placement.share(&s.name, &network.name)?)?,
                ))
            };
            let services = self.fleet.services.iter().filter_map(share).collect();
            let assignment =
                Assignment { generation: self.memory.placement.generation, network: network.name.clone(), services };
            commands.push(Command::Assign(network.name.clone(), assignment));
        }
    }

    fn share_of(&self, service: &Service, network: &NetworkId, share: Share) -> Option<ServiceShare> {
        Some(ServiceShare {
            image: service.image.clone(),
            instances: share.instances(),
            memory_mib: service.memory_mib,
            vip: self.fleet.vip(&service.name, network)?,
            ports: service.ports.clone(),
            backends: service.backend.iter().cloned().collect(),
            drain: DRAIN,
            forward_to: self.forward(service, network),
            singleton: (service.kind == Kind::Singleton).then(|| self.singleton(service, network)),
        })
    }

    /// What `network` does about a singleton. Only the network it is on its way to, or is to be in, may take it; and
    /// it is begun only if no machine was ever seen to hold it, so a holder that is silent is waited for, not
    /// replaced by a second one.
    fn singleton(&self, service: &Service, network: &NetworkId) -> Singleton {
        let target = match self.memory.transitions.get(&service.name) {
            Some(transition) => Some(&transition.target),
            None => self.memory.placement.services.get(&service.name),
        };
        let is_its_place = target.and_then(|t| t.get(network)).is_some_and(|s| s.instances() > 0);
        match self.memory.holders.get(&service.name) {
            _ if !is_its_place => Singleton::Keep,
            None => Singleton::Begin,
            Some(held) if held.network == *network => Singleton::Keep,
            Some(held) => Singleton::Take(held.holder.transfer),
        }
    }

    /// Where `network` sends new connections while it runs nothing: the nearest network that is settled there. A
    /// settled network forwards nowhere, so no two forward to each other.
    fn forward(&self, service: &Service, network: &NetworkId) -> Option<Ipv4Addr> {
        let transition = self.memory.transitions.get(&service.name);
        let placed: BTreeMap<NetworkId, u32> = running(self.memory.placement.services.get(&service.name)?);
        let settled =
            |n: &&NetworkId| transition.is_none_or(|t| t.told || t.before.get(*n).is_some_and(|s| s.instances() > 0));
        if placed.keys().any(|n| n == network && settled(&n)) {
            return None;
        }
        self.fleet.vip(&service.name, self.nearest(network, placed.keys().filter(settled))?)
    }
}
