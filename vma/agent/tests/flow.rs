//! The whole of a network but its edge: a real image staged chunk by chunk, resumed, lost, found again
//! and put back to sleep by the two daemons as they run live. Edge and CPA are stand-ins that confirm
//! and write down.

// A test may stop where its own input is wrong.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use axum::extract::{Path as UrlPath, State};
use axum::http::StatusCode;
use axum::routing::{get, post, put};
use axum::{Json, Router};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use vmatrix_model::assignment::{Assignment, ServiceShare};
use vmatrix_model::edge_config::{EdgeConfig, EdgeSeen};
use vmatrix_model::inventory::{InstanceState, Inventory};
use vmatrix_model::manifest::SignedManifest;
use vmatrix_model::{Digest, Generation, ServiceId, Span};
use vmatrix_vma_image::{Store, build, netns, sign};

struct Network {
    name: String,
    dir: tempfile::TempDir,
}

impl Network {
    fn new(what: &str) -> Network {
        let name = format!("vmxf{}{what}", std::process::id());
        netns::ip_batch(None, &[format!("netns add {name}")]).expect("this test needs root and iproute2");
        netns::ip_batch(Some(&name), &["link set lo up".into()]).unwrap();
        Network { name, dir: tempfile::tempdir().unwrap() }
    }

    fn namespaces(&self) -> Vec<String> {
        let all = std::fs::read_dir("/run/netns").unwrap().filter_map(|e| e.ok()?.file_name().into_string().ok());
        all.filter(|n| n.starts_with(&format!("{}-", self.name))).collect()
    }

    fn qemu(&self) -> Vec<i32> {
        let mine = format!("{}-", self.name);
        let pids =
            std::fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            line.starts_with("qemu-system") && line.contains(&mine)
        })
        .collect()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for pid in self.qemu() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        for name in self.namespaces().into_iter().chain([self.name.clone()]) {
            let _ = netns::ip_batch(None, &[format!("netns del {name}")]);
        }
    }
}

/// What the stand-ins heard.
#[derive(Default)]
struct Heard {
    inventory: Option<Inventory>,
    config: Option<EdgeConfig>,
    configs: u64,
}

type World = Arc<(Store, Mutex<Heard>)>;

fn edge_seen(heard: &Heard) -> Json<EdgeSeen> {
    let config = heard.config.as_ref().map_or(Generation(0), |c| c.generation);
    Json(EdgeSeen {
        network: "ashburn".parse().unwrap(),
        config,
        steering: Generation(0),
        connections: BTreeMap::new(),
    })
}

/// CPA, edge and origin in one.
fn stand_ins(world: World) -> Router {
    Router::new()
        .route(
            "/v1/inventory",
            post(|State(w): State<World>, Json(i): Json<Inventory>| async move {
                w.1.lock().unwrap().inventory = Some(i);
                StatusCode::NO_CONTENT
            }),
        )
        .route(
            "/v1/config",
            put(|State(w): State<World>, Json(c): Json<EdgeConfig>| async move {
                let mut heard = w.1.lock().unwrap();
                assert!(
                    heard.config.as_ref().is_none_or(|old| old.generation <= c.generation),
                    "the edge was told an old config"
                );
                heard.config = Some(c);
                heard.configs += 1;
                edge_seen(&heard)
            }),
        )
        .route("/v1/seen", get(|State(w): State<World>| async move { edge_seen(&w.1.lock().unwrap()) }))
        .route(
            "/v1/images/{name}",
            get(|State(w): State<World>, UrlPath(name): UrlPath<String>| async move {
                Json::<SignedManifest>(w.0.image(&name).unwrap().unwrap())
            }),
        )
        .route(
            "/v1/chunks/{digest}",
            get(|State(w): State<World>, UrlPath(digest): UrlPath<Digest>| async move { w.0.chunk(&digest).unwrap() }),
        )
        .with_state(world)
}

fn assignment(generation: u64, instances: Option<u32>) -> Assignment {
    let share = |instances| ServiceShare {
        image: "tiny".into(),
        instances,
        memory_mib: 128,
        vip: [198, 19, 1, 100].into(),
        ports: vec![80],
        backends: vec![],
        drain: Span::secs(2),
        forward_to: None,
    };
    let services = instances.map(|n| ("tiny".parse::<ServiceId>().unwrap(), share(n))).into_iter().collect();
    Assignment { generation: Generation(generation), network: "ashburn".parse().unwrap(), services }
}

async fn put_assignment(a: &Assignment) -> u16 {
    let client = reqwest::Client::new();
    client
        .put("http://127.0.0.1:8441/v1/assignment")
        .bearer_auth("secret")
        .json(a)
        .send()
        .await
        .unwrap()
        .status()
        .as_u16()
}

async fn until(what: &str, world: &World, limit: Duration, done: impl Fn(&Heard) -> bool) -> Duration {
    let began = Instant::now();
    loop {
        {
            let heard = world.1.lock().unwrap();
            if done(&heard) {
                return began.elapsed();
            }
            assert!(began.elapsed() < limit, "{what} did not happen in {limit:?}: {:?}", heard.inventory);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn serving(heard: &Heard) -> usize {
    heard.inventory.iter().flat_map(|i| &i.instances).filter(|i| i.state == InstanceState::Serving).count()
}

fn slots(heard: &Heard) -> Vec<Ipv4Addr> {
    heard.config.iter().flat_map(|c| c.services.values()).flat_map(|s| s.slots.iter().map(|s| s.cell)).collect()
}

fn get_page(address: Ipv4Addr, port: u16) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(address.into(), port), Duration::from_secs(2)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

async fn image() -> (Store, String) {
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("store");
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios/guests/tiny.toml");
    build::build(&recipe, &kept, &build::Options::default()).await.expect("the image tiny is needed here");
    let store = Store::open(&kept).unwrap();
    let signer = sign::builder_public(&store).unwrap();
    (store, signer)
}

fn write_configs(dir: &Path, prefix: &str, signer: &str) -> (PathBuf, PathBuf) {
    std::fs::write(dir.join("token"), "secret\n").unwrap();
    let vma = dir.join("vma.toml");
    std::fs::write(&vma, "network = 'ashburn'\nlisten = '127.0.0.1:8441'\nstate_dir = 'v'\ntoken_file = 'token'\ncpa = 'http://127.0.0.1:8440'\nedge = 'http://127.0.0.1:8440'\n").unwrap();
    let machine = dir.join("machine.toml");
    let text = format!(
        "name = 'm1'\nnetwork = 'ashburn'\nlisten = '127.0.0.1:8451'\nstate_dir = 'm'\ntoken_file = 'token'\nvma = 'http://127.0.0.1:8441'\nimages = 'http://127.0.0.1:8440'\norigin = 'http://127.0.0.1:8440'\ncpus = 1\nmemory_mib = 512\ncells = '100.64.9.0/24'\ncell_prefix = '{prefix}'\nsigners = ['{signer}']\n"
    );
    std::fs::write(&machine, text).unwrap();
    (vma, machine)
}

fn start_vma(config: &Path) -> JoinHandle<anyhow::Result<()>> {
    let config = config.to_owned();
    tokio::spawn(async move { vmatrix_vma_agent::run(&config).await })
}

fn start_machine(config: &Path) -> JoinHandle<anyhow::Result<()>> {
    let config = config.to_owned();
    tokio::spawn(async move { vmatrix_vma_agent::machine::run(&config).await })
}

async fn kill(task: JoinHandle<anyhow::Result<()>>) {
    task.abort();
    let _ = task.await;
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

#[test]
fn machine_an_image_is_staged_resumed_found_again_and_put_back_to_sleep() {
    let network = Network::new("a");
    let (store, signer) = runtime().block_on(image());
    let (vma_toml, machine_toml) = write_configs(network.dir.path(), &network.name, &signer);
    let world: World = Arc::new((store, Mutex::default()));
    netns::enter(&netns::path(&network.name), || runtime().block_on(play(&network, &world, &vma_toml, &machine_toml)))
        .unwrap();
}

async fn play(network: &Network, world: &World, vma_toml: &Path, machine_toml: &Path) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:8440").await.unwrap();
    let routes = stand_ins(world.clone());
    tokio::spawn(async move { axum::serve(listener, routes).await });
    let mut vma = start_vma(vma_toml);
    let mut machine = start_machine(machine_toml);
    let minute = Duration::from_secs(60);

    // Staged and dormant.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(put_assignment(&assignment(2, Some(0))).await, 204);
    assert_eq!(put_assignment(&assignment(1, Some(1))).await, 409, "an older assignment was taken");
    let tiny: ServiceId = "tiny".parse().unwrap();
    let staged = until("staging", world, minute, |h| {
        h.inventory.as_ref().is_some_and(|i| i.images.get(&tiny).is_some_and(|i| i.complete()))
    })
    .await;
    assert_eq!(network.qemu().len(), 0);

    // Resumed: from the order to the first byte.
    let began = Instant::now();
    assert_eq!(put_assignment(&assignment(3, Some(1))).await, 204);
    until("serving", world, minute, |h| serving(h) == 1).await;
    let cell = slots(&world.1.lock().unwrap())[0];
    let ask = move |port| tokio::task::spawn_blocking(move || get_page(cell, port));
    assert!(ask(80).await.unwrap().is_some_and(|p| p.starts_with("HTTP/1.")), "the instance does not answer");
    let first_byte = began.elapsed();
    assert!(ask(8080).await.unwrap().is_none());
    let fetched = world.1.lock().unwrap().inventory.as_ref().unwrap().images[&tiny].fetched;
    eprintln!("staged {fetched} in {staged:?}; order to first byte {first_byte:?}");
    assert!(first_byte < Duration::from_secs(20), "{first_byte:?}");

    // Both daemons are killed: the VM goes on, is found again, and stays in rotation.
    let before = network.qemu();
    kill(machine).await;
    kill(vma).await;
    assert!(ask(80).await.unwrap().is_some());
    world.1.lock().unwrap().inventory = None;
    vma = start_vma(vma_toml);
    machine = start_machine(machine_toml);
    until("serving after a restart", world, minute, |h| serving(h) == 1).await;
    assert_eq!(network.qemu(), before);
    assert_eq!(slots(&world.1.lock().unwrap()), [cell]);

    // The machine's daemon is dead for longer than its lease: what it runs answers, and stays in rotation.
    kill(machine).await;
    let until_then = Instant::now() + Duration::from_secs(10);
    while Instant::now() < until_then {
        let (slots, serving) = {
            let heard = world.1.lock().unwrap();
            (slots(&heard), serving(&heard))
        };
        assert_eq!((slots.as_slice(), serving), (&[cell][..], 1));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let told = world.1.lock().unwrap().inventory.as_ref().and_then(|i| i.instances[0].trouble.clone());
    assert!(told.is_some_and(|t| t.contains("m1 is silent")));
    machine = start_machine(machine_toml);
    until("the machine's return", world, minute, |h| {
        h.inventory.as_ref().is_some_and(|i| i.instances[0].trouble.is_none() && serving(h) == 1)
    })
    .await;
    assert_eq!((network.qemu(), slots(&world.1.lock().unwrap())), (before.clone(), vec![cell]));

    // QEMU dies: out of rotation, and back.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(before[0]), nix::sys::signal::Signal::SIGKILL).unwrap();
    let out = until("leaving rotation", world, minute, |h| slots(h).is_empty()).await;
    until("coming back", world, minute, |h| serving(h) == 1).await;
    assert_ne!(network.qemu(), before);
    eprintln!("a lost VM left rotation after {out:?}");

    // Back to dormant, then nothing.
    assert_eq!(put_assignment(&assignment(4, Some(0))).await, 204);
    until("the suspend", world, minute, |h| {
        h.inventory.as_ref().is_some_and(|i| i.instances.is_empty() && i.images[&tiny].complete())
    })
    .await;
    assert_eq!((network.qemu().len(), network.namespaces().len()), (0, 0));
    assert_eq!(put_assignment(&assignment(5, None)).await, 204);
    let images = network.dir.path().join("m/images");
    until("dropping the image", world, minute, |_| std::fs::read_dir(&images).unwrap().count() == 0).await;
    assert_eq!(std::fs::read_dir(network.dir.path().join("m/cells")).unwrap().count(), 0);
    kill(machine).await;
    kill(vma).await;
}

/// A file system that is gone with the test.
struct Small(PathBuf);

impl Small {
    fn new(at: &Path, size: &str) -> Small {
        std::fs::create_dir_all(at).unwrap();
        nix::mount::mount(
            Some("none"),
            at,
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            Some(format!("size={size}").as_str()),
        )
        .expect("this test needs root");
        Small(at.to_owned())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Wants an instance and answers the reason why it is refused.
fn refusal(network: &Network, signer: Option<&str>) -> String {
    let (store, builder) = runtime().block_on(image());
    let (vma_toml, machine_toml) = write_configs(network.dir.path(), &network.name, signer.unwrap_or(&builder));
    let world: World = Arc::new((store, Mutex::default()));
    let play = async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:8440").await.unwrap();
        let routes = stand_ins(world.clone());
        tokio::spawn(async move { axum::serve(listener, routes).await });
        let (vma, machine) = (start_vma(&vma_toml), start_machine(&machine_toml));
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(put_assignment(&assignment(1, Some(1))).await, 204);
        until("a refusal that lasts", &world, Duration::from_secs(60), |h| {
            h.inventory.as_ref().is_some_and(|i| i.refused.values().any(|r| r.contains("m1: ")))
        })
        .await;
        kill(machine).await;
        kill(vma).await;
    };
    netns::enter(&netns::path(&network.name), || runtime().block_on(play)).unwrap();
    assert_eq!((network.qemu().len(), network.namespaces().len()), (0, 0));
    let heard = world.1.lock().unwrap();
    let tiny: ServiceId = "tiny".parse().unwrap();
    heard.inventory.as_ref().unwrap().refused[&tiny].clone()
}

#[test]
fn machine_an_image_nobody_here_trusts_is_refused_by_signer() {
    let network = Network::new("b");
    let said = refusal(&network, Some(&"0".repeat(64)));
    assert!(said.contains("not trusted here") && said.contains("\"tiny\""), "{said}");
}

#[test]
fn machine_a_full_disk_while_staging_is_said_and_nothing_runs() {
    let network = Network::new("c");
    let _small = Small::new(&network.dir.path().join("m"), "3m");
    let said = refusal(&network, None);
    assert!(said.contains("no space left"), "{said}");
}

#[test]
fn machine_an_address_in_use_is_said_with_what_to_do() {
    let network = Network::new("d");
    let (vma_toml, _) = write_configs(network.dir.path(), &network.name, "");
    let said = netns::enter(&netns::path(&network.name), || {
        let _taken = std::net::TcpListener::bind("127.0.0.1:8441").unwrap();
        runtime().block_on(vmatrix_vma_agent::run(&vma_toml)).unwrap_err().to_string()
    })
    .unwrap();
    assert!(said.contains("cannot listen on 127.0.0.1:8441") && said.contains("hint:"), "{said}");
}
