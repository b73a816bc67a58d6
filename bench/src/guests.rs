//! The guests that are measured: the recipes of `scenarios/guests`, `tiny` also in three sizes of memory.
//!
//! ```text
//! tiny.toml ─▶ tiny-512m (200 MiB of text in memory), tiny-2g (1 GiB), tiny-8g (1 GiB) ─build─▶ store
//! ```
//! A guest whose memory is empty would flatter nobody: copying zeros costs nothing. So a sized guest fills a
//! tmpfs with text that it makes at boot (letters with unequal odds: zstd -3 makes it 2.6 times smaller),
//! which its web server serves.

use anyhow::{Context, bail};
use base64::Engine;
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use vmatrix_model::manifest::{Manifest, PartKind};
use vmatrix_vma_image::machine::Files;
use vmatrix_vma_image::{Store, chunks, inspect, memory, sign};

use crate::client::{Request, Right};

/// A guest as a bench asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `tiny` as its recipe has it, with 128 MiB and nothing in them.
    Plain,
    /// `tiny` with so many MiB of memory and text in it.
    Tiny(u64),
    Maps,
    /// Its data stay in a database at the origin, and each of its answers is read from there.
    Agenda,
    /// What is written to it stays in it.
    Ledger,
}

/// Every guest of the relocation table, in its order.
pub const ALL: [Kind; 5] = [Kind::Tiny(512), Kind::Tiny(2048), Kind::Tiny(8192), Kind::Maps, Kind::Agenda];

/// Entries of the calendar that `agenda` was warmed with: `warm-0` to `warm-11`.
const ENTRIES: u64 = 12;
/// Whom its recipe warms it as.
const AGENDA_USER: &str = "admin:vmatrix-demo";

/// What a bench knows of right answers.
#[derive(Debug, Clone)]
pub struct Known {
    /// Folder of the recipes, whose pages are served.
    pub recipes: PathBuf,
    /// A word that a bench writes into the database at the origin when it begins: no guest can have it in memory.
    pub mark: String,
}

impl Kind {
    /// Name of its image.
    pub fn image(self) -> String {
        match self {
            Kind::Plain => "tiny".to_owned(),
            Kind::Tiny(mib) if mib % 1024 == 0 => format!("tiny-{}g", mib / 1024),
            Kind::Tiny(mib) => format!("tiny-{mib}m"),
            Kind::Maps => "maps".to_owned(),
            Kind::Agenda => "agenda".to_owned(),
            Kind::Ledger => "ledger".to_owned(),
        }
    }

    /// As rows name it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Plain | Kind::Tiny(_) => "tiny",
            Kind::Maps => "maps",
            Kind::Agenda => "agenda",
            Kind::Ledger => "ledger",
        }
    }

    /// Its memory as the recipes have it, MiB.
    pub fn ram_mib(self) -> u64 {
        match self {
            Kind::Plain | Kind::Ledger => 128,
            Kind::Tiny(mib) => mib,
            Kind::Maps => 512,
            Kind::Agenda => 384,
        }
    }

    /// MiB of text in its memory.
    pub fn data_mib(self) -> u64 {
        match self {
            Kind::Tiny(mib) if mib < 1024 => 200,
            Kind::Tiny(_) => 1024,
            Kind::Plain | Kind::Maps | Kind::Agenda | Kind::Ledger => 0,
        }
    }

    /// Its recipe's file: one of `recipes`, or one made of `tiny.toml` in `folder`.
    ///
    /// # Errors
    /// A file cannot be read or written, or `tiny.toml` is not as it was.
    pub fn recipe(self, recipes: &Path, folder: &Path) -> anyhow::Result<PathBuf> {
        let Kind::Tiny(mib) = self else { return Ok(recipes.join(format!("{}.toml", self.image()))) };
        let base = recipes.join("tiny.toml");
        let text = fs::read_to_string(&base).with_context(|| format!("cannot read {}", base.display()))?;
        let text = sized(&text, &self.image(), mib, self.data_mib()).with_context(|| base.display().to_string())?;
        fs::create_dir_all(folder.join("tiny")).with_context(|| format!("cannot make {}", folder.display()))?;
        for name in ["index.html", "random"] {
            let from = recipes.join("tiny").join(name);
            fs::copy(&from, folder.join("tiny").join(name))
                .with_context(|| format!("cannot copy {}", from.display()))?;
        }
        let file = folder.join(format!("{}.toml", self.image()));
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(file)
    }

    /// The request whose answer counts; `run` makes each run's another one where the guest computes its answer.
    ///
    /// # Errors
    /// The page that must come cannot be read.
    pub fn request(self, to: Ipv4Addr, known: &Known, run: u64) -> anyhow::Result<Request> {
        let plain = |path: String, right| Request {
            to: SocketAddrV4::new(to, 80),
            tls: None,
            path,
            headers: String::new(),
            right,
        };
        Ok(match self {
            Kind::Plain | Kind::Tiny(_) => {
                let page = known.recipes.join("tiny/index.html");
                let body = fs::read(&page).with_context(|| format!("cannot read {}", page.display()))?;
                plain("/index.html".to_owned(), Right::Body(body))
            }
            Kind::Ledger => {
                let page = known.recipes.join("ledger/index.html");
                let body = fs::read(&page).with_context(|| format!("cannot read {}", page.display()))?;
                plain("/index.html".to_owned(), Right::Body(body))
            }
            // Another part of the world each time, none of those it was warmed with.
            Kind::Maps => {
                plain(format!("/map?west=-{0}.7&south=-3{0}&east=9{0}.3&north=4{0}.1", run % 9), Right::Picture)
            }
            Kind::Agenda => {
                let entry = run % ENTRIES;
                let user = base64::engine::general_purpose::STANDARD.encode(AGENDA_USER);
                Request {
                    to: SocketAddrV4::new(to, 443),
                    tls: Some("agenda"),
                    path: format!("/caldav.php/admin/calendar/warm-{entry}.ics"),
                    headers: format!("Authorization: Basic {user}\r\n"),
                    right: Right::Holds(summary(&known.mark, entry)),
                }
            }
        })
    }

    /// A request for 16 KiB of the text that nobody asked for before; none where there is no text.
    pub fn cold_request(self, to: Ipv4Addr, run: u64) -> Option<Request> {
        let items = self.data_mib();
        (items > 0).then(|| {
            let (item, begin) = ((run * 37 + 11) % items, (run * 7919 % 60) << 14);
            Request {
                to: SocketAddrV4::new(to, 80),
                tls: None,
                path: format!("/data/item.{item}"),
                headers: format!("Range: bytes={begin}-{}\r\n", begin + (16 << 10) - 1),
                right: Right::Length(16 << 10),
            }
        })
    }
}

/// What an entry of the calendar says once a mark was set.
fn summary(mark: &str, entry: u64) -> String {
    format!("SUMMARY:{mark} {entry}")
}

/// SQL that sets a mark in every entry of `agenda`'s calendar, whatever marks were set before, and answers how many
/// entries have it.
pub fn set_mark(mark: &str) -> String {
    // Without quotes: it is a literal within SQL.
    let mark: String = mark.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
    format!(
        "UPDATE caldav_data SET caldav_data = regexp_replace(caldav_data, 'SUMMARY:[^ ]+ ', 'SUMMARY:{mark} ');\n\
         SELECT count(*) FROM caldav_data WHERE caldav_data LIKE '%SUMMARY:{mark} %';\n"
    )
}

/// `tiny`'s recipe with another name, memory, and text in a tmpfs.
fn sized(recipe: &str, name: &str, mib: u64, data_mib: u64) -> anyhow::Result<String> {
    let mut text = recipe.to_owned();
    // Eight MiB of random letters; the others are these in other letters, so that no part repeats another.
    let start = format!(
        r#"start = [
    "mkdir -p /data && mount -t tmpfs -o size=95% tmpfs /data && ln -s /data /srv/www/data",
    "cd /data && xxd -p -c 64 /dev/urandom | tr 0123456789abcdef eeeeeeeettaaoins | ( i=0; while [ $i -lt 8 ]; do dd of=item.$i bs=1M count=1 iflag=fullblock 2>/dev/null; i=$((i+1)); done )",
    "cd /data && A=abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:-_abcdefghijkl; i=8; while [ $i -lt {data_mib} ]; do k=$((i/8)); tr etaoins ${{A:$k:7}} < item.$((i%8)) > item.$i; i=$((i+1)); done",
    "httpd -p 80 -h /srv/www",
]"#
    );
    for (from, to) in [
        ("name = \"tiny\"", format!("name = \"{name}\"")),
        ("memory_mib = 128", format!("memory_mib = {mib}")),
        ("start = [\"httpd -p 80 -h /srv/www\"]", start),
    ] {
        if !text.contains(from) {
            bail!("has no line {from:?}, which the bench replaces");
        }
        text = text.replacen(from, &to, 1);
    }
    Ok(text)
}

/// An image that a bench put into the store for itself; it is taken out again when this is dropped. Its chunks go
/// with the store's next collection.
#[derive(Debug)]
pub struct Temporary {
    pub image: Image,
    store: Store,
}

impl Temporary {
    /// Puts a manifest under its own name.
    ///
    /// # Errors
    /// The store is full, or not the builder's own.
    pub fn put(store: &Store, kind: Kind, manifest: Manifest) -> anyhow::Result<Temporary> {
        let signed = sign::sign(store, &manifest)?;
        store.put_image(&manifest.name, &signed)?;
        let digest = vmatrix_model::Digest::of(signed.manifest.as_bytes());
        Ok(Temporary { image: Image { kind, manifest, digest }, store: store.clone() })
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Err(e) = self.store.remove_image(&self.image.manifest.name) {
            tracing::warn!(image = self.image.manifest.name, error = %e, "an image of the bench stays in the store");
        }
    }
}

/// An image of a store, verified, and laid out whole as files where a baseline needs that.
#[derive(Debug, Clone)]
pub struct Image {
    pub kind: Kind,
    pub manifest: Manifest,
    pub digest: vmatrix_model::Digest,
}

impl Image {
    /// Finds a guest's image in a store and verifies it.
    ///
    /// # Errors
    /// It is not there, or was not signed by the store's own builder.
    pub fn read(store: &Store, kind: Kind) -> anyhow::Result<Image> {
        let name = kind.image();
        let signed = store.image(&name)?.with_context(|| format!("there is no image {name}"))?;
        let (manifest, digest) = sign::verify(&signed, &[sign::public(store)?])?;
        Ok(Image { kind, manifest, digest })
    }

    /// The same suspended VM as if its working set had never been recorded, put into the store beside it.
    /// `files` are those of [`Image::lay_out`].
    ///
    /// # Errors
    /// The store is full or not the builder's own.
    pub fn unrecorded(&self, store: &Store, files: &Files) -> anyhow::Result<Temporary> {
        let key = inspect::owner_key(&self.manifest, store)?;
        let cutter = chunks::Cutter::new(store, key.as_ref());
        let memory = memory::cut(&cutter, &files.memory, &[], 0, None)?;
        let name = format!("{}-unrecorded", self.manifest.name);
        Temporary::put(store, self.kind, Manifest { name, memory, ..self.manifest.clone() })
    }

    /// Memory, device state and disk as files in `folder`, sparse where they are zero. What is there is kept.
    ///
    /// # Errors
    /// A chunk is missing or wrong, or there is no room.
    pub fn lay_out(&self, store: &Store, folder: &Path) -> anyhow::Result<Files> {
        let folder = folder.join(format!("{}-{}", self.kind.image(), self.digest.short()));
        let files = Files::within(&folder);
        let done = folder.join("whole");
        if done.exists() {
            return Ok(files);
        }
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let key = inspect::owner_key(&self.manifest, store)?;
        memory::assemble(&self.manifest, store, key.as_ref(), &files.memory)?;
        let need = chunks::Need::blob(&self.manifest.device, self.manifest.seal.is_some());
        let device = chunks::open(&store.chunk(&need.digest)?, &need, key.as_ref())?;
        fs::write(&files.device, device).with_context(|| format!("cannot write {}", files.device.display()))?;
        for part in &self.manifest.parts {
            if let Some(name) = file_name(part.kind) {
                chunks::assemble(part, store, &folder.join(name))?;
            }
        }
        fs::write(&done, b"").with_context(|| format!("cannot write {}", done.display()))?;
        Ok(files)
    }
}

impl Image {
    /// The laid-out files that a copy must carry: memory, device state, disks.
    pub fn carried(&self, files: &Files) -> Vec<PathBuf> {
        let disks = [PartKind::Disk, PartKind::Base, PartKind::Data];
        let here = disks.into_iter().filter(|kind| self.manifest.part(*kind).is_some()).filter_map(file_name);
        [files.memory.clone(), files.device.clone()]
            .into_iter()
            .chain(here.map(|name| files.disk.with_file_name(name)))
            .collect()
    }
}

/// What a part's file is called, beside the others; none for what no machine needs.
fn file_name(kind: PartKind) -> Option<&'static str> {
    match kind {
        PartKind::Disk => Some("disk"),
        PartKind::Base => Some("base"),
        PartKind::Data => Some("data"),
        PartKind::Kernel => Some("kernel"),
        PartKind::Initrd => Some("initrd"),
        PartKind::BackendSeed => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipes() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../scenarios/guests")
    }

    #[test]
    fn each_size_is_a_recipe_of_its_own_that_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        for (mib, name) in [(512, "tiny-512m"), (2048, "tiny-2g"), (8192, "tiny-8g")] {
            let file = Kind::Tiny(mib).recipe(&recipes(), dir.path()).unwrap();
            let (recipe, _) = vmatrix_vma_build::recipe::read(&file).unwrap();
            assert_eq!((recipe.name.as_str(), recipe.memory_mib), (name, mib));
            assert!(recipe.start.last().unwrap().starts_with("httpd"), "{:?}", recipe.start);
        }
    }

    #[test]
    fn the_recipes_have_the_memory_that_rows_are_known_by() {
        for kind in [Kind::Plain, Kind::Maps, Kind::Agenda, Kind::Ledger] {
            let dir = tempfile::tempdir().unwrap();
            let (recipe, _) = vmatrix_vma_build::recipe::read(&kind.recipe(&recipes(), dir.path()).unwrap()).unwrap();
            assert_eq!(recipe.memory_mib, kind.ram_mib(), "{}", recipe.name);
        }
    }

    #[test]
    fn a_recipe_that_is_not_as_expected_is_refused() {
        let error = sized("name = \"other\"", "tiny-512m", 512, 200).unwrap_err().to_string();
        assert!(error.contains("name = \\\"tiny\\\""), "{error}");
    }

    #[test]
    fn each_run_asks_a_guest_that_computes_for_something_else() {
        let known = Known { recipes: recipes(), mark: "m-1".to_owned() };
        for kind in [Kind::Maps, Kind::Agenda] {
            let ask = |run| kind.request(Ipv4Addr::LOCALHOST, &known, run).unwrap().path;
            assert_ne!(ask(0), ask(1));
        }
        let cold = |run| Kind::Tiny(512).cold_request(Ipv4Addr::LOCALHOST, run).unwrap();
        assert_ne!(cold(0).path, cold(1).path);
        assert!(Kind::Maps.cold_request(Ipv4Addr::LOCALHOST, 0).is_none());
    }

    #[test]
    fn an_answer_of_the_agenda_is_right_only_with_the_mark_of_this_bench() {
        let known = Known { recipes: recipes(), mark: "m-1".to_owned() };
        let request = Kind::Agenda.request(Ipv4Addr::LOCALHOST, &known, 14).unwrap();
        assert_eq!(request.right, Right::Holds("SUMMARY:m-1 2".to_owned()));
        assert!(set_mark("m'-1").contains("'SUMMARY:m-1 '"), "{}", set_mark("m'-1"));
    }
}
