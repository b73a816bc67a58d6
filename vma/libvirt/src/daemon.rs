//! A libvirt daemon of one's own, for tests and measurements: its state, its sockets and its VMs are in one folder and
//! one process namespace, and go with it.
//!
//! ```text
//! unshare ─▶ own mounts over /etc/libvirt, /var/lib/libvirt, /var/log/libvirt, /var/cache/libvirt, /run
//!         └▶ own processes ─▶ sh (starts it again, collects what it leaves) ─▶ libvirtd ─▶ QEMU …
//! ```
//! As root, libvirt has one place for everything and no session daemon, so the places themselves are changed, for it
//! alone. The network namespace stays the caller's.

use crate::error::{Error, Result, io};
use crate::libvirt::Connection;
use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What a system's `/etc/libvirt/qemu.conf` must say as well: QEMU opens its tap itself. The rest of the list is what
/// libvirt allows anyway.
pub const QEMU_CONF: &str = "cgroup_device_acl = [\"/dev/null\", \"/dev/full\", \"/dev/zero\", \"/dev/random\", \
                             \"/dev/urandom\", \"/dev/ptmx\", \"/dev/kvm\", \"/dev/userfaultfd\", \"/dev/net/tun\"]\n";
/// What a daemon without a system round it needs: no log daemon, no control groups, no security module.
const ALONE: &str = "stdio_handler = \"file\"\ncgroup_controllers = []\nsecurity_driver = \"none\"\n";
/// The first start asks QEMU for all it can do, which takes seconds; a kept cache saves that.
const START_LIMIT: Duration = Duration::from_secs(40);
/// Folder in the daemon's, place it takes.
const PLACES: [(&str, &str); 5] = [
    ("etc", "/etc/libvirt"),
    ("lib", "/var/lib/libvirt"),
    ("log", "/var/log/libvirt"),
    ("cache", "/var/cache/libvirt"),
    ("run", "/run"),
];
/// The first process of the namespace: it starts the daemon again and again, and collects what libvirt's processes leave.
const SCRIPT: &str = "command -v libvirtd || { echo 'libvirtd is missing; install it with apt-get install -t \
                      bookworm-backports libvirt-daemon libvirt-daemon-driver-qemu'; exit 1; }; \
                      while :; do libvirtd -f \"$0\" -p \"$1\" & wait; sleep 0.2; done";

/// A running daemon. Dropped, it is killed, with every VM it started.
#[derive(Debug)]
pub struct Daemon {
    folder: PathBuf,
    child: Child,
}

impl Daemon {
    /// Starts a daemon that keeps everything in `folder`, which others must be able to search and whose path has at
    /// most 80 bytes. Needs root.
    ///
    /// # Errors
    /// Its program is missing, or it does not answer in time; then with the end of its log.
    pub async fn start(folder: &Path) -> Result<Daemon> {
        for name in PLACES.iter().map(|(name, _)| *name).chain(["sockets"]) {
            let place = folder.join(name);
            std::fs::create_dir_all(&place).map_err(io("make", &place))?;
            std::fs::set_permissions(&place, Permissions::from_mode(0o711)).map_err(io("open", &place))?;
        }
        let write = |name: &str, text: &str| {
            let file = folder.join(name);
            std::fs::write(&file, text).map_err(io("write", &file))
        };
        write("etc/qemu.conf", &format!("{QEMU_CONF}{ALONE}"))?;
        let at = folder.display();
        write(
            "libvirtd.conf",
            &format!(
                "unix_sock_dir = \"{at}/sockets\"\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\n\
                 log_outputs = \"3:file:{at}/libvirtd.log\"\n"
            ),
        )?;
        let mut daemon = Daemon { child: unshare(folder)?, folder: folder.to_owned() };
        daemon.ready().await?;
        Ok(daemon)
    }

    /// Where to connect to.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}/sockets/libvirt-sock", self.folder.display())
    }

    /// Where it keeps what QEMU says.
    pub fn logs(&self) -> PathBuf {
        self.folder.join("log/qemu")
    }

    /// The daemon's process, unless it is between one and the next: one that ended is started again.
    pub fn pid(&self) -> Option<i32> {
        let first = children(self.child.id())?.first().copied()?;
        let is_it =
            |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c.trim() == "libvirtd");
        // The rest are QEMUs, whom libvirt leaves to the first process.
        children(first)?.into_iter().find(is_it).and_then(|pid| i32::try_from(pid).ok())
    }

    async fn ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        let log = self.folder.join("libvirtd.log");
        loop {
            let uri = self.uri();
            let opened = tokio::task::spawn_blocking(move || Connection::open(&uri).map(drop)).await;
            if matches!(opened, Ok(Ok(()))) {
                return Ok(());
            }
            let ended = self.child.try_wait().map_err(io("wait for", Path::new("libvirtd")))?;
            if ended.is_some() || Instant::now() > deadline {
                let said = [self.folder.join("output"), log].map(|file| crate::process::tail(&file)).join("; ");
                return Err(Error::NoDaemon { uri: self.uri(), said });
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // The first process of the namespace goes with its parent, and all others with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn children(pid: u32) -> Option<Vec<u32>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    Some(text.split_whitespace().filter_map(|word| word.parse().ok()).collect())
}

fn unshare(folder: &Path) -> Result<Child> {
    let output = folder.join("output");
    let file = File::create(&output).map_err(io("write", &output))?;
    let copy = file.try_clone().map_err(io("share", &output))?;
    let binds: String = PLACES.iter().map(|(name, to)| format!("mount --bind \"$2/{name}\" {to} && ")).collect();
    Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["sh", "-c", &format!("{binds}{SCRIPT}")])
        .args([folder.join("libvirtd.conf"), folder.join("libvirtd.pid"), folder.to_owned()])
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(copy)
        .spawn()
        .map_err(io("run", Path::new("unshare")))
}
