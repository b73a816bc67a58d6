//! Each verb as a function: what was typed in, an exit code out.

mod bar;
mod bench;
mod daemon;
mod doctor;
mod identity;
mod image;
mod operate;
mod play;
mod progress;
mod trace;

use crate::args::Command;
use anyhow::Result;
use std::process::ExitCode;

/// Does what was asked.
pub fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Demo(demo) => play::demo(&demo),
        Command::Replay(replay) => play::replay(&replay),
        Command::Lab(lab) => play::lab(&lab),
        Command::Image(image) => image::run(&image),
        Command::Place(order) => operate::place(&order),
        Command::Plan(order) => operate::plan(&order),
        Command::Apply(apply) => operate::apply(&apply),
        Command::Explain(explain) => operate::explain(&explain),
        Command::Watch(cpa) => operate::watch(&cpa),
        Command::Doctor => doctor::run(),
        Command::Identity(identity) => identity::run(&identity),
        Command::Bench(bench) => bench::run(&bench),
        Command::Trace(trace) => trace::run(&trace),
        Command::Cpa(_)
        | Command::Vma(_)
        | Command::Machine(_)
        | Command::Edge(_)
        | Command::Origin(_)
        | Command::Store(_)
        | Command::Pager(_)
        | Command::Relay(_)
        | Command::Tunnel(_)
        | Command::Wan(_) => daemon::run(command),
    }
}

/// Runs a future to its end on a runtime of its own.
fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(future)
}
