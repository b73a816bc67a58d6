//! What a store keeper may not read: chunks of memory and device state, sealed with their owner's key.
//!
//! ```text
//! plain ─digest─▶ name (keyed)      zstd(plain) ─seal(digest)─▶ nonce · ciphertext · tag ─open(digest)─▶ zstd(plain)
//! ```
//!
//! Three keys are derived from the owner's by BLAKE3: one that names, one that makes nonces, one that seals
//! (ChaCha20-Poly1305, the name as associated data, so a chunk under another's name does not open).
//!
//! The nonce is a keyed hash of the name and of the very bytes that are sealed. So equal content of one owner is
//! equal when sealed, and is stored and sent once; and other bytes never meet the same nonce, as they would if it
//! came from the name alone and a later zstd packed the same content differently.
//!
//! # What it reveals
//! Whoever holds the store sees which chunks of **one** owner are equal, how long each is when packed, and when
//! each was put; not what is in them. Names of sealed chunks are keyed too: a plain digest would tell who has a
//! known file in memory, and two owners' chunks of the same content would have one name but other bytes.

use crate::error::{Error, Result, io};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use std::fmt;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use vmatrix_model::{Digest, KeyId};
use zeroize::Zeroizing;

/// Bytes that sealing adds: a nonce before, a tag behind.
pub const OVERHEAD: usize = NONCE + TAG;
const NONCE: usize = 12;
const TAG: usize = 16;

// Each says what the derived key is for; a change makes all that was sealed unreadable.
const FOR_ID: &str = "vmatrix 2026 owner key: id";
const FOR_NAMES: &str = "vmatrix 2026 owner key: names of sealed chunks";
const FOR_NONCES: &str = "vmatrix 2026 owner key: nonces";
const FOR_SEALING: &str = "vmatrix 2026 owner key: sealing";

/// An image owner's secret: 32 random bytes. They are wiped when it is dropped, and never printed.
#[derive(Clone)]
pub struct OwnerKey {
    secret: Zeroizing<[u8; 32]>,
    names: Zeroizing<[u8; 32]>,
    nonces: Zeroizing<[u8; 32]>,
    sealing: Zeroizing<[u8; 32]>,
}

impl OwnerKey {
    /// A new one, from the kernel's random bytes.
    ///
    /// # Errors
    /// The kernel has none to give.
    pub fn generate() -> Result<OwnerKey> {
        let mut secret = [0; 32];
        getrandom::fill(&mut secret)
            .map_err(|e| io("draw a key from", Path::new("/dev/urandom"))(std::io::Error::other(e.to_string())))?;
        Ok(OwnerKey::from_bytes(secret))
    }

    /// The key of these 32 bytes.
    pub fn from_bytes(secret: [u8; 32]) -> OwnerKey {
        let derived = |purpose| Zeroizing::new(blake3::derive_key(purpose, &secret));
        OwnerKey {
            names: derived(FOR_NAMES),
            nonces: derived(FOR_NONCES),
            sealing: derived(FOR_SEALING),
            secret: Zeroizing::new(secret),
        }
    }

    /// Reads a key file: 64 hex digits.
    ///
    /// # Errors
    /// It is not there, others than its owner may read it, or it holds something else.
    pub fn read(path: impl AsRef<Path>) -> Result<OwnerKey> {
        let path = path.as_ref();
        let bad = |problem: String| Error::BadKey { path: path.to_owned(), problem };
        let file = fs::File::open(path).map_err(io("open", path))?;
        let mode = file.metadata().map_err(io("look at", path))?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(bad(format!("others may read it (mode {:03o}); make it 600", mode & 0o777)));
        }
        let mut text = Zeroizing::new(String::new());
        // One more than digits and line end, so that a longer file is seen as one.
        file.take(67).read_to_string(&mut text).map_err(io("read", path))?;
        let secret = blake3::Hash::from_hex(text.trim_end()).map_err(|_| bad("it is not 64 hex digits".to_owned()))?;
        Ok(OwnerKey::from_bytes(*secret.as_bytes()))
    }

    /// Writes it to a new file that only its owner may read.
    ///
    /// # Errors
    /// There is a file already, which may be the only copy of another key; or it cannot be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let text = blake3::Hash::from_bytes(*self.bytes()).to_hex();
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
            .map_err(io("write the key", path))
    }

    /// The secret itself, for whoever hands it to a machine that is to resume the image.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.secret
    }

    /// What names it in manifests, without telling it.
    pub fn id(&self) -> KeyId {
        KeyId(Digest(blake3::derive_key(FOR_ID, self.bytes())))
    }

    /// The name of a sealed chunk with these plain bytes: their BLAKE3, keyed.
    pub fn digest(&self, plain: &[u8]) -> Digest {
        Digest(*blake3::keyed_hash(&self.names, plain).as_bytes())
    }

    /// Seals the packed bytes of chunk `digest`; equal bytes become equal ones. The result is [`OVERHEAD`] longer.
    ///
    /// # Errors
    /// The bytes are more than the cipher takes (256 GiB).
    pub fn seal(&self, digest: &Digest, packed: &[u8]) -> Result<Vec<u8>> {
        let nonce = self.nonce(digest, packed);
        let mut sealed = Vec::with_capacity(packed.len() + OVERHEAD);
        sealed.extend_from_slice(&nonce);
        sealed.extend_from_slice(packed);
        let fault = |_| Error::BadChunk { digest: *digest, problem: "cannot be sealed".to_owned() };
        let tag = self
            .cipher(digest)?
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(digest.0),
                sealed.get_mut(NONCE..).unwrap_or_default(),
            )
            .map_err(fault)?;
        sealed.extend_from_slice(tag.as_ref());
        Ok(sealed)
    }

    /// Opens what [`OwnerKey::seal`] made of chunk `digest`, and gives its packed bytes.
    ///
    /// # Errors
    /// [`Error::BadChunk`]: sealed with another key, under another name, or changed since.
    pub fn open(&self, digest: &Digest, sealed: &[u8]) -> Result<Vec<u8>> {
        let bad = || Error::BadChunk {
            digest: *digest,
            problem: format!(
                "does not open with key {}: another key's, another chunk's, or damaged",
                self.id().0.short()
            ),
        };
        let (nonce, rest) = sealed.split_first_chunk::<NONCE>().ok_or_else(bad)?;
        let mut packed = rest.to_vec();
        let length = self
            .cipher(digest)?
            .open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(digest.0), &mut packed)
            .map_err(|_| bad())?
            .len();
        packed.truncate(length);
        Ok(packed)
    }

    fn nonce(&self, digest: &Digest, packed: &[u8]) -> [u8; NONCE] {
        let mut hash = blake3::Hasher::new_keyed(&self.nonces);
        hash.update(&digest.0);
        hash.update(packed);
        let mut nonce = [0; NONCE];
        hash.finalize_xof().fill(&mut nonce);
        nonce
    }

    fn cipher(&self, digest: &Digest) -> Result<LessSafeKey> {
        UnboundKey::new(&CHACHA20_POLY1305, self.sealing.as_slice())
            .map(LessSafeKey::new)
            .map_err(|_| Error::BadChunk { digest: *digest, problem: "the cipher refuses the key".to_owned() })
    }
}

impl fmt::Debug for OwnerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnerKey({})", self.id().0.short())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(byte: u8) -> OwnerKey {
        OwnerKey::from_bytes([byte; 32])
    }

    fn refused(key: &OwnerKey, digest: &Digest, sealed: &[u8]) -> bool {
        matches!(key.open(digest, sealed), Err(Error::BadChunk { .. }))
    }

    #[test]
    fn what_was_sealed_opens_and_is_the_same_each_time() {
        let (key, packed) = (key(1), b"session keys of a guest".as_slice());
        let digest = key.digest(packed);
        let sealed = key.seal(&digest, packed).unwrap();
        assert_eq!(sealed.len(), packed.len() + OVERHEAD);
        assert_eq!(key.open(&digest, &sealed).unwrap(), packed);
        assert_eq!(key.seal(&digest, packed).unwrap(), sealed, "one owner's equal content is stored twice");
        assert!(!sealed.windows(7).any(|w| w == b"session"), "it can be read");
    }

    #[test]
    fn two_packings_of_one_content_never_share_a_nonce() {
        let key = key(1);
        let digest = key.digest(b"content");
        let (one, other) =
            (key.seal(&digest, b"packed one way").unwrap(), key.seal(&digest, b"packed another").unwrap());
        assert_ne!(one[..NONCE], other[..NONCE]);
    }

    #[test]
    fn another_key_opens_nothing_and_names_otherwise() {
        let digest = key(1).digest(b"x");
        let sealed = key(1).seal(&digest, b"x").unwrap();
        assert!(refused(&key(2), &digest, &sealed));
        assert_ne!(key(1).digest(b"x"), key(2).digest(b"x"));
        assert_ne!(key(1).digest(b"x"), Digest::of(b"x"), "a known file could be found by its digest");
        assert_ne!(key(1).id(), key(2).id());
    }

    #[test]
    fn a_chunk_under_anothers_name_is_refused() {
        let key = key(1);
        let (mine, other) = (key.digest(b"mine"), key.digest(b"other"));
        let sealed = key.seal(&mine, b"mine").unwrap();
        assert!(refused(&key, &other, &sealed));
    }

    proptest! {
        #[test]
        fn one_flipped_bit_anywhere_is_refused(packed: Vec<u8>, at: prop::sample::Index, bit in 0u8..8) {
            let key = key(7);
            let digest = key.digest(&packed);
            let mut sealed = key.seal(&digest, &packed).unwrap();
            let at = at.index(sealed.len());
            sealed[at] ^= 1 << bit;
            prop_assert!(refused(&key, &digest, &sealed));
        }

        #[test]
        fn no_answer_of_any_length_makes_it_panic(sealed: Vec<u8>) {
            prop_assert!(refused(&key(7), &Digest::of(b""), &sealed));
        }
    }

    #[test]
    fn a_key_file_is_the_owners_alone_and_is_never_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("owner");
        let key = OwnerKey::generate().unwrap();
        key.write(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(OwnerKey::read(&path).unwrap().id(), key.id());
        assert!(OwnerKey::generate().unwrap().write(&path).is_err(), "the only copy of a key was written over");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = OwnerKey::read(&path).unwrap_err().to_string();
        assert!(error.contains("make it 600"), "{error}");
    }

    #[test]
    fn a_file_that_holds_no_key_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("owner");
        for text in ["", "abc", &"0".repeat(66), &"zz".repeat(32)] {
            let _ = fs::remove_file(&path);
            fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .unwrap()
                .write_all(text.as_bytes())
                .unwrap();
            let error = OwnerKey::read(&path).unwrap_err().to_string();
            assert!(error.contains("64 hex digits") && error.contains("owner"), "{error}");
        }
    }

    #[test]
    fn a_key_is_never_printed() {
        let text = format!("{:?}", key(0xab));
        assert!(!text.contains("abab"), "{text}");
    }
}
