//! Placement from epoch to epoch: forecast, plan ahead, do the first step, look again (receding horizon).
//!
//! ```text
//!  epoch ends ─▶ outlook hears ─▶ forecast of a day ─▶ last plan, shifted │ everything stays │ rounded from the dual
//!       │                                                  └▶ improve each ─▶ the cheapest: its first step is done
//!       └▶ missed: what absent networks would have saved        ▲
//!          idle: what images that nobody used have cost ────────┘ prices of the window
//! ```
//! A window of a day does not see why an image should be kept for next week, or brought because it will be used each
//! day: it would drop images in the evening and ship them again in the morning. What lies beyond the window is rent or
//! buy (Karlin et al. 1988), for which nothing need be known of the future:
//!
//! - an image that is there is kept, whatever the window says, until its storage since it was last used has cost as much
//!   as bringing it again;
//! - an image that is not there costs its way less what has been missed without it: once that is the whole price, it is
//!   as if it had been paid.

use super::descent::Served;
use super::outlook::Outlook;
use super::{Plan, Problem, Stage, State, dual, improve};
use serde::{Deserialize, Serialize};

/// Sweeps until a plan is taken as it is: descent ends by itself after three or four.
const SWEEPS: usize = 8;
/// Networks that are looked at between two full looks, beside those that have the image: those that came nearest to
/// paying in the last full one.
const NEAR: usize = 24;

/// What is fixed of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requests {
    pub clusters: usize,
    /// As in [`Problem`]: `[network * clusters + cluster]`.
    pub prices: Vec<u32>,
    pub unserved: u32,
}

/// What a service's requests cost, and networks at which time.
pub trait Prices {
    /// What requests cost.
    fn requests(&self) -> &Requests;

    /// What a network costs in `epochs` epochs that begin with `epoch`.
    fn stage(&self, network: usize, epoch: usize, epochs: usize) -> Stage;
}

/// Plans one service over and over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Planner {
    /// Lengths of the steps that are planned, in epochs: fine at first, for that is what will be done.
    lengths: Vec<usize>,
    outlook: Outlook,
    epoch: usize,
    states: Vec<State>,
    /// By network: what its clients would have saved with it, while it had no image; what its image has cost unused.
    missed: Vec<i64>,
    idle: Vec<i64>,
    /// Networks that got the image as the present epoch began.
    came: Vec<usize>,
    plan: Vec<State>,
    near: Vec<usize>,
    pays: Vec<f32>,
    /// Rounds of the dual at each look.
    rounds: usize,
}

impl Planner {
    /// A planner of so many client clusters that has heard nothing and begins with `epoch`; `day` epochs are a day, and so
    /// many `rounds` are spent on the dual at each look.
    pub fn new(clusters: usize, day: usize, epoch: usize, from: Vec<State>, rounds: usize) -> Planner {
        let hour = (day / 24).max(1);
        // A day: an hour by epochs, five hours, three times two, three times four.
        let lengths = std::iter::repeat_n(1, hour).chain([hour; 5]).chain([2 * hour; 3]).chain([4 * hour; 3]).collect();
        Planner {
            outlook: Outlook::new(clusters, day),
            lengths,
            epoch,
            missed: vec![0; from.len()],
            idle: vec![0; from.len()],
            states: from,
            came: Vec::new(),
            plan: Vec::new(),
            near: Vec::new(),
            pays: Vec::new(),
            rounds,
        }
    }

    /// The epoch that is to be heard of next, or to be decided about.
    pub fn epoch(&self) -> usize {
        self.epoch
    }

    /// Whether a whole day was heard, so that there is something to foresee.
    pub fn knows(&self) -> bool {
        self.outlook.knows()
    }

    /// What each network has.
    pub fn states(&self) -> &[State] {
        &self.states
    }

    /// Lengths of the steps that are planned, in epochs.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// What is expected in the steps to come: `[step * clusters + cluster]`.
    pub fn forecast(&self, into: &mut Vec<u32>) {
        self.outlook.forecast(&self.lengths, into);
    }

    /// Learns what each cluster asked in the epoch that has ended.
    pub fn hear(&mut self, demand: &[u32], networks: &dyn Prices) {
        self.outlook.hear(demand);
        let stages: Vec<Stage> = (0..self.states.len()).map(|n| networks.stage(n, self.epoch, 1)).collect();
        let problem = networks.requests().problem(1, demand, &stages, &self.states);
        let served = Served::of(&problem, &self.states);
        let without: Vec<State> = self
            .states
            .iter()
            .enumerate()
            .map(|(n, s)| if self.came.contains(&n) { State::Absent } else { *s })
            .collect();
        let before = (!self.came.is_empty()).then(|| Served::of(&problem, &without));
        let (mut saves, mut saved) = ([0_i64], [0_i64]);
        for (network, state) in self.states.iter().enumerate() {
            if *state == State::Absent {
                served.saves(&problem, network, &[], &mut saves);
                if let Some(before) = &before {
                    // What was missed without it is not missed any more where somebody else came for it.
                    before.saves(&problem, network, &[], &mut saved);
                    let left = i128::from(self.missed[network]) * i128::from(saves[0]) / i128::from(saved[0].max(1));
                    self.missed[network] = left as i64;
                }
                self.missed[network] += (saves[0] - stages[network].active).max(0);
            }
            match state {
                State::Dormant => self.idle[network] += stages[network].dormant,
                State::Active | State::Absent => self.idle[network] = 0,
            }
        }
        self.came.clear();
        self.epoch += 1;
    }

    /// Decides what each network has in the epoch that begins. `demand` is what is expected, as [`Planner::forecast`] has
    /// it; `full` looks at every network, else at those that have the image and those that came near to paying.
    pub fn decide(&mut self, demand: &[u32], networks: &dyn Prices, full: bool) -> &[State] {
        let choice = self.choose(demand, networks, full);
        let states = self.wanted(&choice, networks);
        self.see(&states);
        &self.states
    }

    /// The cheapest plan from here, of which nothing is done yet.
    pub fn choose(&mut self, demand: &[u32], networks: &dyn Prices, full: bool) -> Choice {
        let (count, steps) = (self.states.len(), self.lengths.len());
        let stages = self.window(networks);
        let pays = std::mem::take(&mut self.pays);
        let mut pays: Vec<f32> = if pays.is_empty() {
            pays
        } else {
            let (later, row) = (self.later(1), networks.requests().clusters);
            later.iter().flat_map(|step| pays[step * row..(step + 1) * row].to_vec()).collect()
        };
        let problem = networks.requests().problem(steps, demand, &stages, &self.states);
        let full = full || self.near.is_empty();
        let order: Vec<usize> = if full { (0..count).collect() } else { self.near.clone() };
        let planned = |states: Vec<State>| {
            let mut plan = Plan { cost: problem.cost(&states), states };
            improve(&problem, &mut plan, &order, SWEEPS);
            plan
        };
        let mut best = planned(self.staying());
        if !self.plan.is_empty() {
            let warm = planned(self.shifted());
            best = if warm.cost < best.cost { warm } else { best };
        }
        if full {
            self.near = near(&problem, &best);
        }
        if self.rounds > 0 {
            best = exchange(&problem, best, &self.near, &mut pays, self.rounds);
        }
        self.pays = pays;
        self.plan.clone_from(&best.states);
        Choice { plan: best, stages, demand: demand.to_vec(), from: self.states.clone() }
    }

    /// Every network as it is, in every step.
    pub fn staying(&self) -> Vec<State> {
        self.states.iter().flat_map(|s| std::iter::repeat_n(*s, self.lengths.len())).collect()
    }

    /// Stages of the window: what an image that is there costs is counted elsewhere, and what was missed is paid.
    fn window(&self, networks: &dyn Prices) -> Vec<Stage> {
        let mut stages = Vec::with_capacity(self.states.len() * self.lengths.len());
        for (network, state) in self.states.iter().enumerate() {
            let mut at = self.epoch;
            for length in &self.lengths {
                let mut stage = networks.stage(network, at, *length);
                if *state == State::Absent {
                    stage.ship = (stage.ship - self.missed[network]).max(0);
                } else {
                    stage.active -= stage.dormant;
                    stage.dormant = 0;
                }
                stages.push(stage);
                at += length;
            }
        }
        stages
    }

    /// What each network is to have now: the first step of the plan, without images that have cost as much unused as
    /// bringing them again.
    pub fn wanted(&self, choice: &Choice, networks: &dyn Prices) -> Vec<State> {
        let first = choice.plan.states.iter().step_by(self.lengths.len().max(1));
        let each = first.enumerate().map(|(network, to)| {
            let dear = self.idle[network] > networks.stage(network, self.epoch, 1).ship;
            let idle = *to == State::Dormant && self.states[network] == State::Dormant;
            if idle && dear { State::Absent } else { *to }
        });
        each.collect()
    }

    /// Takes note of what each network has, whoever had it brought there.
    pub fn see(&mut self, states: &[State]) {
        for (network, (has, is)) in self.states.iter_mut().zip(states).enumerate() {
            if *has == State::Absent && *is != State::Absent {
                self.missed[network] = 0;
                self.came.push(network);
            }
            *has = *is;
        }
    }

    /// Lets epochs pass of which nothing was heard.
    pub fn skip(&mut self, epochs: usize) {
        self.outlook.skip(epochs);
        self.epoch += epochs;
        self.came.clear();
        self.plan.clear();
        self.pays.clear();
    }

    /// The last plan, an epoch later.
    fn shifted(&self) -> Vec<State> {
        let of = self.later(1);
        self.plan.chunks(self.lengths.len()).flat_map(|path| of.iter().map(|step| path[*step])).collect()
    }

    /// For each step of a window that begins so many epochs later, the step that it was in.
    fn later(&self, epochs: usize) -> Vec<usize> {
        let mut end = 0;
        let ends: Vec<usize> = self
            .lengths
            .iter()
            .map(|length| {
                end += length;
                end
            })
            .collect();
        let mut begins = epochs;
        let was_in = |length: &usize| {
            let step = ends.iter().position(|end| begins < *end).unwrap_or(ends.len() - 1);
            begins += length;
            step
        };
        self.lengths.iter().map(was_in).collect()
    }
}

/// A plan for the window, and what it was made of.
#[derive(Debug, Clone)]
pub struct Choice {
    pub plan: Plan,
    stages: Vec<Stage>,
    demand: Vec<u32>,
    from: Vec<State>,
}

impl Choice {
    /// What the plan is a plan of.
    pub fn problem<'a>(&'a self, requests: &'a Requests) -> Problem<'a> {
        let steps = self.stages.len() / self.from.len().max(1);
        requests.problem(steps, &self.demand, &self.stages, &self.from)
    }
}

/// A cheaper plan by way of the dual, among networks that are near to paying; where there is none, the plan that is.
/// `pays` are the prices to begin with, none if empty, and afterwards those that were found.
fn exchange(problem: &Problem, best: Plan, near: &[usize], pays: &mut Vec<f32>, rounds: usize) -> Plan {
    let steps = problem.steps;
    // The others are absent in every step and would pay for nothing: the price is the same without them.
    let few = Few::of(problem, near);
    let part = few.problem(problem);
    let states = near.iter().flat_map(|n| best.states[n * steps..(n + 1) * steps].to_vec()).collect();
    let plan = Plan { states, cost: best.cost };
    let first = if pays.is_empty() { dual::first_prices(&part, &plan) } else { std::mem::take(pays) };
    let risen = dual::rise(&part, best.cost, first, rounds);
    let other = dual::rounded(&part, &risen.active, SWEEPS);
    *pays = risen.pays;
    if other.cost >= best.cost {
        return best;
    }
    let mut states = vec![State::Absent; best.states.len()];
    for (n, path) in near.iter().zip(other.states.chunks(steps)) {
        states[n * steps..(n + 1) * steps].copy_from_slice(path);
    }
    Plan { states, cost: other.cost }
}

/// Some networks of a problem.
struct Few {
    prices: Vec<u32>,
    stages: Vec<Stage>,
    from: Vec<State>,
}

impl Few {
    fn of(problem: &Problem, networks: &[usize]) -> Few {
        Few {
            prices: networks.iter().flat_map(|n| problem.prices_of(*n).to_vec()).collect(),
            stages: networks.iter().flat_map(|n| problem.stages_of(*n).to_vec()).collect(),
            from: networks.iter().map(|n| problem.before(*n)).collect(),
        }
    }

    fn problem<'a>(&'a self, whole: &Problem<'a>) -> Problem<'a> {
        Problem { networks: self.from.len(), prices: &self.prices, stages: &self.stages, from: &self.from, ..*whole }
    }
}

impl Requests {
    /// These requests as a problem.
    pub fn problem<'a>(
        &'a self,
        steps: usize,
        demand: &'a [u32],
        stages: &'a [Stage],
        from: &'a [State],
    ) -> Problem<'a> {
        Problem {
            networks: from.len(),
            clusters: self.clusters,
            steps,
            prices: &self.prices,
            unserved: self.unserved,
            demand,
            stages,
            from,
        }
    }
}

/// Networks that a plan uses, and those beside them that came nearest to being used.
fn near(problem: &Problem, plan: &Plan) -> Vec<usize> {
    let mut gains = super::descent::gains(problem, plan);
    gains.sort_by_key(|(gain, network)| (std::cmp::Reverse(*gain), *network));
    let used = |n: usize| plan.states[n * problem.steps..(n + 1) * problem.steps].iter().any(|s| *s != State::Absent);
    let mut near: Vec<usize> =
        (0..problem.networks).filter(|n| used(*n) || problem.from[*n] != State::Absent).collect();
    near.extend(gains.iter().map(|(_, n)| *n).filter(|n| !used(*n)).take(NEAR));
    near.sort_unstable();
    near.dedup();
    near
}
