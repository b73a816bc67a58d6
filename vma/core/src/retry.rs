//! Trying again, later and later: fault ─▶ not before when, and what to tell people meanwhile.

use crate::steps::{Fault, Step};
use vmatrix_model::{Span, Time};

/// First pause after a failed step.
const PAUSE_FIRST: Span = Span::ms(500);
/// Longest pause: what an operator has mended is found within half a minute.
const PAUSE_MAX: Span = Span::secs(30);
/// Doublings from the first pause to beyond the longest.
const DOUBLINGS_MAX: u32 = 6;
/// A step not answered within so long was lost with whoever carried it; the slowest one (a resume
/// on a busy machine without KVM) is given up by its machine before that.
const ANSWER_MAX: Span = Span::secs(90);

/// The steps towards one thing (an instance, or an image on a machine): one at a time.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Effort {
    /// The outstanding step and when it was sent.
    outstanding: Option<(Time, Step)>,
    /// Whether a step was sent since the last failure.
    armed: bool,
    leaving: bool,
    failures: u32,
    not_before: Time,
    /// What went wrong last.
    pub trouble: Option<Fault>,
}

impl Effort {
    /// Whether a step may be sent now.
    pub fn may_act(&self, now: Time) -> bool {
        let idle = self.outstanding.as_ref().is_none_or(|(sent, _)| now.since(*sent) >= ANSWER_MAX);
        idle && now >= self.not_before
    }

    /// The step that was sent and not answered.
    pub fn outstanding(&self) -> Option<&Step> {
        self.outstanding.as_ref().map(|(_, step)| step)
    }

    /// Whether a step that takes the instance out of service is on its way, or failed, perhaps halfway, and
    /// nobody has looked since.
    pub fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// Notes that the machine was looked at.
    pub fn looked(&mut self) {
        self.leaving &= self.outstanding.is_some();
    }

    /// Whether a failure seen now is of a step sent since the last one.
    pub fn is_armed(&self) -> bool {
        self.armed && self.outstanding.is_none()
    }

    /// Notes that a step was sent.
    pub fn sent(&mut self, now: Time, step: Step) {
        self.leaving = matches!(step, Step::Suspend { .. } | Step::Release { .. });
        self.outstanding = Some((now, step));
        self.armed = true;
    }

    /// Notes a step's answer.
    pub fn answered(&mut self, now: Time, result: Result<(), Fault>) {
        self.outstanding = None;
        match result {
            Ok(()) => {
                self.not_before = now;
                self.leaving = false;
            }
            Err(fault) => self.failed(now, fault),
        }
    }

    /// Notes a failure: the pause doubles with each.
    pub fn failed(&mut self, now: Time, fault: Fault) {
        let pause = PAUSE_FIRST.times(1 << self.failures.min(DOUBLINGS_MAX)).min(PAUSE_MAX);
        self.not_before = now + if fault.lasting { PAUSE_MAX } else { pause };
        self.failures = self.failures.saturating_add(1);
        self.trouble = Some(fault);
        self.armed = false;
    }

    /// Notes that what was wanted is there.
    pub fn reached(&mut self) {
        self.armed = false;
        self.failures = 0;
        self.trouble = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(lasting: bool) -> Fault {
        Fault { problem: "no".into(), hint: String::new(), lasting }
    }

    fn drop() -> Step {
        Step::DropImage { image: "maps".into() }
    }

    #[test]
    fn pauses_double_up_to_half_a_minute() {
        let mut e = Effort::default();
        let mut now = Time(0);
        let mut pauses = Vec::new();
        for _ in 0..9 {
            e.sent(now, drop());
            e.answered(now, Err(fault(false)));
            pauses.push(e.not_before.since(now).as_ms());
            now = e.not_before;
        }
        assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000]);
    }

    #[test]
    fn an_answer_that_never_comes_is_not_waited_for_for_ever() {
        let mut e = Effort::default();
        e.sent(Time(0), drop());
        assert!(!e.may_act(Time(0) + Span::secs(89)));
        assert!(e.may_act(Time(0) + Span::secs(90)));
    }

    #[test]
    fn a_lasting_fault_is_not_hammered() {
        let mut e = Effort::default();
        e.answered(Time(0), Err(fault(true)));
        assert!(!e.may_act(Time(0) + Span::secs(29)));
    }
}
