use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use vmatrix_model::ServiceId;

fn machine(number: usize, room: [u64; KINDS]) -> Machine {
    let [cpu_millis, memory_mib, disk_mib, load] = room;
    Machine::new(format!("m{number:03}").parse().unwrap(), Amounts { cpu_millis, memory_mib, disk_mib, load })
}

fn instance(service: usize, number: u32, machine: usize, needs: [u64; KINDS]) -> Instance {
    let [cpu_millis, memory_mib, disk_mib, load] = needs;
    Instance {
        id: InstanceId { service: format!("s{service:02}").parse().unwrap(), number },
        machine: format!("m{machine:03}").parse().unwrap(),
        needs: Amounts { cpu_millis, memory_mib, disk_mib, load },
        apart: false,
    }
}

fn run(machines: &[Machine], instances: &[Instance]) -> Balance {
    balance(machines, instances, &Rules::default(), &Limits::default()).unwrap()
}

fn words(b: &Balance) -> Vec<String> {
    b.steps.iter().map(ToString::to_string).collect()
}

const ROOM: [u64; KINDS] = [8000, 16384, 100_000, 1000];

#[test]
fn what_is_even_stays() {
    let machines = [machine(1, ROOM), machine(2, ROOM)];
    let even = [instance(1, 0, 1, [1000, 1024, 0, 1000]), instance(1, 1, 2, [1000, 1024, 0, 1000])];
    let b = run(&machines, &even);
    assert_eq!((b.steps.len(), b.before, b.after), (0, 0.0, 0.0));
    assert_eq!(run(&machines, &[]).steps, []);
    assert_eq!(run(&[], &[]).steps, []);
    // Swapping the two would change nothing, moving one would make it worse.
    assert_eq!(run(&machines[..1], &even[..1]).steps, []);
}

#[test]
fn one_move_evens_two_machines() {
    let machines = [machine(1, ROOM), machine(2, ROOM)];
    let both = [instance(1, 0, 1, [1000, 4096, 0, 1000]), instance(2, 0, 1, [1000, 4096, 0, 1000])];
    let b = run(&machines, &both);
    // Each kind deviates by half of what is taken: 1/8 of the CPU, 1/4 of the memory, one instance, which is a tenth.
    assert_eq!(words(&b), ["s01-0 from m001 to m002: 0.4750 to 0.0000, evens out memory"]);
    assert_eq!(b.moves().count(), 1);
}

#[test]
fn an_exchange_is_one_step() {
    let machines = [machine(1, ROOM), machine(2, ROOM)];
    let (large, small) = ([1000, 4096, 0, 1000], [1000, 2048, 0, 1000]);
    let all = [instance(1, 0, 1, large), instance(1, 1, 1, large), instance(2, 0, 2, small), instance(2, 1, 2, small)];
    let b = run(&machines, &all);
    assert_eq!(words(&b), ["s01-0 from m001 to m002, s02-0 from m002 to m001: 0.1250 to 0.0000, evens out memory"]);
}

#[test]
fn a_machine_without_room_gets_nothing() {
    let machines = [machine(1, ROOM), machine(2, [8000, 4000, 100_000, 1000])];
    let both = [instance(1, 0, 1, [1000, 4096, 0, 1000]), instance(2, 0, 1, [1000, 4096, 0, 1000])];
    assert_eq!(run(&machines, &both).steps, []);
}

#[test]
fn what_should_not_share_is_taken_apart() {
    let machines = [machine(1, [80_000, 163_840, 100_000, 1000]), machine(2, ROOM)];
    let mut both = [instance(1, 0, 1, [1000, 1024, 0, 1000]), instance(1, 1, 1, [1000, 1024, 0, 1000])];
    both.iter_mut().for_each(|i| i.apart = true);
    let b = run(&machines, &both);
    assert_eq!(b.moves().count(), 1);
    assert!(words(&b)[0].ends_with("no longer shares a machine with its like"), "{b:?}");
}

#[test]
fn a_shared_machine_is_slower() {
    let machines = [machine(1, [2000, 16384, 100_000, 1000]), machine(2, [2000, 16384, 100_000, 1000])];
    let rules = |slow_down| Rules { weights: [0.0, 0.0, 1.0, 0.0], slow_down, ..Rules::default() };
    let all = [
        instance(1, 0, 1, [1000, 1, 30_000, 1000]),
        instance(2, 0, 1, [333, 1, 30_000, 1000]),
        instance(3, 0, 2, [1000, 1, 10_000, 1000]),
    ];
    let moves = |slow_down| balance(&machines, &all, &rules(slow_down), &Limits::default()).unwrap().steps.len();
    // 1000 and 333 fit in 2000 even if they take half as much again; 1000 and 1000 do not.
    assert_eq!((moves(100), moves(150), moves(151)), (1, 1, 0));
}

#[test]
fn a_gain_below_the_threshold_is_left() {
    let machines = [machine(1, ROOM), machine(2, ROOM)];
    let both = [instance(1, 0, 1, [1000, 4096, 0, 1000]), instance(2, 0, 1, [1000, 4096, 0, 1000])];
    let steps = |gain| {
        let limits = Limits { gain, ..Limits::default() };
        balance(&machines, &both, &Rules::default(), &limits).unwrap().steps.len()
    };
    assert_eq!((steps(0.474), steps(0.476)), (1, 0));
}

#[test]
fn odd_input_is_refused_with_what_to_do() {
    let (m, i) = (machine(1, ROOM), instance(1, 0, 1, [1, 1, 1, 1]));
    let (rules, limits) = (Rules::default(), Limits::default());
    let say = |m: &[Machine], i: &[Instance], r: &Rules| balance(m, i, r, &limits).unwrap_err().to_string();
    assert!(say(&[m.clone(), m.clone()], &[], &rules).contains("name each machine once"));
    assert!(say(std::slice::from_ref(&m), &[i.clone(), i.clone()], &rules).contains("name each instance once"));
    assert!(say(&[], std::slice::from_ref(&i), &rules).contains("not among the machines"));
    let poor = Machine { pool: Amounts { cpu_millis: 0, ..m.pool }, ..m.clone() };
    assert!(say(&[poor], &[], &rules).contains("pool of 0 CPU"));
    let huge = instance(1, 0, 1, [1, 1 << 40, 1, 1]);
    assert!(say(std::slice::from_ref(&m), &[huge], &rules).contains("mend its size"));
    for weight in [-1.0, f64::NAN, f64::INFINITY, 1e7] {
        assert!(say(&[], &[], &Rules { conflict: weight, ..rules.clone() }).contains("mend the rules"));
        let gain = Limits { gain: weight, ..limits };
        assert!(balance(&[], &[], &rules, &gain).is_err());
    }
    assert!(say(&[], &[], &Rules { slow_down: 99, ..rules.clone() }).contains("slow-down"));
}

/// The score by its definition, and nothing else.
fn by_definition(machines: &[Machine], instances: &[Instance], rules: &Rules) -> f64 {
    let mut score = 0.0;
    let on = |m: &Machine| instances.iter().filter(|i| i.machine == m.id).collect::<Vec<_>>();
    for k in 0..KINDS {
        let level = |m: &Machine| {
            let here = on(m);
            let taken: u64 = here.iter().map(|i| i.needs.by_kind()[k]).sum();
            let slow = if k == 0 && here.len() > 1 { rules.slow_down } else { 100 };
            taken as f64 * slow as f64 / 100.0 / m.pool.by_kind()[k].max(1) as f64
        };
        let levels: Vec<f64> = machines.iter().map(level).collect();
        let mean = levels.iter().sum::<f64>() / levels.len() as f64;
        let variance = levels.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / levels.len() as f64;
        score += rules.weights[k] * variance.sqrt();
    }
    let sharers = machines.iter().map(|m| {
        let apart: Vec<&ServiceId> = on(m).iter().filter(|i| i.apart).map(|i| &i.id.service).collect();
        apart.len() - apart.iter().collect::<BTreeSet<_>>().len()
    });
    score + rules.conflict * sharers.sum::<usize>() as f64
}

fn over(machine: &Machine, instances: &[Instance], rules: &Rules) -> bool {
    let here: Vec<&Instance> = instances.iter().filter(|i| i.machine == machine.id).collect();
    let slow = if here.len() > 1 { rules.slow_down } else { 100 };
    let taken = |k: usize| here.iter().map(|i| u128::from(i.needs.by_kind()[k])).sum::<u128>();
    let taken = |k: usize| if k == 0 { taken(k) * u128::from(slow) } else { taken(k) * 100 };
    (0..KINDS).any(|k| taken(k) > u128::from(machine.room.by_kind()[k]) * 100)
}

fn meets(instance: &Instance, others: &[Instance]) -> bool {
    let like = |o: &&Instance| o.id != instance.id && o.apart && o.id.service == instance.id.service;
    instance.apart && others.iter().filter(like).any(|o| o.machine == instance.machine)
}

/// A network in which no machine is over its room. Some share that should not.
fn network(machines: std::ops::Range<usize>) -> impl Strategy<Value = (Vec<Machine>, Vec<Instance>, Rules)> {
    let room = (2000_u64..16_000, 2048_u64..32_768, 0_u64..50_000, 500_u64..2000);
    let needs = (0_u64..4000, 0_u64..8192, 0_u64..20_000, 0_u64..2000);
    let pick = (0_usize..6, any::<prop::sample::Index>(), needs, any::<bool>());
    let instances = prop::collection::vec(pick, 0..40);
    (prop::collection::vec(room, machines), instances, 100_u64..200).prop_map(|(rooms, picks, slow_down)| {
        let rules = Rules { slow_down, ..Rules::default() };
        let rooms = rooms.iter().enumerate();
        let machines: Vec<Machine> = rooms.map(|(n, (c, m, d, l))| machine(n, [*c, *m, *d, *l])).collect();
        let mut instances: Vec<Instance> = Vec::new();
        for (nth, (service, at, (c, m, d, l), apart)) in picks.into_iter().enumerate() {
            let at = at.index(machines.len());
            instances.push(Instance { apart, ..instance(service, nth as u32, at, [c, m, d, l]) });
            if over(&machines[at], &instances, &rules) {
                instances.pop();
            }
        }
        (machines, instances, rules)
    })
}

fn made(instances: &[Instance], b: &Balance) -> Vec<Instance> {
    let mut by_name: BTreeMap<InstanceId, Instance> = instances.iter().map(|i| (i.id.clone(), i.clone())).collect();
    for m in b.moves() {
        by_name.get_mut(&m.instance).unwrap().machine = m.to.clone();
    }
    by_name.into_values().collect()
}

/// Makes the steps one after the other and looks at each, and at the score by its definition after each `every`.
fn check_steps(
    (machines, instances, rules): (&[Machine], &[Instance], &Rules),
    limits: &Limits,
    b: &Balance,
    every: usize,
) {
    let mut now = instances.to_vec();
    let mut score = b.before;
    assert!((score - by_definition(machines, &now, rules)).abs() < 1e-6, "{score}");
    for (nth, step) in b.steps.iter().enumerate() {
        for m in &step.moves {
            let moved = now.iter_mut().find(|i| i.id == m.instance).unwrap();
            assert_eq!(moved.machine, m.from);
            assert_ne!(m.to, m.from);
            moved.machine = m.to.clone();
            let moved = moved.clone();
            assert!(!meets(&moved, &now), "{m:?} meets its like");
            let to = machines.iter().find(|to| to.id == m.to).unwrap();
            assert!(!over(to, &now, rules), "{m:?} is more than there is room for");
        }
        assert_eq!(step.before, score);
        assert!(step.gain() > limits.gain * step.moves.len() as f64, "{step}");
        score = step.after;
        assert!(nth % every > 0 || (score - by_definition(machines, &now, rules)).abs() < 1e-6, "{step}");
    }
    assert_eq!(score, b.after);
    assert!(b.moves().count() <= limits.moves);
    assert_eq!(now.len(), instances.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn each_step_fits_and_gains(
        (machines, instances, rules) in network(1..12), gain in 0.0..0.02_f64, moves in prop_oneof![0_usize..8, Just(usize::MAX)],
    ) {
        let limits = Limits { moves, gain };
        let b = balance(&machines, &instances, &rules, &limits).unwrap();
        check_steps((&machines, &instances, &rules), &limits, &b, 1);
    }

    #[test]
    fn what_was_balanced_is_left_alone((machines, instances, rules) in network(1..12)) {
        let limits = Limits::default();
        let b = balance(&machines, &instances, &rules, &limits).unwrap();
        let again = balance(&machines, &made(&instances, &b), &rules, &limits).unwrap();
        prop_assert_eq!(again.steps, []);
        prop_assert_eq!(again.before, b.after);
    }

    #[test]
    fn the_order_of_the_input_does_not_matter(
        ((machines, instances, rules), shuffled) in network(1..12).prop_flat_map(|n| {
            let shuffled = (Just(n.0.clone()).prop_shuffle(), Just(n.1.clone()).prop_shuffle());
            (Just(n), shuffled)
        })
    ) {
        let limits = Limits::default();
        let b = balance(&machines, &instances, &rules, &limits).unwrap();
        prop_assert_eq!(b, balance(&shuffled.0, &shuffled.1, &rules, &limits).unwrap());
    }

    #[test]
    fn a_placed_instance_fits_and_is_apart(
        (machines, present, rules) in network(1..8), n in 0_u32..10, cpu in 0_u64..4000, memory in 0_u64..8192,
        apart in prop_oneof![Just(Apart::No), Just(Apart::WherePossible), Just(Apart::Always)],
    ) {
        let each = Amounts { cpu_millis: cpu, memory_mib: memory, disk_mib: 0, load: 1000 };
        let want = Want { service: "s01".parse().unwrap(), instances: n, each, apart };
        match place(&machines, &present, &BTreeMap::new(), &want, &rules) {
            Ok(placed) => {
                prop_assert_eq!(placed.len(), n as usize);
                let mut all = present.clone();
                for p in &placed {
                    let here = |i: &Instance| i.machine == p.instance.machine && i.id.service == want.service;
                    prop_assert_eq!(p.shares, all.iter().any(here));
                    prop_assert!(!(p.shares && apart == Apart::Always));
                    all.push(p.instance.clone());
                    let to = machines.iter().find(|m| m.id == p.instance.machine).unwrap();
                    prop_assert!(!over(to, &all, &rules));
                }
                let names: BTreeSet<_> = all.iter().map(|i| &i.id).collect();
                prop_assert_eq!(names.len(), all.len());
            }
            Err(Refused::NoRoom { granted, .. }) => prop_assert!(granted < n),
            Err(refused) => prop_assert!(false, "{}", refused),
        }
    }
}

/// Beyond the machines whose every pair is looked at, the same holds.
#[test]
fn many_machines_are_balanced_too() {
    let machines: Vec<Machine> = (0..300).map(|n| machine(n, ROOM)).collect();
    // A third of the machines has everything.
    let instances: Vec<Instance> = (0..900)
        .map(|n| instance(n % 50, n as u32, n % 100, [200 + n as u64 % 7 * 100, 512 << (n % 3), 100, 1000]))
        .collect();
    let (rules, limits) = (Rules::default(), Limits { gain: 1e-4, ..Limits::default() });
    let b = balance(&machines, &instances, &rules, &limits).unwrap();
    check_steps((&machines, &instances, &rules), &limits, &b, 50);
    assert!(b.after < b.before / 10.0, "{} to {}", b.before, b.after);
    // 600 of 900 have to move if each machine is to have three of them; few that need not do.
    assert!((540..=800).contains(&b.moves().count()), "{}", b.moves().count());
    let again = balance(&machines, &made(&instances, &b), &rules, &limits).unwrap();
    assert_eq!(again.steps, []);
}
