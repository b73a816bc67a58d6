//! Keeps the last good state on disk, so that a restarted daemon goes on where it was.

use anyhow::Context;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Writes `bytes` to `path` so that a reader sees the old file or the new one, never a part.
///
/// # Errors
/// The folder is not there, or the disk is full.
pub fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let new = path.with_extension("new");
    let put = || -> std::io::Result<()> {
        // What a killed writer left there may have other rights.
        let _ = std::fs::remove_file(&new);
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&new, path)
    };
    put().with_context(|| format!("cannot write {}", path.display()))
}

/// Writes `value` as JSON; see [`write`].
///
/// # Errors
/// As [`write`].
pub fn save<T: Serialize>(path: &Path, value: &T) -> anyhow::Result<()> {
    write(path, &serde_json::to_vec(value).context("cannot turn state into JSON")?)
}

/// Reads what [`save`] wrote; none if nothing was.
///
/// # Errors
/// The file is there and is not what was written.
pub fn load<T: DeserializeOwned>(path: &Path) -> anyhow::Result<Option<T>> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .with_context(|| format!("{} is damaged: remove it and the state will be sent again", path.display())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn state_survives_and_only_its_owner_reads_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        assert_eq!(load::<Vec<u32>>(&path).unwrap(), None);
        save(&path, &vec![1u32]).unwrap();
        save(&path, &vec![1u32, 2]).unwrap();
        assert_eq!(load(&path).unwrap(), Some(vec![1u32, 2]));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::write(&path, "[1, ").unwrap();
        assert!(load::<Vec<u32>>(&path).is_err());
    }
}
