//! A fleet in one process: an authority, stores with an image, servers, clients.

use crate::identity::{Authority, Identity, Role};
use crate::{Ask, ImageRef, Limits, Server, ServerConfig, Sources};
use std::net::SocketAddr;
use std::path::PathBuf;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use vmatrix_model::Digest;
use vmatrix_model::manifest::*;
use vmatrix_model::units::Bytes;
use vmatrix_vma_image::chunks::{Cutter, Need, close};
use vmatrix_vma_image::memory::{self, Map};
use vmatrix_vma_image::seal::OwnerKey;
use vmatrix_vma_image::{Store, sign};

pub struct Fleet {
    pub dir: tempfile::TempDir,
    pub authority: Authority,
}

/// An image in a store.
pub struct Image {
    pub store: Store,
    pub signed: SignedManifest,
    pub manifest: Manifest,
    pub signers: Vec<String>,
    pub map: Map,
}

/// A server that runs until it is dropped.
pub struct Running {
    pub server: Server,
    pub address: SocketAddr,
    _stop: oneshot::Sender<()>,
}

/// What the guest's memory holds: bytes that do not compress, different for each seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

impl Fleet {
    pub fn new() -> Fleet {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(dir.path().join("ca")).unwrap();
        Fleet { dir, authority }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn identity(&self, role: Role, id: &str) -> Identity {
        self.authority.issue(role, id).unwrap()
    }

    pub fn empty(&self, name: &str) -> Store {
        Store::open(self.path(name)).unwrap()
    }

    /// An image with `pages` of noise in 32 MiB, of which the first 256 are its working set.
    pub fn image(&self, store: &str, pages: usize, key: Option<&OwnerKey>) -> Image {
        self.image_of(store, &noise(7, pages * 4096), key)
    }

    pub fn image_of(&self, store: &str, memory: &[u8], key: Option<&OwnerKey>) -> Image {
        let store = self.empty(store);
        let file = self.path("memory");
        std::fs::write(&file, memory).unwrap();
        std::fs::File::options().write(true).open(&file).unwrap().set_len(32 << 20).unwrap();
        let order: Vec<u32> = (0..256).collect();
        let cutter = Cutter::new(&store, key);
        let memory = memory::cut(&cutter, &file, &order, 60, None).unwrap();
        let device = cutter.blob(&noise(3, 100_000), true).unwrap();
        let disk = self.path("disk");
        std::fs::write(&disk, noise(4, 300_000)).unwrap();
        let disk = cutter.part(&disk, PartKind::Disk, Bytes(256 << 10)).unwrap();
        let manifest = manifest(memory, device, disk, key);
        let signed = sign::sign(&store, &manifest).unwrap();
        store.put_image("tiny", &signed).unwrap();
        let signers = vec![sign::public(&store).unwrap()];
        let map = memory::map(&manifest, &store).unwrap();
        Image { store, signed, manifest, signers, map }
    }

    pub async fn serve(&self, config: ServerConfig) -> Running {
        self.serve_at(Server::new(config).unwrap(), "127.0.0.1:0".parse().unwrap()).await
    }

    pub async fn serve_at(&self, server: Server, at: SocketAddr) -> Running {
        let listener = TcpListener::bind(at).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (_stop, stopped) = oneshot::channel::<()>();
        let running = server.clone();
        tokio::spawn(async move { running.run(listener, async { drop(stopped.await) }).await });
        Running { server, address, _stop }
    }

    pub async fn serve_store(&self, store: &Store) -> Running {
        self.serve(self.config(store)).await
    }

    pub fn config(&self, store: &Store) -> ServerConfig {
        let identity = self.identity(Role::Store, "origin");
        ServerConfig { identity, store: store.clone(), keys: None, rate_mbit: None }
    }

    pub fn machine(&self, local: &Store, addresses: &[SocketAddr]) -> Sources {
        let identity = self.identity(Role::Machine, "tokyo-1");
        Sources::new(&identity, local.clone(), addresses.to_vec(), None, &Limits::default()).unwrap()
    }
}

impl Image {
    /// Every pack of memory.
    pub fn packs(&self) -> Vec<Need> {
        self.map.packs().iter().map(|p| p.need(self.manifest.seal.is_some())).collect()
    }

    pub fn ask(&self, push: bool) -> Ask {
        Ask { image: ImageRef::Name("tiny".to_owned()), have: None, push, key: None }
    }

    pub fn digest(&self) -> Digest {
        Digest::of(self.signed.manifest.as_bytes())
    }

    /// What lies in `local` under the name of `need`, if it is right.
    pub fn right_in(&self, local: &Store, need: &Need, key: Option<&OwnerKey>) -> bool {
        local.chunk(&need.digest).is_ok_and(|stored| vmatrix_vma_image::chunks::open(&stored, need, key).is_ok())
    }
}

/// A chunk of its own, put into `store`.
pub fn chunk(store: &Store, seed: u64, length: usize) -> Need {
    let (need, stored) = close(&noise(seed, length), None).unwrap();
    store.put_chunk(&need.digest, &stored).unwrap();
    need
}

/// Waits until `done`, or fails with what was waited for.
pub async fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..500 {
        if done() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("not within 5 s: {what}");
}

fn manifest(memory: Memory, device: Blob, disk: Part, key: Option<&OwnerKey>) -> Manifest {
    let seal = key.map(OwnerKey::id);
    Manifest { seal, memory, device, parts: vec![disk], ..vmatrix_vma_testing::manifest("tiny", 32, &[PartKind::Disk]) }
}
