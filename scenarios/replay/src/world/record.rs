//! Writes down what happens, in the world's time; shifted to the play's when it is handed over.

use super::World;
use crate::recording::{InstancesAt, Recording, Request, StepAt};
use std::collections::{BTreeMap, BTreeSet};
use vmatrix_model::fleet::Fleet;
use vmatrix_model::plan::{Cause, Decision};
use vmatrix_model::steering::{Answers, Steering};
use vmatrix_model::{Bytes, NetworkId, ServiceId, Time};
use vmatrix_vma_core::steps::Step;

#[derive(Default)]
pub struct Recorder {
    requests: Vec<Request>,
    /// By number of the plan; the newest word about each.
    decisions: BTreeMap<u64, Decision>,
    instances: Vec<InstancesAt>,
    steps: Vec<StepAt>,
    answers: BTreeMap<ServiceId, Answers>,
    moved: Bytes,
    notes: BTreeSet<String>,
}

impl Recorder {
    pub fn request(&mut self, request: Request) {
        self.requests.push(request);
    }

    /// Keeps a decision; says whether it is a new one.
    pub fn decision(&mut self, decision: Decision) -> bool {
        self.decisions.insert(decision.plan.id, decision).is_none()
    }

    /// Keeps where a service serves, if that changed.
    pub fn instances(&mut self, at: Time, service: &ServiceId, serving: BTreeMap<NetworkId, u32>) {
        let last = self.instances.iter().rev().find(|i| i.service == *service);
        if last.map_or(!serving.is_empty(), |l| l.serving != serving) {
            self.instances.push(InstancesAt { at, service: service.clone(), serving });
        }
    }

    /// Keeps answers that differ from those before.
    pub fn announced(&mut self, at: Time, fleet: &Fleet, steering: &Steering) {
        for (service, answers) in &steering.services {
            if self.answers.get(service) == Some(answers) {
                continue;
            }
            self.answers.insert(service.clone(), answers.clone());
            self.steps.push(StepAt {
                at,
                verb: "announce".into(),
                what: format!("{service} ({}): {}", steering.generation, in_words(fleet, service, answers)),
            });
        }
    }

    pub fn step(&mut self, at: Time, network: &NetworkId, step: &Step) {
        let (verb, what) = match step {
            Step::Resume { instance } => ("resume", format!("{instance} at {network} is healthy")),
            Step::Suspend { instance } => ("suspend", format!("{instance} at {network} sleeps")),
            Step::Release { instance } => ("release", format!("{instance} at {network}: only the image is left")),
            Step::Stage { .. } | Step::DropImage { .. } | Step::Prepare(_) => return,
        };
        self.steps.push(StepAt { at, verb: verb.into(), what });
    }

    pub fn fault(&mut self, at: Time, verb: &str, what: &str) {
        self.steps.push(StepAt { at, verb: verb.into(), what: what.into() });
    }

    pub fn moved(&mut self, bytes: Bytes) {
        self.moved += bytes;
    }

    /// A note is kept once.
    pub fn note(&mut self, note: String) {
        self.notes.insert(note);
    }

    /// Answers that send clients to where nothing serves, or some of them nowhere.
    pub fn bad_answers(&mut self, service: &ServiceId, what: &str) {
        self.note(format!("clients of {service} were sent {what}"));
    }

    /// An edge had no address to give: never while an instance serves.
    pub fn empty_answer(&mut self, network: &NetworkId, service: &ServiceId) {
        self.note(format!("the edge of {network} had no address for {service}"));
    }
}

/// Who is sent where: regions that get something else than everyone, then everyone else.
fn in_words(fleet: &Fleet, service: &ServiceId, answers: &Answers) -> String {
    let names = |addresses: &[std::net::Ipv4Addr]| {
        let of = |a: &std::net::Ipv4Addr| {
            fleet
                .networks
                .iter()
                .find(|n| fleet.vip(service, &n.name) == Some(*a))
                .map_or(a.to_string(), |n| n.name.to_string())
        };
        if addresses.is_empty() {
            "nobody".to_owned()
        } else {
            addresses.iter().map(of).collect::<Vec<_>>().join(" and ")
        }
    };
    let mut words = Vec::new();
    for (prefix, addresses) in answers.by_clients.iter().filter(|(_, a)| **a != answers.otherwise) {
        let who = fleet.regions.iter().find(|r| r.prefix == *prefix).map_or(prefix.to_string(), |r| r.name.to_string());
        words.push(format!("{who} to {}", names(addresses)));
    }
    words.push(format!(
        "{} to {}",
        if words.is_empty() { "everyone" } else { "everyone else" },
        names(&answers.otherwise)
    ));
    words.join(", ")
}

impl World {
    /// The recording, in the play's time.
    pub(super) fn finish(mut self) -> Recording {
        for id in self.asked.keys().copied().collect::<Vec<_>>() {
            self.end(id, Some("not answered by the end of the play".into()));
        }
        let began = self.began.unwrap_or_default();
        let play = |at: Time| Time(at.since(began).0);
        let returned_to_dormant = self.dormant_but_at_home();
        let explain = self.explained();
        let Recorder { mut requests, decisions, instances, mut steps, moved, notes, .. } = self.record;
        requests.sort_by(|a, b| (a.at, &a.service, &a.region).cmp(&(b.at, &b.service, &b.region)));
        steps.retain(|s| s.at >= began);
        steps.iter_mut().for_each(|s| s.at = play(s.at));
        let mut decisions: Vec<Decision> = decisions.into_values().collect();
        for d in &mut decisions {
            d.plan.at = play(d.plan.at);
            d.serving_at = d.serving_at.map(play);
            d.done_at = d.done_at.map(play);
        }
        // What happened before the play is told only as the state it left.
        let mut kept: Vec<InstancesAt> = Vec::new();
        for i in instances {
            if i.at <= began {
                kept.retain(|k| k.service != i.service);
            }
            kept.push(InstancesAt { at: play(i.at), ..i });
        }
        Recording {
            accelerator: "replay".into(),
            requests,
            decisions,
            instances: kept,
            steps,
            bytes_moved: moved,
            returned_to_dormant,
            writes: self.acknowledged.len() as u64,
            lost_writes: self.acknowledged.difference(&self.written).count() as u64,
            explain,
            notes: notes.into_iter().collect(),
            // Simulated packets have no content that could leak, and nobody knocks at simulated ports.
            ..Recording::default()
        }
    }

    /// The reasons of every move that was made by itself or by an order.
    fn explained(&self) -> Vec<String> {
        let decisions = self.record.decisions.values().filter(|d| d.plan.cause != Cause::Start);
        decisions
            .flat_map(|d| {
                d.plan
                    .moves
                    .iter()
                    .map(|m| m.to_string())
                    .chain(d.plan.not.iter().map(|n| n.to_string().trim_start().to_owned()))
            })
            .collect()
    }
}
