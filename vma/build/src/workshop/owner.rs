//! The key that a store's own images are sealed with.
//!
//! ```text
//! <store>/keys/<id>            the key
//! <store>/keys/owner ─link─▶ <id>    which of the keys is this store's own
//! ```

use nix::errno::Errno;
use std::path::Path;
use vmatrix_vma_image::error::{Result, io};
use vmatrix_vma_image::seal::OwnerKey;
use vmatrix_vma_image::{Store, inspect};

/// The store's own key, which is made if there is none.
///
/// # Errors
/// It cannot be read, or not be made.
pub fn key(store: &Store) -> Result<OwnerKey> {
    let own = store.dir().join("keys").join("owner");
    if !own.exists() {
        make(store, &own)?;
    }
    OwnerKey::read(&own)
}

fn make(store: &Store, own: &Path) -> Result<()> {
    let key = OwnerKey::generate()?;
    key.write(inspect::key_path(store.dir(), &key.id()))?;
    // The link is what counts, and comes last. Where another build was faster, this key is nobody's.
    match nix::unistd::symlinkat(key.id().to_string().as_str(), nix::fcntl::AT_FDCWD, own) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(e) => Err(io("name the store's own key", own)(e.into())),
    }
}
