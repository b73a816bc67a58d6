//! Parts of a trace, and the same trace in other steps.

use super::{STEPS_MAX, Trace, TraceError, bad_step, civil, shown};
use vmatrix_model::Span;

impl Trace {
    /// The steps that lie between two times (Unix seconds), the second one excluded.
    ///
    /// # Errors
    /// If no whole step lies between them.
    pub fn slice(&self, from: i64, to: i64) -> Result<Trace, TraceError> {
        let range = self.between(from, to);
        let Some(counts) = self.counts.get(range.clone()).filter(|c| !c.is_empty()) else {
            let (own, end) = (civil::written(self.begins), civil::written(self.ends()));
            return Err(self.refused(format!(
                "no step lies between {} and {}; it goes from {own} to {end}",
                civil::written(from),
                civil::written(to)
            )));
        };
        Ok(Trace { begins: self.at(range.start), counts: counts.to_vec(), ..self.clone_empty() })
    }

    /// The steps that lie wholly between two times, perhaps none.
    pub(super) fn between(&self, from: i64, to: i64) -> std::ops::Range<usize> {
        let since = |time: i64| u128::from(time.saturating_sub(self.begins).max(0).unsigned_abs()) * 1_000_000;
        let step = u128::from(self.step.0.max(1));
        let steps = self.counts.len() as u128;
        let start = since(from).div_ceil(step).min(steps);
        let end = (since(to) / step).min(steps);
        start as usize..end.max(start) as usize
    }

    /// The same requests in other steps. The requests of a step are taken to be spread evenly over it, in whole
    /// numbers, and none is lost or made; the last step may reach beyond the trace's end.
    ///
    /// # Errors
    /// If no trace can have such steps, or so many.
    pub fn resample(&self, step: Span) -> Result<Trace, TraceError> {
        if let Some(problem) = bad_step(step) {
            return Err(self.refused(problem));
        }
        let old = u128::from(self.step.0.max(1));
        let steps = (old * self.counts.len() as u128).div_ceil(u128::from(step.0));
        if steps > STEPS_MAX as u128 {
            return Err(self.refused(format!("steps of {step} would make {steps}, at most {STEPS_MAX} are taken")));
        }
        let mut counts = Vec::with_capacity(steps as usize);
        // Requests before the old step that is looked at, and before the new one.
        let (mut at, mut before, mut told) = (0_usize, 0_u128, 0_u128);
        for new in 1..=steps {
            let end = new * u128::from(step.0);
            while (at as u128 + 1) * old <= end && at < self.counts.len() {
                before += u128::from(self.counts[at]);
                at += 1;
            }
            let into = end - (at as u128 * old).min(end);
            let part = self.counts.get(at).map_or(0, |c| u128::from(*c) * into / old);
            counts.push(u64::try_from(before + part - told).unwrap_or(u64::MAX));
            told = before + part;
        }
        let resampled = Trace { step, counts, ..self.clone_empty() };
        resampled.check()?;
        Ok(resampled)
    }

    fn refused(&self, problem: String) -> TraceError {
        TraceError::Whole { file: format!("trace {}", shown(&self.name)), problem }
    }

    fn clone_empty(&self) -> Trace {
        Trace { name: self.name.clone(), begins: self.begins, step: self.step, counts: vec![] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn minutes(counts: &[u64]) -> Trace {
        Trace { name: "some".into(), begins: 600, step: Span::secs(60), counts: counts.to_vec() }
    }

    #[test]
    fn a_slice_has_whole_steps_only() {
        let trace = minutes(&[1, 2, 3, 4]);
        assert_eq!(trace.slice(0, 9999).unwrap(), trace);
        let middle = trace.slice(601, 839).unwrap();
        assert_eq!((middle.begins, &middle.counts[..]), (660, &[2, 3][..]));
        for (from, to) in [(600, 659), (840, 9999), (700, 650), (i64::MIN, 0), (i64::MAX, i64::MAX)] {
            assert!(trace.slice(from, to).unwrap_err().to_string().contains("no step lies between"));
        }
    }

    #[test]
    fn steps_are_joined_and_parted() {
        let trace = minutes(&[1, 2, 3, 4, 5]);
        assert_eq!(trace.resample(Span::secs(120)).unwrap().counts, [3, 7, 5]);
        assert_eq!(trace.resample(Span::secs(90)).unwrap().counts, [2, 4, 6, 3]);
        assert_eq!(minutes(&[7, 1]).resample(Span::secs(20)).unwrap().counts, [2, 2, 3, 0, 0, 1]);
        assert_eq!(minutes(&[7]).resample(Span::ms(500)).unwrap().counts.len(), 120);
        for bad in [Span::ZERO, Span::ms(700), Span::secs(86_401)] {
            assert!(trace.resample(bad).is_err());
        }
        assert!(minutes(&[1; 1000]).resample(Span(1)).unwrap_err().to_string().contains("at most 10000000"));
    }

    proptest! {
        #[test]
        fn no_request_is_lost_or_made(counts in proptest::collection::vec(0u64..1_000_000_000, 1..200), to in 1u64..4000) {
            let trace = minutes(&counts);
            let other = trace.resample(Span::secs(to)).unwrap();
            prop_assert_eq!(other.total(), trace.total());
            prop_assert!(other.length() >= trace.length());
            prop_assert!(other.length().0 - trace.length().0 < other.step.0);
        }
    }
}
