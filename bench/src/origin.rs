//! The origin's side of a guest whose data stay there: database, gateway, and the way to it for guests that no
//! product brings.
//!
//! ```text
//! site a: PostgreSQL ─ `vmatrix origin` ◀═ tunnel per cell (the product's own)
//!                                       ◀═ `vmatrix tunnel` of the target's bridge ◀─ NAT ◀─ a baseline's guest
//! ```
//! A baseline's tunnel is up before its guest comes; the product makes one within the order.

use crate::Bench;
use crate::fleet::{Fleet, ORIGIN_PORT, daemon, until_listening};
use crate::guests::{self, Image, Kind};
use crate::process::Running;
use crate::world::{Site, World};
use anyhow::{Context, bail};
use serde::Deserialize;
use serde_json::json;
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::{Command, Stdio};
use std::time::Duration;
use vmatrix_lab::namespace::{Namespace, ip_batch};
use vmatrix_model::manifest::PartKind;
use vmatrix_vma_build::postgres::Server;
use vmatrix_vma_image::{Store, chunks};

/// Where cells' tunnels end, UDP.
const TUNNEL_PORT: u16 = 51820;
/// The owner's intranet: what holds the back ends' addresses.
const INTRANET_PREFIX: u8 = 24;
/// A baseline's end of its tunnel.
const DEVICE: &str = "vpn0";
/// A handshake over the longest link, and the daemon's start on a busy machine.
const TUNNEL_LIMIT: Duration = Duration::from_secs(30);
/// What a tunnel or a gateway may take to say goodbye.
const PATIENCE: Duration = Duration::from_secs(2);

/// A database and the gateway before it. Dropped, both are gone.
pub struct Origin {
    tunnel: Option<Running>,
    gateway: Option<Running>,
    _database: Server,
}

/// What a tunnel writes about itself.
#[derive(Deserialize)]
struct Status {
    ready: bool,
}

impl Origin {
    /// Starts what `image` needs at site `near`, and a tunnel from the bridge of `far` for guests of baselines; none
    /// for an image without back ends. The database has this bench's mark.
    ///
    /// # Errors
    /// PostgreSQL is missing, the seed cannot be read, or a daemon does not start, with its words.
    pub fn start(bench: &Bench, fleet: &Fleet, world: &World, image: &Image) -> anyhow::Result<Option<Origin>> {
        let (near, far) = (world.site(0)?, world.site(1)?);
        let Some(backend) = image.manifest.guest.backends.first() else { return Ok(None) };
        let at = SocketAddrV4::new(backend.address, backend.port);
        ip_batch(Some(&near.namespace), &format!("addr add {}/32 dev lo\nlink set lo up\n", at.ip()))?;
        let seed = seed(&bench.store, image, bench)?;
        let folder = bench.place.open_folder("db")?;
        let database = Server::start(Some(&near.namespace.path()), &folder, *at.ip(), at.port(), Some(&seed))?;
        if image.kind == Kind::Agenda {
            let marked = database.sql("davical", &guests::set_mark(&bench.known.mark))?;
            if marked.lines().last().is_none_or(|n| n.trim() == "0") {
                bail!("the calendar in the image's seed has no entry to mark; build {} again", image.manifest.name);
            }
        }
        let intranet = ipnet::Ipv4Net::new(*at.ip(), INTRANET_PREFIX)?.trunc();
        let listen = SocketAddrV4::new(near.address, ORIGIN_PORT);
        let config = json!({
            "listen": listen,
            "state_dir": bench.place.disk().join("origin"),
            "token_file": fleet.token_file(),
            "store": std::path::absolute(&bench.options.store).context("cannot find the store")?,
            "tunnel_listen": SocketAddrV4::new(near.address, TUNNEL_PORT),
            "intranet": intranet,
            "backends": [at],
        });
        let mut gateway = daemon(bench, fleet, "origin", "origin", &config, near)?;
        until_listening(&bench.stop, &mut gateway, near, listen)?;
        let tunnel = tunnel(bench, fleet, near.address, far)?;
        Ok(Some(Origin { tunnel: Some(tunnel), gateway: Some(gateway), _database: database }))
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        // The tunnel says goodbye to the gateway.
        for process in [self.tunnel.take(), self.gateway.take()].into_iter().flatten() {
            process.end(PATIENCE);
        }
    }
}

/// What the back end held when the guest was warmed, as SQL.
fn seed(store: &Store, image: &Image, bench: &Bench) -> anyhow::Result<String> {
    let part = image.manifest.part(PartKind::BackendSeed);
    let part = part.with_context(|| format!("image {} has a back end and no seed for it", image.manifest.name))?;
    let file = bench.place.disk().join("seed.sql");
    chunks::assemble(part, store, &file)?;
    fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
}

/// Joins the bridge of a site with the origin, for guests that a baseline brings there.
fn tunnel(bench: &Bench, fleet: &Fleet, origin: Ipv4Addr, site: &Site) -> anyhow::Result<Running> {
    let status = bench.place.disk().join("tunnel.json");
    let mut command = Command::new(&bench.options.program);
    command
        .args(["tunnel", "--network", &site.name, "--cell", "baseline-0", "--device", DEVICE, "--netns"])
        .arg(site.namespace.path())
        .args(["--origin", &format!("http://{origin}:{ORIGIN_PORT}"), "--token-file"])
        .arg(fleet.token_file())
        .arg("--status")
        .arg(&status)
        .stdin(Stdio::null());
    let log = bench.place.disk().join("tunnel.log");
    let mut process = Running::start("vmatrix tunnel", &mut command, &site.namespace, &log)?;
    bench.stop.until("the baselines' tunnel", TUNNEL_LIMIT, Duration::from_millis(20), || {
        process.check()?;
        let text = fs::read(&status).unwrap_or_default();
        Ok(serde_json::from_slice::<Status>(&text).ok().filter(|s| s.ready).map(drop))
    })?;
    forward(&site.namespace)?;
    Ok(process)
}

/// Lets guests of the bridge out by the tunnel, with the tunnel's own address.
fn forward(inside: &Namespace) -> anyhow::Result<()> {
    let rules = format!(
        "table ip vmb {{\n\
         chain out {{ type nat hook postrouting priority srcnat; oifname \"{DEVICE}\" masquerade; }}\n\
         chain fit {{ type filter hook forward priority mangle; \
         oifname \"{DEVICE}\" tcp flags syn tcp option maxseg size set rt mtu; }}\n}}\n"
    );
    inside.run(|| -> anyhow::Result<()> {
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("cannot let packets through")?;
        let mut command = Command::new("nft");
        command.arg(rules);
        crate::process::output(&mut command, "nftables").map(drop)
    })?
}
