//! Keeps what the daemons of a lab that failed have logged: the lab's own folder goes with it.
//!
//! ```text
//! <lab>/<daemon>/log ─▶ <temp>/vmatrix-logs-<id>/<daemon>.log   (the end of each)
//! ```

use crate::layout::Place;
use anyhow::Context;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

/// Kept of each log: its end, for that is where it went wrong.
const KEPT_MAX: u64 = 1 << 20;

/// Copies the ends of `logs` (name, file) to a folder that outlives the lab. None if nothing was logged.
///
/// # Errors
/// The temporary folder cannot be written.
pub fn keep(place: &Place, logs: &[(String, PathBuf)]) -> anyhow::Result<Option<PathBuf>> {
    let ends: Vec<(&String, Vec<u8>)> =
        logs.iter().filter_map(|(name, file)| Some((name, end(file).ok().filter(|e| !e.is_empty())?))).collect();
    if ends.is_empty() {
        return Ok(None);
    }
    let folder = std::env::temp_dir().join(format!("vmatrix-logs-{}", place.id));
    std::fs::DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    for (name, end) in ends {
        let file = folder.join(format!("{name}.log"));
        std::fs::write(&file, end).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(Some(folder))
}

fn end(file: &PathBuf) -> std::io::Result<Vec<u8>> {
    let mut log = File::open(file)?;
    let length = log.metadata()?.len();
    log.seek(SeekFrom::Start(length.saturating_sub(KEPT_MAX)))?;
    let mut kept = Vec::new();
    log.take(KEPT_MAX).read_to_end(&mut kept)?;
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::place;

    #[test]
    fn logs_outlive_their_lab_and_are_no_leftover() {
        let lab = tempfile::tempdir().unwrap();
        let place = Place { id: "fe0a".into(), folder: lab.path().into(), store: "store".into() };
        let (long, silent) = (lab.path().join("cpa"), lab.path().join("edge"));
        std::fs::write(&long, [vec![b'a'; KEPT_MAX as usize], b"the end".to_vec()].concat()).unwrap();
        std::fs::write(&silent, "").unwrap();
        let logs = [("cpa".to_owned(), long), ("edge".to_owned(), silent), ("vma".to_owned(), "/nowhere".into())];
        let kept = keep(&place, &logs).unwrap().unwrap();
        drop(lab);
        let text = std::fs::read(kept.join("cpa.log")).unwrap();
        let counted = place::folders(&std::env::temp_dir(), Some("fe0a"));
        let files = std::fs::read_dir(&kept).unwrap().count();
        std::fs::remove_dir_all(&kept).unwrap();
        assert_eq!((text.len(), files), (KEPT_MAX as usize, 1));
        assert!(text.ends_with(b"the end"));
        assert_eq!(counted, Vec::<PathBuf>::new());
        assert_eq!(keep(&place, &logs[1..]).unwrap(), None);
    }
}
