//! What an image is, for people; and whether every byte of it is there and right.

use crate::chunks::{self, Need};
use crate::error::{Error, Result};
use crate::memory;
use crate::seal::OwnerKey;
use crate::sign;
use crate::store::Store;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use vmatrix_model::manifest::Manifest;
use vmatrix_model::{Bytes, Digest, KeyId};

/// A manifest that was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspected {
    pub manifest: Manifest,
    /// Of its text: names the image.
    pub digest: Digest,
    /// Its signer's public key, 64 hex digits.
    pub signer: String,
}

/// Reads an image's manifest and checks its signature. With no `trusted` keys the store's own builder is
/// the one that is trusted.
///
/// # Errors
/// There is no such store or image, or [`sign::verify`] refuses it. Nothing is made or changed.
pub fn inspect(store: &Path, name: &str, trusted: &[String]) -> Result<Inspected> {
    let store = Store::read(store)?;
    let signed =
        store.image(name)?.ok_or_else(|| Error::NoImage { name: name.to_owned(), store: store.dir().to_owned() })?;
    let own = if trusted.is_empty() { vec![sign::public(&store)?] } else { trusted.to_vec() };
    let (manifest, digest) = sign::verify(&signed, &own)?;
    Ok(Inspected { manifest, digest, signer: signed.signer })
}

/// As [`inspect`], and unpacks every chunk: each must be there and have its digest. Returns what was read.
///
/// # Errors
/// The first chunk that is missing or wrong, by digest.
pub fn verify(store: &Path, name: &str, trusted: &[String]) -> Result<(Inspected, Bytes)> {
    let inspected = inspect(store, name, trusted)?;
    let store = Store::read(store)?;
    let m = &inspected.manifest;
    let key = owner_key(m, &store)?;
    let mut needs = BTreeSet::from([Need::blob(&m.device, m.seal.is_some())]);
    needs.extend([&m.memory.first, &m.memory.rest].map(|table| Need::blob(table, false)));
    needs.extend(memory::map(m, &store)?.packs().iter().map(|p| p.need(m.seal.is_some())));
    for part in &m.parts {
        needs.insert(Need::blob(&part.table, false));
        let chunks = chunks::table(part, &store)?;
        needs.extend(chunks.iter().enumerate().filter_map(|(i, c)| Some(Need::part(part, i, c.as_ref()?))));
    }
    for need in &needs {
        chunks::open(&store.chunk(&need.digest)?, need, key.as_ref())?;
    }
    let read = needs.iter().map(|n| Bytes(n.stored)).sum();
    Ok((inspected, read))
}

/// The key that a sealed image's owner keeps in the store's own folder; none where nothing is sealed.
///
/// # Errors
/// The key is not there, or cannot be read.
pub fn owner_key(manifest: &Manifest, store: &Store) -> Result<Option<OwnerKey>> {
    manifest.seal.map(|id| OwnerKey::read(key_path(store.dir(), &id))).transpose()
}

/// Where the folder of a store keeps an owner's key.
pub fn key_path(store: &Path, id: &KeyId) -> PathBuf {
    store.join("keys").join(id.to_string())
}

impl Inspected {
    /// The image as lines for a terminal.
    pub fn table(&self) -> String {
        let m = &self.manifest;
        let ports: Vec<String> = m.guest.ports.iter().map(u16::to_string).collect();
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = writeln!(text, "image     {} {}", m.name, self.digest);
        let _ = writeln!(text, "signer    {}", self.signer);
        let _ = writeln!(
            text,
            "machine   {} {} {} QEMU {}, {} MiB",
            m.machine.machine_type,
            m.machine.cpu_model,
            m.machine.accelerator,
            m.machine.qemu_version,
            m.machine.memory_mib
        );
        let _ = writeln!(text, "guest     {} ports {}", m.guest.address, ports.join(" "));
        for backend in &m.guest.backends {
            let _ = writeln!(text, "back end  {} {}:{}", backend.name, backend.address, backend.port);
        }
        let _ = writeln!(text, "measured  boot {} ms, answer {} ms", m.measured.boot_ms, m.measured.answer_ms);
        let _ = writeln!(text, "stored    {}", m.stored());
        let (memory, set) = (&m.memory, &m.memory.working_set);
        let _ = writeln!(
            text,
            "  memory        {:>10}  stored {:>10}  {} % zero; working set {} pages, {} stored, of {} requests",
            memory.size.to_string(),
            memory.stored.to_string(),
            memory.zero_pages * 100 / m.pages().max(1),
            set.pages,
            set.stored,
            set.requests
        );
        let _ = writeln!(
            text,
            "  device state  {:>10}  stored {:>10}",
            m.device.plain.to_string(),
            m.device.stored.to_string()
        );
        for part in &m.parts {
            let _ = writeln!(
                text,
                "  {:<13} {:>10}  stored {:>10}",
                format!("{:?}", part.kind).to_lowercase(),
                part.size.to_string(),
                part.stored.to_string()
            );
        }
        if let Some(id) = &m.seal {
            let _ = writeln!(text, "sealed    memory and device state, with key {}", id.0.short());
        }
        if !m.guest.reseeds {
            let _ = writeln!(text, "warning   nothing in this guest takes fresh random bytes: its clones share theirs");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunks::Cutter;

    use crate::machine::tests::manifest;
    use std::fs::File;
    use vmatrix_model::manifest::PartKind;

    #[test]
    fn a_mistyped_store_or_name_is_named_and_nothing_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let wrong = dir.path().join("stroe");
        for looked in [inspect(&wrong, "tiny", &[]).map(drop), verify(&wrong, "tiny", &[]).map(drop)] {
            let error = looked.unwrap_err().to_string();
            assert!(error.contains("stroe is no image store") && error.contains("--store"), "{error}");
        }
        assert!(!wrong.exists(), "a look made a folder");
        let store = Store::open(dir.path().join("store")).unwrap();
        store.put_image("tiny", &sign::sign(&store, &manifest()).unwrap()).unwrap();
        std::fs::remove_file(store.dir().join("keys/builder")).unwrap();
        assert!(matches!(inspect(store.dir(), "tiny", &[]), Err(Error::NoKey { .. })));
        assert!(!store.dir().join("keys/builder").exists(), "a look made a key");
        let error = inspect(store.dir(), "../tiny", &[]).unwrap_err().to_string();
        assert!(error.contains("not the name of an image") && !error.contains("service"), "{error}");
    }

    #[test]
    fn a_truncated_and_a_missing_chunk_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let file = dir.path().join("memory");
        std::fs::write(&file, vec![7; 1 << 20]).unwrap();
        let cutter = Cutter::new(&store, None);
        let mut m = manifest();
        m.memory = memory::cut(&cutter, &file, &[3], 1, None).unwrap();
        m.machine.memory_mib = 1;
        let refused = sign::sign(&store, &m).unwrap_err().to_string();
        assert!(refused.contains("out of range"), "{refused}");
        File::options().write(true).open(&file).unwrap().set_len(128 << 20).unwrap();
        m.memory = memory::cut(&cutter, &file, &[3], 1, None).unwrap();
        m.machine.memory_mib = 128;
        m.device = cutter.blob(b"device state", true).unwrap();
        std::fs::write(dir.path().join("kernel"), b"a kernel, more or less").unwrap();
        m.parts = [PartKind::Kernel, PartKind::Disk]
            .map(|kind| cutter.part(&dir.path().join("kernel"), kind, Bytes(4096)).unwrap())
            .to_vec();
        store.put_image("tiny", &sign::sign(&store, &m).unwrap()).unwrap();
        let chunk = chunks::table(&m.parts[0], &store).unwrap()[0].unwrap();
        assert!(verify(dir.path(), "tiny", &[]).unwrap().1 > chunk.stored);

        let hex = chunk.digest.to_string();
        let path = dir.path().join("chunks").join(&hex[..2]).join(&hex);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        assert!(verify(dir.path(), "tiny", &[]).unwrap_err().to_string().contains(&hex));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(verify(dir.path(), "tiny", &[]), Err(Error::NoChunk { .. })));
        assert!(matches!(inspect(dir.path(), "none", &[]), Err(Error::NoImage { .. })));
    }
}
