//! What an owner writes: packages, files, how to start, how to tell that it serves, what to warm it with.

use serde::Deserialize;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use vmatrix_model::config::parse_toml;
use vmatrix_model::manifest::{Health, PartKind};
use vmatrix_model::{Digest, ServiceId};
use vmatrix_vma_image::error::{Error, Result, io};

/// A recipe. Unknown keys are errors.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Of the image; a DNS label.
    pub name: String,
    /// One sentence for people.
    pub about: String,
    /// The base it stands on, by the name of its file in `base` beside the recipe; without one it brings all it needs.
    #[serde(default)]
    pub base: Option<String>,
    /// Debian packages; their dependencies come with them, recommendations do not.
    pub packages: Vec<String>,
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// TCP ports it answers on.
    pub ports: Vec<u16>,
    /// Paths (dpkg globs) that are left out of the packages.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Packages of which only some files are taken, without dependencies: data.
    #[serde(default, rename = "extract")]
    pub extracts: Vec<Extract>,
    /// Files beside the recipe that are copied in.
    #[serde(default, rename = "file")]
    pub files: Vec<CopiedFile>,
    /// Shell lines run once inside the finished root file system, before it becomes a disk.
    #[serde(default)]
    pub setup: Vec<String>,
    /// Shell lines run at boot, in order; each must return (daemons go to the background).
    pub start: Vec<String>,
    pub health: Health,
    /// Real requests that warm the guest before it is suspended.
    #[serde(default, rename = "warm")]
    pub warm: Vec<Request>,
    #[serde(default)]
    pub backend: Option<BackendRecipe>,
    /// A disk that it writes. Such a service is a singleton: its writes are not thrown away.
    #[serde(default)]
    pub data: Option<DataRecipe>,
}

/// A disk that the guest writes, empty when it is built.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataRecipe {
    /// Its size, MiB, 16 to 65536; what was never written takes no room.
    pub mib: u32,
    /// The folder where it is found inside the guest.
    pub mount: String,
}

/// Files taken from a package.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extract {
    pub package: String,
    /// Paths within the package.
    pub paths: Vec<String>,
    /// The folder they are put into.
    pub to: String,
}

/// A file of the recipe's own.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopiedFile {
    /// Relative to the recipe.
    pub from: PathBuf,
    /// Absolute, inside the guest.
    pub to: String,
    #[serde(default)]
    pub executable: bool,
}

/// A request, sent `times` times. `{n}` in path and body counts from 0.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    #[serde(default = "one")]
    pub times: u32,
    #[serde(default = "get")]
    pub method: String,
    pub port: u16,
    #[serde(default)]
    pub tls: bool,
    pub path: String,
    /// `name:password`.
    #[serde(default)]
    pub user: Option<String>,
    #[serde(default)]
    pub content_type: Option<String>,
    #[serde(default)]
    pub body: Option<String>,
    /// Statuses that are right.
    pub status: Vec<u16>,
    /// Content type that is right, if it matters: some programs send their errors with status 200.
    #[serde(default)]
    pub answers: Option<String>,
    /// Whether its times make the image's `answer_ms`.
    #[serde(default)]
    pub measured: bool,
}

fn one() -> u32 {
    1
}
fn get() -> String {
    "GET".to_owned()
}

/// The database that stays at the origin.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackendRecipe {
    pub name: String,
    pub engine: Engine,
    /// Its address in the origin's intranet.
    pub address: Ipv4Addr,
    pub port: u16,
    pub database: String,
    /// Whom the application connects as.
    pub user: String,
    pub password: String,
    /// Shell lines run inside the finished root file system that make the schema by the package's own
    /// means; `PGHOST`, `PGPORT` and `PGUSER` lead to the server as its superuser.
    pub schema: Vec<String>,
    /// SQL run in `database` after them.
    #[serde(default)]
    pub sql: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    Postgresql,
}

/// Sizes of a disk that is written, MiB: its journal and what describes it take some 5.
const DATA_MIB: std::ops::RangeInclusive<u32> = 16..=65_536;
/// Most times one request is sent: with 150 ms an answer that is two minutes.
const TIMES_MAX: u32 = 800;

/// Reads and checks a recipe; the digest is of it and every file it copies.
///
/// # Errors
/// Unknown or missing keys with the nearest right one, values out of range, files that are not there.
pub fn read(file: &Path) -> Result<(Recipe, Digest)> {
    let text = std::fs::read_to_string(file).map_err(io("read recipe", file))?;
    let recipe: Recipe = parse_toml(&file.display().to_string(), &text)?;
    recipe.check().map_err(|problem| Error::BadRecipe { file: file.to_owned(), problem })?;
    let mut hasher = Hashed::default();
    hasher.add(text.as_bytes());
    for copied in &recipe.files {
        let path = beside(file, &copied.from);
        hasher.add(&std::fs::read(&path).map_err(io("read", &path))?);
    }
    Ok((recipe, hasher.end()))
}

/// A file that stands beside the recipe.
pub(crate) fn beside(recipe: &Path, file: &Path) -> PathBuf {
    recipe.parent().unwrap_or(Path::new(".")).join(file)
}

/// Digests several things, each with its length, so that none runs into the next.
#[derive(Default)]
pub(crate) struct Hashed(Vec<u8>);

impl Hashed {
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(&Digest::of(bytes).0);
    }
    pub(crate) fn end(&self) -> Digest {
        Digest::of(&self.0)
    }
}

impl Recipe {
    /// Gives it another name or another size of memory.
    ///
    /// # Errors
    /// What it becomes cannot be built.
    pub fn change(&mut self, file: &Path, name: Option<&str>, memory_mib: Option<u64>) -> Result<()> {
        self.name = name.map_or_else(|| std::mem::take(&mut self.name), str::to_owned);
        self.memory_mib = memory_mib.unwrap_or(self.memory_mib);
        self.check().map_err(|problem| Error::BadRecipe { file: file.to_owned(), problem })
    }

    /// The disks of its guest.
    pub fn disks(&self) -> Vec<PartKind> {
        let base = self.base.iter().map(|_| PartKind::Base);
        [PartKind::Disk].into_iter().chain(base).chain(self.data.iter().map(|_| PartKind::Data)).collect()
    }

    fn check(&self) -> std::result::Result<(), String> {
        if self.name.parse::<ServiceId>().is_err() {
            return Err(Error::BadName { name: self.name.chars().take(80).collect() }.to_string());
        }
        if !(64..=65_536).contains(&self.memory_mib) {
            return Err(format!("memory_mib = {} is not 64 to 65536", self.memory_mib));
        }
        if self.ports.is_empty() || self.ports.contains(&0) {
            return Err("ports needs at least one port, 1 to 65535".to_owned());
        }
        if self.start.is_empty() {
            return Err("start needs at least one line, or nothing would serve".to_owned());
        }
        if !self.health.path.starts_with('/') {
            return Err(format!("health.path {:?} does not begin with /", self.health.path));
        }
        if let Some(base) = self.base.as_deref().filter(|name| !is_label(name)) {
            return Err(format!("base = {base:?} is not the name of a base, which is a-z, 0-9 and -"));
        }
        if let Some(data) = self.data.as_ref().filter(|d| !DATA_MIB.contains(&d.mib)) {
            return Err(format!("data.mib = {} is not {} to {}", data.mib, DATA_MIB.start(), DATA_MIB.end()));
        }
        are_packages(self.packages.iter().chain(self.extracts.iter().map(|e| &e.package)))?;
        let inside = self.files.iter().map(|f| &f.to).chain(self.extracts.iter().map(|e| &e.to));
        let inside = inside.chain(self.data.iter().map(|d| &d.mount));
        for path in inside {
            if !path.starts_with('/') || path.split('/').any(|p| p == "..") {
                return Err(format!("{path:?} is not an absolute path inside the guest"));
            }
        }
        for request in &self.warm {
            if request.times == 0 || request.times > TIMES_MAX {
                return Err(format!("warm {}: times = {} is not 1 to {TIMES_MAX}", request.path, request.times));
            }
            if request.status.is_empty() {
                return Err(format!("warm {}: status names no status that is right", request.path));
            }
        }
        match &self.backend {
            Some(b) if !plain_word(&b.database) || !plain_word(&b.user) => {
                Err("backend.database and backend.user may hold a-z, 0-9 and _ only".to_owned())
            }
            _ => Ok(()),
        }
    }
}

/// Refuses what is no name of a package.
pub(crate) fn are_packages<'a>(mut packages: impl Iterator<Item = &'a String>) -> std::result::Result<(), String> {
    let is_good = |package: &str| {
        package.len() > 1
            && package.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b))
            && package.starts_with(|c: char| c.is_ascii_alphanumeric())
    };
    match packages.find(|package| !is_good(package)) {
        Some(package) => Err(format!("{package:?} is not the name of a Debian package")),
        None => Ok(()),
    }
}

/// Whether it is the name of a base or of a release: part of a file's name and of a command.
pub(crate) fn is_label(word: &str) -> bool {
    !word.is_empty()
        && word.len() <= 30
        && word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && word.starts_with(|c: char| c.is_ascii_lowercase())
}

fn plain_word(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(change: impl Fn(&str) -> String) -> String {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("r.toml");
        let good = "name = \"r\"\nabout = \"x\"\npackages = [\"nginx-light\"]\nmemory_mib = 128\nports = [80]\n\
                    start = [\"nginx\"]\n[health]\nport = 80\npath = \"/\"\nstatus = 200\n";
        std::fs::write(&file, good).unwrap();
        assert!(read(&file).is_ok(), "the good one is refused");
        std::fs::write(&file, change(good)).unwrap();
        read(&file).unwrap_err().to_string()
    }

    #[test]
    fn a_wrong_key_comes_with_the_right_one_and_a_missing_one_is_named() {
        let error = refusal(|t| t.replace("memory_mib", "memory_mb"));
        assert!(error.contains("r.toml:4:1") && error.contains("did you mean `memory_mib`?"), "{error}");
        let error = refusal(|t| t.replace("ports = [80]\n", ""));
        assert!(error.contains("missing field `ports`"), "{error}");
    }

    #[test]
    fn what_cannot_be_built_is_refused_before_anything_is_done() {
        for (from, to, says) in [
            ("nginx-light", "nginx; rm -rf /", "not the name of a Debian package"),
            ("nginx-light", "--include", "not the name of a Debian package"),
            ("128", "1", "memory_mib = 1"),
            ("[80]", "[]", "at least one port"),
            ("[\"nginx\"]", "[]", "at least one line"),
            ("\"r\"", "\"../r\"", "not the name of an image"),
            ("memory_mib", "base = \"../x\"\nmemory_mib", "not the name of a base"),
        ] {
            let error = refusal(|t| t.replacen(from, to, 1));
            assert!(error.contains(says), "{to}: {error}");
        }
        for (mib, mount, says) in [(4, "/srv", "data.mib = 4"), (64, "srv", "not an absolute path")] {
            let error = refusal(|t| format!("{t}[data]\nmib = {mib}\nmount = \"{mount}\"\n"));
            assert!(error.contains(says), "{error}");
        }
        let error = refusal(|t| format!("{t}[[file]]\nfrom = \"a\"\nto = \"/etc/../../a\"\n"));
        assert!(error.contains("not an absolute path inside the guest"), "{error}");
        let error = refusal(|t| format!("{t}[[file]]\nfrom = \"nothing-here\"\nto = \"/a\"\n"));
        assert!(error.contains("cannot read") && error.contains("nothing-here"), "{error}");
    }

    #[test]
    fn a_changed_file_beside_a_recipe_makes_it_another_recipe() {
        let dir = tempfile::tempdir().unwrap();
        let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios/guests");
        std::fs::create_dir(dir.path().join("tiny")).unwrap();
        for name in ["tiny.toml", "tiny/index.html", "tiny/random"] {
            std::fs::copy(guests.join(name), dir.path().join(name)).unwrap();
        }
        let file = dir.path().join("tiny.toml");
        let before = read(&file).unwrap().1;
        assert_eq!(before, read(&file).unwrap().1);
        std::fs::write(dir.path().join("tiny/index.html"), "another").unwrap();
        assert_ne!(before, read(&file).unwrap().1);
    }
}
