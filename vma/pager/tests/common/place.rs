//! A place where an image is resumed, with a pager that is a process of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use vmatrix_vma_image::{Store, inspect, sign};
use vmatrix_vma_pager::{Control, DisksConfig};
use vmatrix_vma_testing::Process;
use vmatrix_vma_transfer::identity::{Authority, Role};

/// What the test `process_that_pages` of each file does: the pager's process.
pub fn process() {
    let Some(config) = std::env::var_os("VMATRIX_TEST_PAGER").map(PathBuf::from) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(vmatrix_vma_pager::run(&config)).unwrap();
}

/// A folder of a resume of its own. All chunks are in the store; there is no other source.
pub struct Place {
    pub store: Store,
    pub dir: PathBuf,
}

impl Place {
    pub fn new(above: &Path, name: &str, store: &Store, image: &str, shared: bool) -> Place {
        let place = Place { store: store.clone(), dir: above.join(name) };
        std::fs::create_dir_all(place.disks().dir).unwrap();
        // QEMU is nobody when it connects to its disks again.
        std::fs::set_permissions(&place.dir, std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
        let identity = above.join("identity");
        if !identity.exists() {
            let authority = Authority::create(above.join("authority")).unwrap();
            authority.issue(Role::Machine, "m1").unwrap().write(&identity).unwrap();
        }
        let signed = store.image(image).unwrap().unwrap();
        let signer = sign::public(store).unwrap();
        let (manifest, _) = sign::verify(&signed, &[signer.clone(), signed.signer.clone()]).unwrap();
        std::fs::write(place.path("manifest.json"), serde_json::to_vec(&signed).unwrap()).unwrap();
        let mut config = serde_json::json!({
            "image": place.path("manifest.json"), "signers": [signer, signed.signer],
            "memory": place.path("memory"), "disks": place.disks(), "control": place.path("control"),
            "store": store.dir(), "sources": { "identity": identity, "addresses": [] }, "shared": shared,
        });
        if let Some(id) = manifest.seal {
            config["key"] = inspect::key_path(store.dir(), &id).to_str().into();
        }
        std::fs::write(place.path("pager.json"), config.to_string()).unwrap();
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn disks(&self) -> DisksConfig {
        DisksConfig { dir: self.path("disks"), socket: self.path("s") }
    }

    pub fn start(&self) -> Process {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "process_that_pages", "--nocapture", "--test-threads=1"]);
        command.env("VMATRIX_TEST_PAGER", self.path("pager.json"));
        let said = std::fs::File::create(self.path("said")).unwrap();
        Process(command.stdout(said.try_clone().unwrap()).stderr(said).spawn().unwrap())
    }

    /// Starts the pager and waits until it answers.
    pub async fn pager(&self) -> (Process, Control) {
        let process = self.start();
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Ok(control) = Control::connect(&self.path("control")).await {
                return (process, control);
            }
            assert!(Instant::now() < deadline, "no pager: {}", self.said());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// What the pager said.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.path("said")).unwrap()
    }

    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.path("s").display())
    }
}
