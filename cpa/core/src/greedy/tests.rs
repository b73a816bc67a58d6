use super::*;
use proptest::prelude::*;

/// A splitmix64 generator.
struct Dice(u64);

impl Dice {
    fn under(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }
}

/// Places on a square of 20 × 20 ms, prefixes with their nearest candidates; some prefixes share a place, some ask for
/// nothing, some have no candidate.
#[derive(Debug, Clone)]
struct World {
    networks: u32,
    candidates: Vec<Vec<(u32, u32)>>,
    demand: Demand,
    prices: Prices,
}

fn world(seed: u64, networks: u32, prefixes: usize) -> World {
    let mut dice = Dice(seed);
    let spot = |dice: &mut Dice| (dice.under(20_000) as i64, dice.under(20_000) as i64);
    let sites: Vec<_> = (0..networks).map(|_| spot(&mut dice)).collect();
    let homes: Vec<_> = (0..prefixes.div_ceil(2)).map(|_| spot(&mut dice)).collect();
    let candidates = (0..prefixes).map(|_| {
        let (x, y) = homes[dice.under(homes.len() as u64) as usize];
        let last_mile = 1000 + dice.under(3) * 500;
        let way = |&(a, b): &(i64, i64)| ((x - a).pow(2) as u64 + (y - b).pow(2) as u64).isqrt() + last_mile;
        let mut row: Vec<_> = sites.iter().enumerate().map(|(i, s)| (i as u32, way(s) as u32)).collect();
        row.sort_by_key(|&(_, l)| l);
        row.truncate(if dice.under(20) == 0 { 0 } else { 1 + dice.under(u64::from(networks)) as usize });
        row
    });
    let candidates: Vec<_> = candidates.collect();
    let weights = (0..prefixes).map(|_| if dice.under(8) == 0 { 0 } else { 2_000_000 / (1 + dice.under(200)) });
    let demand = Demand { weights: weights.collect() };
    let open = (0..networks).map(|_| MicroUsd(dice.under(6) as i64 * 30_000)).collect();
    World { networks, candidates, demand, prices: Prices { open, latency_second: MicroUsd(20) } }
}

impl World {
    fn graph(&self) -> Graph {
        Graph::new(self.networks, &self.candidates).unwrap()
    }

    fn place(&self, warm: Option<&Placed>) -> Placed {
        place(&self.graph(), &self.demand, &self.prices, warm).unwrap()
    }

    /// What these networks cost, straight from the definition; none if someone cannot be served.
    fn cost(&self, open: impl Fn(u32) -> bool) -> Option<Pico> {
        let hours = self.prices.open.iter().enumerate().filter(|&(i, _)| open(i as u32)).map(|(_, p)| p.0 as u64);
        let mut cost = hours.sum::<u64>() * 1_000_000;
        for (row, &weight) in self.candidates.iter().zip(&self.demand.weights) {
            if weight > 0 && !row.is_empty() {
                let near = row.iter().filter(|c| open(c.0)).map(|c| u64::from(c.1)).min()?;
                cost += weight * self.prices.latency_second.0 as u64 * near;
            }
        }
        Some(Pico(cost))
    }

    fn optimum(&self) -> Pico {
        (0..1_u32 << self.networks).filter_map(|set| self.cost(|i| set >> i & 1 == 1)).min().unwrap()
    }

    fn shuffled(&self, seed: u64) -> World {
        let (mut dice, mut to) = (Dice(seed), self.clone());
        for i in (1..to.candidates.len()).rev() {
            let j = dice.under(i as u64 + 1) as usize;
            to.candidates.swap(i, j);
            to.demand.weights.swap(i, j);
        }
        to
    }
}

proptest! {
    #[test]
    fn the_optimum_lies_between_bound_and_cost(seed: u64, networks in 1_u32..10, prefixes in 1_usize..40) {
        let world = world(seed, networks, prefixes);
        let (placed, optimum) = (world.place(None), world.optimum());
        prop_assert!(placed.bound <= optimum && optimum <= placed.cost, "{placed:?} {optimum:?}");
    }

    #[test]
    fn everyone_who_asks_is_served_by_the_nearest_and_the_cost_is_what_it_costs(seed: u64, networks in 1_u32..60, prefixes in 1_usize..300) {
        let world = world(seed, networks, prefixes);
        let placed = world.place(None);
        let open = |i: u32| placed.open.binary_search(&i).is_ok();
        prop_assert_eq!(Some(placed.cost), world.cost(open));
        prop_assert!(placed.bound <= placed.cost);
        for (prefix, &serves) in placed.serves.iter().enumerate() {
            let row = &world.candidates[prefix];
            let near = row.iter().filter(|c| open(c.0)).map(|c| (c.1, c.0)).min();
            prop_assert_eq!(serves, near.map_or(NOWHERE, |n| n.1));
            prop_assert!(world.demand.weights[prefix] == 0 || row.is_empty() || serves != NOWHERE);
        }
    }

    #[test]
    fn nobody_pays_a_network_more_than_its_price_and_the_bids_prove_the_bound(seed: u64, networks in 1_u32..60, prefixes in 1_usize..300) {
        let world = world(seed, networks, prefixes);
        let (graph, placed) = (world.graph(), world.place(None));
        for network in 0..networks {
            // From the definition: each prefix bids its way to the nearest candidate, and its level beyond.
            let bid = |(prefix, &weight): (usize, &u64)| {
                let way = world.candidates[prefix].iter().find(|c| c.0 == network)?.1;
                let (row, nearest) = graph.of_prefix()[prefix];
                let level = placed.levels[row as usize] + u64::from(nearest);
                Some(weight * 20 * level.saturating_sub(u64::from(way)))
            };
            let paid: u64 = world.demand.weights.iter().enumerate().filter_map(bid).sum();
            prop_assert!(paid <= world.prices.open[network as usize].0 as u64 * 1_000_000);
        }
        prop_assert_eq!(certify(&graph, &world.demand, &world.prices, &placed.levels), Ok(placed.bound));
    }

    #[test]
    fn a_second_look_only_narrows_the_gap(seed: u64, networks in 1_u32..10, prefixes in 1_usize..60) {
        let world = world(seed, networks, prefixes);
        let (graph, placed) = (world.graph(), world.place(None));
        let tight = tighten(&graph, &world.demand, &world.prices, &placed).unwrap();
        prop_assert!(placed.bound <= tight.bound && tight.bound <= world.optimum());
        prop_assert!(world.optimum() <= tight.cost && tight.cost <= placed.cost);
        prop_assert_eq!(Some(tight.cost), world.cost(|i| tight.open.binary_search(&i).is_ok()));
        prop_assert_eq!(certify(&graph, &world.demand, &world.prices, &tight.levels), Ok(tight.bound));
    }

    #[test]
    fn bids_that_overpay_prove_less_and_never_too_much(seed: u64, networks in 1_u32..9, prefixes in 1_usize..30, high in 0_u64..100_000) {
        let world = world(seed, networks, prefixes);
        let graph = world.graph();
        let mut dice = Dice(seed);
        let levels: Vec<u64> = (0..graph.rows()).map(|_| dice.under(high + 1)).collect();
        prop_assert!(certify(&graph, &world.demand, &world.prices, &levels).unwrap() <= world.optimum());
    }

    #[test]
    fn the_order_of_the_prefixes_does_not_matter(seed: u64, networks in 1_u32..60, prefixes in 1_usize..300) {
        let world = world(seed, networks, prefixes);
        let (placed, other) = (world.place(None), world.shuffled(seed).place(None));
        prop_assert_eq!((placed.cost, placed.bound, placed.open), (other.cost, other.bound, other.open));
    }

    #[test]
    fn a_warm_start_is_as_near_the_best_as_before_or_as_good_as_a_cold_one(seed: u64, networks in 1_u32..60, prefixes in 1_usize..300, hours in 1_i64..4) {
        let mut world = world(seed, networks, prefixes);
        let before = world.place(None);
        let mut dice = Dice(seed);
        world.demand.weights.iter_mut().for_each(|w| *w = *w * dice.under(200) / 100);
        world.prices.open.iter_mut().for_each(|p| p.0 *= hours);
        let (warm, cold) = (world.place(Some(&before)), world.place(None));
        prop_assert!(warm.gap_ppm() <= before.gap_ppm() + WARM_GAP_PPM || warm.cost <= cold.cost);
        prop_assert!(warm.bound <= cold.cost && warm.bound <= warm.cost);
        prop_assert_eq!(Some(warm.cost), world.cost(|i| warm.open.binary_search(&i).is_ok()));
    }

    #[test]
    fn a_tick_never_raises_the_price(seed: u64, networks in 1_u32..60, prefixes in 1_usize..300, most in 0_usize..5) {
        let world = world(seed, networks, prefixes);
        let (graph, placed, mut dice) = (world.graph(), world.place(None), Dice(seed));
        let holders: Vec<u32> = (0..networks).filter(|_| dice.under(2) == 0).collect();
        let mut flash = Flash::new(&graph, &world.demand, &world.prices, &placed, &holders, MicroUsd(2_000)).unwrap();
        prop_assert!(placed.serves.contains(&NOWHERE) || flash.price() == placed.cost);
        for _ in 0..3 {
            let crowd: Vec<_> = (0..prefixes / 10 + 1)
                .map(|_| (dice.under(prefixes as u64) as u32, dice.under(2_000_000)))
                .collect();
            let mut idle = flash.clone();
            idle.changed(&crowd, 0).unwrap();
            let opened = flash.changed(&crowd, most).unwrap().opened;
            prop_assert!(flash.price() <= idle.price());
            prop_assert_eq!(flash.price() < idle.price(), !opened.is_empty());
            prop_assert!(opened.len() <= most && opened.iter().all(|o| holders.contains(o) && !placed.open.contains(o)));
        }
    }
}

/// Three networks on a line, 10 ms apart; two prefixes at the ends.
fn line(weights: [u64; 2]) -> (Graph, Demand, Prices) {
    let graph = Graph::new(3, &[[(0, 1000), (1, 11_000), (2, 21_000)], [(2, 1000), (1, 11_000), (0, 21_000)]]).unwrap();
    let prices = Prices { open: vec![MicroUsd(100_000); 3], latency_second: MicroUsd(20) };
    (graph, Demand { weights: weights.to_vec() }, prices)
}

#[test]
fn a_network_opens_beside_those_who_ask_enough() {
    // 10 ms of 500,000 requests an hour at 20 µ$ a second are 0.1 $: as much as an hour of a network.
    let open = |weights| {
        let (graph, demand, prices) = line(weights);
        let placed = place(&graph, &demand, &prices, None).unwrap();
        // Whole microseconds: a little is lost.
        assert!(placed.gap_ppm() < 100, "{placed:?}");
        placed.open
    };
    assert_eq!(open([1000, 900]), [0]);
    assert_eq!(open([260_000, 260_000]), [0, 2]);
    assert_eq!(open([0, 900]), [2]);
    assert_eq!(open([0, 0]), [] as [u32; 0]);
}

#[test]
fn a_crowd_opens_what_holds_the_image_and_nothing_else() {
    let (graph, demand, prices) = line([1000, 900]);
    let placed = place(&graph, &demand, &prices, None).unwrap();
    let opened = |holders: &[u32], crowd: u64| {
        let mut flash = Flash::new(&graph, &demand, &prices, &placed, holders, MicroUsd(2000)).unwrap();
        let ticked = flash.changed(&[(1, crowd)], 9).unwrap();
        assert_eq!((ticked.decided, flash.serves(1)), (1, ticked.opened.first().copied().unwrap_or(0)));
        ticked.opened
    };
    assert_eq!(opened(&[1, 2], 1_000_000), [2]);
    assert_eq!(opened(&[1], 1_000_000), [1]);
    assert_eq!(opened(&[0], 1_000_000), [] as [u32; 0]);
    // 20 ms of 250,000 requests are an hour of it, but not the resume as well.
    assert_eq!(opened(&[2], 254_000), [] as [u32; 0]);
    assert_eq!(opened(&[2], 256_000), [2]);
}

#[test]
fn small_worlds_are_placed_nearly_as_well_as_can_be() {
    let (mut cost, mut bound, mut tight, mut optimum) = (0, 0, 0, 0);
    for seed in 0..200 {
        let world = world(seed, 10, 60);
        let placed = world.place(None);
        (cost, bound, optimum) = (cost + placed.cost.0, bound + placed.bound.0, optimum + world.optimum().0);
        tight += tighten(&world.graph(), &world.demand, &world.prices, &placed).unwrap().bound.0;
    }
    assert!(cost - optimum <= optimum / 200, "{cost} {optimum}");
    assert!(optimum - bound <= optimum / 50, "{bound} {optimum}");
    assert!(optimum - tight <= optimum / 200, "{tight} {optimum}");
}

#[test]
fn what_makes_no_sense_is_said() {
    let wrong = |rows: &[Vec<(u32, u32)>]| Graph::new(2, rows).err();
    assert_eq!(wrong(&[vec![(0, 1)], vec![(2, 1)]]), Some(Wrong::Network { prefix: 1, network: 2, networks: 2 }));
    assert_eq!(wrong(&[vec![(1, 1), (1, 2)]]), Some(Wrong::Twice { prefix: 0, network: 1 }));
    let far = LATENCY_MAX + 1;
    assert_eq!(wrong(&[vec![(1, far)]]), Some(Wrong::Latency { prefix: 0, network: 1, latency: far }));

    let (graph, demand, prices) = line([1, 1]);
    let placing = |demand: &Demand, prices: &Prices| place(&graph, demand, prices, None).err();
    assert_eq!(placing(&demand, &prices), None);
    let short = Demand { weights: vec![1] };
    assert_eq!(placing(&short, &prices), Some(Wrong::Length { what: "weights", have: 1, want: 2 }));
    assert_eq!(placing(&Demand { weights: vec![u64::MAX, 1] }, &prices), Some(Wrong::TooDear));
    let priced = |open: i64, latency: i64| Prices { open: vec![MicroUsd(open); 3], latency_second: MicroUsd(latency) };
    assert_eq!(placing(&demand, &priced(-1, 1)), Some(Wrong::Price { network: 0, price: MicroUsd(-1) }));
    assert_eq!(placing(&demand, &priced(1, -1)), Some(Wrong::Second { price: MicroUsd(-1) }));
    assert_eq!(placing(&demand, &priced(i64::MAX, 1)), Some(Wrong::TooDear));
    assert_eq!(placing(&demand, &priced(1, i64::MAX)), Some(Wrong::TooDear));

    let placed = place(&graph, &demand, &prices, None).unwrap();
    let flash = |holders: &[u32], resume| Flash::new(&graph, &demand, &prices, &placed, holders, MicroUsd(resume));
    assert_eq!(flash(&[3], 0).err(), Some(Wrong::Holder { network: 3, networks: 3 }));
    assert_eq!(flash(&[2], -1).err(), Some(Wrong::Resume { price: MicroUsd(-1) }));
    let mut flash = flash(&[2], 0).unwrap();
    assert_eq!(flash.changed(&[(0, 5), (2, 1)], 1), Err(Wrong::Prefix { prefix: 2, prefixes: 2 }));
    assert_eq!(flash.changed(&[(0, u64::MAX)], 1), Err(Wrong::TooDear));
    assert_eq!(flash.price(), placed.cost);
}

#[test]
fn nothing_costs_nothing() {
    let graph = Graph::new(0, &[] as &[Vec<(u32, u32)>]).unwrap();
    let placed = place(&graph, &Demand::default(), &Prices::default(), None).unwrap();
    assert_eq!(placed, Placed::default());
    assert_eq!(placed.gap_ppm(), 0);
}

#[test]
fn a_billion_requests_from_each_of_a_hundred_prefixes_are_summed_right() {
    let mut world = world(3, 20, 100);
    world.demand.weights = vec![1_000_000_000; 100];
    let placed = world.place(None);
    assert_eq!(Some(placed.cost), world.cost(|i| placed.open.binary_search(&i).is_ok()));
}
