//! The tiny guest, laid out as files.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use vmatrix_model::manifest::{GuestSpec, MachineSpec, PartKind};
use vmatrix_vma_image::machine::Files;
use vmatrix_vma_image::{Store, chunks, inspect, memory, sign};

/// A suspended VM, whole.
pub struct Guest {
    pub machine: MachineSpec,
    pub spec: GuestSpec,
    pub files: Files,
    /// Goes with it.
    _folder: tempfile::TempDir,
}

impl Guest {
    /// Builds the image unless an earlier run did, and lays it out.
    pub async fn get() -> Guest {
        let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios/guests/tiny.toml");
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("store");
        let options = vmatrix_vma_build::Options::default();
        vmatrix_vma_build::build(&recipe, &kept, &options).await.expect("the tiny guest is built");
        let store = Store::read(&kept).unwrap();
        let signed = store.image("tiny").unwrap().unwrap();
        let (manifest, _) = sign::verify(&signed, &[sign::public(&store).unwrap()]).unwrap();
        let folder = folder();
        let files = Files::within(folder.path());
        let key = inspect::owner_key(&manifest, &store).unwrap();
        memory::assemble(&manifest, &store, key.as_ref(), &files.memory).unwrap();
        let need = chunks::Need::blob(&manifest.device, manifest.seal.is_some());
        let stored = store.chunk(&manifest.device.digest).unwrap();
        std::fs::write(&files.device, chunks::open(&stored, &need, key.as_ref()).unwrap()).unwrap();
        let parts =
            [(PartKind::Disk, &files.disk), (PartKind::Kernel, &files.kernel), (PartKind::Initrd, &files.initrd)];
        for (kind, path) in parts {
            chunks::assemble(manifest.part(kind).unwrap(), &store, path).unwrap();
        }
        Guest { machine: manifest.machine, spec: manifest.guest, files, _folder: folder }
    }
}

/// A folder in memory, as a machine keeps guests in, that another user may pass.
pub fn folder() -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("vmx").tempdir_in("/dev/shm").expect("needs /dev/shm");
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    folder
}
