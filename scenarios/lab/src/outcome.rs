//! How a play may end other than well: each an error of its own, so that a caller can tell them apart.

use std::time::Duration;
use vmatrix_replay::recording::Recording;

/// A play that went through and whose checks did not all hold.
#[derive(Debug, thiserror::Error)]
#[error("the play broke its promises:\n- {}", failures.join("\n- "))]
pub struct ChecksFailed {
    /// One sentence each.
    pub failures: Vec<String>,
    /// What was recorded nevertheless.
    pub recording: Box<Recording>,
}

/// Something was waited for in vain.
#[derive(Debug, thiserror::Error)]
#[error("not ready after {} s: {what}", patience.as_secs())]
pub struct NotInTime {
    /// What is not ready, and why as far as is known.
    pub what: String,
    /// How long it was waited for.
    pub patience: Duration,
}

/// A lab went down and not all of it is gone.
#[derive(Debug, thiserror::Error)]
#[error("lab {id} left behind: {}\n\nhint: vmatrix lab down {id}", left.join(", "))]
pub struct LeftBehind {
    /// The lab's id.
    pub id: String,
    /// `namespace vmx-a1b2-tokyo`, `process 4711 (qemu-system-x86_64)` and the like.
    pub left: Vec<String>,
}

/// What must hold however fast the machine is, and did not; one sentence each. Figures that depend on the
/// machine are for benches and tests.
pub fn shortfalls(r: &Recording) -> Vec<String> {
    let failed = r.requests.iter().filter(|q| q.failed.is_some()).count();
    let mut short = Vec::new();
    if failed > 0 {
        short.push(format!("{failed} of {} requests failed", r.requests.len()));
    }
    if !r.returned_to_dormant {
        short.push("instances did not all return to dormant".to_owned());
    }
    if r.lost_writes > 0 {
        short.push(format!("{} of {} acknowledged writes were lost", r.lost_writes, r.writes));
    }
    if r.plaintext_bytes_on_wan > 0 {
        short.push(format!("{} canary bytes crossed the WAN in plain text", r.plaintext_bytes_on_wan));
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_broken_promise_is_a_sentence() {
        let kept = Recording { returned_to_dormant: true, writes: 3, ..Recording::default() };
        assert_eq!(shortfalls(&kept), Vec::<String>::new());
        let broken = Recording { returned_to_dormant: false, lost_writes: 1, plaintext_bytes_on_wan: 24, ..kept };
        assert_eq!(
            shortfalls(&broken),
            [
                "instances did not all return to dormant",
                "1 of 3 acknowledged writes were lost",
                "24 canary bytes crossed the WAN in plain text"
            ]
        );
    }
}
