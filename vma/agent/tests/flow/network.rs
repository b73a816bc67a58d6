//! A network to test in: a namespace, the two daemons as processes, stand-ins for CPA and edge, sources of chunks.

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post, put};
use axum::{Json, Router};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use vmatrix_model::assignment::{Assignment, ServiceShare};
use vmatrix_model::edge_config::{EdgeConfig, EdgeSeen};
use vmatrix_model::inventory::{InstanceState, Inventory};
use vmatrix_model::{Generation, ServiceId, Span};
use vmatrix_vma_image::{Store, netns, sign};
use vmatrix_vma_transfer::identity::{Authority, Identity, Role};
use vmatrix_vma_transfer::{ServerConfig, serve};

/// Long enough for anything that is to happen.
pub const MINUTE: Duration = Duration::from_secs(50);

/// What the stand-ins heard.
#[derive(Default)]
pub struct Heard {
    pub inventory: Option<Inventory>,
    pub config: Option<EdgeConfig>,
}

/// A network with one machine; all it made goes with it.
pub struct Network {
    pub name: String,
    pub dir: tempfile::TempDir,
    pub store: Store,
    authority: Authority,
    heard: Arc<Mutex<Heard>>,
    daemons: Mutex<Vec<Child>>,
}

impl Network {
    pub fn new(what: &str) -> Network {
        let store = std::env::var_os("VMATRIX_STORE").expect("VMATRIX_STORE is to name a store with the image tiny");
        let name = format!("vmxf{}{what}", std::process::id());
        netns::ip_batch(None, &[format!("netns add {name}")]).expect("this test needs root and iproute2");
        netns::ip_batch(Some(&name), &["link set lo up".into()]).unwrap();
        // The library that QEMU is started with is looked for beside the program.
        let library = "libvmatrix_vma_shim.so";
        let _ = std::os::unix::fs::symlink(format!("../deps/{library}"), program().with_file_name(library));
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(dir.path().join("authority")).unwrap();
        authority.issue(Role::Machine, "m1").unwrap().write(dir.path().join("identity")).unwrap();
        let network = Network {
            name,
            dir,
            store: Store::read(store).unwrap(),
            authority,
            heard: Arc::default(),
            daemons: Mutex::default(),
        };
        network.configure(&[8446], "");
        network
    }

    /// Writes the daemons' files: the ports of the sources, and more lines for the machine's.
    pub fn configure(&self, sources: &[u16], more: &str) {
        let (dir, name) = (self.dir.path(), &self.name);
        let signer = sign::public(&self.store).unwrap();
        let sources: Vec<String> = sources.iter().map(|p| format!("'127.0.0.1:{p}'")).collect();
        std::fs::write(dir.join("token"), "secret\n").unwrap();
        std::fs::write(dir.join("vma.toml"), "network = 'ashburn'\nlisten = '127.0.0.1:8441'\nstate_dir = 'v'\ntoken_file = 'token'\ncpa = 'http://127.0.0.1:8440'\nedge = 'http://127.0.0.1:8440'\n").unwrap();
        let signers = if more.contains("signers") { String::new() } else { format!("signers = ['{signer}']\n") };
        let machine = format!(
            "name = 'm1'\nnetwork = 'ashburn'\nlisten = '127.0.0.1:8451'\nstate_dir = 'm'\ntoken_file = 'token'\nvma = 'http://127.0.0.1:8441'\nidentity = 'identity'\nsources = [{}]\norigin = 'http://127.0.0.1:8440'\ncpus = 1\nmemory_mib = 512\ncells = '100.64.9.0/24'\ncell_prefix = '{name}'\n{signers}{more}\n",
            sources.join(", ")
        );
        std::fs::write(dir.join("machine.toml"), machine).unwrap();
    }

    /// Plays in the network's namespace, on one thread and its runtime.
    pub fn play<T: Send>(&self, f: impl Future<Output = T> + Send) -> T {
        netns::enter(&netns::path(&self.name), || {
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
        })
        .unwrap()
    }

    /// CPA and edge in one.
    pub async fn stand_ins(&self) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:8440").await.unwrap();
        let routes = stand_ins(self.heard.clone());
        tokio::spawn(async move { axum::serve(listener, routes).await });
    }

    /// A source of the store's chunks; aborted, it and its connections are gone.
    pub async fn source(&self, port: u16, rate_mbit: Option<u64>) -> JoinHandle<()> {
        let identity: Identity = self.authority.issue(Role::Store, "origin").unwrap();
        let config =
            ServerConfig { identity, store: self.store.clone(), keys: Some(self.store.dir().join("keys")), rate_mbit };
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        tokio::spawn(async move { serve(listener, config, std::future::pending()).await.unwrap() })
    }

    /// The store as a daemon: it answers machines' questions too.
    pub fn store_daemon(&self, port: u16, rate_mbit: u64) -> u32 {
        let (dir, store) = (self.dir.path(), self.store.dir().display());
        self.authority.issue(Role::Store, "origin").unwrap().write(dir.join("store-identity")).unwrap();
        let text = format!(
            "listen = '127.0.0.1:{port}'\nstore = '{store}'\nidentity = 'store-identity'\nkeys = '{store}/keys'\nrate_mbit = {rate_mbit}\n"
        );
        std::fs::write(dir.join("store.toml"), text).unwrap();
        self.start("store")
    }

    /// Starts `machine`, `vma` or `store`; answers its id.
    pub fn start(&self, daemon: &str) -> u32 {
        let program = program();
        let log = std::fs::File::options()
            .append(true)
            .create(true)
            .open(self.dir.path().join(format!("{daemon}.log")))
            .unwrap();
        let child = Command::new(&program)
            .args([daemon, "--config"])
            .arg(self.dir.path().join(format!("{daemon}.toml")))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}; it is built with this test", program.display()));
        let id = child.id();
        self.daemons.lock().unwrap().push(child);
        id
    }

    /// Kills a daemon, with no chance to clean up.
    pub fn kill(&self, id: u32) {
        let mut daemons = self.daemons.lock().unwrap();
        let daemon = daemons.iter_mut().find(|c| c.id() == id).unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// What a daemon logged, for a test that failed.
    pub fn log(&self, daemon: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(format!("{daemon}.log"))).unwrap_or_default()
    }

    pub fn namespaces(&self) -> Vec<String> {
        let all = std::fs::read_dir("/run/netns").unwrap().filter_map(|e| e.ok()?.file_name().into_string().ok());
        all.filter(|n| n.starts_with(&format!("{}-", self.name))).collect()
    }

    /// Processes whose command line begins so and names this network or its folder.
    fn processes(&self, is: impl Fn(&str) -> bool) -> Vec<i32> {
        let dir = self.dir.path().to_str().unwrap();
        let pids =
            std::fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            line.contains(dir) && is(&line)
        })
        .collect()
    }

    /// Those of cells, whatever they waited as.
    pub fn qemu(&self) -> Vec<i32> {
        let given = self.given();
        self.processes(|line| {
            line.starts_with("qemu-system") && (!line.contains("-_") || given.iter().any(|g| line.contains(g)))
        })
    }

    /// Those that wait for a cell.
    pub fn spares(&self) -> Vec<i32> {
        let cells = self.qemu();
        let all = self.processes(|line| line.starts_with("qemu-system"));
        all.into_iter().filter(|pid| !cells.contains(pid)).collect()
    }

    /// Names of QEMUs that waited and were given to cells.
    fn given(&self) -> Vec<String> {
        let records = std::fs::read_dir(self.dir.path().join("m/cells")).into_iter().flatten();
        let records = records.filter_map(|cell| std::fs::read(cell.ok()?.path().join("cell.json")).ok());
        let written = records.filter_map(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
        written.filter_map(|record| Some(record.get("vm")?.as_str()?.to_owned())).collect()
    }

    pub fn pagers(&self) -> Vec<i32> {
        self.processes(|line| line.contains(" pager --config "))
    }

    pub async fn assign(&self, a: &Assignment) -> u16 {
        let client = reqwest::Client::new();
        let sent = client.put("http://127.0.0.1:8441/v1/assignment").bearer_auth("secret").json(a).send().await;
        sent.unwrap().status().as_u16()
    }

    /// Waits for what the stand-ins hear; answers how long it took.
    pub async fn until(&self, what: &str, limit: Duration, done: impl Fn(&Heard) -> bool) -> Duration {
        let began = Instant::now();
        loop {
            {
                let heard = self.heard.lock().unwrap();
                if done(&heard) {
                    return began.elapsed();
                }
                if began.elapsed() > limit {
                    panic!(
                        "{what} did not happen in {limit:?}: {:?}\n{}\n{}",
                        heard.inventory,
                        self.log("machine"),
                        self.log("vma")
                    );
                }
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub fn heard<T>(&self, f: impl FnOnce(&mut Heard) -> T) -> T {
        f(&mut self.heard.lock().unwrap())
    }

    /// Where the edge would send clients.
    pub fn slots(&self) -> Vec<Ipv4Addr> {
        self.heard(|h| h.slots())
    }

    /// Asks for an instance and waits until a client in front of the edge has its first byte.
    pub async fn first_byte(&self, a: &Assignment) -> Duration {
        let began = Instant::now();
        assert_eq!(self.assign(a).await, 204);
        self.until("a slot", MINUTE, |h| !h.slots().is_empty()).await;
        let cell = self.slots()[0];
        let page = ask(cell, 80).await;
        assert!(
            page.is_some_and(|p| p.starts_with("HTTP/1.")),
            "the instance does not answer\n{}",
            self.log("machine")
        );
        began.elapsed()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for daemon in self.daemons.lock().unwrap().iter_mut() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        for pid in self.processes(|_| true) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        for name in self.namespaces().into_iter().chain([self.name.clone()]) {
            let _ = netns::ip_batch(None, &[format!("netns del {name}")]);
        }
        let _ = std::fs::remove_dir_all(Path::new("/dev/shm").join(&self.name));
    }
}

impl Heard {
    pub fn slots(&self) -> Vec<Ipv4Addr> {
        self.config.iter().flat_map(|c| c.services.values()).flat_map(|s| s.slots.iter().map(|s| s.cell)).collect()
    }

    pub fn serving(&self) -> usize {
        self.inventory.iter().flat_map(|i| &i.instances).filter(|i| i.state == InstanceState::Serving).count()
    }

    /// How much of the image is there: any of it to be resumed from, all of it.
    pub fn image(&self) -> (bool, bool) {
        let image = self.inventory.as_ref().and_then(|i| i.images.get(&tiny()));
        image.map_or((false, false), |i| (i.resumable, i.complete()))
    }
}

/// The daemons, which are built with this test.
fn program() -> PathBuf {
    std::env::current_exe().unwrap().with_file_name("../examples/daemons")
}

fn edge_seen(heard: &Heard) -> Json<EdgeSeen> {
    let config = heard.config.as_ref().map_or(Generation(0), |c| c.generation);
    Json(EdgeSeen {
        network: "ashburn".parse().unwrap(),
        config,
        steering: Generation(0),
        connections: BTreeMap::new(),
    })
}

type Ears = Arc<Mutex<Heard>>;

fn stand_ins(heard: Ears) -> Router {
    let inventory = |State(w): State<Ears>, Json(i): Json<Inventory>| async move {
        w.lock().unwrap().inventory = Some(i);
        StatusCode::NO_CONTENT
    };
    let config = |State(w): State<Ears>, Json(c): Json<EdgeConfig>| async move {
        let mut heard = w.lock().unwrap();
        let older = heard.config.as_ref().is_some_and(|old| old.generation > c.generation);
        assert!(!older, "the edge was told an old config");
        heard.config = Some(c);
        edge_seen(&heard)
    };
    Router::new()
        .route("/v1/inventory", post(inventory))
        .route("/v1/config", put(config))
        .route("/v1/seen", get(|State(w): State<Ears>| async move { edge_seen(&w.lock().unwrap()) }))
        .with_state(heard)
}

pub fn tiny() -> ServiceId {
    "tiny".parse().unwrap()
}

pub fn assignment(generation: u64, instances: Option<u32>) -> Assignment {
    let share = |instances| ServiceShare {
        image: "tiny".into(),
        instances,
        memory_mib: 128,
        vip: [198, 19, 1, 100].into(),
        ports: vec![80],
        backends: vec![],
        drain: Span::secs(2),
        forward_to: None,
        singleton: None,
    };
    let services = instances.map(|n| (tiny(), share(n))).into_iter().collect();
    Assignment { generation: Generation(generation), network: "ashburn".parse().unwrap(), services }
}

/// A page of an instance, if it answers.
pub async fn ask(address: Ipv4Addr, port: u16) -> Option<String> {
    tokio::task::spawn_blocking(move || get_page(address, port)).await.unwrap()
}

fn get_page(address: Ipv4Addr, port: u16) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(address.into(), port), Duration::from_secs(2)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

/// Kills whatever has this id.
pub fn kill(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}
