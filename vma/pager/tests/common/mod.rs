//! A guest's memory made of known bytes, and a process that maps it as QEMU does.
#![allow(clippy::unwrap_used, clippy::expect_used, dead_code, reason = "helpers of tests; no file uses all of them")]

pub mod place;

use nix::fcntl::FallocateFlags;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use vmatrix_model::Digest;
use vmatrix_vma_image::chunks::Need;
use vmatrix_vma_image::memory::{First, Map, Pack, Rest};
use vmatrix_vma_pager::{Class, Fetch, preload};

pub const PAGE: usize = 4096;

/// Whether a page of the test's memory is zeros: runs of 24, so that they cross 64 KiB blocks.
pub fn is_zero(page: u32) -> bool {
    page / 24 % 3 == 1
}

/// What a page holds.
pub fn content(page: u32) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    if !is_zero(page) {
        for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
            let value = (u64::from(page) << 32 | i as u64 | 1 << 31).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

/// The tables of a memory of so many pages; every 10th block of pages is the working set.
pub fn tables(pages: u32) -> (First, Rest) {
    let (mut first, mut rest) = (First::default(), Rest::default());
    for page in (0..pages).filter(|p| is_zero(*p)) {
        match first.zero.last_mut() {
            Some(run) if run.end == page => run.end += 1,
            _ => first.zero.push(page..page + 1),
        }
    }
    let pack = |slots: Vec<Option<u32>>| {
        let text: Vec<u8> = slots.iter().flatten().flat_map(|p| p.to_le_bytes()).collect();
        Pack { digest: Digest::of(&text), stored: 1000 * slots.len() as u32, slots }
    };
    let (mut set, mut others) = (Vec::new(), Vec::new());
    for block in 0..pages.div_ceil(16) {
        // One slot of each pack is unused, as in a snapshot that has its own bytes for that page.
        let slots = (block * 16..(block * 16 + 16).min(pages)).filter(|p| !is_zero(*p)).map(Some).chain([None]);
        let slots: Vec<Option<u32>> = slots.rev().collect();
        match slots.len() {
            1 => {}
            _ if block % 10 == 3 => set.push(pack(slots)),
            _ => others.push(pack(slots)),
        }
    }
    (first.packs, rest.packs) = (set, others);
    (first, rest)
}

pub fn map(pages: u32) -> Map {
    let (first, rest) = tables(pages);
    let mut map = Map::new(pages, first).unwrap();
    map.complete(rest).unwrap();
    map
}

/// What happens to a fetch.
pub type Fate = Arc<dyn Fn(&Pack, Class) -> (Duration, Result<(), String>) + Send + Sync>;

/// A source that has all packs; counts what it was asked for.
pub fn source(map: &Map, fate: Fate) -> (Fetch, Arc<AtomicU64>) {
    let packs: BTreeMap<Digest, Pack> = map.packs().iter().map(|p| (p.digest, p.clone())).collect();
    let (packs, asked) = (Arc::new(packs), Arc::new(AtomicU64::new(0)));
    let count = asked.clone();
    let fetch: Fetch = Arc::new(move |need: Need, class| {
        count.fetch_add(1, Ordering::Relaxed);
        let pack = packs[&need.digest].clone();
        let (after, result) = fate(&pack, class);
        Box::pin(async move {
            if !after.is_zero() {
                tokio::time::sleep(after).await;
            }
            // An unused slot holds what must never be seen.
            let bytes = |slot: &Option<u32>| slot.map_or([0xEE; PAGE], content);
            result.map(|()| pack.slots.iter().flat_map(bytes).collect())
        })
    });
    (fetch, asked)
}

pub fn at_once() -> Fate {
    Arc::new(|_, _| (Duration::ZERO, Ok(())))
}

pub fn dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("vmx-pager").tempdir_in("/dev/shm").expect("needs a tmpfs at /dev/shm")
}

/// A process that maps a memory file with the library preloaded, and does what it is told, a line at a time.
pub struct Guest {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Guest {
    /// `how`: `private`, as clones map it, or `shared`.
    pub fn start(memory: &Path, how: &str, track: bool) -> Guest {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "process_that_maps_memory", "--nocapture", "--test-threads=1"]);
        command.env("VMATRIX_TEST_MAPS", memory).env("VMATRIX_TEST_HOW", how);
        preload(&mut command, memory, track).unwrap();
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut guest = Guest { child, input, output };
        assert_eq!(guest.answer(), "mapped");
        guest
    }

    pub fn pid(&self) -> i32 {
        self.child.id().try_into().unwrap()
    }

    pub fn tell(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    /// Its answer to one line, for which it has 20 s.
    pub fn answer(&mut self) -> String {
        self.answer_within(Duration::from_secs(20)).expect("the process that maps memory does not answer")
    }

    /// What it says within `limit`, if it says anything.
    pub fn answer_within(&mut self, limit: Duration) -> Option<String> {
        loop {
            if self.output.buffer().is_empty() {
                let mut wait = [PollFd::new(self.output.get_ref().as_fd(), PollFlags::POLLIN)];
                if poll(&mut wait, PollTimeout::try_from(limit).unwrap()).unwrap() == 0 {
                    return None;
                }
            }
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the process that maps memory has ended");
            if let Some((_, answer)) = line.trim_end().split_once("answer: ") {
                return Some(answer.to_owned());
            }
        }
    }

    pub fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.answer()
    }

    /// Anonymous memory of the process, KiB.
    pub fn anonymous_kib(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps", self.pid())).unwrap();
        let mut lines = text.lines().skip_while(|l| !l.contains("vmx-pager"));
        let line = lines.find(|l| l.starts_with("Anonymous:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What [`Guest::start`] starts; to be called by a test of the name given there.
pub fn process() {
    let Some(path) = std::env::var_os("VMATRIX_TEST_MAPS").map(PathBuf::from) else { return };
    let private = std::env::var("VMATRIX_TEST_HOW").unwrap() == "private";
    let file = OpenOptions::new().read(true).write(!private).open(&path).unwrap();
    let len = NonZeroUsize::new(file.metadata().unwrap().len() as usize).unwrap();
    let flags = if private { MapFlags::MAP_PRIVATE } else { MapFlags::MAP_SHARED };
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping, which lives as long as the process.
    #[allow(unsafe_code)]
    let memory = unsafe {
        let at = mmap(None, len, prot, flags, &file, 0).unwrap();
        std::slice::from_raw_parts_mut(at.as_ptr().cast::<u8>(), len.get())
    };
    let pages = (len.get() / PAGE) as u32;
    println!("\nanswer: mapped");
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let number = |i: usize| words[i].parse::<u32>().unwrap();
        let answer = match words[0] {
            // All pages in an order of its own; `skip` says which to leave out.
            "all" => {
                let wrong = order(pages, number(1)).into_iter().filter(|p| !right(memory, *p)).count();
                format!("{wrong} wrong")
            }
            // So many pages, spread over all; 0: every one.
            "touch" => {
                let count = if number(1) == 0 { pages } else { number(1) };
                let some = order(pages, 1).into_iter().take(count as usize);
                some.for_each(|p| _ = std::hint::black_box(memory[p as usize * PAGE]));
                "touched".to_owned()
            }
            "page" => if right(memory, number(1)) { "right" } else { "wrong" }.to_owned(),
            // A page of a file read by the kernel on our behalf.
            "kernel" => {
                let zeros = std::fs::File::open("/dev/zero").unwrap();
                let at = number(1) as usize * PAGE;
                std::os::unix::fs::FileExt::read_exact_at(&zeros, &mut memory[at + 8..at + 16], 0).unwrap();
                let now = memory[at..at + PAGE].to_vec();
                let was = content(number(1));
                let kept = now[..8] == was[..8] && now[16..] == was[16..] && now[8..16] == [0; 8];
                if kept { "right" } else { "wrong" }.to_owned()
            }
            "write" => {
                for page in number(1)..number(2) {
                    memory[page as usize * PAGE + 100] = 0xAB;
                }
                "written".to_owned()
            }
            "written" => {
                let all = (number(1)..number(2)).all(|page| {
                    let at = page as usize * PAGE;
                    let (mut expected, found) = (content(page), &memory[at..at + PAGE]);
                    expected[100] = 0xAB;
                    found == expected
                });
                if all { "right" } else { "wrong" }.to_owned()
            }
            // Takes pages out of this process's page table, as a kernel does that is short of memory; the file has
            // them still.
            "forget" => {
                let (from, to) = (number(1) as usize * PAGE, number(2) as usize * PAGE);
                let at = NonNull::new(memory.as_mut_ptr()).unwrap().cast::<std::ffi::c_void>();
                for advice in [MmapAdvise::MADV_PAGEOUT, MmapAdvise::MADV_DONTNEED] {
                    // SAFETY: the mapping is shared, so all that the memory holds is in its file and comes back.
                    #[allow(unsafe_code)]
                    unsafe {
                        madvise(at.byte_add(from), to - from, advice).unwrap();
                    }
                }
                "forgotten".to_owned()
            }
            // Gives a page back, as a balloon does.
            "punch" => {
                let (at, mode) = (i64::from(number(1)) * PAGE as i64, FallocateFlags::FALLOC_FL_PUNCH_HOLE);
                nix::fcntl::fallocate(&file, mode | FallocateFlags::FALLOC_FL_KEEP_SIZE, at, PAGE as i64).unwrap();
                "punched".to_owned()
            }
            other => panic!("what is {other:?}?"),
        };
        println!("\nanswer: {answer}");
    }
}

/// Pages in an order that only the seed decides.
fn order(pages: u32, seed: u32) -> Vec<u32> {
    let mut order: Vec<u32> = (0..pages).collect();
    order.sort_by_key(|page| {
        u64::from(page ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(31)
    });
    order
}

fn right(memory: &[u8], page: u32) -> bool {
    let at = page as usize * PAGE;
    memory[at..at + PAGE] == content(page)
}
