//! Who vouches for an image: ed25519 over the manifest's exact text.
//!
//! text ─▶ signature, format, names, sizes ─▶ Manifest + digest, or a refusal that names the fault.

use crate::chunks::CHUNK_MAX;
use crate::error::{Error, Result, io};
use crate::store::{STORED_MAX, Store, write_whole};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use vmatrix_model::Digest;
use vmatrix_model::manifest::{FORMAT, MANIFEST_MAX, Manifest, Part, PartKind, SignedManifest};

/// Largest part: the memory of the largest guest.
pub const PART_MAX: u64 = 64 << 30;
/// Most chunks in a part; what `MANIFEST_MAX` has room for.
const CHUNKS_MAX: usize = 256 << 10;

/// Checks signature, trust, format and sizes, and reads the manifest; the digest is that of its text.
/// `trusted` holds signers' public keys, 64 hex digits each.
///
/// # Errors
/// [`Error::Untrusted`], [`Error::BadSignature`] or [`Error::BadManifest`], which names the fault.
pub fn verify(signed: &SignedManifest, trusted: &[String]) -> Result<(Manifest, Digest)> {
    let name = claimed_name(&signed.manifest);
    if !trusted.iter().any(|t| t.eq_ignore_ascii_case(&signed.signer)) {
        return Err(Error::Untrusted { name, signer: signed.signer.chars().take(80).collect() });
    }
    verify_signature(signed, &name)?;
    let manifest: Manifest = serde_json::from_str(&signed.manifest)
        .map_err(|e| Error::BadManifest { name: name.clone(), problem: e.to_string() })?;
    check(&manifest).map_err(|problem| Error::BadManifest { name, problem })?;
    Ok((manifest, Digest::of(signed.manifest.as_bytes())))
}

fn verify_signature(signed: &SignedManifest, name: &str) -> Result<()> {
    if signed.manifest.len() > MANIFEST_MAX {
        return Err(Error::BadManifest {
            name: name.to_owned(),
            problem: format!("its manifest is longer than {MANIFEST_MAX} bytes"),
        });
    }
    let bad = || Error::BadSignature { name: name.to_owned() };
    let key: [u8; 32] = from_hex(&signed.signer).ok_or_else(bad)?;
    let signature: [u8; 64] = from_hex(&signed.signature).ok_or_else(bad)?;
    VerifyingKey::from_bytes(&key)
        .and_then(|k| k.verify_strict(signed.manifest.as_bytes(), &Signature::from_bytes(&signature)))
        .map_err(|_| bad())
}

/// The name a text that is not yet trusted gives itself, for messages only.
fn claimed_name(text: &str) -> String {
    #[derive(serde::Deserialize)]
    struct Named {
        name: String,
    }
    if text.len() > MANIFEST_MAX {
        return "?".to_owned();
    }
    serde_json::from_str::<Named>(text).map_or("?".to_owned(), |n| n.name.chars().take(80).collect())
}

/// Whether everything a manifest says is possible. Its words reach a command line, its sizes an allocation.
fn check(m: &Manifest) -> std::result::Result<(), String> {
    if m.format != FORMAT {
        return Err(format!("format {} is not {FORMAT}, the one this version reads", m.format));
    }
    m.name.parse::<vmatrix_model::ServiceId>().map_err(|e| e.to_string())?;
    let word = |what: &str, w: &str| {
        let good =
            !w.is_empty() && w.len() <= 64 && w.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if good { Ok(()) } else { Err(format!("{what} {w:?} is not a plain word")) }
    };
    word("machine_type", &m.machine.machine_type)?;
    word("cpu_model", &m.machine.cpu_model)?;
    word("accelerator", &m.machine.accelerator)?;
    word("qemu_version", &m.machine.qemu_version)?;
    word("netdev", &m.machine.netdev)?;
    if !(1..=64).contains(&m.machine.smp) || !(16..=PART_MAX >> 20).contains(&m.machine.memory_mib) {
        return Err(format!("{} processors or {} MiB are out of range", m.machine.smp, m.machine.memory_mib));
    }
    let path = &m.guest.health.path;
    if !path.starts_with('/') || path.len() > 512 || !path.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(format!("health path {path:?} is not a plain path"));
    }
    let mut kinds = BTreeSet::new();
    for part in &m.parts {
        if !kinds.insert(part.kind) {
            return Err(format!("part {:?} is there twice", part.kind));
        }
        check_part(part)?;
    }
    for kind in [PartKind::Memory, PartKind::Device, PartKind::Disk, PartKind::Kernel, PartKind::Initrd] {
        if !kinds.contains(&kind) {
            return Err(format!("part {kind:?} is missing"));
        }
    }
    match m.part(PartKind::Memory) {
        Some(p) if p.size.0 != m.machine.memory_mib << 20 => {
            Err(format!("its memory part has {} bytes, its machine {} MiB", p.size.0, m.machine.memory_mib))
        }
        _ => Ok(()),
    }
}

fn check_part(part: &Part) -> std::result::Result<(), String> {
    let kind = part.kind;
    let chunk = part.chunk.0;
    if !(4096..=CHUNK_MAX as u64).contains(&chunk) {
        return Err(format!("part {kind:?} has chunks of {chunk} bytes, not 4096 to {CHUNK_MAX}"));
    }
    if part.size.0 > PART_MAX || part.chunks.len() > CHUNKS_MAX {
        return Err(format!("part {kind:?} of {} bytes is larger than {PART_MAX}", part.size.0));
    }
    if part.size.0.div_ceil(chunk) != part.chunks.len() as u64 {
        return Err(format!("part {kind:?} of {} bytes cannot have {} chunks", part.size.0, part.chunks.len()));
    }
    match part.chunks.iter().flatten().find(|c| c.stored.0 == 0 || c.stored.0 > STORED_MAX as u64) {
        Some(c) => Err(format!("chunk {} of part {kind:?} has {} stored bytes", c.digest, c.stored.0)),
        None => Ok(()),
    }
}

/// Signs a manifest with the store's builder key, which is made if there is none.
///
/// # Errors
/// The key cannot be read or made, or the manifest breaks a bound that [`verify`] would refuse.
pub fn sign(store: &Store, manifest: &Manifest) -> Result<SignedManifest> {
    let fault = |problem: String| Error::BadManifest { name: manifest.name.clone(), problem };
    check(manifest).map_err(fault)?;
    let text = serde_json::to_string(manifest).map_err(|e| fault(e.to_string()))?;
    let key = builder_key(store)?;
    Ok(SignedManifest {
        signature: hex(&key.sign(text.as_bytes()).to_bytes()),
        signer: hex(key.verifying_key().as_bytes()),
        manifest: text,
    })
}

/// The public key of the store's builder, 64 hex digits: what machines list as a signer.
///
/// # Errors
/// The key cannot be read or made.
pub fn builder_public(store: &Store) -> Result<String> {
    Ok(hex(builder_key(store)?.verifying_key().as_bytes()))
}

fn builder_key(store: &Store) -> Result<SigningKey> {
    let path: PathBuf = store.dir().join("keys").join("builder");
    match fs::read_to_string(&path) {
        Ok(text) => from_hex(text.trim()).map(|seed| SigningKey::from_bytes(&seed)).ok_or_else(|| Error::BadRecipe {
            file: path,
            problem: "not 64 hex digits; remove it to have a new key made, and images built again".to_owned(),
        }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let mut seed = [0; 32];
            getrandom::fill(&mut seed)
                .map_err(|e| io("make a key for", &path)(std::io::Error::other(e.to_string())))?;
            write_whole(&path, hex(&seed).as_bytes(), 0o600)?;
            Ok(SigningKey::from_bytes(&seed))
        }
        Err(e) => Err(io("read", &path)(e)),
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
        let high = char::from(*pair.first()?).to_digit(16)?;
        let low = char::from(*pair.get(1)?).to_digit(16)?;
        *byte = u8::try_from(high * 16 + low).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::tests::manifest;

    fn signed() -> (tempfile::TempDir, Store, SignedManifest, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let signed = sign(&store, &manifest()).unwrap();
        let trusted = vec![builder_public(&store).unwrap()];
        (dir, store, signed, trusted)
    }

    #[test]
    fn a_signed_manifest_reads_back_and_is_named_by_its_text() {
        let (_dir, store, signed, trusted) = signed();
        store.put_image("tiny", &signed).unwrap();
        let read = store.image("tiny").unwrap().unwrap();
        let (back, digest) = verify(&read, &trusted).unwrap();
        assert_eq!(back, manifest());
        assert_eq!(digest, Digest::of(signed.manifest.as_bytes()));
        assert!(store.image("none").unwrap().is_none());
        assert!(store.image("../keys/builder").is_err());
    }

    #[test]
    fn one_changed_letter_breaks_the_signature() {
        let (_dir, _store, mut signed, trusted) = signed();
        signed.manifest = signed.manifest.replace("Nehalem", "Penryn!");
        assert!(matches!(verify(&signed, &trusted), Err(Error::BadSignature { name }) if name == "tiny"));
    }

    #[test]
    fn a_signer_nobody_trusts_is_named() {
        let (_dir, _store, signed, _) = signed();
        let error = verify(&signed, &["00".repeat(32)]).unwrap_err();
        assert!(matches!(&error, Error::Untrusted { signer, .. } if *signer == signed.signer), "{error}");
    }

    #[test]
    fn what_cannot_be_is_refused_even_if_signed() {
        let (_dir, store, ..) = signed();
        let refuses = |change: fn(&mut Manifest), word: &str| {
            let mut m = manifest();
            change(&mut m);
            let error = sign(&store, &m).unwrap_err().to_string();
            assert!(error.contains(word), "{error} does not say {word}");
        };
        refuses(|m| m.format = 2, "format 2");
        refuses(|m| m.machine.cpu_model = "Nehalem,-sse".to_owned(), "cpu_model");
        refuses(|m| m.machine.memory_mib = 256, "memory part");
        refuses(|m| m.guest.health.path = "/ HTTP/1.0\r\n".to_owned(), "health path");
        refuses(|m| m.parts.truncate(2), "missing");
        refuses(|m| m.parts[0].chunk = vmatrix_model::Bytes(1 << 40), "has chunks of");
        refuses(|m| m.parts[0].chunks.truncate(1), "cannot have 1 chunks");
        refuses(|m| m.parts.push(m.parts[1].clone()), "twice");
    }

    #[test]
    fn the_builders_key_is_for_its_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let (dir, ..) = signed();
        let mode = fs::metadata(dir.path().join("keys/builder")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
