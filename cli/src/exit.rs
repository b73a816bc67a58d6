//! What an exit code means, and how an error is told.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | error |
//! | 2 | the command line was not understood |
//! | 3 | the plan has changes, or an expectation of a scenario failed |
//! | 4 | the plan is stale |
//! | 5 | refused: by a check, a limit or a missing permission |
//! | 7 | not done in time |

use std::process::ExitCode;

/// The story did not end as it should: figures are on stdout, this says which are wrong.
#[derive(Debug, thiserror::Error)]
#[error("the play fell short: {0}")]
pub struct FellShort(pub String);

/// The plan holds moves (`vmatrix plan --exit-code`).
pub const CHANGES: u8 = 3;
const STALE: u8 = 4;
const REFUSED: u8 = 5;
const TIMEOUT: u8 = 7;

/// Prints an error with its causes, once, and its hint last.
pub fn say(e: &anyhow::Error) {
    let mut lines = Vec::new();
    for cause in e.chain() {
        let text = cause.to_string();
        // A library error may already hold its source in its text.
        if !lines.iter().any(|l: &String| l.contains(&text)) {
            lines.push(text);
        }
    }
    let all = lines.join(": ");
    // Hints stand at the end of whichever cause knew them.
    let (said, hints): (Vec<&str>, Vec<&str>) = all.split("\n\n").partition(|p| !p.starts_with("hint:"));
    eprintln!("vmatrix: {}", said.join("\n"));
    for hint in hints {
        eprintln!("\n{hint}");
    }
}

/// The exit code an error deserves.
pub fn code(e: &anyhow::Error) -> ExitCode {
    use vmatrix_cpa_agent::client::ClientError;
    for cause in e.chain() {
        if cause.is::<FellShort>() {
            return ExitCode::from(CHANGES);
        }
        if let Some(c) = cause.downcast_ref::<ClientError>() {
            return ExitCode::from(match c.status() {
                Some(409) => STALE,
                Some(401 | 403 | 422) => REFUSED,
                None if c.timed_out() => TIMEOUT,
                _ => 1,
            });
        }
    }
    ExitCode::FAILURE
}
