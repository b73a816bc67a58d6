//! People who watch: server-sent events, bounded in number and in how far behind one may fall.

use serde::Serialize;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast};

/// Most watchers at once: an operators' room, not the public.
pub(crate) const WATCHERS_MAX: usize = 64;
/// Of these, seats that only holders of the token may take: pages left open lock no operator out.
pub(crate) const RESERVED: usize = 16;
/// Events a watcher may be behind; one that is further behind misses some, and the next snapshot is whole again.
const BEHIND_MAX: usize = 32;

/// One event, in its JSON.
#[derive(Debug, Clone)]
pub(crate) struct News {
    pub name: &'static str,
    pub json: Arc<str>,
}

#[derive(Debug, Clone)]
pub(crate) struct Watchers {
    sender: broadcast::Sender<News>,
    /// For whoever asks.
    seats: Arc<Semaphore>,
    /// For holders of the token.
    reserved: Arc<Semaphore>,
}

impl Watchers {
    pub(crate) fn new() -> Watchers {
        Watchers {
            sender: broadcast::channel(BEHIND_MAX).0,
            seats: Arc::new(Semaphore::new(WATCHERS_MAX - RESERVED)),
            reserved: Arc::new(Semaphore::new(RESERVED)),
        }
    }

    pub(crate) fn any(&self) -> bool {
        self.sender.receiver_count() > 0
    }

    /// Tells everyone who watches.
    pub(crate) fn tell(&self, name: &'static str, what: &impl Serialize) {
        if self.any()
            && let Some(news) = news(name, what)
        {
            // Nobody may be left to hear it.
            let _ = self.sender.send(news);
        }
    }

    /// Takes a seat, if one is free; a holder of the token takes a reserved one first, and any other then.
    pub(crate) fn watch(&self, holder: bool) -> Option<(broadcast::Receiver<News>, OwnedSemaphorePermit)> {
        let reserved = holder.then(|| self.reserved.clone().try_acquire_owned().ok()).flatten();
        let seat = reserved.or_else(|| self.seats.clone().try_acquire_owned().ok())?;
        Some((self.sender.subscribe(), seat))
    }
}

pub(crate) fn news(name: &'static str, what: &impl Serialize) -> Option<News> {
    match serde_json::to_string(what) {
        Ok(json) => Some(News { name, json: json.into() }),
        Err(e) => {
            tracing::warn!("cannot put a {name} into JSON: {e}");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_left_open_lock_no_operator_out() {
        let watchers = Watchers::new();
        let pages: Vec<_> = std::iter::from_fn(|| watchers.watch(false)).take(WATCHERS_MAX + 1).collect();
        assert_eq!(pages.len(), WATCHERS_MAX - RESERVED);
        let operators: Vec<_> = std::iter::from_fn(|| watchers.watch(true)).take(WATCHERS_MAX + 1).collect();
        assert_eq!(operators.len(), RESERVED);
        drop(pages);
        assert!(watchers.watch(true).is_some(), "a holder may take any seat");
    }
}
