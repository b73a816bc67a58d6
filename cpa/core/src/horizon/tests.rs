//! Properties over random worlds: costs add up, nothing is cheaper than the bound, nobody is left unserved.

use super::online::{Planner, Prices, Requests};
use super::path::State;
use super::{Plan, Problem, Stage, dual, improve};
use proptest::prelude::*;

/// A world small enough to try every plan of.
#[derive(Debug, Clone)]
struct World {
    networks: usize,
    clusters: usize,
    steps: usize,
    prices: Vec<u32>,
    demand: Vec<u32>,
    stages: Vec<Stage>,
    from: Vec<State>,
}

impl World {
    fn problem(&self) -> Problem<'_> {
        Problem {
            networks: self.networks,
            clusters: self.clusters,
            steps: self.steps,
            prices: &self.prices,
            unserved: 1000,
            demand: &self.demand,
            stages: &self.stages,
            from: &self.from,
        }
    }

    fn plan(&self) -> Plan {
        let states: Vec<State> = self.from.iter().flat_map(|s| std::iter::repeat_n(*s, self.steps)).collect();
        Plan { cost: self.problem().cost(&states), states }
    }

    fn optimum(&self) -> i64 {
        let cells = self.networks * self.steps;
        let plans = (0..3usize.pow(cells as u32)).map(|n| {
            let mut n = n;
            let states: Vec<State> = (0..cells)
                .map(|_| {
                    let state = State::ALL[n % 3];
                    n /= 3;
                    state
                })
                .collect();
            self.problem().cost(&states)
        });
        plans.min().unwrap()
    }
}

fn stage() -> impl Strategy<Value = Stage> {
    (0..40i64, 0..3000i64, 0..4000i64, 0..400i64).prop_map(|(dormant, active, ship, resume)| Stage {
        dormant,
        active: active + dormant,
        ship,
        resume,
    })
}

fn world(networks: usize, clusters: usize, steps: usize) -> impl Strategy<Value = World> {
    (
        prop::collection::vec(prop_oneof![9 => 0..300u32, 1 => Just(super::UNREACHED)], networks * clusters),
        prop::collection::vec(0..30u32, clusters * steps),
        prop::collection::vec(stage(), networks * steps),
        prop::collection::vec(0..3usize, networks),
    )
        .prop_map(move |(prices, demand, stages, from)| World {
            networks,
            clusters,
            steps,
            prices,
            demand,
            stages,
            from: from.into_iter().map(|s| State::ALL[s]).collect(),
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_plan_is_below_the_bound_nor_any_bound_above_the_best_plan(
        w in world(3, 3, 2),
        guess in prop::collection::vec(0..400u32, 6),
    ) {
        let problem = w.problem();
        let optimum = w.optimum();
        prop_assert!(dual::certify(&problem, &guess) <= optimum, "whatever the prices");
        let mut plan = w.plan();
        dual::upper(&problem, &mut plan, 10);
        let lower = dual::lower(&problem, plan.cost, dual::first_prices(&problem, &plan), 60);
        let rounded = dual::rounded(&problem, &lower.active, 10);
        prop_assert!(lower.value <= optimum && optimum <= plan.cost.min(rounded.cost));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn a_plan_costs_what_its_parts_cost_and_improving_never_makes_it_dearer(w in world(6, 5, 4)) {
        let problem = w.problem();
        let mut plan = w.plan();
        let before = plan.cost;
        let order: Vec<usize> = (0..w.networks).collect();
        improve(&problem, &mut plan, &order, 20);
        prop_assert_eq!(plan.cost, problem.cost(&plan.states));
        prop_assert!(plan.cost <= before);
        let again = plan.clone();
        prop_assert_eq!(improve(&problem, &mut plan, &order, 20), 0, "what cannot be improved stays");
        prop_assert_eq!(plan, again);
    }
}

/// Prices that are the same at all times.
struct Flat(Requests, Vec<Stage>);

impl Prices for Flat {
    fn requests(&self) -> &Requests {
        &self.0
    }

    fn stage(&self, network: usize, _: usize, epochs: usize) -> Stage {
        let s = self.1[network];
        Stage { dormant: s.dormant * epochs as i64, active: s.active * epochs as i64, ..s }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn constant_demand_comes_to_rest_and_nobody_is_left_unserved(w in world(5, 4, 1), rounds in 0..8usize) {
        let requests = Requests { clusters: w.clusters, prices: w.prices.clone(), unserved: 1_000_000 };
        let networks = Flat(requests, w.stages.clone());
        let mut planner = Planner::new(w.clusters, 24, 0, w.from.clone(), rounds);
        let mut demand = vec![];
        let mut seen = vec![];
        for _ in 0..24 * 4 {
            planner.hear(&w.demand, &networks);
            planner.forecast(&mut demand);
            seen.push(planner.decide(&demand, &networks, true).to_vec());
        }
        let last = &seen[seen.len() - 1];
        let active = |states: &[State]| -> Vec<usize> {
            (0..states.len()).filter(|n| states[*n] == State::Active).collect()
        };
        // Nobody goes to and fro in the last day. What was missed without an image may buy it as late as then, once.
        for network in 0..w.networks {
            let runs = seen[24 * 3..].chunk_by(|a, b| (a[network] == State::Active) == (b[network] == State::Active));
            prop_assert!(runs.count() <= 2, "network {network}: {seen:?}");
        }
        for cluster in (0..w.clusters).filter(|c| w.demand[*c] > 0) {
            let reach = |n: &usize| w.prices[n * w.clusters + cluster] != super::UNREACHED;
            if (0..w.networks).any(|n| reach(&n)) {
                prop_assert!(active(last).iter().any(reach), "cluster {cluster} is not served: {last:?}");
            }
        }
    }
}
