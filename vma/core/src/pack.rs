//! Which machine an instance goes to: machines, their free memory, who holds the image ─▶ one machine, or why none.

use vmatrix_model::MachineId;

/// A machine as a candidate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub machine: MachineId,
    /// Memory that no cell has.
    pub free_mib: u64,
    /// How much of the image is on it.
    pub held: Held,
    /// Whether it said for good that it will not take the image.
    pub refuses: bool,
    /// Whether the image does not come there now.
    pub barren: bool,
}

/// How much of an image a machine has; the most first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Held {
    Whole,
    /// What is needed before the guest runs.
    Critical,
    Part,
    Nothing,
}

/// Picks the machine for an instance of `memory_mib`: of those that hold most of the image, the one
/// that has least memory left afterwards (best fit keeps room for large instances); ties go to the
/// lower name. A machine to which the image does not come, or that refused it, comes last: it is asked
/// again, for what was wrong there may have been mended.
///
/// # Errors
/// Why no machine takes it, for the operator.
pub fn pick(candidates: &[Candidate], memory_mib: u64) -> Result<&Candidate, String> {
    if candidates.is_empty() {
        return Err("no machine is subscribed; start `vmatrix machine` on one".into());
    }
    let fits = candidates.iter().filter(|c| c.free_mib >= memory_mib);
    fits.min_by_key(|c| (c.refuses, c.barren, c.held, c.free_mib, &c.machine)).ok_or_else(|| {
        let most = candidates.iter().map(|c| c.free_mib).max().unwrap_or(0);
        format!("an instance needs {memory_mib} MiB and no machine has more than {most} MiB free; add a machine or want fewer instances")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(name: &str, free_mib: u64, holds: bool) -> Candidate {
        let held = if holds { Held::Whole } else { Held::Nothing };
        Candidate { machine: name.parse().unwrap(), free_mib, held, refuses: false, barren: false }
    }

    #[test]
    fn the_fullest_machine_that_still_fits_is_picked() {
        let all = [machine("m1", 4096, true), machine("m2", 600, true), machine("m3", 500, true)];
        assert_eq!(pick(&all, 512).unwrap().machine.as_str(), "m2");
    }

    #[test]
    fn a_machine_with_the_image_is_preferred_to_a_better_fit() {
        let all = [machine("m1", 4096, true), machine("m2", 512, false)];
        assert_eq!(pick(&all, 512).unwrap().machine.as_str(), "m1");
    }

    #[test]
    fn ties_go_to_the_lower_name() {
        let all = [machine("m2", 512, true), machine("m1", 512, true)];
        assert_eq!(pick(&all, 512).unwrap().machine.as_str(), "m1");
    }

    #[test]
    fn a_refusal_says_what_is_missing() {
        assert!(pick(&[], 1).unwrap_err().contains("no machine is subscribed"));
        assert!(pick(&[machine("m1", 100, true)], 512).unwrap_err().contains("needs 512 MiB"));
    }

    #[test]
    fn a_machine_that_refused_the_image_comes_last() {
        let odd = Candidate { refuses: true, ..machine("m1", 600, true) };
        assert_eq!(pick(&[odd.clone(), machine("m2", 4096, false)], 512).unwrap().machine.as_str(), "m2");
        assert_eq!(pick(&[odd], 512).unwrap().machine.as_str(), "m1");
    }
}
