//! What a pager process is told, as JSON.

use crate::error::{Error, Result, io};
use serde::{Deserialize, Serialize, Serializer};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use vmatrix_vma_transfer::SourcesConfig;

/// Largest configuration file.
const CONFIG_MAX: u64 = 1 << 20;

/// A pager: one image on one machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// File with the signed manifest, as JSON.
    pub image: PathBuf,
    /// Where that file comes later, and with it this configuration anew: the signed manifest of the image that it begins
    /// from. What a singleton's memory is becomes known when it stops elsewhere; disks that it only reads stay what they
    /// are, and are served at once.
    #[serde(default)]
    pub before: Option<PathBuf>,
    /// Public keys of whose images are run, 64 hex digits each.
    pub signers: Vec<String>,
    /// The memory file, on a tmpfs; made if it is not there. For a singleton it is new with each resume: what it
    /// holds is believed.
    pub memory: PathBuf,
    /// The disks of the image, over NBD as they arrive.
    #[serde(default)]
    pub disks: Option<DisksConfig>,
    /// Socket on which the pager is told what to do; for root only.
    pub control: PathBuf,
    /// File with the owner's key of a sealed image; without it the sources are asked for the key.
    #[serde(default)]
    pub key: Option<PathBuf>,
    /// Folder of the local chunk store.
    pub store: PathBuf,
    /// Who else has chunks.
    #[serde(serialize_with = "sources")]
    pub sources: SourcesConfig,
    /// Whether one guest maps the memory and writes to it (a singleton), and writes to the image's data, if it has any.
    #[serde(default)]
    pub shared: bool,
    /// Cap on what is fetched ahead of need, past the working set: megabits a second.
    #[serde(default)]
    pub background_mbit: Option<u64>,
    /// Fetch ahead: the working set, then the rest. Without it pages come only when a guest touches them.
    #[serde(default = "yes")]
    pub working_set: bool,
    /// Fetch the rest behind the working set, so that guests come to depend on nobody.
    #[serde(default = "yes")]
    pub background: bool,
    /// Put pages in one by one, only as they are touched, so that `recorded` has them all.
    #[serde(default)]
    pub record: bool,
    /// Milliseconds that a guest may wait for a page before the status says that it is stuck.
    #[serde(default = "ten_seconds")]
    pub stuck_ms: u64,
}

/// Where the disks of an image are.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DisksConfig {
    /// Folder with a sparse file for each disk, which keeps what was read of it, and what was written. Data that is
    /// written belongs to one life of one memory file: where that is new, the folder must be too.
    pub dir: PathBuf,
    /// NBD socket; its exports are called as [`vmatrix_vma_image::machine::export`] says.
    pub socket: PathBuf,
}

impl DisksConfig {
    /// The file of the disk that is exported under this name; a snapshot reads written data from it.
    pub fn file(&self, export: &str) -> PathBuf {
        self.dir.join(format!("{export}.part"))
    }
}

fn yes() -> bool {
    true
}

fn ten_seconds() -> u64 {
    10_000
}

fn sources<S: Serializer>(config: &SourcesConfig, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serde_json::json!({
        "identity": config.identity,
        "addresses": config.addresses,
        "serving": config.serving,
        "limits": { "background_mbit": config.limits.background_mbit },
    })
    .serialize(serializer)
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// It cannot be read, or is not one.
    pub fn read(path: &Path) -> Result<Config> {
        let mut text = String::new();
        let file = File::open(path).map_err(io("open", path))?;
        file.take(CONFIG_MAX).read_to_string(&mut text).map_err(io("read", path))?;
        let bad = |e: serde_json::Error| Error::Config { path: path.to_owned(), problem: e.to_string() };
        serde_json::from_str(&text).map_err(bad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again_and_what_is_left_out_has_its_default() {
        let text = r#"{"image":"/i","signers":["aa"],"memory":"/m","control":"/c","store":"/s",
            "sources":{"identity":"/id","addresses":["127.0.0.1:1"],"limits":{"background_mbit":5}}}"#;
        let config: Config = serde_json::from_str(text).unwrap();
        assert!(config.working_set && config.background && !config.shared && !config.record && config.disks.is_none());
        assert_eq!(config.stuck_ms, 10_000);
        let again: Config = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(format!("{again:?}"), format!("{config:?}"));
        assert!(serde_json::from_str::<Config>(&text.replacen("memory", "memmory", 1)).is_err());
    }
}
