//! qemu-img, told everything and trusted with nothing.
//!
//! ```text
//! open file (standard input) ─"this format, no backing file"─▶ qemu-img ─▶ the raw file that is there already
//!    watched: percent done, bytes on disk, time                 limits: memory, CPU time, file size, no network
//! ```
//! It parses what strangers wrote, so it gets a network namespace of its own where that is allowed, can gain
//! no privilege, and ends with this program.

use crate::error::{Error, Result, io};
use crate::progress::{Count, Observer};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::json;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The program.
const QEMU_IMG: &str = "qemu-img";
/// Its address space: it needs some 300 MiB.
const MEMORY: u64 = 2 << 30;
/// Slowest disk that is waited for, bytes a second; and what is waited for in any case.
const SLOWEST: u64 = 2 << 20;
const AT_LEAST: Duration = Duration::from_secs(120);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// What it says at the most, that is kept.
const SAID_MAX: u64 = 16 << 10;
/// What qemu-img calls its source: the file this program opened and read the header of, whatever has come to
/// stand under its name since.
const STDIN: &str = "/proc/self/fd/0";

/// What is converted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum From {
    Qcow2,
    /// A VMDK file within the file, from byte `at` on.
    Vmdk {
        at: u64,
        length: u64,
    },
}

impl From {
    /// The source as QEMU's block layer is told of it: every driver by name, and no backing file whatever
    /// the header says.
    fn source(self) -> String {
        let file = json!({ "driver": "file", "filename": STDIN });
        let source = match self {
            From::Qcow2 => json!({ "driver": "qcow2", "backing": null, "file": file }),
            From::Vmdk { at, length } => json!({
                "driver": "vmdk", "backing": null,
                "file": { "driver": "raw", "offset": at, "size": length, "file": file },
            }),
        };
        format!("json:{source}")
    }
}

/// What a file of `length` bytes may unpack to: disks compress by three to ten.
pub(crate) fn data_limit(length: u64) -> u64 {
    length.saturating_mul(50).saturating_add(256 << 20)
}

/// Converts `file` into `target`, which is empty, of `size` bytes when done and of `limit` bytes on disk at most.
#[allow(clippy::too_many_arguments, reason = "two files, each with its name, and three bounds")]
pub(crate) fn to_raw(
    path: &Path,
    file: &File,
    from: From,
    to: &Path,
    target: &File,
    size: u64,
    limit: u64,
    observer: &Observer,
) -> Result<()> {
    target.set_len(size).map_err(io("size", to))?;
    let mut command = Command::new(QEMU_IMG);
    let out = format!("driver=raw,file.driver=file,file.filename={}", to.display().to_string().replace(',', ",,"));
    command.args(["convert", "-p", "-n", "--target-is-zero", "--target-image-opts", &from.source(), &out]);
    command.stdin(Stdio::from(file.try_clone().map_err(io("read", path))?));
    let watch = Watch { what: "qemu-img convert", path, to, target, limit, total: size };
    run(command, size, &watch, observer)
}

/// What is looked at while a program runs.
pub(crate) struct Watch<'a> {
    /// For errors.
    pub(crate) what: &'static str,
    /// What it reads.
    pub(crate) path: &'a Path,
    /// What it writes.
    pub(crate) to: &'a Path,
    pub(crate) target: &'a File,
    /// Bytes on disk that it may write.
    pub(crate) limit: u64,
    /// Bytes that 100 % stand for.
    pub(crate) total: u64,
}

/// Runs qemu-img under its limits to its end. `longest` is the size of the largest file it may make.
pub(crate) fn run(mut command: Command, longest: u64, watch: &Watch<'_>, observer: &Observer) -> Result<()> {
    let allowed = AT_LEAST + Duration::from_secs(watch.total / SLOWEST);
    restrict(&mut command, longest, allowed);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C.UTF-8");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::Missing { program: QEMU_IMG, package: "qemu-utils" },
        _ => io("run", Path::new(QEMU_IMG))(e),
    })?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let hundredths = AtomicU64::new(0);
    let (ended, said) = std::thread::scope(|scope| {
        let said = scope.spawn(|| hear(stderr));
        scope.spawn(|| percents(stdout, &hundredths));
        let ended = wait(&mut child, watch, allowed, &hundredths, observer);
        if ended.is_err() {
            end(&mut child);
        }
        (ended, said.join().unwrap_or_default())
    });
    let status = ended?;
    if status.success() {
        return Ok(());
    }
    if said.contains("No space left on device") {
        return Err(Error::DiskFull { what: "write", path: watch.to.to_owned() });
    }
    let said = said.trim().replace(STDIN, &watch.path.display().to_string());
    Err(Error::Tool { what: watch.what, status: status.to_string(), said: said.chars().take(1200).collect() })
}

fn wait(
    child: &mut Child,
    watch: &Watch<'_>,
    allowed: Duration,
    hundredths: &AtomicU64,
    observer: &Observer,
) -> Result<ExitStatus> {
    let began = Instant::now();
    let mut count = Count::new(observer, watch.total);
    loop {
        if let Some(status) = child.try_wait().map_err(io("wait for", Path::new(QEMU_IMG)))? {
            if status.success() {
                count.reach(watch.total);
            }
            return Ok(status);
        }
        let done = u128::from(watch.total) * u128::from(hundredths.load(Ordering::Relaxed).min(10_000)) / 10_000;
        count.reach(u64::try_from(done).unwrap_or(watch.total));
        let written = watch.target.metadata().map_err(io("read", watch.to))?.blocks() * 512;
        if written > watch.limit {
            return Err(Error::Bomb { path: watch.path.to_owned(), limit_mib: watch.limit >> 20 });
        }
        if began.elapsed() > allowed {
            return Err(Error::Timeout { what: watch.what, path: watch.path.to_owned(), after: allowed });
        }
        std::thread::park_timeout(LOOK);
    }
}

/// Ends it with all it started.
fn end(child: &mut Child) {
    if let Ok(pid) = i32::try_from(child.id()) {
        // Already ended is as good.
        let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let _ = child.wait();
}

/// What it complains of; what is too much is read and forgotten, so that it never waits for a reader.
fn hear(stderr: Option<impl Read>) -> String {
    let Some(mut stderr) = stderr else { return String::new() };
    let mut said = Vec::new();
    // What was heard until the pipe broke is what there is to tell.
    let _ = (&mut stderr).take(SAID_MAX).read_to_end(&mut said);
    let _ = std::io::copy(&mut stderr, &mut std::io::sink());
    String::from_utf8_lossy(&said).into_owned()
}

/// Follows `    (12.34/100%)`, again and again on one line.
fn percents(stdout: Option<impl Read>, hundredths: &AtomicU64) {
    let Some(mut stdout) = stdout else { return };
    let mut buffer = [0; 256];
    while let Ok(length @ 1..) = stdout.read(&mut buffer) {
        let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned();
        if let Some(done) = text.rsplit('(').find_map(percent) {
            hundredths.store(done, Ordering::Relaxed);
        }
    }
}

/// `12.34/100%)` ─▶ 1234.
fn percent(text: &str) -> Option<u64> {
    let (whole, part) = text.split_once("/100%")?.0.trim().split_once('.')?;
    whole.parse::<u64>().ok()?.checked_mul(100)?.checked_add(part.get(..2)?.parse().ok()?)
}

fn restrict(command: &mut Command, longest: u64, allowed: Duration) {
    let bounds = [
        (Resource::RLIMIT_AS, MEMORY),
        (Resource::RLIMIT_CPU, allowed.as_secs()),
        // Whole clusters: the last one may pass the end.
        (Resource::RLIMIT_FSIZE, longest.saturating_add(4 << 20)),
        (Resource::RLIMIT_CORE, 0),
    ];
    let restrict = move || {
        // Only root may, and without it the limits below still hold.
        let _ = unshare(CloneFlags::CLONE_NEWNET);
        for (resource, bound) in bounds {
            setrlimit(resource, bound, bound)?;
        }
        prctl::set_no_new_privs()?;
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        Ok(())
    };
    command.process_group(0);
    // SAFETY: system calls only between fork and exec: nothing is allocated, no lock is taken.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(restrict);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentage_is_read_however_the_pipe_cuts_it() {
        assert_eq!(percent("12.34/100%)\r"), Some(1234));
        assert_eq!(percent("100.00/100%)\r"), Some(10_000));
        for cut in ["", "12.", "12.34/10", "x.yz/100%", "99999999999999999999.00/100%"] {
            assert_eq!(percent(cut), None, "{cut}");
        }
    }

    #[test]
    fn a_source_names_every_driver_and_no_backing_file() {
        assert_eq!(
            From::Qcow2.source(),
            r#"json:{"backing":null,"driver":"qcow2","file":{"driver":"file","filename":"/proc/self/fd/0"}}"#
        );
        let vmdk = From::Vmdk { at: 512, length: 1024 }.source();
        assert!(
            vmdk.contains(r#""driver":"raw","file":{"driver":"file""#) && vmdk.contains(r#""offset":512,"size":1024"#),
            "{vmdk}"
        );
        assert!(vmdk.starts_with(r#"json:{"backing":null,"driver":"vmdk""#), "{vmdk}");
    }
}
