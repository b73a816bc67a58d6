//! Does what the plan asks, and tells it what happened.
//!
//! ```text
//! get ─Message─▶ ┌────────┐ ─Event─▶ ┌──────┐
//! link ─Report─▶ │ Driver │          │ Plan │
//! verified ────▶ └────────┘ ◀Command─└──────┘
//!                    └─ Ask ─▶ link   └─ Stored ─▶ blocking: open, hand on, keep
//! ```

use crate::error::{Error, Fault};
use crate::link::{self, Counters, Dialer, Link, Report, Reports};
use crate::plan::{Command, Event, Plan, Slot};
use crate::{Class, Result, SourceStatus};
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use vmatrix_model::Digest;
use vmatrix_vma_image::Store;
use vmatrix_vma_image::chunks::{Need, open};
use vmatrix_vma_image::seal::OwnerKey;

/// Reports that wait for the driver; a link waits when there are more.
pub const REPORTS_MAX: usize = 1024;
/// Chunks verified and kept at once, urgent ones and others: neither waits for the other.
const URGENT_AT_ONCE: usize = 4;
const BACKGROUND_AT_ONCE: usize = 4;

/// What others ask of the driver.
pub enum Message {
    Get {
        need: Need,
        class: Class,
        key: Option<OwnerKey>,
        /// The local store has bytes of that name which are wrong.
        replace: bool,
        ticket: u64,
        reply: oneshot::Sender<Result<Vec<u8>>>,
    },
    /// Nobody waits for this get any more.
    Leave {
        digest: Digest,
        ticket: u64,
    },
    Pause {
        paused: bool,
    },
    /// The links that are up: as soon as there is one, or when each source of the list is up or has failed.
    Links {
        all: bool,
        reply: oneshot::Sender<Vec<Link>>,
    },
    /// Connections to listed sources are to be made again when they end, and warmed.
    KeepUp,
    /// What came over this link was wrong.
    Blame {
        link: Link,
        fault: Fault,
    },
    Status {
        reply: oneshot::Sender<Vec<SourceStatus>>,
    },
    /// Which of these somebody waits for.
    Wanted {
        of: Vec<Digest>,
        reply: oneshot::Sender<Vec<Digest>>,
    },
}

/// A chunk that somebody waits for.
struct Wanted {
    need: Need,
    key: Option<OwnerKey>,
    replace: bool,
    waits: Vec<(u64, oneshot::Sender<Result<Vec<u8>>>)>,
}

/// A chunk that was verified.
struct Opened {
    slot: Slot,
    connection: u64,
    digest: Digest,
    plain: std::result::Result<Vec<u8>, String>,
}

struct Connection {
    number: u64,
    task: AbortHandle,
    link: Option<Link>,
}

/// See the module.
pub struct Driver {
    began: Instant,
    plan: Plan,
    dialer: Dialer,
    local: Local,
    wanted: HashMap<Digest, Wanted>,
    connections: HashMap<Slot, Connection>,
    counters: HashMap<Slot, Arc<Counters>>,
    last: u64,
    keeps_up: bool,
    tasks: JoinSet<()>,
    asking: Vec<(bool, oneshot::Sender<Vec<Link>>)>,
    reports: mpsc::Sender<(Slot, u64, Report)>,
    opened: mpsc::UnboundedSender<Opened>,
    urgent: Arc<Semaphore>,
    background: Arc<Semaphore>,
}

/// Runs until the last sender of messages is dropped.
pub async fn run(
    addresses: Vec<SocketAddr>,
    background_mbit: Option<u64>,
    dialer: Dialer,
    local: Local,
    mut messages: mpsc::UnboundedReceiver<Message>,
) {
    let (reports, mut reported) = mpsc::channel(REPORTS_MAX);
    // No more than are verified at once are sent; the others wait for their turn.
    let (opened, mut verified) = mpsc::unbounded_channel();
    let mut driver = Driver {
        began: Instant::now(),
        plan: Plan::new(&addresses, background_mbit),
        dialer,
        local,
        wanted: HashMap::new(),
        connections: HashMap::new(),
        counters: HashMap::new(),
        last: 0,
        keeps_up: false,
        tasks: JoinSet::new(),
        asking: Vec::new(),
        reports,
        opened,
        urgent: Arc::new(Semaphore::new(URGENT_AT_ONCE)),
        background: Arc::new(Semaphore::new(BACKGROUND_AT_ONCE)),
    };
    loop {
        let next = driver.plan.next_tick(driver.now());
        let tick = async {
            match next {
                Some(at) => tokio::time::sleep_until(driver.began + at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            message = messages.recv() => match message {
                Some(message) => driver.message(message),
                None => break,
            },
            Some((slot, connection, report)) = reported.recv() => driver.report(slot, connection, report),
            Some(opened) = verified.recv() => driver.opened(opened),
            () = tick => driver.plan(Event::Tick),
        }
        while driver.tasks.try_join_next().is_some() {}
        driver.answer_asking();
    }
}

impl Driver {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Tells the plan, and does what it asks, until it asks no more.
    fn plan(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let now = self.now();
            for command in self.plan.handle(now, event) {
                events.extend(self.act(command));
            }
        }
    }

    fn act(&mut self, command: Command) -> Option<Event> {
        match command {
            Command::Connect { slot, address } => self.connect(slot, address),
            Command::Close { slot } => self.close(slot),
            Command::Ask { slot, digest, stored, class, how } => {
                let link = self.connections.get(&slot).and_then(|c| c.link.as_ref());
                if !link.is_some_and(|link| link.ask(digest, stored, class, how)) {
                    self.close(slot);
                    return Some(Event::Down { slot, fault: Fault::Lost("it takes no requests".to_owned()) });
                }
            }
            Command::Cancel { slot, digest } => {
                if let Some(link) = self.connections.get(&slot).and_then(|c| c.link.as_ref()) {
                    link.cancel(digest);
                }
            }
            Command::Fail { digest, tried } => {
                if let Some(wanted) = self.wanted.remove(&digest) {
                    for (_, reply) in wanted.waits {
                        let what = format!("chunk {}", digest.short());
                        let _ = reply.send(Err(Error::Nowhere { what, tried: tried.clone() }));
                    }
                }
            }
        }
        None
    }

    fn connect(&mut self, slot: Slot, address: SocketAddr) {
        self.last += 1;
        let reports = Reports { slot, connection: self.last, to: self.reports.clone() };
        let counters = Arc::clone(self.counters.entry(slot).or_default());
        let task = self.tasks.spawn(link::run(slot, address, self.dialer.clone(), counters, reports));
        self.connections.insert(slot, Connection { number: self.last, task, link: None });
    }

    fn close(&mut self, slot: Slot) {
        if let Some(connection) = self.connections.remove(&slot) {
            connection.task.abort();
        }
    }

    fn message(&mut self, message: Message) {
        match message {
            Message::Get { need, class, key, replace, ticket, reply } => {
                let wanted = self.wanted.entry(need.digest).or_insert_with(|| Wanted {
                    need,
                    key,
                    replace,
                    waits: Vec::with_capacity(1),
                });
                if wanted.need != need {
                    let problem = format!("two manifests disagree about chunk {}", need.digest.short());
                    let _ = reply.send(Err(Error::WrongImage { image: "?".to_owned(), problem }));
                    return;
                }
                wanted.waits.push((ticket, reply));
                self.plan(Event::Want { digest: need.digest, stored: need.stored, class });
            }
            Message::Leave { digest, ticket } => {
                let Some(wanted) = self.wanted.get_mut(&digest) else { return };
                wanted.waits.retain(|(t, _)| *t != ticket);
                if wanted.waits.is_empty() {
                    self.wanted.remove(&digest);
                    self.plan(Event::Unwant { digest });
                }
            }
            Message::Pause { paused } => self.plan(Event::Pause { paused }),
            Message::Links { all, reply } => {
                self.asking.push((all, reply));
                self.plan(Event::Connect);
            }
            Message::KeepUp => {
                self.keeps_up = true;
                self.plan(Event::KeepUp);
            }
            Message::Blame { link, fault } => {
                let current = self.connections.get(&link.slot).and_then(|c| c.link.as_ref());
                if current.is_some_and(|current| current.is(&link)) {
                    self.blame(link.slot, fault);
                }
            }
            Message::Status { reply } => drop(reply.send(self.status())),
            Message::Wanted { mut of, reply } => {
                of.retain(|digest| self.wanted.contains_key(digest));
                // Nobody listens any more: nothing is lost.
                drop(reply.send(of));
            }
        }
    }

    fn report(&mut self, slot: Slot, connection: u64, report: Report) {
        // Of a connection that was closed meanwhile.
        if self.connections.get(&slot).is_none_or(|c| c.number != connection) {
            return;
        }
        match report {
            Report::Up(link) => {
                tracing::debug!(source = %link.address, "a source is connected");
                if self.keeps_up && self.plan.is_listed(slot) {
                    link.begin_to_warm();
                }
                if let Some(connection) = self.connections.get_mut(&slot) {
                    connection.link = Some(link);
                }
                self.plan(Event::Up { slot });
            }
            Report::Down(fault) => self.blame(slot, fault),
            Report::Heard => self.plan(Event::Heard { slot }),
            Report::Missing { digest } => self.plan(Event::Missing { slot, digest }),
            Report::Elsewhere { digest, addresses } => {
                // Nobody is sent to himself.
                let addresses = addresses.into_iter().filter(|at| Some(*at) != self.dialer.serving).collect();
                self.plan(Event::Elsewhere { slot, digest, addresses });
            }
            Report::Stored { digest, bytes } => {
                self.plan(Event::Came { slot, digest });
                self.verify(slot, connection, digest, bytes);
            }
        }
    }

    fn blame(&mut self, slot: Slot, fault: Fault) {
        let address = self.plan.address(slot);
        if fault.is_foul() {
            self.counters.entry(slot).or_default().foul.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(source = ?address, %fault, "a source is left alone for a while");
        } else {
            tracing::debug!(source = ?address, %fault, "a source is gone");
        }
        self.close(slot);
        self.plan(Event::Down { slot, fault });
    }

    /// Verifies where blocking is allowed; whoever waits gets the bytes before they are kept.
    fn verify(&mut self, slot: Slot, connection: u64, digest: Digest, bytes: Bytes) {
        let Some(wanted) = self.wanted.get(&digest) else { return };
        let (need, key, replace) = (wanted.need, wanted.key.clone(), wanted.replace);
        let urgent = self.plan.class(&digest).is_some_and(|class| class != Class::Background);
        let turns = Arc::clone(if urgent { &self.urgent } else { &self.background });
        let (opened, local) = (self.opened.clone(), self.local.clone());
        self.tasks.spawn(async move {
            let Ok(_turn) = turns.acquire().await else { return };
            let work = tokio::task::spawn_blocking(move || {
                let plain = open(&bytes, &need, key.as_ref()).map_err(|e| e.to_string());
                let good = plain.is_ok();
                // Without a driver nobody waits, but the chunk is good all the same.
                let _ = opened.send(Opened { slot, connection, digest, plain });
                if good {
                    local.keep(&digest, &bytes, replace);
                }
            });
            let _ = work.await;
        });
    }

    fn opened(&mut self, opened: Opened) {
        let Opened { slot, connection, digest, plain } = opened;
        match plain {
            Ok(plain) => {
                if let Some(mut wanted) = self.wanted.remove(&digest) {
                    let last = wanted.waits.pop();
                    for (_, reply) in wanted.waits {
                        let _ = reply.send(Ok(plain.clone()));
                    }
                    if let Some((_, reply)) = last {
                        let _ = reply.send(Ok(plain));
                    }
                }
                self.plan(Event::Arrived { slot, digest });
            }
            Err(problem) if self.connections.get(&slot).is_some_and(|c| c.number == connection) => {
                self.blame(slot, Fault::WrongBytes(problem));
            }
            // Its connection is closed already, and what was asked over it is asked elsewhere.
            Err(_) => {}
        }
    }

    fn answer_asking(&mut self) {
        if self.asking.is_empty() {
            return;
        }
        let mut links: Vec<Link> = self.connections.values().filter_map(|c| c.link.clone()).collect();
        links.sort_by_key(|link| link.slot);
        let settled = self.plan.settled();
        let ready = |all: bool| settled || (!all && !links.is_empty());
        for (all, reply) in std::mem::take(&mut self.asking) {
            if ready(all) {
                let _ = reply.send(links.clone());
            } else {
                self.asking.push((all, reply));
            }
        }
    }

    fn status(&self) -> Vec<SourceStatus> {
        let read = |slot: Slot, of: fn(&Counters) -> u64| self.counters.get(&slot).map_or(0, |c| of(c));
        self.plan
            .health()
            .map(|(slot, address, up, fault)| SourceStatus {
                address,
                up,
                received_bytes: read(slot, |c| c.received.load(Ordering::Relaxed)),
                chunks: read(slot, |c| c.chunks.load(Ordering::Relaxed)),
                foul: read(slot, |c| c.foul.load(Ordering::Relaxed)),
                fault: fault.map(ToString::to_string),
            })
            .collect()
    }
}

/// Where what was fetched is kept.
#[derive(Debug, Clone)]
pub struct Local {
    pub store: Store,
    /// What was put into it.
    pub kept: broadcast::Sender<Digest>,
}

impl Local {
    /// Puts a verified chunk into the store. If there is no room the fetch has not failed: it is fetched again
    /// when it is needed again.
    pub fn keep(&self, digest: &Digest, bytes: &[u8], replace: bool) {
        let put = if replace { self.store.replace_chunk(digest, bytes) } else { self.store.put_chunk(digest, bytes) };
        match put {
            // Often nobody listens.
            Ok(()) => drop(self.kept.send(*digest)),
            Err(error) => {
                tracing::warn!(chunk = %digest.short(), %error, "a fetched chunk is not kept in the local store");
            }
        }
    }
}
