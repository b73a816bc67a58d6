//! Who vouches for an image: ed25519 over the manifest's exact text.
//!
//! text ─▶ signature, format, names, sizes ─▶ Manifest + digest, or a refusal that names the fault.

use crate::bounds::check;
use crate::error::{Error, Result, io};
use crate::store::{Store, write_whole};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use std::fs;
use std::path::{Path, PathBuf};
use vmatrix_model::Digest;
use vmatrix_model::manifest::{MANIFEST_MAX, Manifest, SignedManifest};

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

/// The public key of the store's builder, 64 hex digits, for whoever is about to build: the key is made if
/// there is none.
///
/// # Errors
/// The key cannot be read or made.
pub fn builder_public(store: &Store) -> Result<String> {
    Ok(hex(builder_key(store)?.verifying_key().as_bytes()))
}

/// The public key of the store's builder, 64 hex digits: what machines list as a signer. Changes nothing.
///
/// # Errors
/// [`Error::NoKey`]: nothing was built here; or the key cannot be read.
pub fn public(store: &Store) -> Result<String> {
    let path = key_path(store);
    let key = read_key(&path)?.ok_or(Error::NoKey { path })?;
    Ok(hex(key.verifying_key().as_bytes()))
}

fn key_path(store: &Store) -> PathBuf {
    store.dir().join("keys").join("builder")
}

fn read_key(path: &Path) -> Result<Option<SigningKey>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io("read", path)(e)),
    };
    from_hex(text.trim()).map(|seed| Some(SigningKey::from_bytes(&seed))).ok_or_else(|| Error::BadRecipe {
        file: path.to_owned(),
        problem: "not 64 hex digits; remove it to have a new key made, and images built again".to_owned(),
    })
}

fn builder_key(store: &Store) -> Result<SigningKey> {
    let path = key_path(store);
    if let Some(key) = read_key(&path)? {
        return Ok(key);
    }
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|e| io("make a key for", &path)(std::io::Error::other(e.to_string())))?;
    write_whole(&path, hex(&seed).as_bytes())?;
    Ok(SigningKey::from_bytes(&seed))
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
        let (_dir, store, _, trusted) = signed();
        let mut m = manifest();
        m.guest.mac = "52:54:00:12:34:56 drop; flush ruleset".to_owned();
        assert!(sign(&store, &m).unwrap_err().to_string().contains("mac"));
        // As a trusted builder that does not look would have signed it.
        let text = serde_json::to_string(&m).unwrap();
        let key = builder_key(&store).unwrap();
        let signature = hex(&key.sign(text.as_bytes()).to_bytes());
        let signed = SignedManifest { signature, signer: trusted[0].clone(), manifest: text };
        assert!(
            matches!(verify(&signed, &trusted), Err(Error::BadManifest { problem, .. }) if problem.contains("mac"))
        );
    }

    #[test]
    fn reading_the_public_key_makes_none() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert!(matches!(public(&store), Err(Error::NoKey { .. })));
        assert!(!dir.path().join("keys/builder").exists(), "a key was made");
        assert_eq!(builder_public(&store).unwrap(), public(&store).unwrap());
    }

    #[test]
    fn the_builders_key_is_for_its_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let (dir, ..) = signed();
        let mode = fs::metadata(dir.path().join("keys/builder")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
