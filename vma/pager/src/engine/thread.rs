//! The loop: orders, fetches, faults, and again.

use super::{Options, Order, Shared, Source, Status};
use crate::adopt::Adopted;
use crate::error::{Error, Result};
use crate::state::{Ask, Class, State, Verdict, Who};
use crate::window::Window;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::collections::{BTreeMap, VecDeque};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use vmatrix_vma_image::memory::Map;
use vmatrix_vma_uffd::{Fault, PAGE};

/// Epoll's word for the bell; other words are a guest's number, doubled, plus one for its end.
const BELL: u64 = u64::MAX;
/// Events taken at once.
const EVENTS: usize = 64;
/// Packs that were missed and are kept unpacked, so that a touch of their other pages is seen and waits for nobody: as
/// many as 4 MiB hold. Of one that gave way the local store has the bytes.
const APART_MAX: usize = 64;
/// How often to look again where only time lets something be asked for.
const HELD_BACK: Duration = Duration::from_millis(10);
/// How often to look again where nothing is to be done: what has been waited for too long is to be said.
const IDLE: Duration = Duration::from_millis(500);

pub(super) struct Thread {
    window: Window,
    state: State,
    options: Options,
    source: Source,
    shared: Arc<Shared>,
    /// For fetches, which answer like orders.
    orders: mpsc::Sender<Order>,
    received: mpsc::Receiver<Order>,
    epoll: Epoll,
    /// Packs with pages that are not put in yet, the newest last, by number.
    apart: VecDeque<(u32, Arc<Vec<u8>>)>,
    guests: BTreeMap<Who, Arc<Adopted>>,
    next_guest: Who,
    began: Instant,
    misses: u64,
    zeros: u64,
    fetched: u64,
    /// Why the last fetch or write failed.
    problem: Option<String>,
    /// All is here, and guests have been let go.
    released: bool,
}

impl Thread {
    pub fn new(
        window: Window,
        map: Map,
        options: Options,
        source: Source,
        shared: Arc<Shared>,
        orders: mpsc::Sender<Order>,
        received: mpsc::Receiver<Order>,
    ) -> Result<Thread> {
        let kernel = |source| Error::Kernel { what: "make an epoll", source };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(kernel)?;
        epoll.add(&shared.bell, EpollEvent::new(EpollFlags::EPOLLIN, BELL)).map_err(kernel)?;
        let state = State::new(map, options.hydrate.clone(), window.present()?);
        let mut thread = Thread {
            window,
            state,
            options,
            source,
            shared,
            orders,
            received,
            epoll,
            apart: VecDeque::new(),
            guests: BTreeMap::new(),
            next_guest: 0,
            began: Instant::now(),
            misses: 0,
            zeros: 0,
            fetched: 0,
            problem: None,
            released: false,
        };
        thread.publish();
        Ok(thread)
    }

    pub fn run(mut self) {
        let mut events = [EpollEvent::empty(); EVENTS];
        let mut faults = Vec::new();
        loop {
            while let Ok(order) = self.received.try_recv() {
                if matches!(order, Order::Stop) {
                    return;
                }
                self.obey(order);
            }
            self.ask();
            self.release();
            self.publish();
            let idle = if self.state.is_held_back() { HELD_BACK } else { IDLE };
            let timeout = EpollTimeout::try_from(idle).unwrap_or(EpollTimeout::ZERO);
            let ready = match self.epoll.wait(&mut events, timeout) {
                Ok(ready) => ready,
                Err(nix::errno::Errno::EINTR) => 0,
                Err(e) => {
                    tracing::error!(error = %e, "the pager cannot wait for faults any more; it ends, start it again");
                    return;
                }
            };
            for event in events.iter().take(ready) {
                match event.data() {
                    BELL => drop(self.shared.bell.read()),
                    word if word % 2 == 1 => self.ended((word / 2) as Who),
                    word => self.faults((word / 2) as Who, &mut faults),
                }
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Adopt(guest, done) => {
                let _ = done.send(self.adopt(guest));
            }
            Order::Complete(rest, done) => {
                let again = self.state.complete(rest);
                let _ = done.send(again.map_err(Error::from).map(|again| {
                    for (who, page) in again {
                        self.fault(who, page);
                    }
                }));
            }
            Order::Arrived(ask, Ok(plain)) => self.fetched(ask, plain),
            Order::Arrived(ask, Err(why)) => self.failed(ask, why),
            Order::Pause(paused) => self.state.pause(paused),
            Order::Missed(done) => drop(done.send(self.state.missed().to_vec())),
            Order::Recorded(done) => drop(done.send(self.state.recorded().to_vec())),
            Order::Stop => {}
        }
    }

    fn adopt(&mut self, guest: Arc<Adopted>) -> Result<()> {
        let pid = guest.pid();
        let refuse = |problem: &str| Err(Error::Process { pid, problem: problem.to_owned() });
        if self.options.shared && guest.is_private() {
            return refuse("maps a singleton's memory for itself; end it, start it with share=on");
        }
        if !self.options.shared && !guest.is_private() {
            return refuse("shares the memory that clones read; end it, start it with share=off");
        }
        // Told twice of the same process, the second counts: the first may be of one that is no more.
        let before: Vec<Who> = self.guests.iter().filter(|(_, g)| g.pid() == pid).map(|(who, _)| *who).collect();
        before.into_iter().for_each(|who| self.ended(who));
        if self.options.shared && !self.guests.is_empty() {
            return refuse("a singleton's memory has one guest, and there is one; end that first");
        }
        let who = self.next_guest;
        self.next_guest += 1;
        let add =
            |fd: std::os::fd::BorrowedFd<'_>, word| self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, word));
        let uffd = std::os::fd::AsFd::as_fd(guest.uffd());
        add(uffd, u64::from(who) * 2)
            .and_then(|()| add(guest.ended(), u64::from(who) * 2 + 1))
            .map_err(|source| Error::Adopt { pid, what: "wait for its faults", source })?;
        if self.released && self.may_release() {
            guest.release();
        }
        self.shared.guests().insert(pid, guest.clone());
        self.guests.insert(who, guest);
        Ok(())
    }

    fn ended(&mut self, who: Who) {
        let Some(guest) = self.guests.remove(&who) else { return };
        // Closing alone does not take a descriptor out while the process still has its own.
        let _ = self.epoll.delete(guest.uffd());
        let _ = self.epoll.delete(guest.ended());
        self.shared.guests().remove(&guest.pid());
        self.state.gone(who);
    }

    fn faults(&mut self, who: Who, faults: &mut Vec<Fault>) {
        let Some(guest) = self.guests.get(&who).cloned() else { return };
        faults.clear();
        if let Err(e) = guest.uffd().read(faults) {
            tracing::warn!(pid = guest.pid(), error = %e, "cannot read a guest's faults any more");
            return self.ended(who);
        }
        for fault in faults.drain(..) {
            match guest.page(fault.address) {
                Some(page) => self.fault(who, page),
                // A guest that broke out can move its memory about; its thread waits, and no log fills.
                None => tracing::debug!(pid = guest.pid(), address = fault.address, "a fault outside of the memory"),
            }
        }
    }

    fn fault(&mut self, who: Who, page: u32) {
        let Some(guest) = self.guests.get(&who).cloned() else { return };
        if let Source::Whole { .. } = self.source {
            return self.fault_whole(&guest, page);
        }
        let now = self.began.elapsed();
        let mut verdict = self.state.fault(now, who, guest.is_private(), page);
        if verdict == Verdict::Wake && !self.window.has(page).unwrap_or(true) {
            // Given back by the guest's machine, by a hole punched into the file.
            self.state.lost(page);
            verdict = self.state.fault(now, who, guest.is_private(), page);
        }
        match verdict {
            Verdict::Wake => guest.wake(page),
            Verdict::Wait if self.has_apart(page) => {}
            Verdict::Wait => {
                self.misses += 1;
                let digest = self.state.pack_of(page).map(|pack| pack.digest.short());
                tracing::debug!(page, pack = digest, "a guest waits for a page");
            }
            Verdict::Zeros(run) => self.zeros(&guest, page, run),
        }
    }

    fn zeros(&mut self, guest: &Adopted, page: u32, run: std::ops::Range<u32>) {
        self.zeros += 1;
        let put = if guest.is_private() {
            guest.zero(run)
        } else {
            self.window.fill_zero(page).map(|()| {
                self.state.filled(page);
                guest.wake(page);
            })
        };
        if let Err(e) = put {
            self.problem = Some(format!("page {page}: {}", chain(&e)));
            // It faults again, and is tried again.
            guest.wake(page);
        }
    }

    fn fault_whole(&mut self, guest: &Adopted, page: u32) {
        let Source::Whole { file, stall } = &self.source else { return };
        if self.state.touch(page)
            && let Some(stall) = stall.filter(|stall| self.state.recorded_pages().is_multiple_of(stall.every))
        {
            #[allow(clippy::disallowed_methods, reason = "the engine's own thread, which is to keep a guest waiting")]
            std::thread::sleep(stall.time);
        }
        let mut bytes = [0; PAGE as usize];
        let read = file.read_exact_at(&mut bytes, u64::from(page) * PAGE);
        let put = read.map_err(crate::error::io("read", self.window.path())).and_then(|()| {
            if guest.is_private() && bytes.iter().all(|b| *b == 0) {
                return guest.zero(page..page + 1);
            }
            self.window.fill(page, &bytes)
        });
        match put {
            Ok(()) => {
                self.state.filled(page);
            }
            Err(e) => self.problem = Some(format!("page {page}: {}", chain(&e))),
        }
        guest.wake(page);
    }

    /// Asks for what is to be asked for now.
    fn ask(&mut self) {
        while let Some(ask) = self.state.next(self.began.elapsed()) {
            if let Some((_, plain)) = self.apart.iter().find(|(pack, _)| *pack == ask.pack) {
                let plain = plain.clone();
                self.arrived(ask, &plain);
                self.set_apart(ask.pack, plain);
                continue;
            }
            let Source::Packs(fetch, runtime) = &self.source else { return };
            let Some(pack) = self.state.pack(ask.pack) else { continue };
            let fetched = fetch(pack.need(self.options.sealed), ask.class);
            let ahead = if ask.class == Class::Miss { 1 } else { 6 };
            let (limit, orders) = (self.options.fetch_limit * ahead, self.orders.clone());
            let shared = self.shared.clone();
            runtime.spawn(async move {
                let late = |_| Err(format!("nothing came within {limit:?}"));
                let result = tokio::time::timeout(limit, fetched).await.unwrap_or_else(late);
                // Nobody listens once the engine has been stopped.
                if orders.send(Order::Arrived(ask, result)).is_ok() {
                    let _ = shared.bell.write(1);
                }
            });
        }
    }

    fn fetched(&mut self, ask: Ask, plain: Vec<u8>) {
        let Some(pack) = self.state.pack(ask.pack) else { return };
        let (whole, stored, digest) = (pack.slots.len() * PAGE as usize, pack.stored, pack.digest);
        if plain.len() != whole {
            return self.failed(ask, format!("pack {digest}: {} bytes came, not {whole}", plain.len()));
        }
        self.fetched += u64::from(stored);
        self.arrived(ask, &plain);
        self.set_apart(ask.pack, Arc::new(plain));
    }

    /// Keeps a pack of which not all is put in, as the newest; forgets it once all is.
    fn set_apart(&mut self, pack: u32, plain: Arc<Vec<u8>>) {
        self.apart.retain(|(number, _)| *number != pack);
        if self.state.is_held_apart(pack) {
            self.apart.push_back((pack, plain));
        }
        if self.apart.len() > APART_MAX {
            self.apart.pop_front();
        }
    }

    /// Whether a page can be put in without a fetch.
    fn has_apart(&self, page: u32) -> bool {
        let has = |pack: u32| self.state.pack(pack).is_some_and(|p| p.slots.contains(&Some(page)));
        self.apart.iter().any(|(pack, _)| has(*pack))
    }

    fn arrived(&mut self, ask: Ask, plain: &[u8]) {
        let pages = self.state.arrived(ask);
        for run in pages.chunk_by(|a, b| a.0 + 1 == b.0 && a.1 + 1 == b.1) {
            let Some((slot, page)) = run.first().copied() else { continue };
            let bytes = plain.get(slot * PAGE as usize..(slot + run.len()) * PAGE as usize).unwrap_or_default();
            if let Err(e) = self.window.fill(page, bytes) {
                return self.failed(ask, chain(&e));
            }
            for (_, page) in run {
                for who in self.state.filled(*page) {
                    if let Some(guest) = self.guests.get(&who) {
                        guest.wake(*page);
                    }
                }
            }
        }
        self.problem = None;
    }

    fn failed(&mut self, ask: Ask, why: String) {
        tracing::debug!(pack = ask.pack, class = ?ask.class, why, "a pack did not come");
        self.state.failed(self.began.elapsed(), ask);
        self.problem = Some(why);
    }

    /// Lets clones go once nothing is missing. A singleton stays: its writes are noted, and letting go would forget
    /// them.
    fn release(&mut self) {
        if self.released || !self.may_release() || !self.state.is_whole() {
            return;
        }
        self.released = true;
        self.guests.values().for_each(|guest| guest.release());
    }

    fn may_release(&self) -> bool {
        self.options.release && !self.options.shared && !self.options.hydrate.precise
    }

    fn publish(&mut self) {
        let stuck = self.state.oldest().and_then(|(page, since)| {
            let waited = self.began.elapsed().saturating_sub(since);
            let pack = self.state.pack_of(page).map_or_else(String::new, |p| format!(" (pack {})", p.digest));
            let why = self.problem.as_deref().unwrap_or("no answer yet");
            let after = self.options.stuck_after;
            (waited >= after).then(|| format!("page {page}{pack} cannot be had since {} s: {why}", waited.as_secs()))
        });
        *self.shared.status() = Status {
            pages_present: self.state.present().into(),
            pages_total: self.state.pages().into(),
            misses: self.misses,
            missed: self.state.missed().len() as u64,
            zeros: self.zeros,
            waiting: self.state.waiting() as u64,
            adopted: self.guests.len() as u64,
            hydrated: self.state.is_whole(),
            critical: self.state.has_working_set(),
            fetched_bytes: self.fetched,
            stuck,
            ..Status::default()
        };
    }
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |e| e.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
