//! What a user has without the product: stop-and-copy, and the whole image compressed.
//!
//! ```text
//! stop_and_copy     QEMU a (stopped) ─migrate tcp:─▶ QEMU b (waiting) ─cont─▶ answer
//! whole_image_zstd  file (zstd -3, made beforehand) ─TCP─▶ unpacked as it comes ─load, cont─▶ answer
//! ```
//! Both begin with a QEMU that already waits at the target: the pool that the product has, they have too.

use crate::Bench;
use crate::client::{self, Answered, Pace, Request};
use crate::guests::Image;
use crate::report::{Sample, median, ms};
use crate::stop::Stop;
use crate::vm::{Begin, Bridge, Ram, Vm};
use crate::world::World;
use anyhow::{Context, bail};
use serde_json::json;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vmatrix_lab::namespace::Namespace;
use vmatrix_vma_image::machine::Files;

/// Where a waiting QEMU takes a migration.
const MIGRATION_PORT: u16 = 4444;
/// Where the compressed image is sent from.
const IMAGE_PORT: u16 = 4445;
/// `zstd -3`, as a user would take it.
const LEVEL: i32 = 3;
/// Pages are written one by one, so that what is zero stays a hole.
const PAGE: usize = 4096;
/// Copied at a time.
const PIECE: usize = 256 << 10;
/// Requests after the second, of which the median is what a warm guest needs.
const WARM: u32 = 15;
/// One request of a guest that runs.
pub const REQUEST_LIMIT: Duration = Duration::from_secs(20);

/// A guest at one end of a link, about to be at the other.
#[derive(Clone, Copy)]
pub struct Scene<'a> {
    pub bench: &'a Bench,
    pub image: &'a Image,
    /// Laid out whole, at the source.
    pub files: &'a Files,
    /// Bridges of both ends.
    pub source: &'a Bridge<'a>,
    pub target: &'a Bridge<'a>,
    pub target_site: &'a Namespace,
    /// Longest that one run may take.
    pub limit: Duration,
}

/// Sends the memory of a stopped guest from QEMU to QEMU.
///
/// # Errors
/// QEMU's own words, or no correct answer.
pub fn stop_and_copy(scene: &Scene<'_>, world: &World, run: u64) -> anyhow::Result<Sample> {
    let (bench, runtime) = (scene.bench, &scene.bench.runtime);
    let spec = &scene.image.manifest.machine;
    let scratch = bench.place.memory();
    let mut source = Vm::start(runtime, spec, scene.files, scene.source, scratch, (Ram::Clone, Begin::Waiting))?;
    source.load_state(runtime, &scene.files.device)?;
    source.prepare_migration(runtime, false)?;
    let mut target = Vm::start(runtime, spec, scene.files, scene.target, scratch, (Ram::Own, Begin::Waiting))?;
    target.prepare_migration(runtime, false)?;
    let to = world.site(1)?.address;
    target.execute(runtime, "migrate-incoming", json!({ "uri": format!("tcp:{to}:{MIGRATION_PORT}") }))?;
    let before = world.crossed(&bench.stop)?;
    let request = scene.request(run)?;
    let began = Instant::now();
    let answered = scene.watch(&request, began, || {
        source.execute(runtime, "migrate", json!({ "uri": format!("tcp:{to}:{MIGRATION_PORT}") }))?;
        target.until_migrated(runtime, scene.limit)?;
        target.cont(runtime)
    })?;
    scene.after(answered, run, None, world.crossed(&bench.stop)?.bytes - before.bytes)
}

/// Sends the whole image, compressed beforehand, and resumes it from files.
///
/// # Errors
/// The transfer breaks, QEMU's own words, or no correct answer.
pub fn whole_image_zstd(scene: &Scene<'_>, packed: &Packed, world: &World, run: u64) -> anyhow::Result<Sample> {
    let (bench, runtime) = (scene.bench, &scene.bench.runtime);
    let from = SocketAddrV4::new(world.site(0)?.address, IMAGE_PORT);
    let listener = world.site(0)?.namespace.run(|| TcpListener::bind(from))?.context("cannot listen at the source")?;
    let folder = bench.place.memory().join("unpacked");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let files = Files::within(&folder);
    // QEMU opens them before the first byte comes.
    let unpacked = packed.lay_empty(&folder)?;
    let spec = &scene.image.manifest.machine;
    let mut target =
        Vm::start(runtime, spec, &files, scene.target, bench.place.memory(), (Ram::Clone, Begin::Waiting))?;
    let before = world.crossed(&bench.stop)?;
    let request = scene.request(run)?;
    let began = Instant::now();
    let mut load = None;
    let answered = std::thread::scope(|scope| {
        let sender = scope.spawn(|| send(&listener, &packed.file, &bench.stop));
        let answered = scene.watch(&request, began, || {
            receive(scene.target_site, from.into(), &unpacked)?;
            load = Some(target.load_state(runtime, &files.device)?);
            target.cont(runtime)
        });
        match sender.join() {
            Ok(sent) => sent.and(answered),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })?;
    let bytes = world.crossed(&bench.stop)?.bytes - before.bytes;
    let sample = scene.after(answered, run, load, bytes);
    drop(target);
    std::fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    sample
}

/// A whole image as one compressed file: memory, device state, disks.
#[derive(Debug)]
pub struct Packed {
    pub file: PathBuf,
    /// Name and bytes of each file in it, in their order.
    pub parts: Vec<(PathBuf, u64)>,
}

impl Packed {
    /// Compresses files into `file`.
    ///
    /// # Errors
    /// A file cannot be read, or the disk is full.
    pub fn make(files: &[PathBuf], file: PathBuf, stop: &Stop) -> anyhow::Result<Packed> {
        let out = File::create(&file).with_context(|| format!("cannot make {}", file.display()))?;
        let mut packer = zstd::stream::write::Encoder::new(out, LEVEL).context("zstd does not begin")?;
        let mut piece = vec![0; PIECE];
        let mut parts = Vec::new();
        for path in files {
            let mut from = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
            let mut size = 0;
            loop {
                stop.check()?;
                match from.read(&mut piece).with_context(|| format!("cannot read {}", path.display()))? {
                    0 => break,
                    n => {
                        size += n as u64;
                        packer.write_all(piece.get(..n).unwrap_or_default()).context("cannot compress")?;
                    }
                }
            }
            parts.push((path.file_name().map(PathBuf::from).unwrap_or_default(), size));
        }
        packer.finish().context("cannot compress")?;
        Ok(Packed { file, parts })
    }

    /// Its files in `folder`, of their size and empty.
    fn lay_empty(&self, folder: &Path) -> anyhow::Result<Vec<(File, u64)>> {
        let lay = |(name, size): &(PathBuf, u64)| {
            let path = folder.join(name);
            // Kept from the run before it would be there already.
            let made = File::create(&path).and_then(|f| f.set_len(*size).map(|()| f));
            Ok((made.with_context(|| format!("cannot make {}", path.display()))?, *size))
        };
        self.parts.iter().map(lay).collect()
    }
}

fn send(listener: &TcpListener, file: &Path, stop: &Stop) -> anyhow::Result<()> {
    listener.set_nonblocking(true).context("cannot wait for the receiver")?;
    let mut stream =
        stop.until("the receiver's connection", REQUEST_LIMIT, Duration::from_millis(1), || match listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e).context("cannot take the receiver's connection"),
        })?;
    stream.set_nonblocking(false).context("cannot send")?;
    let mut from = File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
    std::io::copy(&mut from, &mut stream).context("cannot send the image")?;
    Ok(())
}

/// Unpacks what comes into the files, leaving holes where it is zero.
fn receive(inside: &Namespace, from: SocketAddr, files: &[(File, u64)]) -> anyhow::Result<()> {
    let stream = inside.run(|| TcpStream::connect_timeout(&from, REQUEST_LIMIT))?.context("cannot reach the source")?;
    stream.set_read_timeout(Some(REQUEST_LIMIT)).context("cannot receive")?;
    let mut unpacker = zstd::stream::read::Decoder::new(stream).context("zstd does not begin")?;
    let mut piece = vec![0; PIECE];
    for (file, size) in files {
        let mut at = 0;
        while at < *size {
            let here = piece.get_mut(..(size - at).min(PIECE as u64) as usize).unwrap_or_default();
            unpacker.read_exact(here).context("the image breaks off")?;
            for (i, page) in here.chunks(PAGE).enumerate().filter(|(_, p)| p.iter().any(|b| *b != 0)) {
                file.write_all_at(page, at + (i * PAGE) as u64).context("cannot write the image")?;
            }
            at += here.len() as u64;
        }
    }
    Ok(())
}

impl Scene<'_> {
    /// The request of a run, to the guest itself.
    ///
    /// # Errors
    /// See [`crate::guests::Kind::request`].
    pub fn request(&self, run: u64) -> anyhow::Result<Request> {
        self.image.kind.request(self.image.manifest.guest.address, &self.bench.known, run)
    }

    /// Asks from `began` on while `work` brings the guest.
    ///
    /// # Errors
    /// As `work`, or no correct answer.
    pub fn watch(
        &self,
        request: &Request,
        began: Instant,
        work: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<Answered> {
        let ended = Stop::default();
        std::thread::scope(|scope| {
            let stop = self.bench.stop.or(&ended);
            let client = scope.spawn(move || {
                client::until_answered(self.target_site, (request, Pace::Bare), began, self.limit, &stop)
            });
            if let Err(e) = work() {
                ended.ask();
                let _ = client.join();
                return Err(e);
            }
            client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// The second request, a warm one, a cold item, and all of it as a sample.
    ///
    /// # Errors
    /// An answer is wrong or does not come.
    pub fn after(&self, first: Answered, run: u64, load: Option<Duration>, bytes: u64) -> anyhow::Result<Sample> {
        let request = self.request(run + 1)?;
        let mut sample = follow(self.target_site, &request, first)?;
        sample.load_ms = load.map(ms);
        sample.bytes_on_wire = Some(bytes);
        if let Some(cold) = self.image.kind.cold_request(self.image.manifest.guest.address, run) {
            sample.more.push(("cold_item_ms_median", client::ask(self.target_site, &cold, REQUEST_LIMIT)?.whole_ms));
        }
        Ok(sample)
    }
}

/// What follows a first answer: the second request, and what a warm guest needs.
///
/// # Errors
/// An answer is wrong or does not come.
pub fn follow(inside: &Namespace, request: &Request, first: Answered) -> anyhow::Result<Sample> {
    let second = client::ask(inside, request, REQUEST_LIMIT)?;
    let warm = (0..WARM).map(|_| Ok(client::ask(inside, request, REQUEST_LIMIT)?.whole_ms));
    let warm = warm.collect::<anyhow::Result<Vec<f64>>>()?;
    if first.first_byte_ms <= 0.0 {
        bail!("an answer was there before it was asked for");
    }
    Ok(Sample {
        first_byte_ms: first.first_byte_ms,
        whole_ms: first.whole_ms,
        second_ms: Some(second.whole_ms),
        warm_ms: median(&warm),
        ..Sample::default()
    })
}

/// Resumes from files at the target: what the guest itself needs, with no link and no product.
///
/// # Errors
/// QEMU's own words, or no correct answer.
pub fn local(scene: &Scene<'_>, run: u64) -> anyhow::Result<Sample> {
    let (bench, runtime) = (scene.bench, &scene.bench.runtime);
    let spec = &scene.image.manifest.machine;
    let waiting = (Ram::Clone, Begin::Waiting);
    let mut target = Vm::start(runtime, spec, scene.files, scene.target, bench.place.memory(), waiting)?;
    let request = scene.request(run)?;
    let began = Instant::now();
    let mut load = None;
    let answered = scene.watch(&request, began, || {
        load = Some(target.load_state(runtime, &scene.files.device)?);
        target.cont(runtime)
    })?;
    scene.after(answered, run, load, 0)
}
