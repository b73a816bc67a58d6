//! One network's cheapest way through time: an exact dynamic programme over absent, dormant and active.
//!
//! ```text
//!            ship            resume
//!  absent ─────────▶ dormant ───────▶ active        down again: free
//!  pays nothing      pays storage     pays machine and storage, saves what its clients pay elsewhere
//! ```

use serde::{Deserialize, Serialize};

/// What a network has of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    #[default]
    Absent,
    /// The image is there and nothing runs.
    Dormant,
    Active,
}

impl State {
    pub const ALL: [State; 3] = [State::Absent, State::Dormant, State::Active];
}

/// What a network costs during one step of time, in 10⁻¹² dollars each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stage {
    /// Storage of a dormant image.
    pub dormant: i64,
    /// Machine and storage of a running instance.
    pub active: i64,
    /// The bytes that are missing there, if they travel as this step begins (paper §5.4).
    pub ship: i64,
    /// One resume.
    pub resume: i64,
}

impl Stage {
    /// What a state costs during the step.
    pub fn stay(&self, state: State) -> i64 {
        match state {
            State::Absent => 0,
            State::Dormant => self.dormant,
            State::Active => self.active,
        }
    }

    /// What it costs to become `to` as the step begins.
    pub fn change(&self, from: State, to: State) -> i64 {
        match (from, to) {
            (State::Absent, State::Dormant) => self.ship,
            (State::Absent, State::Active) => self.ship + self.resume,
            (State::Dormant, State::Active) => self.resume,
            _ => 0,
        }
    }

    /// The price of a step in which a network that was `from` is `to`.
    pub fn price(&self, from: State, to: State) -> i64 {
        self.change(from, to) + self.stay(to)
    }
}

/// Finds the cheapest states of one network, one for each step; being active in a step saves `saves`.
///
/// `path` gets them; the answer is their price less what they save. Of equally cheap ways the one that changes later,
/// and then the lower state.
pub fn cheapest(from: State, stages: &[Stage], saves: &[i64], path: &mut Vec<State>) -> i64 {
    // Backwards: what is still to be paid by a network that was in a state before the step, and what it best becomes.
    path.clear();
    let mut choices = Vec::with_capacity(stages.len());
    let mut ahead = [0_i64; 3];
    for (stage, saves) in stages.iter().zip(saves).rev() {
        let own = State::ALL.map(|to| {
            let saved = if to == State::Active { *saves } else { 0 };
            stage.stay(to) - saved + ahead[to as usize]
        });
        let best = State::ALL.map(|before| {
            // The state it has wins a tie.
            let mut best = (own[before as usize], before);
            for to in State::ALL {
                let value = stage.change(before, to) + own[to as usize];
                if value < best.0 {
                    best = (value, to);
                }
            }
            best
        });
        ahead = best.map(|(value, _)| value);
        choices.push(best.map(|(_, to)| to));
    }
    let mut state = from;
    path.extend(choices.iter().rev().map(|choice| {
        state = choice[state as usize];
        state
    }));
    ahead[from as usize]
}

/// The price of a given way, less what it saves.
pub fn price(from: State, stages: &[Stage], saves: &[i64], path: &[State]) -> i64 {
    let mut before = from;
    let mut total = 0;
    for ((stage, saves), to) in stages.iter().zip(saves).zip(path) {
        total += stage.price(before, *to) - if *to == State::Active { *saves } else { 0 };
        before = *to;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stage() -> impl Strategy<Value = Stage> {
        (0..50i64, 0..200i64, 0..300i64, 0..50i64).prop_map(|(dormant, active, ship, resume)| Stage {
            dormant,
            active: dormant + active,
            ship,
            resume,
        })
    }

    proptest! {
        #[test]
        fn no_way_through_time_is_cheaper(
            steps in prop::collection::vec((stage(), 0..400i64), 1..6),
            from in 0..3usize,
        ) {
            let (stages, saves): (Vec<_>, Vec<_>) = steps.into_iter().unzip();
            let from = State::ALL[from];
            let mut path = vec![];
            let found = cheapest(from, &stages, &saves, &mut path);
            prop_assert_eq!(found, price(from, &stages, &saves, &path));
            let ways = 3usize.pow(stages.len() as u32);
            let least = (0..ways).map(|n| {
                let way: Vec<State> = (0..stages.len()).map(|s| State::ALL[n / 3usize.pow(s as u32) % 3]).collect();
                price(from, &stages, &saves, &way)
            });
            prop_assert_eq!(Some(found), least.min());
        }
    }

    #[test]
    fn an_image_travels_in_the_cheap_hour_before_it_is_needed() {
        let day = |ship| Stage { dormant: 1, active: 50, ship, resume: 5 };
        let stages = [day(400), day(90), day(400), day(400)];
        let mut path = vec![];
        cheapest(State::Absent, &stages, &[0, 0, 0, 500], &mut path);
        assert_eq!(path, [State::Absent, State::Dormant, State::Dormant, State::Active]);
    }

    #[test]
    fn nothing_changes_where_nothing_is_gained() {
        let stages = [Stage::default(); 3];
        let mut path = vec![];
        assert_eq!(cheapest(State::Dormant, &stages, &[0; 3], &mut path), 0);
        assert_eq!(path, [State::Dormant; 3]);
    }
}
