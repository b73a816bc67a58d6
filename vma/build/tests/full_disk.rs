//! A build whose disk fills up, at two moments: it says so, and leaves nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

use std::fs::{File, read_dir};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vmatrix_vma_build::build;
use vmatrix_vma_image::{Error, netns};
use vmatrix_vma_testing::Small;

fn files(folder: &Path, all: &mut Vec<PathBuf>) {
    for entry in read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files(&entry.path(), all),
            _ => all.push(entry.path()),
        }
    }
}

/// Names in `folder` that hold the id of this process, which every build's folder and namespace does.
fn ours(folder: &Path, word: &str) -> Vec<String> {
    let id = std::process::id().to_string();
    let names = read_dir(folder).into_iter().flatten().flatten().map(|e| e.file_name().to_string_lossy().into_owned());
    names.filter(|n| n.contains(word) && n.split('-').any(|w| w == id)).collect()
}

async fn build_tiny(store: &Path) -> Error {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios/guests/tiny.toml");
    // Packages are kept elsewhere, so that they are downloaded once and do not fill the disk by themselves.
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("store/cache");
    let options = build::Options { cache: Some(cache), ..build::Options::default() };
    let built = tokio::time::timeout(Duration::from_secs(240), build::build(&recipe, store, &options)).await;
    built.expect("a build that met a full disk goes on").expect_err("it fitted onto the small disk")
}

fn left_nothing(error: &Error, store: &Path) {
    assert!(matches!(error, Error::DiskFull { .. }), "{error:?}");
    let said = error.to_string();
    assert!(said.contains("no space left") && said.contains(&store.display().to_string()), "{said}");
    let mut left = Vec::new();
    files(store, &mut left);
    // The store's own keys and locks outlive a build; what they are for does not matter.
    left.retain(|path| !path.starts_with(store.join("keys")) && !path.ends_with(".lock") && !path.ends_with(".sweep"));
    assert_eq!(left, [] as [PathBuf; 0]);
    assert_eq!(ours(store, "build"), [] as [String; 0]);
    assert_eq!(ours(Path::new("/dev/shm"), "build"), [] as [String; 0]);
    assert_eq!(ours(&netns::path(""), "build"), [] as [String; 0]);
}

#[tokio::test]
async fn machine_a_disk_that_fills_before_the_guest_boots_is_named_and_nothing_is_left() {
    // Kernel, initrd, packages, disk: each size is enough for one more of them.
    for mib in [4, 12, 20, 24] {
        let dir = tempfile::tempdir().unwrap();
        let small = Small::new(dir.path().join("small"), &format!("{mib}m,mode=0700"));
        let store = small.0.join("store");
        let error = build_tiny(&store).await;
        left_nothing(&error, &store);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machine_a_disk_that_fills_while_chunks_are_put_is_named_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let small = Small::new(dir.path().join("small"), "512m,mode=0700");
    let store = small.0.join("store");
    let (chunks, ballast) = (store.join("chunks"), small.0.join("ballast"));
    let done = AtomicBool::new(false);
    let error = std::thread::scope(|scope| {
        let (done, ballast) = (&done, &ballast);
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                let mut put = Vec::new();
                files(&chunks, &mut put);
                if !put.is_empty() {
                    fill(ballast);
                    return;
                }
                std::thread::park_timeout(Duration::from_millis(2));
            }
        });
        let error = tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(build_tiny(&store)));
        done.store(true, Ordering::Relaxed);
        error
    });
    assert!(ballast.exists(), "the build failed before it put a chunk: {error}");
    left_nothing(&error, &store);
}

/// Takes all the room there is.
fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    for piece in [1 << 20, 4096] {
        while file.write_all(&vec![1; piece]).is_ok() {}
    }
}
