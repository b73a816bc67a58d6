//! The one command `vmatrix`: every daemon and every verb is a subcommand.
//!
//! Data goes to stdout, talk to stderr. Exit codes: see [`exit`].

mod args;
mod commands;
mod exit;

use clap::Parser;
use std::io::IsTerminal;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args = args::Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("VMATRIX_LOG")
                .unwrap_or_else(|_| args.command.log_level().into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .init();
    match commands::run(args.command) {
        Ok(code) => code,
        Err(e) => {
            exit::say(&e);
            exit::code(&e)
        }
    }
}
