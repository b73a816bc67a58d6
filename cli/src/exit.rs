//! What an exit code means, and how an error is told.

use std::process::ExitCode;
use vmatrix_cpa_agent::client::ClientError;
use vmatrix_lab::{ChecksFailed, LeftBehind, NotInTime, needs};
use vmatrix_vma_image::Error as ImageError;

/// What each code means, as `vmatrix --help` shows it.
pub const TABLE: &str = "Exit codes:
  0  done
  1  error
  2  the command line was not understood
  3  the plan has changes, or a play broke a promise
  4  the plan is stale: plan again
  5  refused: by a check, a limit, or because this machine lacks something
  7  not done in time";

/// The plan holds moves (`vmatrix plan --exit-code`), or a play was not as its scenario expects.
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

/// The exit code an error deserves: of the outermost cause that has one.
pub fn code(e: &anyhow::Error) -> ExitCode {
    ExitCode::from(e.chain().find_map(of_cause).unwrap_or(1))
}

fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if cause.is::<ChecksFailed>() || cause.is::<LeftBehind>() {
        Some(CHANGES)
    } else if cause.is::<needs::Missing>() {
        Some(REFUSED)
    } else if cause.is::<NotInTime>() {
        Some(TIMEOUT)
    } else {
        cause.downcast_ref().and_then(of_client).or_else(|| cause.downcast_ref().and_then(of_image))
    }
}

fn of_client(e: &ClientError) -> Option<u8> {
    match e.status() {
        Some(409) => Some(STALE),
        Some(401 | 403 | 422) => Some(REFUSED),
        None if e.timed_out() => Some(TIMEOUT),
        _ => None,
    }
}

fn of_image(e: &ImageError) -> Option<u8> {
    match e {
        ImageError::BadChunk { .. }
        | ImageError::BadManifest { .. }
        | ImageError::BadSignature { .. }
        | ImageError::Untrusted { .. }
        | ImageError::Mismatch(_)
        | ImageError::Missing { .. } => Some(REFUSED),
        ImageError::Timeout { .. } => Some(TIMEOUT),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_typed_error_keeps_its_code_under_any_context() {
        let coded = |e: anyhow::Error| code(&e.context("the daemons' logs are kept").context("lab"));
        let late = NotInTime { what: "maps".into(), patience: std::time::Duration::from_secs(1) };
        assert_eq!(coded(late.into()), ExitCode::from(TIMEOUT));
        assert_eq!(coded(needs::Missing::Tun.into()), ExitCode::from(REFUSED));
        let broken = ChecksFailed { failures: vec!["one".into()], recording: Box::default() };
        assert_eq!(coded(broken.into()), ExitCode::from(CHANGES));
        let forged = ImageError::BadSignature { name: "maps".into() };
        assert_eq!(coded(forged.into()), ExitCode::from(REFUSED));
        assert_eq!(coded(anyhow::anyhow!("something else")), ExitCode::FAILURE);
        let plain: anyhow::Result<()> = Err(std::io::Error::other("disk")).context("cannot write");
        assert_eq!(code(&plain.unwrap_err()), ExitCode::FAILURE);
    }
}
