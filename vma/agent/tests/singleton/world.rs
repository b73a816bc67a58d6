//! Machines in networks of their own, joined by links with a rate and a delay; an origin with the image; a user.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use vmatrix_lab::wan::pipe::Wire;
use vmatrix_lab::wan::{Direction, Port, WanConfig, default_capture_bytes_max};
use vmatrix_model::InstanceId;
use vmatrix_model::assignment::Singleton;
use vmatrix_vma_core::steps::{CellSeen, CellSpec, Outcome, Seen, Step};
use vmatrix_vma_image::{Store, netns, sign};
use vmatrix_vma_transfer::identity::{Authority, Role};

/// Each link: 100 Mbit/s, and 20 ms there and back.
const WIRE: Wire = Wire { delay_us: 10_000, mbit: 100, loss_ppm: 0, queue_us: 40_000 };
/// A resume on a busy machine, and the limits of the daemon behind it.
const STEP_LIMIT: Duration = Duration::from_secs(90);

/// Waits: the clients of these tests are threads of their own.
#[allow(clippy::disallowed_methods, reason = "there is no runtime here whose thread it would block")]
pub fn wait(time: Duration) {
    std::thread::sleep(time);
}

/// All of it; what it made goes with it.
pub struct World {
    name: String,
    dir: tempfile::TempDir,
    image: String,
    machines: Vec<&'static str>,
    daemons: Mutex<Vec<(String, Child)>>,
}

/// The guest's address in the cell of each machine is translated from this one: the first of its cells.
fn cell(machine: usize) -> Ipv4Addr {
    Ipv4Addr::new(100, 64, machine as u8 + 1, 2)
}

impl World {
    /// Machines that trust whoever built what is in the store that `VMATRIX_STORE` names.
    pub fn new(what: &str, machines: &[&'static str], image: &str) -> World {
        let store = std::env::var_os("VMATRIX_STORE").expect("VMATRIX_STORE is to name a store with the image");
        let store = std::fs::canonicalize(store).unwrap();
        let name = format!("vmxs{}{what}", std::process::id());
        // The library that QEMU is started with is looked for beside the program.
        let library = "libvmatrix_vma_shim.so";
        let _ = std::os::unix::fs::symlink(format!("../deps/{library}"), program().with_file_name(library));
        let world = World {
            name,
            dir: tempfile::tempdir().unwrap(),
            image: image.to_owned(),
            machines: machines.to_vec(),
            daemons: Mutex::default(),
        };
        for site in world.sites() {
            netns::ip_batch(None, &[format!("netns add {}", world.namespace(site))]).expect("needs root and iproute2");
        }
        world.wan();
        let authority = Authority::create(world.path("authority")).unwrap();
        let signer = sign::public(&Store::read(&store).unwrap()).unwrap();
        world.configure_origin(&authority, &store);
        for site in machines {
            world.configure(&authority, site, &signer);
        }
        world.start("store", "origin");
        for site in machines {
            world.start("machine", site);
        }
        for (number, _) in machines.iter().enumerate() {
            world.until("a machine's daemon", Duration::from_secs(20), || world.try_seen(number).is_some());
        }
        world
    }

    fn sites(&self) -> impl Iterator<Item = &'static str> {
        self.machines.iter().copied().chain(["origin", "user"])
    }

    fn namespace(&self, site: &str) -> String {
        format!("{}{site}", self.name)
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// A site's address on the WAN.
    fn address(&self, site: &str) -> Ipv4Addr {
        let number = self.sites().position(|s| s == site).unwrap();
        Ipv4Addr::new(198, 18, number as u8 + 1, 1)
    }

    /// Where a machine gives chunks and answers others.
    pub fn transfer(&self, machine: usize) -> SocketAddr {
        SocketAddr::new(self.address(self.machines[machine]).into(), 8446)
    }

    fn wan(&self) {
        for site in self.sites() {
            let (namespace, address) = (self.namespace(site), self.address(site));
            let lines = format!(
                "link set lo up\ntuntap add dev wan0 mode tun\naddr add {address}/32 dev wan0\n\
                 link set wan0 mtu 1500 txqueuelen 4000 up\nroute add 198.18.0.0/15 dev wan0 src {address}\n\
                 route add 100.64.0.0/16 dev wan0 src {address}"
            );
            netns::ip_batch(Some(&namespace), &lines.lines().map(str::to_owned).collect::<Vec<_>>()).unwrap();
            self.inside(site, || {
                for (key, value) in [
                    ("ip_forward", "1"),
                    ("conf/all/rp_filter", "0"),
                    ("conf/default/rp_filter", "0"),
                    ("tcp_slow_start_after_idle", "0"),
                ] {
                    std::fs::write(format!("/proc/sys/net/ipv4/{key}"), value).unwrap();
                }
            });
        }
        let port = |site: &str| {
            let mut prefixes = vec![format!("{}/32", self.address(site)).parse().unwrap()];
            if let Some(number) = self.machines.iter().position(|m| *m == site) {
                prefixes.push(format!("100.64.{}.0/24", number + 1).parse().unwrap());
            }
            let (namespace, interface) = (self.namespace(site), "wan0".to_owned());
            Port { site: site.to_owned(), namespace, interface, prefixes }
        };
        let pairs = self.sites().flat_map(|a| self.sites().map(move |b| (a, b))).filter(|(a, b)| a != b);
        let config = WanConfig {
            seed: 1,
            stats_file: self.path("wan.json"),
            capture_file: None,
            capture_bytes_max: default_capture_bytes_max(),
            ports: self.sites().map(port).collect(),
            links: pairs.map(|(a, b)| Direction { from: a.to_owned(), to: b.to_owned(), wire: WIRE }).collect(),
        };
        std::fs::write(self.path("wan.toml"), toml::to_string(&config).unwrap()).unwrap();
        self.start("wan", "user");
        self.until("the WAN", Duration::from_secs(10), || self.path("wan.json").exists());
    }

    fn configure_origin(&self, authority: &Authority, store: &Path) {
        authority.issue(Role::Store, "origin").unwrap().write(self.path("origin-identity")).unwrap();
        let text = format!(
            "listen = '{}:8446'\nstore = '{}'\nidentity = 'origin-identity'\nkeys = '{}'\n",
            self.address("origin"),
            store.display(),
            store.join("keys").display()
        );
        std::fs::write(self.path("store-origin.toml"), text).unwrap();
    }

    fn configure(&self, authority: &Authority, site: &str, signer: &str) {
        authority.issue(Role::Machine, site).unwrap().write(self.path(&format!("{site}-identity"))).unwrap();
        std::fs::write(self.path("token"), "secret\n").unwrap();
        let (address, origin) = (self.address(site), self.address("origin"));
        let number = self.machines.iter().position(|m| *m == site).unwrap() + 1;
        let text = format!(
            "name = '{site}'\nnetwork = '{site}'\nlisten = '{address}:8451'\nstate_dir = '{site}'\ntoken_file = 'token'\n\
             vma = 'http://{address}:1'\nidentity = '{site}-identity'\nsources = ['{origin}:8446']\n\
             transfer_listen = '{address}:8446'\norigin = 'http://{origin}:1'\ncpus = 1\nmemory_mib = 512\n\
             cells = '100.64.{number}.0/24'\ncell_prefix = '{}'\nsigners = ['{signer}']\nwarm = 0\n",
            self.namespace(site)
        );
        std::fs::write(self.path(&format!("machine-{site}.toml")), text).unwrap();
    }

    /// Runs within a site's network.
    pub fn inside<T: Send>(&self, site: &str, f: impl FnOnce() -> T + Send) -> T {
        netns::enter(&netns::path(&self.namespace(site)), f).unwrap()
    }

    fn start(&self, daemon: &str, site: &str) {
        let program = program();
        let file = if daemon == "wan" { "wan.toml".to_owned() } else { format!("{daemon}-{site}.toml") };
        let log = self.path(&format!("{daemon}-{site}.log"));
        let log = std::fs::File::options().append(true).create(true).open(log).unwrap();
        let child = self.inside(site, || {
            Command::new(&program)
                .args([daemon, "--config"])
                .arg(self.path(&file))
                .stdin(Stdio::null())
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .spawn()
                .unwrap_or_else(|e| panic!("{}: {e}; it is built with this test", program.display()))
        });
        self.daemons.lock().unwrap().push((format!("{daemon}-{site}"), child));
    }

    /// Kills a machine's daemon, with no chance to clean up.
    pub fn kill(&self, machine: usize) {
        let name = format!("machine-{}", self.machines[machine]);
        let mut daemons = self.daemons.lock().unwrap();
        let at = daemons.iter().position(|(n, _)| *n == name).unwrap();
        let (_, mut daemon) = daemons.remove(at);
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// Kills what serves the guest of a machine: its pagers, and its ends of relays.
    pub fn kill_helpers(&self, machine: usize) {
        for words in [" pager --config ", " relay --config "] {
            assert!(self.made(machine, words) > 0, "machine {machine} has no{words}");
            self.end_made(machine, words);
        }
    }

    /// Ends of relays that run for a machine.
    pub fn relays(&self, machine: usize) -> usize {
        self.made(machine, " relay --config ")
    }

    /// Processes that a machine made, with such words in their command lines.
    pub fn made(&self, machine: usize, words: &str) -> usize {
        self.pids(machine, words).len()
    }

    fn pids(&self, machine: usize, words: &str) -> Vec<i32> {
        let folder = format!("{}/", self.path(self.machines[machine]).display());
        self.processes(|line| line.contains(&folder) && line.contains(words))
    }

    /// Kills the processes that [`World::made`] counts.
    pub fn end_made(&self, machine: usize, words: &str) {
        for pid in self.pids(machine, words) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }

    /// Starts it again.
    pub fn restart(&self, machine: usize) {
        self.start("machine", self.machines[machine]);
        self.until("a machine's return", Duration::from_secs(20), || self.try_seen(machine).is_some());
    }

    /// Cuts a machine off from all others, or lets it back.
    pub fn cut_off(&self, machine: usize, off: bool) {
        let change = if off { "down" } else { "up" };
        let address = self.address(self.machines[machine]);
        let mut lines = vec![format!("link set wan0 {change}")];
        if !off {
            lines.push(format!("route replace 198.18.0.0/15 dev wan0 src {address}"));
            lines.push(format!("route replace 100.64.0.0/16 dev wan0 src {address}"));
        }
        netns::ip_batch(Some(&self.namespace(self.machines[machine])), &lines).unwrap();
    }

    /// What a daemon logged.
    pub fn log(&self, machine: usize) -> String {
        std::fs::read_to_string(self.path(&format!("machine-{}.log", self.machines[machine]))).unwrap_or_default()
    }

    pub fn logs(&self) -> String {
        let each = (0..self.machines.len()).map(|m| {
            let lines: Vec<String> =
                self.log(m).lines().filter(|l| !l.contains("renewed")).map(str::to_owned).collect();
            format!("== {}\n{}\n", self.machines[m], lines[lines.len().saturating_sub(40)..].join("\n"))
        });
        each.collect()
    }

    pub fn until(&self, what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
        let began = Instant::now();
        while !done() {
            assert!(began.elapsed() < limit, "{what} did not happen in {limit:?}\n{}", self.logs());
            wait(Duration::from_millis(20));
        }
    }

    fn instance(&self) -> InstanceId {
        InstanceId { service: self.image.parse().unwrap(), number: 0 }
    }

    /// Does a step at a machine; its fault, if it has one.
    pub fn step(&self, machine: usize, step: &Step) -> Result<Seen, String> {
        let body = serde_json::to_string(step).unwrap();
        let said = self.http(machine, "POST", "/v1/step", &body).ok_or("the daemon does not answer")?;
        let outcome: Outcome = serde_json::from_str(&said).map_err(|e| format!("{e}: {said}"))?;
        outcome.fault.map_or(Ok(outcome.seen), |fault| Err(format!("{}; {}", fault.problem, fault.hint)))
    }

    /// Makes the singleton's cell.
    pub fn prepare(&self, machine: usize, from: Singleton, ports: &[u16]) -> Result<Seen, String> {
        self.step(
            machine,
            &Step::Prepare(CellSpec {
                instance: self.instance(),
                image: self.image.clone(),
                ports: ports.to_vec(),
                backends: vec![],
                memory_mib: 128,
                singleton: Some(from),
            }),
        )
    }

    pub fn stage(&self, machine: usize) {
        let step = Step::Stage { service: self.image.parse().unwrap(), image: self.image.clone(), urgent: false };
        self.step(machine, &step).unwrap();
        let whole = || {
            let seen = self.try_seen(machine)?;
            seen.images.iter().find(|i| i.image == self.image)?.seen.as_ref().map(|i| i.complete())
        };
        self.until("staging", Duration::from_secs(60), || whole() == Some(true));
    }

    pub fn resume(&self, machine: usize) -> Result<Seen, String> {
        self.step(machine, &Step::Resume { instance: self.instance() })
    }

    pub fn suspend(&self, machine: usize) -> Result<Seen, String> {
        self.step(machine, &Step::Suspend { instance: self.instance() })
    }

    pub fn release(&self, machine: usize) -> Result<Seen, String> {
        self.step(machine, &Step::Release { instance: self.instance() })
    }

    pub fn try_seen(&self, machine: usize) -> Option<Seen> {
        serde_json::from_str(&self.http(machine, "GET", "/v1/seen", "")?).ok()
    }

    /// The singleton's cell at a machine.
    pub fn cell_seen(&self, machine: usize) -> Option<CellSeen> {
        self.try_seen(machine)?.cells.into_iter().find(|c| c.instance == self.instance())
    }

    /// Where users reach the guest through a machine's network.
    pub fn door(&self, machine: usize, port: u16) -> SocketAddr {
        SocketAddr::new(cell(machine).into(), port)
    }

    fn http(&self, machine: usize, method: &str, path: &str, body: &str) -> Option<String> {
        let site = self.machines[machine];
        let address = SocketAddr::new(self.address(site).into(), 8451);
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: m\r\nauthorization: Bearer secret\r\ncontent-type: application/json\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
        self.inside(site, || {
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok()?;
            stream.set_read_timeout(Some(STEP_LIMIT)).unwrap();
            stream.write_all(request.as_bytes()).ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned())
        })
    }

    /// QEMUs of this world whose guest runs, by machine.
    pub fn running(&self) -> Vec<usize> {
        (0..self.machines.len()).filter(|m| self.guest_runs(*m)).collect()
    }

    fn guest_runs(&self, machine: usize) -> bool {
        let qmp = self.path(self.machines[machine]).join("cells").join(self.instance().to_string()).join("qmp");
        let asked = || -> std::io::Result<String> {
            let mut socket = std::os::unix::net::UnixStream::connect(&qmp)?;
            socket.set_read_timeout(Some(Duration::from_secs(2)))?;
            socket.write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"query-status\"}\n")?;
            let (mut text, mut buffer) = (String::new(), [0; 4096]);
            while !text.contains("\"status\"") {
                let n = socket.read(&mut buffer)?;
                if n == 0 {
                    break;
                }
                text.push_str(&String::from_utf8_lossy(&buffer[..n]));
            }
            Ok(text)
        };
        asked().is_ok_and(|text| text.contains("\"running\": true") || text.contains("\"running\":true"))
    }

    /// How far a machine's part in it is, as it wrote down: `held`, `saving`, `handed`.
    pub fn part(&self, machine: usize) -> Option<String> {
        let path = self.path(self.machines[machine]).join("tenures").join(format!("{}.json", self.image));
        let written: serde_json::Value = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        match written.get("tenure")?.get("part")? {
            serde_json::Value::String(part) => Some(part.clone()),
            part => part.as_object()?.keys().next().cloned(),
        }
    }

    /// Machines that hold it.
    pub fn holders(&self) -> Vec<usize> {
        (0..self.machines.len()).filter(|m| self.part(*m).as_deref() == Some("held")).collect()
    }

    /// Tells a machine that handed it on to begin it from its built image.
    pub fn step_begin(&self, machine: usize) -> Result<Seen, String> {
        self.prepare(machine, Singleton::Begin, &crate::PORTS)?;
        self.resume(machine)
    }

    /// Processes of this world whose command line is such.
    fn processes(&self, is: impl Fn(&str) -> bool) -> Vec<i32> {
        let dir = self.dir.path().to_str().unwrap();
        let pids =
            std::fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse::<i32>().ok());
        let ours = |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            (line.contains(dir) || line.contains(&self.name)) && is(&line)
        };
        pids.filter(ours).filter(|pid| *pid != std::process::id() as i32).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        for (_, daemon) in self.daemons.lock().unwrap().iter_mut() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        for pid in self.processes(|_| true) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        let names = std::fs::read_dir("/run/netns").unwrap().filter_map(|e| e.ok()?.file_name().into_string().ok());
        for name in names.filter(|n| n.starts_with(&self.name)) {
            let _ = netns::ip_batch(None, &[format!("netns del {name}")]);
        }
        for site in self.machines.clone() {
            let _ = std::fs::remove_dir_all(Path::new("/dev/shm").join(self.namespace(site)));
        }
    }
}

/// The daemons, which are built with this test.
fn program() -> PathBuf {
    std::env::current_exe().unwrap().with_file_name("../examples/daemons")
}
