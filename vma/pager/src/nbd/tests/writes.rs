//! Data: written by QEMU's own tools, over servers that end.

use super::*;
use std::os::unix::fs::FileExt;
use std::process::Stdio;
use vmatrix_vma_testing::Small;

const LIFE: Life = Life { device: 1, inode: 2, born_ns: 3 };
const WRITE: u16 = 1;
const FLUSH: u16 = 3;

impl World {
    /// Data that is written, and a root disk that is not.
    async fn writable() -> World {
        let mut world = World::new();
        world.again().await;
        world
    }

    /// The next server, as after a kill.
    async fn again(&mut self) {
        self.end().await;
        let disks = vec![self.disk(PartKind::Disk, None), self.disk(PartKind::Data, Some(LIFE))];
        self.serve_all(disks);
    }

    fn data(&self) -> String {
        self.uri().replace("/disk?", "/data?")
    }

    /// Runs qemu-io's commands on data, and does the same to a plain file.
    async fn io(&self, commands: &[&str]) {
        for to in [self.data(), self.path("plain").display().to_string()] {
            let mut words = vec!["-f".to_owned(), "raw".to_owned(), "-d".to_owned(), "unmap".to_owned()];
            words.extend(commands.iter().flat_map(|c| ["-c".to_owned(), (*c).to_owned()]));
            words.push(to);
            let said = self.run("qemu-io", &words).await;
            assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
        }
    }

    async fn is_same(&self) {
        let plain = self.path("plain").display().to_string();
        let arguments = ["compare", "-f", "raw", "-F", "raw", &self.data(), &plain].map(str::to_owned);
        let said = self.run("qemu-img", &arguments).await;
        assert!(said.contains("identical"), "{said}");
    }

    async fn shaken_data(&self) -> UnixStream {
        let mut stream = self.connect().await;
        stream.read_exact(&mut [0; 18]).await.unwrap();
        stream.write_all(&[0, 0, 0, 3]).await.unwrap();
        stream.write_all(&option(1, b"data")).await.unwrap();
        let mut export = [0; 10];
        stream.read_exact(&mut export).await.unwrap();
        assert_eq!(export[8..], [0, 1 | 4 | 32 | 64], "flags");
        stream
    }
}

async fn write(stream: &mut UnixStream, offset: u64, bytes: &[u8]) {
    stream.write_all(&request(WRITE, offset, bytes.len() as u32)).await.unwrap();
    stream.write_all(bytes).await.unwrap();
}

async fn read(stream: &mut UnixStream, offset: u64, len: u64) -> Vec<u8> {
    stream.write_all(&request(0, offset, len as u32)).await.unwrap();
    let (error, plain) = reply(stream, len as usize).await;
    assert_eq!(error, 0, "{len} bytes at {offset}");
    plain
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_what_qemu_writes_is_read_again_from_the_next_server_and_only_data_is_written() {
    let mut world = World::writable().await;
    world.is_same().await;
    world.io(&["write -P 1 65000 2000", "write -P 2 131072 65536", "flush", "write -P 3 200000 512"]).await;
    world.is_same().await;
    world.again().await;
    world.is_same().await;
    // Whole chunks: what is trimmed of them is zeros there as in a file.
    world.io(&["write -z 300000 70000", "write -zu 400000 140000", "discard 65536 131072", "flush"]).await;
    world.is_same().await;
    world.again().await;
    world.is_same().await;
    let root = world.run("qemu-io", &["-f", "raw", "-c", "write 0 512", &world.uri()].map(str::to_owned)).await;
    assert!(root.contains("Permission denied"), "{root}");
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_exports_are_listed_by_kind() {
    let world = World::writable().await;
    let output = world.run("qemu-nbd", &["--list".into(), "-k".into(), world.path("s").display().to_string()]).await;
    assert!(output.contains("exports available: 2"), "{output}");
    let export = |name: &str| {
        let found = output.split("export: ").find(|e| e.starts_with(&format!("'{name}'")));
        found.unwrap_or_else(|| panic!("no {name}: {output}")).to_owned()
    };
    assert!(export("disk").contains("readonly") && !export("data").contains("readonly"), "{output}");
    for flag in ["flush", "trim", "zeroes"] {
        assert!(export("data").contains(flag), "{output}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_to_one_chunk_at_once_are_all_there_and_it_is_fetched_once() {
    let world = World::writable().await;
    let mut stream = world.shaken_data().await;
    for at in 0..16u8 {
        write(&mut stream, 6 * CHUNK + u64::from(at) * 100, &[at + 1; 100]).await;
    }
    for _ in 0..16 {
        assert_eq!(reply(&mut stream, 0).await.0, 0);
    }
    let found = read(&mut stream, 6 * CHUNK, CHUNK).await;
    let mut expected = world.plain[6 * CHUNK as usize..7 * CHUNK as usize].to_vec();
    (0..16).for_each(|at| expected[at * 100..at * 100 + 100].fill(at as u8 + 1));
    assert!(found == expected);
    assert_eq!(world.fetched.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn bounds_of_writes_are_kept_and_the_connection_goes_on() {
    let world = World::writable().await;
    let (mut stream, size) = (world.shaken_data().await, world.plain.len() as u64);
    for (offset, len) in [(size - 10, 11), (0, requests::BYTES_AT_ONCE + 1), (u64::MAX, 2)] {
        write(&mut stream, offset, &vec![1; len as usize]).await;
        assert_eq!(reply(&mut stream, 0).await.0, 22, "{len} bytes at {offset}");
    }
    for (kind, offset, len, error) in
        [(6, size, 1, 22), (6, 0, u32::MAX, 22), (4, 0, 0, 22), (6, 0, 0, 22), (FLUSH, 0, 0, 0)]
    {
        stream.write_all(&request(kind, offset, len)).await.unwrap();
        assert_eq!(reply(&mut stream, 0).await.0, error, "kind {kind}, {len} bytes at {offset}");
    }
    let mut forced = request(WRITE, 0, 1);
    forced[5] = 1;
    stream.write_all(&forced).await.unwrap();
    stream.write_all(&[1]).await.unwrap();
    assert_eq!(reply(&mut stream, 0).await.0, 22, "a flag that was not offered");
    assert_eq!(read(&mut stream, 0, 10).await, world.plain[..10]);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_writes_and_what_an_earlier_one_was_not_answered_never_comes() {
    let world = World::writable().await;
    world.works.store(false, Ordering::Relaxed);
    let mut first = world.shaken_data().await;
    write(&mut first, 7 * CHUNK + 5, &[1; 100]).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    // It waits for its chunk, and its client goes.
    drop(first);
    let mut second = world.shaken_data().await;
    write(&mut second, 8 * CHUNK, &[3; CHUNK as usize]).await;
    assert_eq!(reply(&mut second, 0).await.0, 0, "the next is not let write");
    world.works.store(true, Ordering::Relaxed);
    write(&mut second, 7 * CHUNK + 5, &[2; 100]).await;
    assert_eq!(reply(&mut second, 0).await.0, 0);
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(read(&mut second, 7 * CHUNK + 5, 100).await, [2; 100]);
    let mut third = world.shaken_data().await;
    write(&mut third, 0, &[9; 10]).await;
    assert_eq!(reply(&mut third, 0).await.0, 1, "two write at once");
    assert_eq!(read(&mut third, 7 * CHUNK + 5, 100).await, [2; 100], "a reader is refused");
}

/// One write of the test below: where, how long, of what, and its answer.
type Answered = (u64, u64, u8, u32);

/// Reads all of it. What a write that found no room has of its own place may be of either.
async fn check(stream: &mut UnixStream, expected: &[u8], answers: &[Answered]) {
    for at in (0..expected.len()).step_by(CHUNK as usize) {
        let found = read(stream, at as u64, CHUNK.min((expected.len() - at) as u64)).await;
        let refused = |i: usize| answers.iter().any(|a| a.3 != 0 && (a.0..a.0 + a.1).contains(&((at + i) as u64)));
        let same = found.iter().enumerate().all(|(i, byte)| *byte == expected[at + i] || refused(i));
        assert!(same, "at {at}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_full_disk_is_said_and_nothing_that_was_answered_is_lost() {
    let mut world = World::new();
    let small = Small::new(world.path("small"), "256k");
    let disk = |world: &World| {
        let (size, table) = (world.plain.len() as u64, world.table(&world.plain));
        world.disk_at(&world.path("small/data"), PartKind::Data, Some(LIFE), size, table)
    };
    world.end().await;
    let served = disk(&world);
    world.serve_all(vec![served.clone()]);
    let (mut stream, mut expected) = (world.shaken_data().await, world.plain.clone());
    let mut answers: Vec<Answered> = Vec::new();
    for chunk in 0..8 {
        // Whole ones, and ones of which the rest is the image's.
        let (at, len) = if chunk % 2 == 0 { (chunk * CHUNK, CHUNK) } else { (chunk * CHUNK + 700, 1000) };
        write(&mut stream, at, &vec![chunk as u8 + 1; len as usize]).await;
        let error = reply(&mut stream, 0).await.0;
        answers.push((at, len, chunk as u8 + 1, error));
        if error == 0 {
            expected[at as usize..(at + len) as usize].fill(chunk as u8 + 1);
        }
    }
    assert!([0, 28].iter().all(|e| answers.iter().any(|a| a.3 == *e)), "{answers:?}");
    assert!(answers.iter().all(|a| matches!(a.3, 0 | 28)), "{answers:?}");
    let said = served.full().expect("nobody says that it is full");
    assert!(said.contains("no room") && said.contains("make room"), "{said}");
    check(&mut stream, &expected, &answers).await;

    small.resize("4m");
    for (at, len, byte, _) in answers.iter().filter(|a| a.3 != 0) {
        write(&mut stream, *at, &vec![*byte; *len as usize]).await;
        assert_eq!(reply(&mut stream, 0).await.0, 0);
        expected[*at as usize..(at + len) as usize].fill(*byte);
    }
    assert_eq!(served.full(), None);
    stream.write_all(&request(FLUSH, 0, 0)).await.unwrap();
    assert_eq!(reply(&mut stream, 0).await.0, 0);
    check(&mut stream, &expected, &[]).await;
    drop((stream, served));
    world.end().await;
    let next = disk(&world);
    world.serve_all(vec![next]);
    check(&mut world.shaken_data().await, &expected, &[]).await;
}

/// Not a test of its own: a server that is killed.
#[test]
fn process_that_serves_data() {
    let Some(dir) = std::env::var_os("VMATRIX_TEST_DATA").map(PathBuf::from) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let world = World::new();
        let (size, table) = (world.plain.len() as u64, world.table(&world.plain));
        let disk = world.disk_at(&dir.join("data"), PartKind::Data, Some(LIFE), size, table);
        let listener = socket::listen(&dir.join("s"), 0o666).unwrap();
        tokio::spawn(serve(listener, vec![disk], Arc::new(|_| true)));
        // Until whoever started it is gone, too.
        let input = || std::io::Read::read_to_end(&mut std::io::stdin(), &mut Vec::new());
        let _ = tokio::task::spawn_blocking(input).await;
        std::process::exit(0);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_server_that_is_killed_again_and_again_loses_nothing_that_was_written() {
    let mut world = World::new();
    world.end().await;
    let server = || {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "nbd::tests::writes::process_that_serves_data", "--nocapture"]);
        command.env("VMATRIX_TEST_DATA", world.dir.path());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
    };
    // One client throughout, which sends again what was not answered, as a guest's QEMU does.
    let (mut commands, mut expected) = (Vec::new(), world.plain.clone());
    let size = expected.len() as u64;
    for n in 0..700u64 {
        let at = (n * 7919 * 512) % (size - 70_000) / 512 * 512;
        let len = if n % 5 == 0 { 65_536 } else { 512 * (1 + n % 7) };
        let byte = (n % 250 + 1) as u8;
        commands.extend(["-c".to_owned(), format!("write -q -P {byte} {at} {len}")]);
        expected[at as usize..(at + len) as usize].fill(byte);
        if n % 50 == 49 {
            commands.extend(["-c".to_owned(), "flush".to_owned()]);
        }
    }
    let image = format!(
        "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={},file.export=data,\
         file.reconnect-delay=30,file.open-timeout=30",
        world.path("s").display()
    );
    let mut process = server();
    let mut client = Command::new("qemu-io");
    client.args(&commands).arg("--image-opts").arg(image).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut client = client.spawn().expect("qemu-io is missing");
    let mut kills = 0;
    let deadline = std::time::Instant::now() + Duration::from_secs(50);
    while client.try_wait().unwrap().is_none() {
        assert!(std::time::Instant::now() < deadline, "the client does not come to its end, {kills} kills");
        tokio::time::sleep(Duration::from_millis(60 + kills * 13 % 90)).await;
        process.kill().unwrap();
        process.wait().unwrap();
        kills += 1;
        process = server();
    }
    let output = client.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(output.status.success() && !said.contains("failed"), "{said:.2000}");
    assert!(kills >= 3, "killed {kills} times only");
    eprintln!("{kills} kills during 700 writes");
    // What a snapshot takes: the image where nothing is marked, the file where something is.
    let disk = world.disk(PartKind::Data, Some(LIFE));
    let (mut found, file) = (world.plain.clone(), std::fs::File::open(world.path("data")).unwrap());
    for chunk in disk.written().unwrap() {
        let at = u64::from(chunk) * CHUNK;
        file.read_exact_at(&mut found[at as usize..(at + CHUNK).min(size) as usize], at).unwrap();
    }
    assert!(found == expected, "the disk is another than the client wrote");
}
