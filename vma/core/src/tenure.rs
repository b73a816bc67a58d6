//! Who may run a singleton: one machine holds it, and hands it on with a snapshot. Never two.
//!
//! ```text
//!  holder                                            taker
//!  Held(e) ◀─────────────── ask ──────────────────── (nothing, or Handed before)
//!     ▼ stop the VM, save it
//!  Saving(e, to)
//!     ▼ the snapshot is whole: epoch e+1
//!  Handed(e+1, to) ──────── answer ────────────────▶ take(e+1): Held(e+1) ▶ resume
//! ```
//!
//! Each state is written down before anything follows from it. A machine that has handed a singleton on never runs
//! it again, whatever it hears, unless it is handed back with a later epoch: so an answer that comes late or twice,
//! a daemon that was killed at any step, or a network that was cut off and comes back makes no second writer. While
//! an answer is under way nobody runs it; the taker asks again and gets the same one.
//!
//! A holder that is lost for good takes its tenure with it: only an operator may then begin a new one from an
//! older snapshot, and must know that it is lost.

use serde::{Deserialize, Serialize};

/// One machine's part in a singleton.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tenure {
    /// Of the snapshot it is, or was last, held with; rises each time it is handed on.
    pub epoch: u64,
    pub part: Part,
}

/// See the module's picture.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Part {
    /// This machine may run it.
    Held,
    /// It is stopped and being saved for that machine.
    Saving { to: String },
    /// That machine has it, or will once it hears the answer.
    Handed { to: String },
}

/// What a holder does when it is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// Write the tenure down, stop the VM, save it, then say [`Tenure::saved`].
    Save,
    /// Answer with the snapshot of this epoch.
    Answer { epoch: u64 },
}

/// Why a singleton is not handed over, or not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("it was handed to {to} with epoch {epoch}; ask there")]
    Elsewhere { to: String, epoch: u64 },
    #[error("it is being handed to {to}; ask there")]
    Promised { to: String },
    #[error("epoch {offered} is not later than {epoch}, which was here already: an old answer, or an old snapshot")]
    Older { offered: u64, epoch: u64 },
    #[error("it is held here with epoch {epoch} and has to be handed on first")]
    Held { epoch: u64 },
}

impl Tenure {
    /// The first one: of the machine where the singleton begins.
    pub fn first() -> Tenure {
        Tenure { epoch: 0, part: Part::Held }
    }

    /// Whether this machine may run the singleton.
    pub fn may_run(&self) -> bool {
        self.part == Part::Held
    }

    /// `to` asks for it; asked again, it goes on or answers the same.
    ///
    /// # Errors
    /// [`Refused`]: another machine has it, or is getting it.
    pub fn ask(&mut self, to: &str) -> Result<Asked, Refused> {
        match &self.part {
            Part::Held => {
                self.part = Part::Saving { to: to.to_owned() };
                Ok(Asked::Save)
            }
            Part::Saving { to: other } if other == to => Ok(Asked::Save),
            Part::Saving { to: other } => Err(Refused::Promised { to: other.clone() }),
            Part::Handed { to: other } if other == to => Ok(Asked::Answer { epoch: self.epoch }),
            Part::Handed { to: other } => Err(Refused::Elsewhere { to: other.clone(), epoch: self.epoch }),
        }
    }

    /// The snapshot is whole and can be fetched: it is handed on. Answers whether that is news.
    pub fn saved(&mut self) -> bool {
        let Part::Saving { to } = &self.part else { return false };
        *self = Tenure { epoch: self.epoch + 1, part: Part::Handed { to: to.clone() } };
        true
    }

    /// Nobody is to get it after all: what is being saved may run here again. Once handed on, it may not.
    pub fn keep(&mut self) -> bool {
        if matches!(self.part, Part::Saving { .. }) {
            self.part = Part::Held;
        }
        self.may_run()
    }

    /// A holder's answer was heard on a machine whose own part, if it had one, is `known`.
    ///
    /// # Errors
    /// [`Refused`]: it has been here before, or is here.
    pub fn take(known: Option<&Tenure>, epoch: u64) -> Result<Tenure, Refused> {
        match known {
            Some(Tenure { epoch: held, part: Part::Held | Part::Saving { .. } }) => Err(Refused::Held { epoch: *held }),
            Some(Tenure { epoch: old, .. }) if epoch <= *old => Err(Refused::Older { offered: epoch, epoch: *old }),
            _ => Ok(Tenure { epoch, part: Part::Held }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MACHINES: usize = 4;

    #[derive(Debug, Clone)]
    enum Happens {
        /// A machine asks another one.
        Ask { taker: usize, holder: usize },
        /// A machine has saved what it is to hand on.
        Saved(usize),
        /// An operator changes their mind.
        Keep(usize),
        /// An answer arrives: the `n`th ever sent, whenever, and as often as this happens.
        Answer(prop::sample::Index),
    }

    fn happens() -> impl Strategy<Value = Happens> {
        let machine = 0..MACHINES;
        prop_oneof![
            3 => (machine.clone(), machine.clone()).prop_map(|(taker, holder)| Happens::Ask { taker, holder }),
            2 => machine.clone().prop_map(Happens::Saved),
            1 => machine.prop_map(Happens::Keep),
            4 => any::<prop::sample::Index>().prop_map(Happens::Answer),
        ]
    }

    proptest! {
        /// Whatever is lost (it does not happen), late, repeated or forgotten: a state is all that a machine has,
        /// so a crash is nothing.
        #[test]
        fn never_do_two_machines_run_it_and_no_epoch_runs_twice(story in proptest::collection::vec(happens(), 0..200)) {
            let mut machines: Vec<Option<Tenure>> = vec![None; MACHINES];
            machines[0] = Some(Tenure::first());
            let mut answers: Vec<(usize, u64)> = Vec::new();
            let mut begun = vec![0];
            for event in story {
                match event {
                    Happens::Ask { taker, holder } if taker != holder => {
                        if let Some(Ok(Asked::Answer { epoch })) = machines[holder].as_mut().map(|t| t.ask(&taker.to_string())) {
                            answers.push((taker, epoch));
                        }
                    }
                    Happens::Ask { .. } => {}
                    Happens::Saved(machine) => {
                        if let Some(tenure) = machines[machine].as_mut() {
                            tenure.saved();
                        }
                    }
                    Happens::Keep(machine) => {
                        if let Some(tenure) = machines[machine].as_mut() {
                            tenure.keep();
                        }
                    }
                    Happens::Answer(which) if !answers.is_empty() => {
                        let (taker, epoch) = *which.get(&answers);
                        if let Ok(tenure) = Tenure::take(machines[taker].as_ref(), epoch) {
                            prop_assert!(!begun.contains(&epoch), "epoch {} began twice", epoch);
                            begun.push(epoch);
                            machines[taker] = Some(tenure);
                        }
                    }
                    Happens::Answer(_) => {}
                }
                let having = machines.iter().flatten().filter(|t| !matches!(t.part, Part::Handed { .. })).count();
                prop_assert!(having <= 1, "{:?}", machines);
            }
        }
    }

    #[test]
    fn a_holder_asked_twice_answers_the_same_and_another_is_sent_on() {
        let mut tenure = Tenure::first();
        assert_eq!(tenure.ask("tokyo-m1"), Ok(Asked::Save));
        assert!(!tenure.may_run());
        assert_eq!(tenure.ask("dublin-m1"), Err(Refused::Promised { to: "tokyo-m1".into() }));
        assert!(tenure.saved() && !tenure.saved());
        assert_eq!(tenure.ask("tokyo-m1"), Ok(Asked::Answer { epoch: 1 }));
        assert_eq!(tenure.ask("tokyo-m1"), Ok(Asked::Answer { epoch: 1 }));
        assert_eq!(tenure.ask("dublin-m1"), Err(Refused::Elsewhere { to: "tokyo-m1".into(), epoch: 1 }));
        assert!(!tenure.keep(), "what was handed on runs again");
    }

    #[test]
    fn an_old_snapshot_is_not_taken() {
        let handed = Tenure { epoch: 5, part: Part::Handed { to: "tokyo-m1".into() } };
        assert_eq!(Tenure::take(Some(&handed), 5), Err(Refused::Older { offered: 5, epoch: 5 }));
        assert!(Tenure::take(Some(&handed), 6).is_ok_and(|t| t.may_run()));
        assert_eq!(Tenure::take(Some(&Tenure::first()), 7), Err(Refused::Held { epoch: 0 }));
    }
}
