//! Who a process is: certificates of the fleet's own authority, named by role.
//!
//! ```text
//! Authority (ca.pem, ca.key) ─issue(role, id)─▶ Identity (ca.pem, cert.pem, key.pem)
//!                                                 └ URI name spiffe://vmatrix/<role>/<id>
//! ```
//! Absent on purpose: revocation. Certificates are short-lived ([`VALID_DAYS`]) and issued again.

use crate::error::{Error, Result, io};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::fmt;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use vmatrix_model::Digest;

/// Days a certificate is good for.
pub const VALID_DAYS: u64 = 365;
/// Days the authority is good for.
const AUTHORITY_DAYS: u64 = 3650;
/// Clocks of two hosts may differ by so much.
const SKEW: Duration = Duration::from_secs(24 * 3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// What every name begins with.
const SCHEME: &str = "spiffe://vmatrix/";
/// Longest id, bytes.
const ID_MAX: usize = 64;
/// Longest file of an identity that is read, bytes.
const FILE_MAX: u64 = 64 << 10;

/// What a process of the fleet does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Serves chunks.
    Store,
    /// Runs guests; is given owners' keys.
    Machine,
    /// A person at a command line.
    Operator,
}

impl Role {
    fn as_str(self) -> &'static str {
        match self {
            Role::Store => "store",
            Role::Machine => "machine",
            Role::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = BadName;
    fn from_str(text: &str) -> std::result::Result<Role, BadName> {
        [Role::Store, Role::Machine, Role::Operator]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| BadName(text.chars().take(80).collect()))
    }
}

/// The name in a certificate.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    pub role: Role,
    /// Letters, digits, dots and dashes.
    pub id: String,
}

/// A name that is no name of this fleet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no name of the fleet: it is spiffe://vmatrix/<store|machine|operator>/<letters, digits, dots, dashes>"
)]
pub struct BadName(String);

impl Name {
    /// The name of `id` in `role`.
    ///
    /// # Errors
    /// The id is empty, too long, or has other letters.
    pub fn new(role: Role, id: &str) -> std::result::Result<Name, BadName> {
        let good = !id.is_empty()
            && id.len() <= ID_MAX
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
        if good { Ok(Name { role, id: id.to_owned() }) } else { Err(BadName(id.chars().take(80).collect())) }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.role, self.id)
    }
}

impl FromStr for Name {
    type Err = BadName;
    fn from_str(uri: &str) -> std::result::Result<Name, BadName> {
        let bad = || BadName(uri.chars().take(80).collect());
        let (role, id) = uri.strip_prefix(SCHEME).and_then(|rest| rest.split_once('/')).ok_or_else(bad)?;
        Name::new(role.parse().map_err(|_| bad())?, id).map_err(|_| bad())
    }
}

/// Whoever may say who belongs to the fleet: a key and its certificate, in a folder.
#[derive(Debug)]
pub struct Authority {
    dir: PathBuf,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes one in `dir`: `ca.pem` to hand out, `ca.key` to keep.
    ///
    /// # Errors
    /// There is one already, or the folder cannot be written.
    pub fn create(dir: impl AsRef<Path>) -> Result<Authority> {
        let dir = dir.as_ref().to_owned();
        make_folder(&dir)?;
        let key = KeyPair::generate().map_err(|e| bad(&dir, format!("no key: {e}")))?;
        write_new(&dir.join("ca.key"), &key.serialize_pem())?;
        let authority = Authority::of(dir, key, None)?;
        write_new(&authority.dir.join("ca.pem"), &authority.pem)?;
        Ok(authority)
    }

    /// Opens the one in `dir`.
    ///
    /// # Errors
    /// There is none, or its files are not what [`Authority::create`] wrote.
    pub fn open(dir: impl AsRef<Path>) -> Result<Authority> {
        let dir = dir.as_ref().to_owned();
        let key_file = dir.join("ca.key");
        let key = KeyPair::from_pem(&read_private(&key_file)?).map_err(|e| bad(&key_file, e.to_string()))?;
        let pem = read_file(&dir.join("ca.pem"))?;
        Authority::of(dir, key, Some(pem))
    }

    fn of(dir: PathBuf, key: KeyPair, pem: Option<String>) -> Result<Authority> {
        let mut params = CertificateParams::default();
        params.distinguished_name = authority_name(&key);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        valid_for(&mut params, AUTHORITY_DAYS);
        let pem = match pem {
            Some(pem) => pem,
            None => params.self_signed(&key).map_err(|e| bad(&dir, e.to_string()))?.pem(),
        };
        Ok(Authority { dir, pem, issuer: Issuer::new(params, key) })
    }

    /// Issues a certificate and its key to `id` in `role`.
    ///
    /// # Errors
    /// The id has letters that do not stand in a name.
    pub fn issue(&self, role: Role, id: &str) -> Result<Identity> {
        let refuse = |problem: String| bad(&self.dir, problem);
        let name = Name::new(role, id).map_err(|e| refuse(e.to_string()))?;
        let key = KeyPair::generate().map_err(|e| refuse(format!("no key: {e}")))?;
        let cert = self.sign(&name.to_string(), &key).map_err(|e| refuse(format!("cannot sign {name}: {e}")))?;
        Identity::of(name, self.pem.clone(), cert.pem(), key.serialize_pem(), &self.dir)
    }

    fn sign(&self, uri: &str, key: &KeyPair) -> std::result::Result<Certificate, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        valid_for(&mut params, VALID_DAYS);
        params.signed_by(key, &self.issuer)
    }
}

/// Two authorities never have one name, so that a stranger's certificate is told apart from a broken one.
fn authority_name(key: &KeyPair) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, format!("vmatrix fleet {}", Digest::of(key.public_key_raw()).short()));
    name
}

fn valid_for(params: &mut CertificateParams, days: u64) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // Whole seconds: a certificate has no finer ones.
    let now = Duration::from_secs(now.as_secs());
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(SKEW);
    params.not_after = epoch + now + DAY * u32::try_from(days).unwrap_or(u32::MAX);
}

/// A process's certificate and key, with the authority it believes in.
#[derive(Clone)]
pub struct Identity {
    name: Name,
    ca_pem: String,
    cert_pem: String,
    key_pem: String,
    pub(crate) ca: CertificateDer<'static>,
    pub(crate) cert: CertificateDer<'static>,
    key: std::sync::Arc<PrivateKeyDer<'static>>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the key.
        write!(f, "Identity({})", self.name)
    }
}

impl Identity {
    /// Who this is.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Writes `ca.pem`, `cert.pem` and `key.pem` into `dir`, in place of older ones.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn write(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        make_folder(dir)?;
        // The key first: with an old certificate beside it the folder is refused, and issued again.
        replace(&dir.join("key.pem"), &self.key_pem)?;
        replace(&dir.join("cert.pem"), &self.cert_pem)?;
        replace(&dir.join("ca.pem"), &self.ca_pem)
    }

    /// Reads them from `dir`.
    ///
    /// # Errors
    /// A file is missing, others may read the key, or the certificate has no name of the fleet.
    pub fn read(dir: impl AsRef<Path>) -> Result<Identity> {
        let dir = dir.as_ref();
        let cert_file = dir.join("cert.pem");
        let cert_pem = read_file(&cert_file)?;
        let der = certificate(&cert_pem, &cert_file)?;
        let name = name_of(&der).map_err(|problem| bad(&cert_file, problem))?;
        Identity::of(name, read_file(&dir.join("ca.pem"))?, cert_pem, read_private(&dir.join("key.pem"))?, dir)
    }

    fn of(name: Name, ca_pem: String, cert_pem: String, key_pem: String, dir: &Path) -> Result<Identity> {
        let ca = certificate(&ca_pem, &dir.join("ca.pem"))?;
        let cert = certificate(&cert_pem, &dir.join("cert.pem"))?;
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|e| bad(&dir.join("key.pem"), format!("not a private key: {e}")))?;
        Ok(Identity { name, ca_pem, cert_pem, key_pem, ca, cert, key: std::sync::Arc::new(key) })
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }
}

/// The name in a certificate.
pub(crate) fn name_of(cert: &CertificateDer<'_>) -> std::result::Result<Name, String> {
    let parsed = webpki::EndEntityCert::try_from(cert).map_err(|e| format!("the certificate cannot be read: {e}"))?;
    let mut names = parsed.valid_uri_names();
    match (names.next(), names.next()) {
        (Some(one), None) => one.parse::<Name>().map_err(|e| e.to_string()),
        (None, _) => Err("the certificate has no URI name; have the fleet's authority issue another".to_owned()),
        _ => Err("the certificate has more than one URI name; have the fleet's authority issue another".to_owned()),
    }
}

fn certificate(pem: &str, path: &Path) -> Result<CertificateDer<'static>> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| bad(path, format!("not a certificate: {e}")))
}

fn bad(path: &Path, problem: String) -> Error {
    Error::Identity { path: path.to_owned(), problem }
}

fn make_folder(dir: &Path) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io("create", dir))
}

fn write_new(path: &Path, text: &str) -> Result<()> {
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io("create", path))?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io("write", path))
}

fn replace(path: &Path, text: &str) -> Result<()> {
    let beside = path.with_extension("new");
    match fs::remove_file(&beside) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io("remove", &beside)(e)),
        _ => {}
    }
    write_new(&beside, text)?;
    fs::rename(&beside, path).map_err(io("rename", &beside))
}

fn read_private(path: &Path) -> Result<String> {
    let mode = fs::metadata(path).map_err(io("look at", path))?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(bad(path, format!("others may read this key (mode {:03o}); make it 600", mode & 0o777)));
    }
    read_file(path)
}

fn read_file(path: &Path) -> Result<String> {
    let length = fs::metadata(path).map_err(io("look at", path))?.len();
    if length > FILE_MAX {
        return Err(bad(path, format!("{length} bytes are too many for a certificate or key")));
    }
    fs::read_to_string(path).map_err(io("read", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_the_same_after_it_was_written_and_read() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(dir.path().join("ca")).unwrap();
        let issued = authority.issue(Role::Machine, "tokyo.rack-1").unwrap();
        issued.write(dir.path().join("id")).unwrap();
        let read = Identity::read(dir.path().join("id")).unwrap();
        assert_eq!(read.name().to_string(), "spiffe://vmatrix/machine/tokyo.rack-1");
        assert_eq!((read.name(), &read.cert, &read.ca), (issued.name(), &issued.cert, &issued.ca));
        // A second time, as when it is issued again.
        issued.write(dir.path().join("id")).unwrap();
    }

    #[test]
    fn keys_are_for_their_owner_only_and_others_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(dir.path().join("ca")).unwrap();
        let id = dir.path().join("id");
        authority.issue(Role::Store, "a").unwrap().write(&id).unwrap();
        for key in [id.join("key.pem"), dir.path().join("ca/ca.key")] {
            assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
            fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        }
        assert!(Identity::read(&id).unwrap_err().to_string().contains("others may read this key"));
        assert!(Authority::open(dir.path().join("ca")).unwrap_err().to_string().contains("others may read"));
    }

    #[test]
    fn an_authority_opened_again_signs_what_the_first_one_believes() {
        let dir = tempfile::tempdir().unwrap();
        let first = Authority::create(dir.path()).unwrap().issue(Role::Store, "a").unwrap();
        let second = Authority::open(dir.path()).unwrap().issue(Role::Store, "b").unwrap();
        assert_eq!(first.ca, second.ca);
        assert!(Authority::create(dir.path()).is_err(), "the only copy of a key was overwritten");
    }

    #[test]
    fn a_name_is_a_role_and_an_id() {
        for bad in [
            "",
            "spiffe://vmatrix/machine/",
            "spiffe://other/machine/a",
            "spiffe://vmatrix/root/a",
            "spiffe://vmatrix/machine/a/b",
            "spiffe://vmatrix/machine/a b",
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?} was taken");
        }
        let dir = tempfile::tempdir().unwrap();
        assert!(Authority::create(dir.path()).unwrap().issue(Role::Store, "../a").is_err());
    }
}
