//! One contract, three places: a folder, a bucket in memory, a bucket behind a real S3 server on loopback.

mod facts;
mod shaken;

use super::bucket::Bucket;
use super::*;
use crate::chunks::Cutter;
use crate::machine::tests::manifest;
use crate::memory;
use crate::seal::OwnerKey;
use object_store::ObjectStore;
use object_store::memory::InMemory;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::net::TcpListener;
use vmatrix_model::Bytes;
use vmatrix_model::manifest::PartKind;

/// A store, and what has to live as long.
pub(crate) struct World {
    pub store: Store,
    /// Where a folder's or the S3 server's files are.
    pub dir: TempDir,
    in_memory: bool,
    /// Of a bucket that a server has.
    address: Option<String>,
    _server: Option<Server>,
}

struct Server(Option<tokio::sync::oneshot::Sender<()>>, Option<std::thread::JoinHandle<()>>);

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.take());
        if let Some(thread) = self.1.take() {
            thread.join().unwrap();
        }
    }
}

pub(crate) fn folder() -> World {
    let dir = tempfile::tempdir().unwrap();
    World { store: Store::open(dir.path()).unwrap(), dir, in_memory: false, address: None, _server: None }
}

pub(crate) fn in_memory() -> World {
    over(Arc::new(InMemory::new()))
}

fn over(objects: Arc<dyn ObjectStore>) -> World {
    let bucket = Bucket::over(objects, "a/prefix", PathBuf::from("memory://"));
    World {
        store: Store::over(bucket),
        dir: tempfile::tempdir().unwrap(),
        in_memory: true,
        address: None,
        _server: None,
    }
}

/// A bucket whose requests take their time and sometimes fail, before or after they had their effect; and what
/// makes it quick and faultless.
pub(crate) fn shaken(seed: u64) -> (World, impl FnOnce()) {
    let objects = shaken::Shaken::new(seed);
    (over(Arc::new(objects.clone())), move || objects.calm())
}

/// The server checks signatures, and keeps each object as a file in `dir`.
pub(crate) fn s3() -> World {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("images")).unwrap();
    let mut service = s3s::service::S3ServiceBuilder::new(s3s_fs::FileSystem::new(dir.path()).unwrap());
    service.set_auth(s3s::auth::SimpleAuth::from_single("the-id", "the-secret"));
    let service = service.build();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, mut stopped) = tokio::sync::oneshot::channel();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            loop {
                let socket = tokio::select! {
                    accepted = listener.accept() => accepted.unwrap().0,
                    _ = &mut stopped => return,
                };
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(hyper_util::rt::TokioIo::new(socket), service.clone());
                tokio::spawn(connection);
            }
        });
    });
    let address = format!("s3://images/a/prefix?endpoint=http://{address}");
    let store = bucket_at(&address, "the-secret");
    World { store, dir, in_memory: false, address: Some(address), _server: Some(Server(Some(stop), Some(thread))) }
}

fn bucket_at(address: &str, secret: &str) -> Store {
    let env = |name: &str| match name {
        "AWS_ACCESS_KEY_ID" => Some("the-id".to_owned()),
        "AWS_SECRET_ACCESS_KEY" => Some(secret.to_owned()),
        _ => None,
    };
    match address::Address::parse(address, env).unwrap() {
        address::Address::Bucket(address) => Store::over(Bucket::connect(&address).unwrap()),
        address::Address::Folder(_) => panic!("{address} is a folder"),
    }
}

/// An image with sixteen pages of its own and some that all have, cut into `store`, not yet put there.
pub(crate) fn image(store: &Store, own: u8, key: Option<&OwnerKey>) -> SignedManifest {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, length: u64, pieces: &[(u64, Vec<u8>)]| {
        let path = dir.path().join(name);
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(length).unwrap();
        pieces.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
        path
    };
    let noise =
        |seed: u8| (0..4096u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 ^ seed).collect::<Vec<u8>>();
    let pages: Vec<(u64, Vec<u8>)> = (0..16)
        .map(|page| (page * 40 * 4096, noise(own.wrapping_add(page as u8))))
        .chain([(3000 * 4096, noise(0))])
        .collect();
    let ram = file("memory", 16 << 20, &pages);
    let disk = file("disk", 10 * 4096, &[(0, noise(0)), (5 * 4096, noise(own))]);
    let cutter = Cutter::new(store, key);
    let mut m = manifest();
    m.name = format!("image-{own}");
    m.machine.memory_mib = 16;
    m.seal = key.map(OwnerKey::id);
    m.memory = memory::cut(&cutter, &ram, &[40, 80], 1, None).unwrap();
    m.device = cutter.blob(&noise(own ^ 0x55), true).unwrap();
    m.parts = vec![cutter.part(&disk, PartKind::Disk, Bytes(4096)).unwrap()];
    SignedManifest { manifest: serde_json::to_string(&m).unwrap(), signature: String::new(), signer: String::new() }
}

/// Every chunk that an image of a store names.
pub(crate) fn named(store: &Store, name: &str) -> Vec<crate::chunks::Need> {
    let signed = store.image(name).unwrap().unwrap();
    needs(&unverified(name, &signed).unwrap(), store).unwrap().into_iter().collect()
}

/// Makes a test of each fact at each place.
macro_rules! contract {
    ($($fact:ident),* $(,)?) => {
        mod folder { $(#[test] fn $fact() { super::$fact(&$crate::store::tests::folder()); })* }
        mod in_memory { $(#[test] fn $fact() { super::$fact(&$crate::store::tests::in_memory()); })* }
        mod s3 { $(#[test] fn $fact() { super::$fact(&$crate::store::tests::s3()); })* }
    };
}
pub(crate) use contract;

impl World {
    /// Makes everything in the store older than [`World::grace`].
    pub fn make_old(&self) {
        if self.in_memory {
            pause(2 * self.grace());
        }
        fn age(folder: &Path) {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    age(&path);
                } else {
                    let two_hours_ago = SystemTime::now() - Duration::from_secs(7200);
                    std::fs::File::options().write(true).open(&path).unwrap().set_modified(two_hours_ago).unwrap();
                }
            }
        }
        age(self.dir.path());
    }

    /// What is put now is younger for the rest of a test.
    pub fn grace(&self) -> Duration {
        if self.in_memory { Duration::from_secs(2) } else { Duration::from_secs(600) }
    }

    pub fn with_lease(mut self, lease: Duration) -> World {
        if let Place::Bucket(bucket) = &mut self.store.place {
            bucket.lease = lease;
        }
        self
    }
}

#[test]
fn a_local_chunk_that_is_too_long_is_not_read_to_its_end() {
    let world = folder();
    let digest = Digest::of(b"x");
    world.store.put_chunk(&digest, b"x").unwrap();
    let path = world.dir.path().join(chunk_key(&digest));
    std::fs::File::options().write(true).open(path).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(world.store.chunk(&digest), Err(Error::TooLong { .. })));
}

#[test]
fn a_bucket_is_where_its_address_says_and_refuses_a_wrong_secret() {
    let world = s3();
    let digest = Digest::of(b"x");
    world.store.put_chunk(&digest, b"x").unwrap();
    assert!(world.dir.path().join("images/a/prefix").join(chunk_key(&digest)).is_file());
    let other = bucket_at(world.address.as_deref().unwrap(), "a-wrong-secret");
    let error = other.chunk(&digest).unwrap_err();
    assert!(matches!(error, Error::Bucket { what: "read", .. }), "{error}");
    assert!(error.to_string().contains("s3://images/a/prefix/chunks"), "{error}");
    assert!(matches!(other.put_chunk(&digest, b"y"), Err(Error::Bucket { .. })));
}

#[test]
fn a_server_that_is_not_there_or_speaks_no_tls_is_an_error_soon() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let free = listener.local_addr().unwrap();
    drop(listener);
    let world = s3();
    let plain = world.address.as_deref().unwrap().replace("http://", "https://");
    let begun = std::time::Instant::now();
    for address in [format!("s3://images?endpoint=http://{free}"), plain] {
        let error = bucket_at(&address, "s").names().unwrap_err();
        assert!(matches!(error, Error::Bucket { what: "list", .. }), "{error}");
    }
    assert!(begun.elapsed() < Duration::from_secs(40), "took {:?}", begun.elapsed());
}

/// Keeps sending, whatever it is asked; how many bytes it got rid of.
fn endless(head: &'static str, body: &'static [u8]) -> (std::net::SocketAddr, Arc<std::sync::atomic::AtomicU64>) {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let sent = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let (address, count) = (listener.local_addr().unwrap(), sent.clone());
    std::thread::spawn(move || {
        for socket in listener.incoming().take(8) {
            let (mut socket, count) = (socket.unwrap(), count.clone());
            std::thread::spawn(move || {
                let _ = socket.read(&mut [0; 4096]);
                let _ = socket.write_all(head.as_bytes());
                while socket.write_all(body).is_ok() {
                    count.fetch_add(body.len() as u64, std::sync::atomic::Ordering::Relaxed);
                }
            });
        }
    });
    (address, sent)
}

#[test]
fn an_endless_answer_is_cut_off() {
    const HEAD: &str = "HTTP/1.1 200 OK\r\nETag: \"x\"\r\nLast-Modified: Fri, 20 Nov 2026 12:00:00 GMT\r\n";
    static ZEROS: [u8; 65536] = [0; 65536];
    let long: &'static str = Box::leak(format!("{HEAD}Content-Length: 1099511627776\r\n\r\n").into_boxed_str());
    let (address, sent) = endless(long, &ZEROS);
    let store = bucket_at(&format!("s3://images?endpoint=http://{address}"), "s");
    let begun = std::time::Instant::now();
    assert!(matches!(store.chunk(&Digest::of(b"x")), Err(Error::TooLong { .. })));
    assert!(begun.elapsed() < Duration::from_secs(10), "took {:?}", begun.elapsed());
    pause(Duration::from_millis(200));
    let sent = sent.load(std::sync::atomic::Ordering::Relaxed);
    assert!(sent < STORED_MAX as u64, "{sent} bytes were taken of what was too long from the start");
}
