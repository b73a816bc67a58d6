use super::*;
use proptest::prelude::*;

/// Two teams of one half each of the rows, at networks "n0", "n1"...
fn two(rows: usize) -> Vec<Vec<usize>> {
    vec![(0..rows / 2).collect(), (rows / 2..rows).collect()]
}

fn dense(table: &[Vec<u32>]) -> Vec<Row<'_>> {
    table.iter().map(|r| Row::Dense(r)).collect()
}

/// The choice for a table in milliseconds, the match set up by `with`.
fn chosen(ms: &[&[u32]], with: impl Fn(&mut Match)) -> Result<Choice, NoPlace> {
    let table: Vec<Vec<u32>> =
        ms.iter().map(|r| r.iter().map(|l| if *l == UNKNOWN { UNKNOWN } else { l * 1000 }).collect()).collect();
    let (rows, teams) = (dense(&table), two(table.len()));
    let mut of = Match::new(ms.first().map_or(0, |r| r.len()), &rows, &teams);
    with(&mut of);
    choose(&of)
}

#[test]
fn where_one_clan_has_30_ms_and_the_other_130_both_can_have_80() {
    let c = chosen(&[&[30, 80, 130], &[30, 80, 130], &[130, 80, 30], &[130, 80, 30]], |_| ()).unwrap();
    assert_eq!((c.chosen.network, c.chosen.gap, c.chosen.worst), (1, Span::ZERO, Span::ms(80)));
    assert_eq!(c.chosen.means, [Span::ms(80), Span::ms(80)]);
}

#[test]
fn nobody_is_made_fair_by_being_bad_for_all() {
    let far = |slack| chosen(&[&[100, 108, 111], &[80, 108, 111]], |m| m.slack_percent = slack).unwrap();
    assert_eq!((far(10).chosen.network, far(10).within, far(10).limit), (1, 2, Span::ms(110)));
    assert_eq!(far(7).chosen.network, 0, "108 ms is above 107");
    let tie =
        chosen(&[&[109, 108, 108], &[109, 108, 108]], |m| m.cost = Some(&[MicroUsd(1), MicroUsd(3), MicroUsd(2)]));
    assert_eq!(tie.unwrap().chosen.network, 2, "the worst latency decides, then the cost");
    let tie = chosen(&[&[109, 108, 108], &[109, 108, 108]], |_| ()).unwrap();
    assert_eq!((tie.chosen.network, tie.second.unwrap().network), (1, 2), "and then the lower");
}

#[test]
fn an_unknown_latency_and_a_full_network_are_never_chosen() {
    let c = chosen(&[&[10, 50, 90], &[UNKNOWN, 90, 50]], |m| m.room = Some(&[true, false, true])).unwrap();
    assert_eq!((c.chosen.network, c.within, c.second), (2, 1, None));
}

#[test]
fn a_call_is_a_match_of_teams_of_one() {
    let table = [vec![10_000, 20_000], vec![20_000, 21_000], vec![21_000, 22_000]];
    let teams: Vec<Vec<usize>> = (0..3).map(|i| vec![i]).collect();
    let c = choose(&Match::new(2, &dense(&table), &teams)).unwrap();
    assert_eq!((c.chosen.network, c.chosen.gap), (1, Span::ms(2)));
}

#[test]
fn what_cannot_be_is_said() {
    let says = |ms: &[&[u32]], with: &dyn Fn(&mut Match)| {
        chosen(ms, with).unwrap_err().to_string().lines().next().unwrap_or_default().to_owned()
    };
    let some: &[&[u32]] = &[&[10, 20], &[30, UNKNOWN]];
    assert_eq!(
        says(some, &|m| m.cap = Some(Span::ms(25))),
        "the worst latency may be 25 ms, and the best possible is 30 ms, at network 0"
    );
    assert_eq!(
        says(&[&[10, 20, UNKNOWN], &[UNKNOWN, UNKNOWN, UNKNOWN]], &|m| m.room = Some(&[false, true, true])),
        "no network with room reaches all 2 players; network 1 reaches 1"
    );
    assert_eq!(says(&[&[], &[]], &|_| ()), "there are 0 networks, and it takes 1 to 100000");
    assert_eq!(says(&[&[1]], &|_| ()), "team 0 has no players");
    assert_eq!(says(some, &|m| m.teams = &[]), "there are 0 teams, and it takes 1 to 64");
    assert_eq!(says(&[&[1, 2], &[1]], &|_| ()), "row 1 has 1 entries, and there are 2 networks");
    assert_eq!(says(some, &|m| m.rows = &[]), "a player of team 0 is in row 0, and there are 0 rows, counted from 0");
    assert_eq!(
        says(some, &|m| m.room = Some(&[])),
        "the list of networks with room has 0 entries, and there are 2 networks"
    );
    for bad in [&[(1, 5), (0, 5)][..], &[(1, 5), (1, 5)], &[(2, 5)]] {
        let (rows, teams) = ([Row::Sparse(bad), Row::Sparse(bad)], two(2));
        let error = choose(&Match::new(2, &rows, &teams)).unwrap_err();
        assert!(matches!(error, NoPlace::Order { row: 0, .. }), "{error}");
    }
}

#[test]
fn the_choice_explains_itself() {
    let why = |ms: &[&[u32]]| chosen(ms, |_| ()).unwrap().why(|n| ["lyon", "oslo", "rome"][n].to_owned());
    assert_eq!(
        why(&[&[70, 79, 78], &[100, 104, 105], &[60, 80, 74], &[62, 100, 70]]),
        "oslo is 91 ms and 90 ms from the teams on average, 1 ms apart, and 104 ms from the worst placed; \
         lyon is best for the worst placed, 24 ms apart at 100 ms; second best: rome, 19 ms apart at 105 ms"
    );
    assert_eq!(
        why(&[&[70, 99], &[80, 99]]),
        "lyon is 70 ms and 80 ms from the teams on average, 10 ms apart, and 80 ms from the worst placed, the best \
         possible; no other network is within 88 ms of all"
    );
}

#[test]
fn a_second_half_gives_back_what_the_first_took() {
    let table = [vec![90_000, 60_000, 95_000], vec![60_000, 90_000, 80_000]];
    let (rows, teams) = (dense(&table), two(2));
    let of = Match::new(3, &rows, &teams);
    assert_eq!(choose(&of).unwrap().chosen.gap, Span::ms(15));
    let h = halves(&of).unwrap();
    assert_eq!((h.gap, h.halves[0].network, h.halves[1].network), (Span::ZERO, 0, 1));
}

#[test]
fn teams_that_are_free_are_drawn_up_evenly() {
    let table: Vec<Vec<u32>> = [10, 20, 70, 80].map(|l| vec![l * 1000, 90_000]).into();
    let (rows, teams) = (dense(&table), two(4));
    let s = split(&Match::new(2, &rows, &teams)).unwrap();
    assert_eq!((s.teams, s.figures.gap, s.figures.worst), ([vec![0, 3], vec![1, 2]], Span::ZERO, Span::ms(80)));
    let three = [vec![0, 1, 2]];
    assert!(split(&Match::new(2, &rows, &three)).is_err());
}

prop_compose! {
    /// A table of 4 to 8 players, some of its entries unknown, in latencies that often tie.
    fn tables()(players in 2_usize..5, networks in 1_usize..40)(
        table in prop::collection::vec(prop::collection::vec(
            prop_oneof![9 => 1_u32..60, 1 => Just(UNKNOWN)], networks), players * 2),
        cut in 1..players * 2, slack in 0_u32..60,
    ) -> (Vec<Vec<u32>>, Vec<Vec<usize>>, u32) {
        let players = table.len();
        (table, vec![(0..cut).collect(), (cut..players).collect()], slack)
    }
}

proptest! {
    #[test]
    fn the_choice_is_the_best_of_all_that_are_allowed((table, teams, slack) in tables()) {
        let rows = dense(&table);
        let of = Match { slack_percent: slack, ..Match::new(table[0].len(), &rows, &teams) };
        // The same by its definition, in fractions: |sum A / a − sum B / b| times a·b.
        let sizes = [teams[0].len() as i64, teams[1].len() as i64];
        let sum = |t: usize, n: usize| teams[t].iter().map(|r| i64::from(table[*r][n])).sum::<i64>();
        let gain = |n: usize| sum(1, n) * sizes[0] - sum(0, n) * sizes[1];
        let worst = |n: usize| table.iter().map(|r| r[n]).max().unwrap();
        let reached: Vec<usize> = (0..of.networks).filter(|n| worst(*n) != UNKNOWN).collect();
        let Some(best) = reached.iter().map(|n| worst(*n)).min() else {
            prop_assert!(choose(&of).is_err() && halves(&of).is_err());
            return Ok(());
        };
        let allowed: Vec<usize> =
            reached.into_iter().filter(|n| u64::from(worst(*n)) * 100 <= u64::from(best) * (100 + u64::from(slack))).collect();
        let fairest = allowed.iter().copied().min_by_key(|n| (gain(*n).abs(), worst(*n), *n)).unwrap();
        let c = choose(&of).unwrap();
        prop_assert_eq!((c.chosen.network, c.within), (fairest, allowed.len()));
        prop_assert_eq!(c.best.worst, Span(u64::from(best)));

        let pairs = allowed.iter().flat_map(|a| allowed.iter().map(|b| (gain(*a) + gain(*b)).abs()));
        let [first, second] = halves(&of).unwrap().halves.map(|f| f.network);
        prop_assert!(allowed.contains(&first) && allowed.contains(&second));
        prop_assert_eq!((gain(first) + gain(second)).abs(), pairs.min().unwrap());

        let s = split(&of).unwrap();
        let drawn = Match { teams: &s.teams, slack_percent: 0, ..of.clone() };
        prop_assert_eq!(s.figures.worst, Span(u64::from(best)));
        prop_assert_eq!(s.figures.network, choose(&drawn).unwrap().best.network);
        let l: Vec<i64> = table.iter().map(|r| i64::from(r[s.figures.network])).collect();
        let halvings = (0_u32..1 << l.len()).filter(|m| m.count_ones() as usize * 2 == l.len());
        let apart = |m: u32| l.iter().enumerate().map(|(i, l)| if m >> i & 1 == 1 { *l } else { -l }).sum::<i64>().unsigned_abs();
        prop_assert_eq!(s.figures.gap, Span(halvings.map(apart).min().unwrap() / (l.len() as u64 / 2)));
    }

    #[test]
    fn a_sparse_table_is_the_dense_one_without_its_gaps((table, teams, slack) in tables()) {
        let rows = dense(&table);
        let known: Vec<Vec<(u32, u32)>> =
            table.iter().map(|r| (0..).zip(r.iter().copied()).filter(|e| e.1 != UNKNOWN).collect()).collect();
        let sparse: Vec<Row> = known.iter().map(|r| Row::Sparse(r)).collect();
        let of = Match { slack_percent: slack, ..Match::new(table[0].len(), &rows, &teams) };
        let as_sparse = Match { rows: &sparse, ..of.clone() };
        prop_assert_eq!(choose(&of), choose(&as_sparse));
        prop_assert_eq!(halves(&of), halves(&as_sparse));
        prop_assert_eq!(split(&of), split(&as_sparse));
    }
}
