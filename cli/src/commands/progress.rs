//! What a play tells people while they wait: a bar on a terminal, plain lines elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vmatrix_lab::Told;
use vmatrix_model::Bytes;

/// Off a terminal, a bar becomes a line each time this much of it is done.
const LINE_EVERY_PER_CENT: u64 = 10;

/// Shows a play's progress on stderr.
pub struct Progress {
    bar: Option<ProgressBar>,
    /// Per cent last told, where there is no bar.
    told: Arc<AtomicU64>,
}

impl Progress {
    pub fn begin() -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} [{bar:30}] {elapsed}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(std::time::Duration::from_millis(200));
            bar
        });
        Progress { bar, told: Arc::new(AtomicU64::new(0)) }
    }

    /// What the lab calls, from any thread.
    pub fn teller(&self) -> Arc<dyn Fn(Told) + Send + Sync> {
        let (bar, told) = (self.bar.clone(), self.told.clone());
        Arc::new(move |what| {
            let line = |text: &str| match &bar {
                Some(bar) if !bar.is_finished() => bar.println(text),
                _ => eprintln!("{text}"),
            };
            let part = |done: u64, of: u64, text: String| match &bar {
                Some(bar) => {
                    bar.set_length(of);
                    bar.set_position(done.min(of));
                    bar.set_message(text);
                }
                None => {
                    let per_cent = done.min(of) * 100 / of.max(1);
                    let last = told.load(Ordering::Relaxed);
                    // Less than last time is another bar.
                    if per_cent >= last + LINE_EVERY_PER_CENT || per_cent < last {
                        told.store(per_cent, Ordering::Relaxed);
                        eprintln!("{text}");
                    }
                }
            };
            match what {
                Told::Step(text) => line(&text),
                Told::Dashboard(address) => line(&format!("live page: {address}")),
                Told::Staging { present, total } => {
                    part(present, total, format!("staging images: {} of {}", Bytes(present), Bytes(total)))
                }
                Told::Playing { second, length_s } => {
                    part(second.into(), length_s.into(), format!("playing: {second} of {length_s} s"))
                }
            }
        })
    }

    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
