//! What a person sees while a build runs: a spinner on a terminal, plain lines elsewhere. All on stderr.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// The progress of one build.
#[derive(Debug)]
pub struct Progress {
    name: String,
    spinner: Option<ProgressBar>,
    began: Instant,
}

impl Progress {
    pub fn new(name: &str) -> Progress {
        let spinner = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix}: {msg} [{elapsed}]") {
                bar.set_style(style);
            }
            bar.set_prefix(name.to_owned());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Progress { name: name.to_owned(), spinner, began: Instant::now() }
    }

    /// Says what begins now.
    pub fn step(&self, what: &str) {
        match &self.spinner {
            Some(bar) => bar.set_message(what.to_owned()),
            None => eprintln!("{} [{:3.0} s] {what}", self.name, self.began.elapsed().as_secs_f64()),
        }
    }

    /// Says what came of it.
    pub fn done(&self, what: &str) {
        match &self.spinner {
            Some(bar) => bar.println(format!("{}: {what}", self.name)),
            None => eprintln!("{} [{:3.0} s] {what}", self.name, self.began.elapsed().as_secs_f64()),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.spinner {
            bar.finish_and_clear();
        }
    }
}
