//! How far a long piece of work is: a bar with bytes and time left on a terminal, a line now and then elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};

/// Off a terminal, a line each time this much is done.
const LINE_EVERY_PER_CENT: u64 = 10;

/// One bar on stderr, gone when it is dropped.
pub struct Bar {
    bar: Option<ProgressBar>,
    what: String,
    /// Per cent last told, where there is no bar.
    told: AtomicU64,
}

impl Bar {
    pub fn begin(what: &str) -> Bar {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            if let Ok(style) =
                ProgressStyle::with_template("{msg} [{bar:30}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left")
            {
                bar.set_style(style);
            }
            bar.set_message(what.to_owned());
            bar
        });
        Bar { bar, what: what.to_owned(), told: AtomicU64::new(0) }
    }

    /// So many bytes of so many; may be called from any thread.
    pub fn at(&self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done.min(total));
            return;
        }
        let per_cent = done.min(total) * 100 / total.max(1);
        if per_cent >= self.told.load(Ordering::Relaxed) + LINE_EVERY_PER_CENT {
            self.told.store(per_cent, Ordering::Relaxed);
            eprintln!("{}: {per_cent} %", self.what);
        }
    }

    /// Says something beside the bar.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
