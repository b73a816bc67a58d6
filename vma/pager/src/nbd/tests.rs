mod writes;

use super::*;
use crate::disk::Life;
use crate::engine::Fetch;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use vmatrix_model::manifest::{Blob, Chunk, Part, PartKind};
use vmatrix_model::{Bytes, Digest};
use vmatrix_vma_image::machine;

const CHUNK: u64 = 64 << 10;

/// A disk of 10 chunks and a bit, of which some are zeros, behind a socket.
struct World {
    dir: tempfile::TempDir,
    plain: Vec<u8>,
    fetched: Arc<AtomicU64>,
    works: Arc<std::sync::atomic::AtomicBool>,
    known: Arc<Mutex<Vec<i32>>>,
    task: tokio::task::JoinHandle<()>,
}

impl World {
    fn new() -> World {
        World::within(tempfile::Builder::new().prefix("vmx-nbd").tempdir().unwrap())
    }

    fn within(dir: tempfile::TempDir) -> World {
        let mut plain: Vec<u8> = (0..CHUNK * 10 + 4096).map(|i| (i / 512 * 7 + i) as u8).collect();
        plain[CHUNK as usize * 3..CHUNK as usize * 5].fill(0);
        std::fs::write(dir.path().join("plain"), &plain).unwrap();
        let (fetched, works) = (Arc::default(), Arc::new(true.into()));
        let (known, task) = (Arc::default(), tokio::spawn(async {}));
        let mut world = World { dir, plain, fetched, works, known, task };
        world.serve();
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A new server on the same files.
    fn serve(&mut self) {
        let disk = self.disk(PartKind::Disk, None);
        self.serve_all(vec![disk]);
    }

    /// A disk of these bytes, as it is left by the one before.
    fn disk(&self, kind: PartKind, life: Option<Life>) -> Arc<Disk> {
        let path = self.path(machine::export(kind).unwrap());
        self.disk_at(&path, kind, life, self.plain.len() as u64, self.table(&self.plain))
    }

    /// The chunks of these bytes, and a source that has them as long as `works` says so.
    fn table(&self, plain: &[u8]) -> (Vec<Option<Chunk>>, Fetch) {
        let chunks: Vec<&[u8]> = plain.chunks(CHUNK as usize).collect();
        let held: BTreeMap<Digest, Vec<u8>> = chunks.iter().map(|c| (Digest::of(c), c.to_vec())).collect();
        let chunk = |c: &&[u8]| Chunk { digest: Digest::of(c), stored: Bytes(100) };
        let table = chunks.iter().map(|c| c.iter().any(|b| *b != 0).then(|| chunk(c))).collect();
        let (count, works) = (self.fetched.clone(), self.works.clone());
        let fetch: Fetch = Arc::new(move |need, _| {
            count.fetch_add(1, Ordering::Relaxed);
            let plain = works.load(Ordering::Relaxed).then(|| held[&need.digest].clone());
            Box::pin(async move { plain.ok_or_else(|| "gone".to_owned()) })
        });
        (table, fetch)
    }

    fn disk_at(
        &self,
        path: &Path,
        kind: PartKind,
        life: Option<Life>,
        size: u64,
        (table, fetch): (Vec<Option<Chunk>>, Fetch),
    ) -> Arc<Disk> {
        let blob = Blob { digest: Digest::of(b""), stored: Bytes(0), plain: Bytes(0) };
        let part = Part { kind, size: Bytes(size), chunk: Bytes(CHUNK), table: blob, stored: Bytes(0) };
        Arc::new(Disk::open(path, part, life, watch::channel(Some(Arc::new(table))).1, fetch).unwrap())
    }

    fn serve_all(&mut self, disks: Vec<Arc<Disk>>) {
        let listener = socket::listen(&self.path("s"), 0o666).unwrap();
        let known = self.known.clone();
        let allowed: Allowed = Arc::new(move |pid| known.lock().unwrap().contains(&pid));
        self.task = tokio::spawn(serve(listener, disks, allowed));
    }

    /// Ends the server, with all its connections.
    async fn end(&mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.path("s")).await.unwrap()
    }

    /// A connection that has shaken hands.
    async fn shaken(&self) -> UnixStream {
        let mut stream = self.connect().await;
        let mut hello = [0; 18];
        stream.read_exact(&mut hello).await.unwrap();
        stream.write_all(&[0, 0, 0, 3]).await.unwrap();
        stream.write_all(&option(1, b"disk")).await.unwrap();
        let mut export = [0; 10];
        stream.read_exact(&mut export).await.unwrap();
        assert_eq!(export[..8], (self.plain.len() as u64).to_be_bytes());
        stream
    }

    async fn run(&self, program: &'static str, arguments: &[String]) -> String {
        let arguments = arguments.to_vec();
        let output = tokio::task::spawn_blocking(move || Command::new(program).args(arguments).output());
        let output = output.await.unwrap().unwrap_or_else(|e| panic!("{program} is missing ({e})"));
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.path("s").display())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn request(kind: u16, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend(0u16.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(77u64.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

/// The error of one reply, and the bytes behind it.
async fn reply(stream: &mut UnixStream, len: usize) -> (u32, Vec<u8>) {
    let mut head = [0; 16];
    stream.read_exact(&mut head).await.unwrap();
    assert_eq!(head[..4], 0x6744_6698u32.to_be_bytes());
    assert_eq!(head[8..], 77u64.to_be_bytes());
    let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
    let mut plain = vec![0; if error == 0 { len } else { 0 }];
    stream.read_exact(&mut plain).await.unwrap();
    (error, plain)
}

/// Whether the server leaves a client that says this.
async fn is_left(world: &World, says: &[u8]) -> bool {
    let mut stream = world.connect().await;
    let mut rest = Vec::new();
    stream.write_all(says).await.unwrap();
    tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_qemus_own_tools_read_the_same_disk_and_cannot_write_it() {
    let mut world = World::new();
    let plain = world.path("plain").display().to_string();
    let arguments = ["compare", "-f", "raw", "-F", "raw", &world.uri(), &plain].map(str::to_owned);
    let said = world.run("qemu-img", &arguments).await;
    assert!(said.contains("identical"), "{said}");
    assert_eq!(world.fetched.load(Ordering::Relaxed), 9, "each chunk once, those of zeros never");
    let io = ["-r", "-f", "raw", "-c", "read -v 65000 1000", &world.uri()].map(str::to_owned);
    let said = world.run("qemu-io", &io).await;
    assert!(said.contains("read 1000/1000 bytes at offset 65000"), "{said}");
    let io = ["-f", "raw", "-c", "write 0 512", &world.uri()].map(str::to_owned);
    let said = world.run("qemu-io", &io).await;
    assert!(said.contains("Permission denied"), "{said}");

    // The next server believes the file only where it is right.
    world.end().await;
    let file = std::fs::OpenOptions::new().write(true).open(world.path("disk")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"damage", 7 * CHUNK + 100).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"damage", 3 * CHUNK).unwrap();
    world.serve();
    let said = world.run("qemu-img", &arguments).await;
    assert!(said.contains("identical"), "{said}");
    assert_eq!(world.fetched.load(Ordering::Relaxed), 10, "only the damaged chunk is fetched again");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_may_not_be_are_refused_and_the_connection_goes_on() {
    let world = World::new();
    let mut stream = world.shaken().await;
    let size = world.plain.len() as u64;
    for (kind, offset, len, error) in [
        (0, size - 10, 11, 22),
        (0, u64::MAX, 2, 22),
        (0, 0, requests::BYTES_AT_ONCE + 1, 22),
        (0, 0, 0, 22),
        (4, 0, 512, 1),
        (6, 0, 512, 1),
        (9, 0, 512, 22),
        (3, 0, 0, 0),
    ] {
        stream.write_all(&request(kind, offset, len)).await.unwrap();
        assert_eq!(reply(&mut stream, 0).await.0, error, "kind {kind}, {len} bytes at {offset}");
    }
    stream.write_all(&request(1, 0, 512)).await.unwrap();
    stream.write_all(&[1; 512]).await.unwrap();
    assert_eq!(reply(&mut stream, 0).await.0, 1, "a write");
    stream.write_all(&request(0, CHUNK - 5, 10)).await.unwrap();
    let (error, plain) = reply(&mut stream, 10).await;
    assert_eq!((error, plain.as_slice()), (0, &world.plain[CHUNK as usize - 5..CHUNK as usize + 5]));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_speak_nbd_is_left() {
    let world = World::new();
    assert!(is_left(&world, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await);
    assert!(is_left(&world, &[0, 0, 0, 0]).await, "an old client");
    assert!(is_left(&world, &[[0, 0, 0, 3].as_slice(), &option(1, b"other")].concat()).await);
    let mut endless = [0, 0, 0, 3].to_vec();
    endless.extend(b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff");
    assert!(is_left(&world, &endless).await, "an option of 4 GiB");
    let many: Vec<u8> = (0..100).flat_map(|_| option(99, b"")).collect();
    assert!(is_left(&world, &[[0, 0, 0, 3].as_slice(), &many].concat()).await, "options without end");
    let mut stream = world.shaken().await;
    stream.write_all(&request(1, 0, u32::MAX)).await.unwrap();
    assert_eq!(stream.read_to_end(&mut Vec::new()).await.unwrap(), 0, "a write of 4 GiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_waits_for_a_source_that_comes_back() {
    let world = World::new();
    world.works.store(false, Ordering::Relaxed);
    let mut stream = world.shaken().await;
    stream.write_all(&request(0, 0, 10)).await.unwrap();
    let early = tokio::time::timeout(Duration::from_millis(400), reply(&mut stream, 10)).await;
    assert!(early.is_err(), "answered with what is not there");
    world.works.store(true, Ordering::Relaxed);
    // The reply's head was not begun to be read.
    let (error, plain) = reply(&mut stream, 10).await;
    assert_eq!((error, plain.as_slice()), (0, &world.plain[..10]));
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_another_users_process_is_served_only_once_it_is_known() {
    let world = World::new();
    std::fs::set_permissions(world.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    let reads = |path: &Path| {
        let script = format!(
            "import socket,os,sys\nos.setgid(65534);os.setuid(65534)\ns=socket.socket(socket.AF_UNIX)\n\
             s.connect({path:?})\nprint(len(s.recv(18)))"
        );
        std::process::Command::new("python3")
            .args(["-c", &script])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    };
    let stranger = reads(&world.path("s"));
    let guest = reads(&world.path("s"));
    tokio::time::sleep(Duration::from_millis(200)).await;
    world.known.lock().unwrap().push(guest.id() as i32);
    let said = |child: std::process::Child| String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    let (stranger, guest) = tokio::task::spawn_blocking(move || (said(stranger), said(guest))).await.unwrap();
    assert_eq!((stranger.trim(), guest.trim()), ("0", "18"));
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_disk_is_read_where_there_is_no_room_to_keep_it() {
    let mut world = World::new();
    world.end().await;
    let small = world.path("small");
    std::fs::create_dir(&small).unwrap();
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("tmpfs"), &small, Some("tmpfs"), flags, Some("size=100k")).expect("needs root to mount");
    std::fs::remove_file(world.path("disk")).unwrap();
    std::os::unix::fs::symlink(small.join("disk"), world.path("disk")).unwrap();
    world.serve();
    let mut stream = world.shaken().await;
    for at in [0, CHUNK - 5, 8 * CHUNK + 1, 8 * CHUNK + 1] {
        stream.write_all(&request(0, at, 1000)).await.unwrap();
        let (error, plain) = reply(&mut stream, 1000).await;
        assert_eq!((error, plain.as_slice()), (0, &world.plain[at as usize..at as usize + 1000]));
    }
    nix::mount::umount2(&small, nix::mount::MntFlags::MNT_DETACH).unwrap();
}
