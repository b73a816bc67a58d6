//! Reads cpa.toml and the files it names, and says what is wrong with them.

use anyhow::{Context, bail};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmatrix_model::NetworkId;
use vmatrix_model::config::parse_toml;
use vmatrix_model::fleet::Fleet;

/// cpa.toml as written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    listen: SocketAddr,
    #[serde(default)]
    page_listen: Option<SocketAddr>,
    state_dir: PathBuf,
    token_file: PathBuf,
    fleet_file: PathBuf,
    images: String,
    #[serde(default = "tick_ms")]
    tick_ms: u64,
    #[serde(default)]
    agents: BTreeMap<NetworkId, Agents>,
}

/// Half a second: a crowd is judged by whole seconds, and two ticks a second find each soon after it ended.
fn tick_ms() -> u64 {
    500
}

/// Where one network's daemons listen.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Agents {
    pub vma: String,
    pub edge: String,
}

/// What the CPA runs by.
#[derive(Debug)]
pub(crate) struct Config {
    pub listen: SocketAddr,
    /// Where the page and what it shows need no token; such a door is for this machine.
    pub page_listen: Option<SocketAddr>,
    pub state_dir: PathBuf,
    pub token: String,
    pub fleet: Fleet,
    /// The origin's base URL.
    pub images: String,
    pub tick: Duration,
    pub agents: BTreeMap<NetworkId, Agents>,
}

fn text(path: &Path, what: &str) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read the {what} {}", path.display()))
}

pub(crate) fn read(path: &Path) -> anyhow::Result<Config> {
    let name = path.display().to_string();
    let file: File = parse_toml(&name, &text(path, "configuration")?)?;
    let dir = path.parent().unwrap_or(Path::new("."));
    if !(50..=1000).contains(&file.tick_ms) {
        bail!("{name}: tick_ms = {} must be 50 to 1000: crowds are judged second by second", file.tick_ms);
    }
    if file.page_listen == Some(file.listen) {
        bail!(
            "{name}: page_listen is the same address as listen\n\nhint: page_listen asks for no token, so give it an address of this machine alone, like 127.0.0.1:8439"
        );
    }
    let token_file = dir.join(&file.token_file);
    let token = text(&token_file, "token")?.trim().to_owned();
    if token.is_empty() {
        bail!(
            "{} is empty\n\nhint: put the fleet's token in it, one line, the same for every daemon",
            token_file.display()
        );
    }
    let fleet_file = dir.join(&file.fleet_file);
    let fleet: Fleet = parse_toml(&fleet_file.display().to_string(), &text(&fleet_file, "fleet")?)?;
    fleet.check().with_context(|| fleet_file.display().to_string())?;
    if let Some(network) = fleet.networks.iter().find(|n| !file.agents.contains_key(&n.name)) {
        bail!(
            "{name}: network {} has no [agents.{}]\n\nhint: say where its vma and edge listen",
            network.name,
            network.name
        );
    }
    if let Some(network) = file.agents.keys().find(|n| fleet.network(n).is_none()) {
        bail!("{name}: [agents.{network}] is not a network of {}", fleet_file.display());
    }
    let urls = file.agents.values().flat_map(|a| [&a.vma, &a.edge]).chain([&file.images]);
    for url in urls {
        if !url.starts_with("http://") {
            bail!("{name}: {url:?} is not an address like http://198.19.1.1:8441");
        }
    }
    let tick = Duration::from_millis(file.tick_ms);
    Ok(Config {
        listen: file.listen,
        page_listen: file.page_listen,
        state_dir: dir.join(file.state_dir),
        token,
        fleet,
        images: file.images,
        tick,
        agents: file.agents,
    })
}
