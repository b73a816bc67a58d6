//! Ctrl-C and SIGTERM as something to look at between steps and within every wait.

use anyhow::{Context, bail};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};

/// Whether the bench was asked to end. Cheap to clone and to look at.
#[derive(Debug, Clone)]
pub struct Stop(Vec<Arc<AtomicBool>>);

impl Default for Stop {
    fn default() -> Stop {
        Stop(vec![Arc::default()])
    }
}

impl Stop {
    /// Listens to SIGINT and SIGTERM on `runtime`.
    ///
    /// # Errors
    /// Signals cannot be listened to.
    pub fn listen(runtime: &tokio::runtime::Runtime) -> anyhow::Result<Stop> {
        let stop = Stop::default();
        let _inside = runtime.enter();
        let mut int = signal(SignalKind::interrupt()).context("cannot listen to SIGINT")?;
        let mut term = signal(SignalKind::terminate()).context("cannot listen to SIGTERM")?;
        let heard = stop.clone();
        runtime.spawn(async move {
            tokio::select! {
                _ = int.recv() => {}
                _ = term.recv() => {}
            }
            heard.ask();
        });
        Ok(stop)
    }

    /// Asks whoever looks at this to end.
    pub fn ask(&self) {
        for asked in &self.0 {
            asked.store(true, Ordering::Relaxed);
        }
    }

    /// Ends by either.
    pub fn or(&self, other: &Stop) -> Stop {
        Stop(self.0.iter().chain(&other.0).cloned().collect())
    }

    /// Goes on, or ends what is under way once it was asked to end.
    ///
    /// # Errors
    /// It was.
    pub fn check(&self) -> anyhow::Result<()> {
        if self.0.iter().any(|asked| asked.load(Ordering::Relaxed)) {
            bail!("interrupted; everything is taken down")
        } else {
            Ok(())
        }
    }

    /// Looks every `every` until `look` sees what it waits for; answers that.
    ///
    /// # Errors
    /// `look` fails, `limit` passes (then `what` is named), or the bench was asked to end.
    pub fn until<T>(
        &self,
        what: &str,
        limit: Duration,
        every: Duration,
        mut look: impl FnMut() -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        let began = Instant::now();
        loop {
            self.check()?;
            if let Some(seen) = look()? {
                return Ok(seen);
            }
            if began.elapsed() > limit {
                bail!("{what}: not within {:.1} s", limit.as_secs_f64());
            }
            std::thread::park_timeout(every);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(1);

    #[test]
    fn a_wait_ends_by_what_is_seen_by_its_limit_or_by_an_interruption() {
        let stop = Stop::default();
        let mut looks = 0;
        let seen = stop.until("three looks", Duration::from_secs(5), TICK, || {
            looks += 1;
            Ok((looks == 3).then_some(looks))
        });
        assert_eq!(seen.unwrap(), 3);
        let late = stop.until("a thing", Duration::from_millis(5), TICK, || Ok(None::<()>)).unwrap_err();
        assert!(late.to_string().contains("a thing"), "{late}");
        Stop::default().or(&stop).ask();
        let ended = stop.until("a thing", Duration::from_secs(5), TICK, || Ok(None::<()>)).unwrap_err();
        assert!(ended.to_string().contains("interrupted"), "{ended}");
    }
}
