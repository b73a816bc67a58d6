//! Keeps placements still: a move has to pay back, a place that was taken is kept a while.
//!
//! | rule | number | why this number |
//! |---|---|---|
//! | a crowd's move serves and has paid back within | 60 s | crowds last minutes; what needs longer (an image that must travel first) comes after the crowd |
//! | an ordinary move pays back within | 1 h | the hour the forecast is good for |
//! | an ordinary move gains at least | 1/20 of the whole price, and 1/4 of what it spends anew | forecasts of quiet regions are off by a fifth |
//! | an ordinary move is the best in | 3 rounds (30 s) | without it, noise at a threshold raises and lowers the same VM |
//! | a network stays | 20 s after it began to serve | ten times a resume; its clients' resolvers have only just learned of it |
//! | the drop after a crowd waits | 5 s of calm | the end of a crowd is known to be real once it has not come back at once |
//! | the same where a copy was called back within an hour | 15 min | what comes back has not gone; by then it is usual, and priced as such |
//! | a network that failed to serve is left out | 5 min | what broke there needs looking after, not another try |

use crate::burst::CROWD_MAX;
use crate::solve::Step;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vmatrix_model::{MicroUsd, NetworkId, Span, Time};

/// A move made for a crowd must have paid back by then.
pub const CROWD_HORIZON: Span = Span::secs(60);
/// An ordinary move must have paid back by then.
pub const EPOCH_HORIZON: Span = Span::secs(3600);
/// Rounds in which an ordinary move must have been the best.
pub const ROUNDS: u32 = 3;
/// A network keeps a service at least so long after it began to serve.
pub const STAY: Span = Span::secs(20);
/// Calm after a crowd before its copy is put back to sleep.
pub const CALM: Span = Span::secs(5);
/// A crowd that comes back so soon after its copy was put to sleep has called it back: what is usual is the last hour's.
pub const RECALL: Span = Span::secs(3600);
/// How long a network that failed to serve is left out.
pub const AVOID: Span = Span::secs(300);

/// What is remembered of one service.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Held {
    /// When each network began to serve.
    pub serving_since: BTreeMap<NetworkId, Time>,
    /// Networks that failed to serve, and when.
    pub failed: BTreeMap<NetworkId, Time>,
    /// The step that was best in the last rounds, as text, and in how many.
    pub tempted: Option<(String, u32)>,
    /// When a crowd last ended.
    pub calm_since: Option<Time>,
    /// When a copy was last put back to sleep after a crowd, and whether another crowd has called one back since.
    pub slept_at: Option<Time>,
    pub recalled: bool,
    /// When anyone was last seen serving it.
    pub served_at: Option<Time>,
}

impl Held {
    /// Whether `network` may be left yet.
    pub fn may_leave(&self, network: &NetworkId, now: Time) -> bool {
        !self.recalled(now) && self.serving_since.get(network).is_none_or(|t| now.since(*t) >= STAY)
    }

    /// Whether a crowd has called a copy back and was over for less than [`CROWD_MAX`].
    fn recalled(&self, now: Time) -> bool {
        self.recalled && self.calm_since.is_some_and(|t| now.since(t) < CROWD_MAX)
    }

    /// Whether `network` may be tried.
    pub fn may_try(&self, network: &NetworkId, now: Time) -> bool {
        self.failed.get(network).is_none_or(|t| now.since(*t) >= AVOID)
    }

    /// A copy is resumed for a crowd.
    pub fn called(&mut self, now: Time) {
        self.recalled = self.slept_at.is_some_and(|t| now.since(t) < RECALL);
    }

    /// Whether a crowd is over long enough for its copy to be put back to sleep, and not so long that whoever serves
    /// does so for a reason of its own.
    pub fn calm(&self, now: Time) -> bool {
        self.calm_since.is_some_and(|t| (CALM..CALM + RECALL).contains(&now.since(t)))
    }

    /// Whether the step has now been the best for [`ROUNDS`] rounds. Called once a round.
    pub fn ripe(&mut self, step: &Step) -> bool {
        let name = format!("{step:?}");
        let rounds = match &self.tempted {
            Some((same, n)) if *same == name => n + 1,
            _ => 1,
        };
        self.tempted = Some((name, rounds));
        rounds >= ROUNDS
    }
}

/// The time after which a gain of `gain` an hour has paid `price`, begun after `ready`; none if it never does.
pub fn payback(gain: MicroUsd, price: MicroUsd, ready: Span) -> Option<Span> {
    if gain.0 <= 0 {
        return None;
    }
    let us = i128::from(price.0.max(0)) * 3_600_000_000 / i128::from(gain.0);
    Some(ready + Span(u64::try_from(us).unwrap_or(u64::MAX)))
}

/// Whether an ordinary gain is more than the forecast's error: see the table.
pub fn worthwhile(gain: MicroUsd, before: MicroUsd, spent: MicroUsd) -> bool {
    gain.0 > 0 && gain.0.saturating_mul(20) >= before.0 && gain.0.saturating_mul(4) >= spent.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_that_must_travel_through_the_crowd_does_not_pay() {
        let gain = MicroUsd(400_000);
        assert!(payback(gain, MicroUsd(200), Span::secs(2)).unwrap() < CROWD_HORIZON);
        assert!(payback(gain, MicroUsd(200), Span::secs(90)).unwrap() > CROWD_HORIZON);
        assert_eq!(payback(MicroUsd(0), MicroUsd(1), Span::ZERO), None);
    }

    #[test]
    fn what_a_crowd_called_back_stays_longer() {
        let mut held = Held::default();
        let at = |s| Time(0) + Span::secs(s);
        held.called(at(100));
        held.calm_since = Some(at(200));
        assert!(!held.calm(at(204)) && held.calm(at(205)) && held.calm(at(3_804)) && !held.calm(at(3_805)));
        held.slept_at = Some(at(205));
        held.called(at(205 + 3599));
        held.calm_since = Some(at(4_000));
        let network = "tokyo".to_owned().try_into().unwrap();
        assert!(!held.may_leave(&network, at(4_899)) && held.may_leave(&network, at(4_900)));
        held.slept_at = Some(at(4_900));
        held.called(at(4_900 + 3600));
        held.calm_since = Some(at(9_000));
        assert!(held.may_leave(&network, at(9_005)), "an hour later it is another crowd");
    }

    #[test]
    fn an_ordinary_step_must_be_best_three_times_in_a_row() {
        let (tokyo, dublin) =
            (Step::Drop("tokyo".to_owned().try_into().unwrap()), Step::Drop("dublin".to_owned().try_into().unwrap()));
        let mut h = Held::default();
        assert_eq!(
            [&tokyo, &tokyo, &dublin, &tokyo, &tokyo, &tokyo].map(|s| h.ripe(s)),
            [false, false, false, false, false, true]
        );
    }
}
