//! The plan in virtual time.

use super::source::State;
use super::*;
use proptest::prelude::*;

const MS: Duration = Duration::from_millis(1);

fn at(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 7400))
}

fn digest(n: u32) -> Digest {
    Digest::of(&n.to_be_bytes())
}

fn want(n: u32, class: Class) -> Event {
    Event::Want { digest: digest(n), stored: 50_000, class }
}

/// A plan whose first `n` sources are up.
fn up(n: u8, mbit: Option<u64>) -> Plan {
    let addresses: Vec<SocketAddr> = (1..=n).map(at).collect();
    let mut plan = Plan::new(&addresses, mbit);
    plan.handle(Duration::ZERO, Event::Connect);
    for slot in 0..usize::from(n) {
        plan.handle(Duration::ZERO, Event::Up { slot });
    }
    plan
}

fn asks(commands: &[Command]) -> Vec<(Slot, Digest, Class, How)> {
    let ask = |c: &Command| match c {
        Command::Ask { slot, digest, class, how, .. } => Some((*slot, *digest, *class, *how)),
        _ => None,
    };
    commands.iter().filter_map(ask).collect()
}

#[test]
fn a_want_connects_and_is_asked_of_the_first_that_is_up() {
    let mut plan = Plan::new(&[at(1), at(2)], None);
    let commands = plan.handle(MS, want(1, Class::Miss));
    assert!(commands.contains(&Command::Connect { slot: 0, address: at(1) }));
    assert_eq!(asks(&plan.handle(2 * MS, Event::Up { slot: 0 })), [(0, digest(1), Class::Miss, How::Plain)]);
    plan.handle(3 * MS, Event::Arrived { slot: 0, digest: digest(1) });
    assert!(plan.wants.is_empty() && plan.next_tick(3 * MS).is_none());
}

#[test]
fn a_listed_source_that_was_warmed_is_connected_again_after_its_backoff() {
    let mut plan = up(1, None);
    let down = Event::Down { slot: 0, fault: Fault::Lost("cut".to_owned()) };
    plan.handle(MS, down.clone());
    assert_eq!(plan.next_tick(MS), None, "nobody wants anything");
    plan.handle(1000 * MS, Event::KeepUp);
    plan.handle(1001 * MS, Event::Up { slot: 0 });
    plan.handle(2000 * MS, down);
    let again = plan.next_tick(2000 * MS).unwrap();
    assert_eq!(again, 2200 * MS);
    assert_eq!(plan.handle(again, Event::Tick), [Command::Connect { slot: 0, address: at(1) }]);
    assert_eq!(plan.next_tick(again), None);
}

#[test]
fn the_background_is_bounded_and_a_miss_is_asked_all_the_same() {
    let mut plan = up(1, None);
    let asked: usize = (0..1000).map(|n| asks(&plan.handle(MS, want(n, Class::Background))).len()).sum();
    assert_eq!(asked, (512 << 10) / 50_000);
    assert_eq!(asks(&plan.handle(MS, want(5000, Class::Miss))).len(), 1);
    // While the miss is under way there is less of the background; then as one arrives, one more is asked.
    assert!(asks(&plan.handle(MS, Event::Arrived { slot: 0, digest: digest(1) })).is_empty());
    assert_eq!(asks(&plan.handle(MS, Event::Arrived { slot: 0, digest: digest(5000) })).len(), 1);
    assert_eq!(asks(&plan.handle(MS, Event::Arrived { slot: 0, digest: digest(0) })).len(), 1);
}

#[test]
fn the_background_is_shared_among_sources_by_what_each_has_given() {
    let mut plan = up(2, None);
    let mut of = [0, 0];
    for n in 0..20 {
        for (slot, ..) in asks(&plan.handle(MS, want(n, Class::Background))) {
            of[slot] += 1;
        }
    }
    assert_eq!(of, [10, 10]);
}

#[test]
fn a_background_want_that_is_missed_is_asked_again_of_the_same_source_as_a_miss() {
    let mut plan = up(1, None);
    plan.handle(MS, want(1, Class::Background));
    assert_eq!(asks(&plan.handle(MS, want(1, Class::Miss))), [(0, digest(1), Class::Miss, How::Insist)]);
    assert!(asks(&plan.handle(MS, want(1, Class::Background))).is_empty());
    assert_eq!(plan.sources[0].background_bytes, 0);
}

#[test]
fn a_cap_spreads_the_background_over_time_and_a_pause_stops_it() {
    let mut plan = up(1, Some(8));
    // A megabyte a second; chunks of 50 kB; one burst of 32 KiB is saved up.
    let mut asked: usize = (0..400).map(|n| asks(&plan.handle(MS, want(n, Class::Background))).len()).sum();
    let mut now = MS;
    let mut arrived = 0;
    while now < Duration::from_secs(4) {
        now = plan.next_tick(now).unwrap().min(now + 10 * MS);
        asked += asks(&plan.handle(now, Event::Tick)).len();
        while arrived < asked as u32 {
            asked += asks(&plan.handle(now, Event::Arrived { slot: 0, digest: digest(arrived) })).len();
            arrived += 1;
        }
    }
    assert!((76..=84).contains(&asked), "{asked} chunks of 50 kB in 4 s at 1 MB/s");
    plan.handle(now, Event::Pause { paused: true });
    assert!(asks(&plan.handle(now + 1000 * MS, Event::Tick)).is_empty());
    assert_eq!(asks(&plan.handle(now + 1001 * MS, want(9999, Class::Critical))).len(), 1);
}

#[test]
fn what_a_lost_source_owed_is_asked_of_the_next_in_the_same_order() {
    let mut plan = up(2, None);
    (0..10).for_each(|n| drop(plan.handle(MS, want(n, Class::Critical))));
    let commands = plan.handle(2 * MS, Event::Down { slot: 0, fault: Fault::Lost("cut".to_owned()) });
    let order: Vec<Digest> = asks(&commands).iter().map(|a| a.1).collect();
    assert_eq!(order, (0..10).map(digest).collect::<Vec<_>>());
    assert!(asks(&commands).iter().all(|a| a.0 == 1));
}

#[test]
fn backoffs_double_and_are_bounded_and_foul_ones_are_longer() {
    for (fault, first, last) in [
        (Fault::Lost(String::new()), 100 * MS, Duration::from_secs(5)),
        (Fault::WrongBytes(String::new()), Duration::from_secs(5), Duration::from_secs(300)),
        (Fault::Handshake(String::new()), Duration::from_secs(1), Duration::from_secs(30)),
    ] {
        let mut source = Source::new(at(1), false);
        source.failed(Duration::ZERO, fault.clone());
        assert_eq!(source.not_before, first);
        source.failed(Duration::ZERO, fault.clone());
        assert_eq!(source.not_before, first * 2);
        (0..100).for_each(|_| drop(source.failed(Duration::ZERO, fault.clone())));
        assert_eq!(source.not_before, last);
        source.gave(Duration::ZERO);
        source.failed(Duration::ZERO, fault.clone());
        assert_eq!(source.not_before, first);
    }
}

#[test]
fn a_slow_miss_is_asked_of_a_second_source_and_the_slow_one_comes_last_afterwards() {
    let mut plan = up(2, None);
    plan.handle(MS, want(1, Class::Miss));
    assert!(asks(&plan.handle(500 * MS, Event::Tick)).is_empty());
    assert_eq!(asks(&plan.handle(1100 * MS, Event::Tick)), [(1, digest(1), Class::Miss, How::Insist)]);
    let commands = plan.handle(1200 * MS, Event::Arrived { slot: 1, digest: digest(1) });
    assert!(commands.contains(&Command::Cancel { slot: 0, digest: digest(1) }));
    assert_eq!(asks(&plan.handle(1300 * MS, want(2, Class::Miss)))[0].0, 1);
    assert_eq!(asks(&plan.handle(9000 * MS, want(3, Class::Miss)))[0].0, 0);
}

#[test]
fn a_source_that_owes_and_is_silent_is_closed() {
    let mut plan = up(1, None);
    plan.handle(MS, want(1, Class::Background));
    plan.handle(3000 * MS, Event::Heard { slot: 0 });
    assert!(!plan.handle(6000 * MS, Event::Tick).contains(&Command::Close { slot: 0 }));
    let commands = plan.handle(7001 * MS, Event::Tick);
    assert!(commands.contains(&Command::Close { slot: 0 }), "{commands:?}");
    assert!(plan.handle(7200 * MS, Event::Tick).contains(&Command::Connect { slot: 0, address: at(1) }));
}

#[test]
fn who_is_sent_elsewhere_asks_there_patiently_and_insists_where_that_fails() {
    let mut plan = up(1, None);
    plan.handle(MS, want(1, Class::Background));
    let elsewhere = Event::Elsewhere { slot: 0, digest: digest(1), addresses: vec![at(8), at(9)] };
    let commands = plan.handle(2 * MS, elsewhere);
    assert_eq!(commands, [Command::Connect { slot: 1, address: at(8) }]);
    assert_eq!(asks(&plan.handle(3 * MS, Event::Up { slot: 1 })), [(1, digest(1), Class::Background, How::Patient)]);
    let commands = plan.handle(4 * MS, Event::Missing { slot: 1, digest: digest(1) });
    assert_eq!(commands, [Command::Connect { slot: 2, address: at(9) }]);
    let commands = plan.handle(5 * MS, Event::Down { slot: 2, fault: Fault::Unreachable(String::new()) });
    assert_eq!(asks(&commands), [(0, digest(1), Class::Background, How::Insist)]);
}

#[test]
fn a_miss_does_not_wait_for_a_peer_that_waits_itself() {
    let mut plan = up(1, None);
    plan.handle(MS, want(1, Class::Background));
    plan.handle(2 * MS, Event::Elsewhere { slot: 0, digest: digest(1), addresses: vec![at(8)] });
    assert_eq!(asks(&plan.handle(3 * MS, Event::Up { slot: 1 })).len(), 1);
    let commands = plan.handle(4 * MS, want(1, Class::Miss));
    assert!(commands.contains(&Command::Cancel { slot: 1, digest: digest(1) }));
    assert_eq!(asks(&commands), [(0, digest(1), Class::Miss, How::Insist)]);
}

#[test]
fn what_nobody_has_fails_after_some_rounds_and_says_who_was_asked() {
    let mut plan = up(2, None);
    let mut commands = plan.handle(MS, want(1, Class::Critical));
    let mut now = MS;
    for _ in 0..20 {
        now += 100 * MS;
        for (slot, digest, ..) in asks(&commands) {
            commands = plan.handle(now, Event::Missing { slot, digest });
        }
        commands.extend(plan.handle(now, Event::Tick));
        if let Some(Command::Fail { tried, .. }) = commands.iter().find(|c| matches!(c, Command::Fail { .. })) {
            assert_eq!(tried, "10.0.0.1:7400: it is not there; 10.0.0.2:7400: it is not there");
            assert!(plan.wants.is_empty());
            return;
        }
    }
    panic!("it never fails");
}

#[test]
fn without_sources_a_want_fails_at_once() {
    let mut plan = Plan::new(&[], None);
    let commands = plan.handle(MS, want(1, Class::Miss));
    assert!(matches!(commands.as_slice(), [Command::Fail { tried, .. }] if tried == "no source is configured"));
}

#[test]
fn an_urgent_want_that_nobody_answers_fails_in_bounded_time() {
    let mut plan = Plan::new(&[at(1)], None);
    let mut now = MS;
    let mut commands = plan.handle(now, want(1, Class::Miss));
    while now < Duration::from_secs(40) {
        if commands.iter().any(|c| matches!(c, Command::Fail { .. })) {
            assert!(now <= URGENT_MAX + TICK + MS, "only after {now:?}");
            return;
        }
        if commands.iter().any(|c| matches!(c, Command::Connect { .. })) {
            commands = plan.handle(now, Event::Down { slot: 0, fault: Fault::Unreachable("refused".to_owned()) });
            continue;
        }
        now = plan.next_tick(now).unwrap();
        commands = plan.handle(now, Event::Tick);
    }
    panic!("it never fails");
}

/// What a world of sources does to a plan: each step one event, answers chosen at random.
fn world(seed: &[u8], sources: u8) -> Result<(), TestCaseError> {
    let mut plan = Plan::new(&(1..=sources).map(at).collect::<Vec<_>>(), Some(400));
    let mut now = Duration::ZERO;
    let mut owed: Vec<(Slot, Digest)> = Vec::new();
    let mut ended: BTreeSet<Digest> = BTreeSet::new();
    let mut connecting: Vec<Slot> = Vec::new();
    let mut wanted = 0u32;
    let end = seed.len() + 4000;
    for step in 0..end {
        let byte = seed.get(step).copied();
        now += 20 * MS;
        let event = match byte {
            // Afterwards everybody behaves, so everything must end.
            None if !connecting.is_empty() => Event::Up { slot: connecting.remove(0) },
            None if !owed.is_empty() => {
                let (slot, digest) = owed.remove(0);
                Event::Arrived { slot, digest }
            }
            None => Event::Tick,
            Some(byte) => match byte % 10 {
                0..=2 => {
                    wanted += 1;
                    want(wanted, Class::ALL[usize::from(byte / 10) % 3])
                }
                3 if !connecting.is_empty() => Event::Up { slot: connecting.remove(0) },
                4 => Event::Down { slot: usize::from(byte / 10) % 4, fault: Fault::Lost(String::new()) },
                5 | 6 if !owed.is_empty() => {
                    let (slot, digest) = owed.remove(usize::from(byte) % owed.len());
                    Event::Arrived { slot, digest }
                }
                7 if !owed.is_empty() => {
                    let (slot, digest) = owed.remove(usize::from(byte) % owed.len());
                    if byte > 128 {
                        Event::Missing { slot, digest }
                    } else {
                        Event::Elsewhere { slot, digest, addresses: vec![at(byte % 6 + 1)] }
                    }
                }
                8 if wanted > 0 => want(1 + u32::from(byte) % wanted, Class::Miss),
                _ => Event::Tick,
            },
        };
        if let Event::Down { slot, .. } = &event {
            owed.retain(|(s, _)| s != slot);
            connecting.retain(|s| s != slot);
        }
        if let Event::Arrived { digest, .. } = &event {
            ended.insert(*digest);
        }
        if let Event::Want { digest, .. } = &event {
            ended.remove(digest);
        }
        let mut commands = VecDeque::from(plan.handle(now, event));
        while let Some(command) = commands.pop_front() {
            match command {
                Command::Connect { slot, .. } => connecting.push(slot),
                Command::Close { slot } => {
                    owed.retain(|(s, _)| *s != slot);
                    connecting.retain(|s| *s != slot);
                }
                Command::Ask { slot, digest, .. } => {
                    prop_assert_eq!(plan.sources[slot].state, State::Up, "asked of a source that is not up");
                    prop_assert!(!ended.contains(&digest), "asked after its end");
                    owed.retain(|o| *o != (slot, digest));
                    owed.push((slot, digest));
                }
                Command::Cancel { slot, digest } => owed.retain(|o| *o != (slot, digest)),
                Command::Fail { digest, .. } => {
                    ended.insert(digest);
                }
            }
        }
        for source in &plan.sources {
            prop_assert!(source.background_bytes <= (4 << 20), "more than a window is asked for");
        }
        let queued: usize = plan.queues.iter().map(VecDeque::len).sum();
        let asked = plan.wants.values().filter(|w| !w.asked.is_empty()).count();
        prop_assert_eq!(queued + plan.deferred.len() + asked, plan.wants.len(), "a want is lost, or in two places");
    }
    prop_assert!(plan.wants.is_empty(), "{} wants never ended", plan.wants.len());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_sources_do_every_want_is_in_one_place_and_ends(
        seed in prop::collection::vec(any::<u8>(), 0..600), sources in 1u8..4,
    ) {
        world(&seed, sources)?;
    }
}
