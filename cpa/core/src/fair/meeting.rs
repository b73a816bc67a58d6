//! A meeting in a fleet: an operator says who plays from which regions, the CPA at which network.
//!
//! ```text
//!  Order { teams of regions } ─▶ round trips region ─▶ network ─┐
//!  each network: heard of? failed lately? room? ─▶ open, closed ─┴▶ choose ─▶ Order { at: network = 1 } ─▶ Plan
//!                                                                      └─ why ──▶ its reasons ──────────────┘
//! ```
//!
//! Latencies are round trips from a region to a network: what the packets of a game feel. A service's own time to
//! answer, and its back end's, are the same for everybody at one network.

use super::{Match, NoPlace, Row, SLACK_PERCENT, UNKNOWN, choose};
use crate::cpa::Cpa;
use crate::orders::guess;
use crate::rounds::running;
use crate::solve::{Case, Rule, Tables};
use crate::{Refusal, cost, steering};
use std::collections::{BTreeMap, BTreeSet};
use vmatrix_model::fleet::Kind;
use vmatrix_model::plan::{Plan, WhyNot};
use vmatrix_model::wire::{Fair, Order};
use vmatrix_model::{NetworkId, RegionId, ServiceId, Span, Time};

/// Most players who are named one by one in a reason, and networks in an error.
const NAMED_PLAYERS: usize = 12;
const NAMED_NETWORKS: usize = 4;

/// Networks where there may be no meeting, and why.
pub type Closed = BTreeMap<NetworkId, String>;

/// Where a meeting is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meeting {
    pub service: ServiceId,
    pub network: NetworkId,
    /// For whom, and why there: one sentence.
    pub words: String,
    pub closed: Closed,
}

/// The network that is fairest to the players of a service, of those that are not closed.
///
/// # Errors
/// [`Refusal::Order`]: a region that does not exist, fewer than two teams, no network that is open, a cap that no
/// network keeps.
pub fn place(case: Case, fair: &Fair, closed: Closed) -> Result<Meeting, Refusal> {
    let refuse = |problem: String, hint: &str| Err(Refusal::Order { problem, hint: hint.into() });
    let Case { fleet, service, .. } = case;
    if fair.teams.len() < 2 {
        return refuse(
            format!("a fair place lies between two teams or more, and the order has {}", fair.teams.len()),
            "give --team for each, as in --team seoul,tokyo --team berlin; people without teams are a --player each",
        );
    }
    let all: BTreeSet<&RegionId> = fair.teams.iter().flatten().collect();
    if let Some(unknown) = all.iter().find(|r| fleet.region(r).is_none()) {
        let names: Vec<&str> = fleet.regions.iter().map(|r| r.name.as_str()).collect();
        return refuse(format!("there is no region {unknown}"), &guess(unknown.as_str(), &names));
    }
    if fleet.networks.iter().all(|n| closed.contains_key(&n.name)) {
        return refuse(
            format!("no network is open to {}{}", service.name, listed(&closed)),
            "wait until one is, or order it all the same, as in --at tokyo=1, where that is possible",
        );
    }
    let table: Vec<Vec<u32>> = all.iter().map(|r| round_trips(case, r)).collect();
    let rows: Vec<Row> = table.iter().map(|r| Row::Dense(r)).collect();
    let row: BTreeMap<&RegionId, usize> = all.iter().enumerate().map(|(i, r)| (*r, i)).collect();
    let teams: Vec<Vec<usize>> =
        fair.teams.iter().map(|team| team.iter().filter_map(|r| row.get(r).copied()).collect()).collect();
    let room: Vec<bool> = fleet.networks.iter().map(|n| !closed.contains_key(&n.name)).collect();
    let cost: Vec<_> = fleet.networks.iter().map(|n| cost::instance_price(n, case.now, 1)).collect();
    let of = Match {
        room: Some(&room),
        cost: Some(&cost),
        slack_percent: fair.slack_percent.unwrap_or(SLACK_PERCENT),
        cap: fair.cap_ms.map(|ms| Span::ms(u64::from(ms))),
        ..Match::new(fleet.networks.len(), &rows, &teams)
    };
    let name = |n: usize| fleet.networks.get(n).map_or_else(|| format!("network {n}"), |n| n.name.to_string());
    let choice = choose(&of).map_err(|no| refusal(&no, name, &closed))?;
    let Some(network) = fleet.networks.get(choice.chosen.network).map(|n| n.name.clone()) else {
        return refuse("the fleet has no network".into(), "give it one in the fleet file");
    };
    let words = format!("fairest to {}: {}", players(fair), choice.why(name));
    Ok(Meeting { service: service.name.clone(), network, words, closed })
}

/// Round trips of a region to every network, in the fleet's order.
fn round_trips(case: Case, region: &RegionId) -> Vec<u32> {
    let to = |network| case.tables.client(region, network).map_or(UNKNOWN, |l| l.rtt_ms.saturating_mul(1000));
    case.fleet.networks.iter().map(|n| to(&n.name)).collect()
}

/// `seoul, tokyo against berlin`; of a call `seoul, tokyo, berlin`; or how many there are.
fn players(fair: &Fair) -> String {
    let all: usize = fair.teams.iter().map(Vec::len).sum();
    if all > NAMED_PLAYERS {
        return format!("{all} players in {} teams", fair.teams.len());
    }
    let team = |team: &Vec<RegionId>| team.iter().map(RegionId::as_str).collect::<Vec<_>>().join(", ");
    // More than two, each alone, are a call and no match.
    let call = fair.teams.len() > 2 && fair.teams.iter().all(|t| t.len() == 1);
    fair.teams.iter().map(team).collect::<Vec<_>>().join(if call { ", " } else { " against " })
}

/// `: tokyo (nothing is heard of tokyo), …`, or nothing.
fn listed(closed: &Closed) -> String {
    let some: Vec<String> = closed.iter().take(NAMED_NETWORKS).map(|(n, why)| format!("{n} ({why})")).collect();
    match closed.len().saturating_sub(NAMED_NETWORKS) {
        0 if closed.is_empty() => String::new(),
        0 => format!(": {}", some.join(", ")),
        more => format!(": {} and {more} more", some.join(", ")),
    }
}

/// Why there is no place, by the fleet's names.
fn refusal(no: &NoPlace, name: impl Fn(usize) -> String, closed: &Closed) -> Refusal {
    let besides = if closed.is_empty() { String::new() } else { format!("; closed{}", listed(closed)) };
    let (problem, hint) = match no {
        NoPlace::Cap { cap, best, network } => (
            format!(
                "no player's round trip may be above {cap}, and the best possible is {best}, at {}{besides}",
                name(*network)
            ),
            "raise --cap-ms, or leave out who is farthest".to_owned(),
        ),
        NoPlace::Unreached { network, reached, players } => (
            format!(
                "no network that is open reaches all {players} players; {} reaches {reached}{besides}",
                name(*network)
            ),
            "leave out who cannot be reached".to_owned(),
        ),
        NoPlace::EmptyTeam { team } => {
            (format!("team {} has no players", team + 1), "name its regions, or leave it out".to_owned())
        }
        other => (other.to_string(), "name fewer players".to_owned()),
    };
    Refusal::Order { problem, hint }
}

/// Players' regions whose clients will go to another network than the meeting's, because it is nearer to them.
fn astray<'a>(
    tables: &Tables,
    meeting: &Meeting,
    fair: &'a Fair,
    active: &'a BTreeSet<NetworkId>,
) -> BTreeMap<&'a NetworkId, BTreeSet<&'a RegionId>> {
    let mut by: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for region in fair.teams.iter().flatten() {
        let nearest = tables.best(Rule::Nearest, &meeting.service, region, active);
        if let Some(other) = nearest.filter(|n| **n != meeting.network) {
            by.entry(other).or_default().insert(region);
        }
    }
    by
}

impl Meeting {
    /// Puts the words where an operator reads them: in front of every move's reason, and why not elsewhere.
    pub(crate) fn tell(self, plan: &mut Plan) {
        for m in &mut plan.moves {
            m.reason = format!("{}; {}", self.words, m.reason);
        }
        let mut not = |network, reason| plan.not.push(WhyNot { service: self.service.clone(), network, reason });
        if plan.moves.is_empty() {
            not(self.network, format!("it runs there already; {}", self.words));
        }
        self.closed.into_iter().for_each(|(network, why)| not(network, why));
    }
}

impl Cpa {
    /// An order as it is carried out: one that is for a meeting names the fairest network.
    pub(crate) fn meet(&self, now: Time, order: &Order) -> Result<(Order, Option<Meeting>), Refusal> {
        let service = self.fleet.service(&order.service);
        // An order for a service that does not exist is refused by whoever reads it next.
        let Some((fair, service)) = order.fair.as_ref().zip(service) else { return Ok((order.clone(), None)) };
        let rates = self.rates(&service.name);
        let case = self.case(service, Rule::Nearest, &rates, now);
        let present = running(&self.aim(&service.name));
        let mut active: BTreeSet<NetworkId> = present.keys().cloned().collect();
        let why = |network: &NetworkId| match order.at.get(network) {
            Some(0) => Some("the order empties it".into()),
            _ if !steering::heard(&self.memory, network, now) => Some(format!("nothing is heard of {network}")),
            _ => self.barred(case, network, &active),
        };
        let networks = self.fleet.networks.iter();
        let closed: Closed = networks.filter_map(|n| Some((n.name.clone(), why(&n.name)?))).collect();
        let mut meeting = place(case, fair, closed)?;
        let mut at = order.at.clone();
        // Where more of it runs already, nothing is taken away.
        at.entry(meeting.network.clone()).or_insert(present.get(&meeting.network).copied().unwrap_or(1));
        if service.kind == Kind::Replica {
            active.extend(at.keys().cloned());
            active.retain(|n| at.get(n) != Some(&0));
            for (network, regions) in astray(&self.tables, &meeting, fair, &active) {
                let regions: Vec<&str> = regions.into_iter().map(RegionId::as_str).collect();
                meeting.words += &format!(
                    "; but {} will be sent to {network}, which is nearer: order --at {network}=0 too for all to meet",
                    regions.join(", ")
                );
            }
        }
        Ok((Order { at, ..order.clone() }, Some(meeting)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solve::Rates;
    use vmatrix_model::fleet::Fleet;

    fn fair(teams: &[&[&str]]) -> Fair {
        let team = |team: &&[&str]| team.iter().map(|r| r.parse().unwrap()).collect();
        Fair { teams: teams.iter().map(team).collect(), slack_percent: None, cap_ms: None }
    }

    /// Ashburn, Dublin and Tokyo of the shipped scenario, some of them closed.
    fn placed(fair: &Fair, closed: &[&str]) -> Result<Meeting, Refusal> {
        let fleet: Fleet = crate::cpa::testing::fleet();
        let (tables, rates) = (Tables::new(&fleet), Rates::default());
        let service = &fleet.services[0];
        let case = Case { fleet: &fleet, tables: &tables, service, rule: Rule::Nearest, rates: &rates, now: Time(0) };
        place(case, fair, closed.iter().map(|n| (n.parse().unwrap(), "it is full".to_owned())).collect())
    }

    #[test]
    fn teams_of_regions_meet_between_them_and_hear_why() {
        let m = placed(&fair(&[&["new-york"], &["berlin"]]), &[]).unwrap();
        assert_eq!(m.network.as_str(), "dublin");
        assert_eq!(
            m.words,
            "fairest to new-york against berlin: dublin is 77 ms and 40 ms from the teams on average, \
             37 ms apart, and 77 ms from the worst placed, the best possible; no other network is within 84 ms of all"
        );
    }

    #[test]
    fn a_region_counts_as_often_as_it_has_players() {
        let mean = |teams: &[&[&str]]| placed(&fair(teams), &[]).unwrap().words;
        assert!(mean(&[&["berlin"], &["new-york", "berlin"]]).contains("dublin is 40 ms and 58"));
        assert!(mean(&[&["berlin"], &["new-york", "berlin", "berlin", "berlin"]]).contains("dublin is 40 ms and 49"));
    }

    #[test]
    fn a_closed_network_is_not_chosen_whatever_it_would_be() {
        let teams = fair(&[&["new-york"], &["berlin"]]);
        assert_eq!(placed(&teams, &["dublin"]).unwrap().network.as_str(), "ashburn");
    }

    #[test]
    fn what_cannot_be_says_what_to_do() {
        let says = |fair: &Fair, closed: &[&str]| placed(fair, closed).unwrap_err().to_string();
        let two: &[&[&str]] = &[&["new-york"], &["berlin"]];
        let has = |said: String, words: &[&str]| words.iter().for_each(|w| assert!(said.contains(w), "{said:?}: {w}"));
        has(says(&fair(&[&["soul"], &["berlin"]]), &[]), &["no region soul", "did you mean seoul?"]);
        has(says(&fair(&[&["seoul", "berlin"]]), &[]), &["the order has 1", "--player"]);
        has(says(&fair(&[]), &[]), &["the order has 0"]);
        has(says(&fair(&[&["seoul"], &[]]), &[]), &["team 2 has no players"]);
        has(
            says(&fair(two), &["ashburn", "dublin", "tokyo"]),
            &["no network is open to maps: ashburn (it is full), dublin (", "--at tokyo=1"],
        );
        let capped = Fair { cap_ms: Some(30), ..fair(two) };
        has(says(&capped, &["tokyo"]), &["above 30 ms", "77 ms, at dublin; closed: tokyo (it is full)", "--cap-ms"]);
        let crowd: Vec<&str> = vec!["seoul"; 2000];
        has(says(&fair(&[&crowd, &["berlin"]]), &[]), &["2001 players", "name fewer players"]);
    }

    #[test]
    fn a_call_is_not_told_as_a_match() {
        let said = placed(&fair(&[&["seoul"], &["new-york"], &["berlin"]]), &[]).unwrap().words;
        assert!(said.starts_with("fairest to seoul, new-york, berlin: "), "{said}");
    }

    #[test]
    fn many_players_are_counted_and_not_named() {
        let crowd: Vec<&str> = vec!["seoul"; 12];
        assert!(
            placed(&fair(&[&crowd, &["berlin"]]), &[]).unwrap().words.starts_with("fairest to 13 players in 2 teams: ")
        );
    }
}
