//! What `bench relocate` is held against: rows in, goals out.

use super::{LINKS, Mechanism};
use crate::guests::{ALL, Kind};
use crate::report::{Goal, Row, hundredth};
use crate::world::Link;

/// First byte over the limit: of a guest that does next to nothing, and of one that computes its answer.
const OF_LIMIT: [f64; 2] = [1.3, 1.5];
/// The second request over a warm one.
const SECOND_MAX: f64 = 1.2;
/// First byte of 8 GiB over that of 512 MiB.
const FLAT_MAX: f64 = 1.3;
/// Stop-and-copy over the product.
const SOONER_MIN: f64 = 50.0;
/// With the snapshot before already there: milliseconds above the guest's own resume from local files.
const OLD_MS_MAX: f64 = 150.0;
/// Where the product is held against a copy.
const AGAINST_COPY: Link = Link { mbit: 100, rtt_us: 20_000 };

/// Holds each first byte of the product against its row's limits.
pub fn ratios(rows: &mut [Row]) {
    for row in rows.iter_mut().filter(|r| r.mechanism == Mechanism::Vmatrix.name()) {
        let Some(first) = row.first_byte_ms_median else { continue };
        if let Some(limit) = row.limit_ms {
            row.add("of_limit", hundredth(first / limit));
        }
        if let Some(bare) = row.number("bare_limit_ms") {
            row.add("of_bare_limit", hundredth(first / bare));
        }
    }
}

/// The goals, against what the rows have.
pub fn goals(rows: &[Row]) -> Vec<Goal> {
    let find = |kind: Kind, link: Link, mechanism: Mechanism| {
        rows.iter().find(|r| {
            (r.guest.as_str(), r.ram_mib, r.mechanism.as_str()) == (kind.name(), kind.ram_mib(), mechanism.name())
                && r.link_mbit == Some(link.mbit)
        })
    };
    let first = |kind, link, mechanism| find(kind, link, mechanism).and_then(|r| r.first_byte_ms_median);
    let mut goals = Vec::new();
    for link in LINKS {
        for kind in ALL {
            let about = format!("{} {} MiB at {}", kind.name(), kind.ram_mib(), link.name());
            let row = find(kind, link, Mechanism::Vmatrix);
            let [plain, computes] = OF_LIMIT;
            let most = if kind.name() == "tiny" { plain } else { computes };
            let ratio = row.and_then(|r| r.number("of_limit"));
            goals.push(Goal::at_most(format!("{about}: first byte over its limit"), most, ratio));
            let second = row.and_then(|r| Some(r.second_ms_median? / r.number("warm_ms_median")?.max(0.1)));
            let second = second.map(hundredth);
            goals.push(Goal::at_most(format!("{about}: second request over a warm one"), SECOND_MAX, second));
            if Mechanism::OldSnapshot.applies(kind, link) {
                let above = first(kind, link, Mechanism::OldSnapshot)
                    .zip(first(kind, link, Mechanism::Local))
                    .map(|(old, own)| hundredth(old - own));
                let what = format!("{about}, the snapshot before there: ms above its own resume from local files");
                goals.push(Goal::at_most(what, OLD_MS_MAX, above));
            }
        }
        let flat = first(Kind::Tiny(8192), link, Mechanism::Vmatrix)
            .zip(first(Kind::Tiny(512), link, Mechanism::Vmatrix))
            .map(|(large, small)| hundredth(large / small));
        goals.push(Goal::at_most(format!("tiny at {}: 8 GiB over 512 MiB", link.name()), FLAT_MAX, flat));
    }
    let sooner = first(Kind::Tiny(512), AGAINST_COPY, Mechanism::StopAndCopy)
        .zip(first(Kind::Tiny(512), AGAINST_COPY, Mechanism::Vmatrix))
        .map(|(copy, ours)| hundredth(copy / ours));
    let what = format!("tiny 512 MiB at {}: stop_and_copy over vmatrix", AGAINST_COPY.name());
    goals.push(Goal::at_least(what, SOONER_MIN, sooner));
    goals
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Sample;

    fn row(mechanism: Mechanism, first: f64) -> Row {
        let mut row = Row::of("tiny", 512, mechanism.name(), &[Sample { first_byte_ms: first, ..Sample::default() }]);
        row.link_mbit = Some(100);
        row.rtt_ms = Some(20.0);
        row
    }

    #[test]
    fn a_goal_without_its_rows_is_not_measured_and_one_with_them_is_judged() {
        let mut rows = vec![row(Mechanism::Vmatrix, 400.0), row(Mechanism::StopAndCopy, 24_000.0)];
        if let Some(row) = rows.first_mut() {
            row.limit_ms = Some(320.0);
        }
        ratios(&mut rows);
        let all = goals(&rows);
        let of = |what: &str| all.iter().find(|g| g.what.contains(what)).unwrap();
        assert_eq!(of("tiny 512 MiB at 100/20: first byte").met, Some(true), "{all:?}");
        assert_eq!(of("stop_and_copy over vmatrix").seen.as_deref(), Some("60"));
        assert_eq!((of("maps 512 MiB at 100/20: first").met, of("8 GiB over").met), (None, None));
    }

    #[test]
    fn a_second_request_counts_against_a_warm_one() {
        let sample = Sample { first_byte_ms: 1.0, second_ms: Some(13.0), warm_ms: Some(10.0), ..Sample::default() };
        let mut row = Row::of("tiny", 512, "vmatrix", &[sample]);
        row.link_mbit = Some(100);
        let all = goals(&[row]);
        let second = all.iter().find(|g| g.what.starts_with("tiny 512 MiB at 100/20: second")).unwrap();
        assert_eq!((second.seen.as_deref(), second.met), (Some("1.30"), Some(false)));
    }
}
