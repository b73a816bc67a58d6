//! Faults in, pages out: one thread that waits on every adopted guest at once.
//!
//! ```text
//! userfaultfds ─▶ ┌────────┐ ─ ask(pack, class) ─▶ fetch (tasks of the runtime) ─┐
//! orders ───────▶ │ thread │ ◀───────── plain bytes, verified ──────────────────┘
//! processes end ▶ └────────┘ ─▶ Window::fill ─▶ wake whoever waited; one fetch serves every guest of the file
//! ```
//! What to do is decided by `state`; this does it.

mod thread;

use crate::adopt::Adopted;
use crate::dirty;
use crate::error::{Error, Result};
use crate::state::{Class, Hydrate};
use crate::window::Window;
use futures_util::future::BoxFuture;
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};
use vmatrix_vma_image::chunks::Need;
use vmatrix_vma_image::memory::{First, Map, Rest};

/// Gets the plain bytes of a pack, verified, or says why not. Called for one pack at a time or several; it may be
/// called for the same pack again in a more urgent class while the first call is under way.
pub type Fetch = Arc<dyn Fn(Need, Class) -> BoxFuture<'static, std::result::Result<Vec<u8>, String>> + Send + Sync>;

/// How a memory file is served.
#[derive(Debug, Clone)]
pub struct Options {
    pub hydrate: Hydrate,
    /// Whether the one guest that maps the file writes to it (a singleton), or many read it and keep their writes.
    pub shared: bool,
    /// Let clones go when all is here. They then need no pager, but a zero page that one touches takes memory in
    /// the file, and ends the guest where there is none; kept, zero pages cost nothing until they are written.
    pub release: bool,
    /// Whether packs are sealed with the owner's key.
    pub sealed: bool,
    /// How long a guest may wait for a page before [`Status::stuck`] says so.
    pub stuck_after: Duration,
    /// How long the fetch of a miss may take before it counts as failed; six times as long for what is fetched
    /// ahead, of which much is under way at once.
    pub fetch_limit: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            hydrate: Hydrate::default(),
            shared: false,
            release: true,
            sealed: false,
            stuck_after: Duration::from_secs(10),
            fetch_limit: Duration::from_secs(10),
        }
    }
}

/// How far a guest's memory has arrived.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// 4 KiB pages in the memory file.
    pub pages_present: u64,
    /// 4 KiB pages of the guest, zero ones included.
    pub pages_total: u64,
    /// Faults that had to wait for a fetch.
    pub misses: u64,
    /// Pages that [`Engine::missed`] has.
    #[serde(default)]
    pub missed: u64,
    /// Faults answered with zeros.
    pub zeros: u64,
    /// Pages that guests wait for now.
    pub waiting: u64,
    /// Guests whose faults come here.
    pub adopted: u64,
    /// Everything is here; guests no longer depend on a source.
    pub hydrated: bool,
    /// What is needed before the guest runs is here: device state (in the local store), first table, working set.
    pub critical: bool,
    /// Stored bytes of the packs that were fetched, from the local store or elsewhere.
    pub fetched_bytes: u64,
    /// Why a page or a piece of the disk cannot be had, once somebody has waited for it too long. It is tried on;
    /// end the guest.
    pub stuck: Option<String>,
    /// Bytes of the chunks of the image's data that the guest has written.
    #[serde(default)]
    pub written_bytes: u64,
    /// Why the last write of the image's data found no room. The guest stands still for it (QEMU stops it); with room
    /// made it can be had go on, and has lost nothing.
    #[serde(default)]
    pub full: Option<String>,
}

/// Pages that come late in a recording.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall {
    /// One of so many that are touched.
    pub every: usize,
    /// By so much.
    pub time: Duration,
}

/// How long a process may take from its start until it has mapped its memory.
const MAPPED_WITHIN: Duration = Duration::from_secs(20);

/// What the thread is told.
enum Order {
    Adopt(Arc<Adopted>, oneshot::Sender<Result<()>>),
    Complete(Rest, oneshot::Sender<Result<()>>),
    Arrived(crate::state::Ask, std::result::Result<Vec<u8>, String>),
    Pause(bool),
    Recorded(oneshot::Sender<Vec<u32>>),
    Missed(oneshot::Sender<Vec<u32>>),
    Stop,
}

/// Where pages come from.
enum Source {
    Packs(Fetch, tokio::runtime::Handle),
    /// A file that has all of them.
    Whole {
        file: File,
        stall: Option<Stall>,
    },
}

/// What the thread and its owner both see.
struct Shared {
    status: Mutex<Status>,
    /// By process id.
    guests: Mutex<BTreeMap<i32, Arc<Adopted>>>,
    /// Written to after an order was sent.
    bell: EventFd,
}

impl Shared {
    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn guests(&self) -> MutexGuard<'_, BTreeMap<i32, Arc<Adopted>>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves one memory file. When it is dropped, guests that still need it wait for the next one.
pub struct Engine {
    orders: mpsc::Sender<Order>,
    shared: Arc<Shared>,
    file: crate::window::FileId,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Engine {
    /// Begins to serve `memory`, a file on tmpfs that is made if it is not there. What it already holds is kept.
    /// Needs a runtime, on which `fetch` runs.
    ///
    /// # Errors
    /// Another pager serves the file, it is another guest's, or the kernel lacks something.
    pub fn start(memory: &Path, map: Map, options: Options, fetch: Fetch) -> Result<Engine> {
        Engine::new(memory, map, options, Source::Packs(fetch, tokio::runtime::Handle::current()))
    }

    /// Serves `memory` page by page from a file that has all of it, so that [`Engine::recorded`] knows every page
    /// that is touched. A build records its working set this way. With `stall` some pages come late, as over a slow
    /// link: a guest whose timers are late runs other code than one that never waits.
    ///
    /// # Errors
    /// As [`Engine::start`], or `whole` cannot be read.
    pub fn record(memory: &Path, whole: &Path, stall: Option<Stall>) -> Result<Engine> {
        let file = File::open(whole).map_err(crate::error::io("open", whole))?;
        let bytes = file.metadata().map_err(crate::error::io("look at", whole))?.len();
        let pages = u32::try_from(bytes / vmatrix_vma_uffd::PAGE).unwrap_or(u32::MAX);
        let map = Map::new(pages, First::default())?;
        let hydrate = Hydrate { working_set: false, background: false, precise: true, ..Hydrate::default() };
        Engine::new(memory, map, Options { hydrate, ..Options::default() }, Source::Whole { file, stall })
    }

    fn new(memory: &Path, map: Map, options: Options, source: Source) -> Result<Engine> {
        let window = Window::open(memory, map.pages())?;
        let file = window.id();
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|source| Error::Kernel { what: "make an eventfd", source })?;
        let shared = Arc::new(Shared { status: Mutex::default(), guests: Mutex::default(), bell });
        let (orders, received) = mpsc::channel();
        let work = thread::Thread::new(window, map, options, source, shared.clone(), orders.clone(), received)?;
        let thread = std::thread::Builder::new().name("pager".to_owned()).spawn(move || work.run());
        let thread = Some(thread.map_err(crate::error::io("start a thread for", memory))?);
        Ok(Engine { orders, shared, file, thread })
    }

    /// Takes over the faults of process `pid`, waiting up to 20 s until it has mapped the memory.
    ///
    /// # Errors
    /// There is no such process, it was started without the preloaded library, or it maps the file in a way that
    /// would let guests see each other's writes.
    pub async fn adopt(&self, pid: i32) -> Result<()> {
        let (file, deadline) = (self.file, Instant::now() + MAPPED_WITHIN);
        let guest = loop {
            let taken = tokio::task::spawn_blocking(move || Adopted::take(pid, file)).await;
            match taken.map_err(|_| Error::Ended)?? {
                Some(guest) => break guest,
                None if Instant::now() > deadline => {
                    let problem = "does not map its memory through the preloaded library; end it, start it with \
                        LD_PRELOAD and VMATRIX_MEMORY"
                        .to_owned();
                    return Err(Error::Process { pid, problem });
                }
                None => sleep(Duration::from_millis(1)).await,
            }
        };
        let (done, answer) = oneshot::channel();
        self.tell(Order::Adopt(Arc::new(guest), done))?;
        answer.await.map_err(|_| Error::Ended)?
    }

    /// Adds the packs past the working set to the map.
    ///
    /// # Errors
    /// The two tables do not fit together: stop the engine, and end its guests.
    pub async fn complete(&self, rest: Rest) -> Result<()> {
        let (done, answer) = oneshot::channel();
        self.tell(Order::Complete(rest, done))?;
        answer.await.map_err(|_| Error::Ended)?
    }

    /// How far it is, as of the last thing that happened.
    pub fn status(&self) -> Status {
        self.shared.status().clone()
    }

    /// The pages touched so far, in order of first touch, over all guests; at most [`crate::RECORDED_MAX`]. A page
    /// that was there before it was touched is not seen.
    ///
    /// # Errors
    /// The engine has ended.
    pub async fn recorded(&self) -> Result<Vec<u32>> {
        let (done, answer) = oneshot::channel();
        self.tell(Order::Recorded(done))?;
        answer.await.map_err(|_| Error::Ended)
    }

    /// The pages that guests touched before they were there although nothing foresaw them, in the order in which they
    /// were first waited for: neither zero nor in the image's working set; at most [`crate::MISSED_MAX`], and none
    /// unless [`Hydrate::notes`]. A working set with these would have spared guests the wait.
    ///
    /// # Errors
    /// The engine has ended.
    pub async fn missed(&self) -> Result<Vec<u32>> {
        let (done, answer) = oneshot::channel();
        self.tell(Order::Missed(done))?;
        answer.await.map_err(|_| Error::Ended)
    }

    /// Stops the background, or lets it go on; faults and the working set are served all the same.
    ///
    /// # Errors
    /// The engine has ended.
    pub fn pause_background(&self, paused: bool) -> Result<()> {
        self.tell(Order::Pause(paused))
    }

    /// Begins anew to note which pages process `pid` writes, and forgets what it wrote before: to be called before its
    /// state is loaded, and later only once all that it wrote is in a snapshot. The kernel keeps the notes, so a pager
    /// that is started anew only adopts.
    ///
    /// # Errors
    /// It is not adopted, not tracked ([`Error::Untracked`]), or has ended.
    pub fn protect(&self, pid: i32) -> Result<()> {
        dirty::protect(&*self.guest(pid)?)
    }

    /// The pages that process `pid` has written since [`Engine::protect`]; ask while it stands still.
    ///
    /// # Errors
    /// As [`Engine::protect`].
    pub fn dirty(&self, pid: i32) -> Result<Vec<Range<u32>>> {
        dirty::dirty(&*self.guest(pid)?)
    }

    /// Whether this process's faults come here.
    pub fn is_adopted(&self, pid: i32) -> bool {
        self.shared.guests().contains_key(&pid)
    }

    fn guest(&self, pid: i32) -> Result<Arc<Adopted>> {
        let problem = || Error::Process { pid, problem: "is not adopted; adopt it first".to_owned() };
        self.shared.guests().get(&pid).cloned().ok_or_else(problem)
    }

    fn tell(&self, order: Order) -> Result<()> {
        self.orders.send(order).map_err(|_| Error::Ended)?;
        self.shared.bell.write(1).map(drop).map_err(|source| Error::Kernel { what: "ring the pager's bell", source })
    }

    /// Ends it. Guests that still miss pages wait for the next engine on the same file.
    pub fn stop(self) {}
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.tell(Order::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the pager's thread ended by itself");
        }
    }
}
