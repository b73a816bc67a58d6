use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use vmatrix_model::Bytes;
use vmatrix_model::manifest::Blob;

const CHUNK: u64 = 4096;
const CHUNKS: u64 = 9;
const SIZE: u64 = CHUNK * (CHUNKS - 1) + 512;
const LIFE: Life = Life { device: 1, inode: 2, born_ns: 3 };

/// The image's bytes: chunks 2 and 5 are zeros.
fn image() -> Vec<u8> {
    let byte = |at: u64| if matches!(at / CHUNK, 2 | 5) { 0 } else { (at / 7 + at + 1) as u8 | 1 };
    (0..SIZE).map(byte).collect()
}

fn open(dir: &Path, asked: &Arc<AtomicU64>) -> Result<Disk> {
    let image = image();
    let chunks: Vec<&[u8]> = image.chunks(CHUNK as usize).collect();
    let held: BTreeMap<Digest, Vec<u8>> = chunks.iter().map(|c| (Digest::of(c), c.to_vec())).collect();
    let chunk = |c: &&[u8]| Chunk { digest: Digest::of(c), stored: Bytes(100) };
    let table = chunks.iter().map(|c| c.iter().any(|b| *b != 0).then(|| chunk(c))).collect();
    let asked = asked.clone();
    let fetch: Fetch = Arc::new(move |need, _| {
        asked.fetch_add(1, Ordering::Relaxed);
        let plain = held[&need.digest].clone();
        Box::pin(async move {
            tokio::task::yield_now().await;
            Ok(plain)
        })
    });
    let blob = Blob { digest: Digest::of(b"table"), stored: Bytes(0), plain: Bytes(0) };
    let part = Part { kind: PartKind::Data, size: Bytes(SIZE), chunk: Bytes(CHUNK), table: blob, stored: Bytes(0) };
    Disk::open(&dir.join("data.part"), part, Some(LIFE), watch::channel(Some(Arc::new(table))).1, fetch)
}

/// What happens to a disk.
#[derive(Debug, Clone)]
enum Step {
    Read(u64, u64),
    Write(u64, u64, u8),
    Zero(u64, u64, u8),
    Flush,
    /// The next process; the one before ended without a word.
    Restart,
    /// Bytes in the file where nothing was written: what a process leaves that is killed as it writes a whole chunk.
    Torn(u64, u8),
    /// Several writes at once.
    Together(Vec<(u64, u64, u8)>),
}

fn place() -> impl Strategy<Value = (u64, u64)> {
    let length = prop_oneof![Just(512u64), Just(CHUNK), 1u64..600, 1u64..3 * CHUNK];
    let from = prop_oneof![0..SIZE, (0..CHUNKS).prop_map(|c| c * CHUNK)];
    (from, length).prop_map(|(from, length)| (from, length.min(SIZE - from)))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => place().prop_map(|(at, len)| Step::Read(at, len)),
        5 => (place(), 1u8..).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
        2 => (place(), 0u8..3).prop_map(|((at, len), how)| Step::Zero(at, len, how)),
        1 => Just(Step::Flush),
        2 => Just(Step::Restart),
        2 => (prop_oneof![Just(2), 0..CHUNKS], 1u8..).prop_map(|(chunk, byte)| Step::Torn(chunk, byte)),
        1 => prop::collection::vec((0..SIZE / 512, 1u8..), 2..9).prop_map(|some| {
            let some: BTreeMap<u64, u8> = some.into_iter().collect();
            Step::Together(some.into_iter().map(|(sector, byte)| (sector * 512, 512, byte)).collect())
        }),
    ]
}

/// A disk beside a plain file that the same is done to.
struct Pair {
    dir: tempfile::TempDir,
    disk: Disk,
    seat: Seat,
    model: Vec<u8>,
    asked: Arc<AtomicU64>,
}

impl Pair {
    async fn new() -> Pair {
        let (dir, asked) = (tempfile::tempdir().unwrap(), Arc::default());
        let disk = open(dir.path(), &asked).unwrap();
        let seat = disk.seat().await.unwrap();
        Pair { dir, disk, seat, model: image(), asked }
    }

    async fn restart(self) -> Pair {
        let Pair { dir, disk, seat, model, asked } = self;
        drop((disk, seat));
        let disk = open(dir.path(), &asked).unwrap();
        let seat = disk.seat().await.unwrap();
        Pair { dir, disk, seat, model, asked }
    }

    fn same(&mut self, at: u64, len: u64) -> &mut [u8] {
        &mut self.model[at as usize..(at + len) as usize]
    }

    async fn done(mut self, step: Step) -> Pair {
        match step {
            Step::Read(at, len) => {
                let found = self.disk.read(at, len as u32).await.unwrap();
                assert!(found == self.same(at, len), "{len} bytes at {at} are others");
            }
            Step::Write(at, len, byte) => {
                let bytes: Vec<u8> = (0..len).map(|i| byte.wrapping_add(i as u8)).collect();
                self.disk.write(&self.seat, at, &bytes).await.unwrap();
                self.same(at, len).copy_from_slice(&bytes);
            }
            Step::Zero(at, len, how) => {
                let (how, all) = [(Zeros::Hole, true), (Zeros::Kept, true), (Zeros::Trimmed, false)][usize::from(how)];
                self.disk.zero(&self.seat, at, len as u32, how).await.unwrap();
                let whole = |c: &u64| c * CHUNK >= at && ((c + 1) * CHUNK).min(SIZE) <= at + len;
                match all {
                    true => self.same(at, len).fill(0),
                    // The rest of it stays as it was.
                    false => (0..CHUNKS).filter(whole).for_each(|c| {
                        self.same(c * CHUNK, CHUNK.min(SIZE - c * CHUNK)).fill(0);
                    }),
                }
            }
            Step::Flush => self.disk.flush().await.unwrap(),
            Step::Restart => return self.restart().await,
            Step::Torn(chunk, byte) => {
                if !self.disk.written().unwrap().contains(&(chunk as u32)) {
                    let file = OpenOptions::new().write(true).open(self.dir.path().join("data.part")).unwrap();
                    file.write_all_at(&[byte; 300], chunk * CHUNK + 100).unwrap();
                    return self.restart().await;
                }
            }
            Step::Together(writes) => {
                let all = writes.iter().map(|(at, len, byte)| {
                    let bytes = vec![*byte; *len as usize];
                    let (disk, seat) = (&self.disk, &self.seat);
                    async move { disk.write(seat, *at, &bytes).await }
                });
                futures_util::future::try_join_all(all).await.unwrap();
                writes.iter().for_each(|(at, len, byte)| self.same(*at, *len).fill(*byte));
            }
        }
        self
    }

    /// A snapshot of it: the image where nothing is marked, the file where something is.
    fn snapshot(&self) -> Vec<u8> {
        let (mut bytes, file) = (image(), fs::read(self.dir.path().join("data.part")).unwrap());
        for chunk in self.disk.written().unwrap() {
            let at = u64::from(chunk) * CHUNK;
            let range = at as usize..(at + CHUNK).min(SIZE) as usize;
            bytes[range.clone()].copy_from_slice(&file[range]);
        }
        bytes
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn whatever_is_done_to_a_disk_it_is_as_a_plain_file_and_so_is_its_snapshot(
        steps in prop::collection::vec(step(), 1..40),
    ) {
        run(async {
            let mut pair = Pair::new().await;
            for step in steps {
                pair = pair.done(step).await;
            }
            assert!(pair.snapshot() == pair.model, "the snapshot is another disk");
            let pair = pair.restart().await;
            assert!(pair.disk.read(0, SIZE as u32).await.unwrap() == pair.model, "the next process serves another disk");
            assert!(pair.snapshot() == pair.model, "the next process makes another snapshot");
        });
    }
}

#[test]
fn only_what_a_write_does_not_cover_is_fetched_and_only_what_is_written_is_marked() {
    run(async {
        let pair = Pair::new().await.done(Step::Write(CHUNK, CHUNK, 7)).await;
        let pair = pair.done(Step::Write(2 * CHUNK + 5, 10, 7)).await.done(Step::Zero(5 * CHUNK, CHUNK, 0)).await;
        assert_eq!(pair.asked.load(Ordering::Relaxed), 0, "whole chunks, and zeros, were asked for");
        assert_eq!(pair.disk.written().unwrap(), [1, 2], "zeros over zeros are a change");
        let pair = pair.done(Step::Write(3 * CHUNK - 1, 2, 9)).await;
        assert_eq!(pair.asked.load(Ordering::Relaxed), 1);
        assert_eq!((pair.disk.written().unwrap(), pair.disk.written_bytes()), (vec![1, 2, 3], 3 * CHUNK));
    });
}

#[test]
fn what_a_process_left_that_was_killed_as_it_wrote_is_never_seen() {
    run(async {
        let mut pair = Pair::new().await;
        for chunk in [2, 3] {
            // Half a chunk, unmarked; then a write to another place in it.
            pair = pair.done(Step::Torn(chunk, 7)).await.done(Step::Read(0, SIZE)).await;
            pair = pair.done(Step::Torn(chunk, 7)).await.done(Step::Write(chunk * CHUNK + 1000, 10, 9)).await;
            pair = pair.done(Step::Read(0, SIZE)).await.restart().await.done(Step::Read(0, SIZE)).await;
        }
        assert!(pair.snapshot() == pair.model);
    });
}

#[test]
fn a_read_that_waits_for_a_write_does_not_undo_it() {
    run(async {
        for _ in 0..5 {
            let mut pair = Pair::new().await;
            for chunk in 0..CHUNKS - 1 {
                let at = chunk * CHUNK;
                let written = [9; CHUNK as usize];
                let (disk, seat) = (&pair.disk, &pair.seat);
                // Both find that the chunk is not there; the write has its turn first.
                let (wrote, read) = tokio::join!(disk.write(seat, at, &written), disk.read(at, CHUNK as u32));
                wrote.unwrap();
                let read = read.unwrap();
                assert!(read == written || read == pair.same(at, CHUNK));
                pair.same(at, CHUNK).fill(9);
            }
            assert!(pair.disk.read(0, SIZE as u32).await.unwrap() == pair.model);
            assert!(pair.snapshot() == pair.model);
        }
    });
}

#[test]
fn who_asks_beyond_the_end_gets_nothing_and_changes_nothing() {
    run(async {
        let pair = Pair::new().await;
        for (at, len) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 2)] {
            assert_eq!(pair.disk.read(at, len).await, Err(Fault::Outside));
            assert_eq!(pair.disk.write(&pair.seat, at, &vec![1; len as usize]).await, Err(Fault::Outside));
            assert_eq!(pair.disk.zero(&pair.seat, at, len, Zeros::Hole).await, Err(Fault::Outside));
        }
        assert!(pair.disk.written().unwrap().is_empty() && pair.snapshot() == pair.model);
    });
}

#[test]
fn the_disk_of_another_guest_is_not_taken_for_ones_own() {
    run(async {
        let pair = Pair::new().await.done(Step::Write(0, 10, 7)).await;
        let Pair { dir, disk, seat, asked, .. } = pair;
        drop((disk, seat));
        let file = OpenOptions::new().write(true).open(dir.path().join("data.part")).unwrap();
        file.set_len(SIZE - 1).unwrap();
        let cut = open(dir.path(), &asked).err().expect("a file that was cut is believed");
        assert!(cut.to_string().contains("another guest"), "{cut}");
        file.set_len(SIZE).unwrap();
        assert_eq!(open(dir.path(), &asked).unwrap().written().unwrap(), [0]);
    });
}
