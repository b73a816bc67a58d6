//! What an image is, for people; and whether every byte of it is there and right.

use crate::chunks::{decode, plain_length};
use crate::error::{Error, Result};
use crate::sign;
use crate::store::Store;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;
use vmatrix_model::manifest::Manifest;
use vmatrix_model::{Bytes, Digest};

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
    let mut seen = BTreeSet::new();
    let mut read = Bytes(0);
    for part in &inspected.manifest.parts {
        for (index, chunk) in part.chunks.iter().enumerate() {
            let Some(chunk) = chunk else { continue };
            if seen.insert(chunk.digest) {
                decode(&store.chunk(&chunk.digest)?, chunk, plain_length(part, index))?;
                read += chunk.stored;
            }
        }
    }
    Ok((inspected, read))
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
        for part in &m.parts {
            let stored: Bytes = part.chunks.iter().flatten().map(|c| c.stored).sum();
            let _ = writeln!(
                text,
                "  {:<13} {:>10}  stored {:>10}",
                format!("{:?}", part.kind),
                part.size.to_string(),
                stored.to_string()
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunks::cut;
    use crate::machine::tests::manifest;
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
        let file = dir.path().join("kernel");
        std::fs::write(&file, b"a kernel, more or less").unwrap();
        let part = cut(&file, PartKind::Kernel, Bytes(4096), &store).unwrap();
        let chunk = part.chunks[0].unwrap();
        let mut m = manifest();
        m.parts[3] = part;
        store.put_image("tiny", &sign::sign(&store, &m).unwrap()).unwrap();
        assert_eq!(verify(dir.path(), "tiny", &[]).unwrap().1, chunk.stored);

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
