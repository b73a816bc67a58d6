//! Runs the system's own tools, with a bound on time.

use anyhow::{Context, bail};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// A filter transaction of 10,000 elements takes 0.25 s on a busy machine; this is forty times that.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs `program` with `input` on its standard input and returns its standard output.
///
/// # Errors
/// The program is missing, fails (with what it said) or takes longer than ten seconds.
pub async fn run(program: &str, args: &[&str], input: &str) -> anyhow::Result<String> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start `{program}`: install it"))?;
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A program that fails early closes its input; what it says then is the better error.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
    };
    let both = async { tokio::join!(feed, child.wait_with_output()).1 };
    let output = tokio::time::timeout(PATIENCE, both)
        .await
        .with_context(|| format!("`{program} {}` took longer than {} s", args.join(" "), PATIENCE.as_secs()))?
        .with_context(|| format!("cannot wait for `{program}`"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{program} {}` failed: {}", args.join(" "), said.trim().chars().take(500).collect::<String>());
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{program}` printed something that is not text"))
}
