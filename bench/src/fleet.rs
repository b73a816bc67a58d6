//! The daemons of a bench as they are deployed: one authority, one token, one program.
//!
//! ```text
//! fleet folder: authority, token, a certificate per agent ─▶ `vmatrix <verb> --config` in a site's namespace
//! ```

use crate::Bench;
use crate::process::Running;
use crate::stop::Stop;
use crate::world::Site;
use anyhow::Context;
use serde_json::{Value, json};
use std::fs;
use std::net::{SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use vmatrix_vma_transfer::identity::{Authority, Role};

/// Where cells' tunnels ask for their places.
pub const ORIGIN_PORT: u16 = 8445;
/// Where a store serves machines.
pub const STORE_PORT: u16 = 8446;
/// A daemon is up in half a second, on a busy machine some more.
pub const START_LIMIT: Duration = Duration::from_secs(30);

/// What all agents of a bench share: who belongs to it, and the token.
pub struct Fleet {
    authority: Authority,
    dir: PathBuf,
    token: String,
}

impl Fleet {
    /// Founds one in `dir`.
    ///
    /// # Errors
    /// The folder is taken or cannot be written.
    pub fn found(dir: PathBuf) -> anyhow::Result<Fleet> {
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let authority = Authority::create(dir.join("authority"))?;
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|e| anyhow::anyhow!("this machine has no random bytes: {e}"))?;
        let token: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        let fleet = Fleet { authority, token, dir };
        fs::write(fleet.token_file(), &fleet.token).context("cannot write the fleet's token")?;
        Ok(fleet)
    }

    /// Where the token is.
    pub fn token_file(&self) -> PathBuf {
        self.dir.join("token")
    }

    /// The token.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Folder with an agent's certificate, which is made once.
    ///
    /// # Errors
    /// It cannot be made or written.
    pub fn identity(&self, role: Role, id: &str) -> anyhow::Result<PathBuf> {
        let folder = self.dir.join(format!("identity-{id}"));
        if !folder.exists() {
            self.authority.issue(role, id)?.write(&folder)?;
        }
        Ok(folder)
    }
}

/// Starts the store daemon at a site, over the store that benches read.
///
/// # Errors
/// It does not start, with its words.
pub fn start_store(bench: &Bench, fleet: &Fleet, site: &Site) -> anyhow::Result<Running> {
    start_store_of(bench, fleet, site, &bench.options.store)
}

/// Starts the store daemon at a site, over the store in `folder`.
///
/// # Errors
/// It does not start, with its words.
pub fn start_store_of(bench: &Bench, fleet: &Fleet, site: &Site, folder: &Path) -> anyhow::Result<Running> {
    let listen = SocketAddrV4::new(site.address, STORE_PORT);
    let store = std::path::absolute(folder).context("cannot find the store")?;
    let config = json!({
        "listen": listen,
        "store": store,
        "identity": fleet.identity(Role::Store, "store")?,
        "keys": store.join("keys"),
        // Every run is to find the same image.
        "learn": false,
    });
    let mut store = daemon(bench, fleet, "store", &format!("store-{}", site.name), &config, site)?;
    until_listening(&bench.stop, &mut store, site, listen)?;
    Ok(store)
}

/// Starts `vmatrix <verb> --config` at a site.
///
/// # Errors
/// The file cannot be written, or the program cannot be started.
pub fn daemon(
    bench: &Bench,
    fleet: &Fleet,
    verb: &str,
    name: &str,
    config: &Value,
    site: &Site,
) -> anyhow::Result<Running> {
    let file = fleet.dir.join(format!("{name}.toml"));
    fs::write(&file, toml::to_string(config)?).with_context(|| format!("cannot write {}", file.display()))?;
    let mut command = Command::new(&bench.options.program);
    command
        .args([verb, "--config"])
        .arg(&file)
        .stdin(Stdio::null())
        .env("VMATRIX_LOG", std::env::var_os("VMATRIX_LOG").unwrap_or_else(|| "info".into()))
        .env("NO_COLOR", "1");
    let log = bench.place.disk().join(format!("{name}.log"));
    Running::start(&format!("vmatrix {verb}"), &mut command, &site.namespace, &log)
}

/// Waits until a daemon takes connections.
///
/// # Errors
/// It ends, with its last words, or takes none in time.
pub fn until_listening(stop: &Stop, process: &mut Running, site: &Site, listen: SocketAddrV4) -> anyhow::Result<()> {
    stop.until(&format!("somebody listening at {listen}"), START_LIMIT, Duration::from_millis(10), || {
        process.check()?;
        let taken = site.namespace.run(|| TcpStream::connect_timeout(&listen.into(), Duration::from_millis(200)))?;
        Ok(taken.ok().map(drop))
    })
}
