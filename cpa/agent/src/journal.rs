//! The journal: every event heard and every decision made, one JSON line each, only ever appended.
//!
//! ```text
//!  {"written_at":…,"entry":"demand",…}               events as they came (a journal is a scenario)
//!  {"written_at":…,"entry":"decided",…}              decisions, placements, announcements
//!  {"written_at":…,"entry":"memory","format":1,…}    all the core knows: a restart needs the last of these and nothing before it
//! ```
//!
//! A memory line follows everything that was said to anyone, before it is sent, and is synced to disk; so no
//! generation and no plan number is ever used twice. Between them at most [`MEMORY_EVERY`] pass. A line that
//! a crash tore is cut off at the next start ([`recall`](crate::recall) reads it). A file of [`FILE_MAX`] is set aside:
//!
//! ```text
//!  journal.next.jsonl (its memory line, synced) ─▶ journal.jsonl ─▶ journal.1.jsonl ─▶ dropped
//! ```
//!
//! so at every moment one of the two that are kept ends in what was last said.

use crate::recall::{Recalled, recall};
use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmatrix_cpa_core::Memory;
use vmatrix_model::Time;
use vmatrix_model::wire::{JournalEntry, JournalLine};

/// Longest time without a memory line while anything happens. What is learned of demand in between is learned again.
pub(crate) const MEMORY_EVERY: Duration = Duration::from_secs(30);
/// A journal of this size is set aside; the one set aside before it is dropped. Days of a small fleet.
const FILE_MAX: u64 = 512 << 20;
/// Of memory lines. Raised when a change of [`Memory`] cannot be read by a default; 0 are those before there was a number.
pub(crate) const FORMAT: u32 = 1;

/// A memory line.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MemoryLine {
    #[serde(rename = "written_at", alias = "at")]
    at: Time,
    entry: Tag,
    #[serde(default)]
    pub format: u32,
    pub memory: Memory,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Tag {
    Memory,
}

/// The open journal.
#[derive(Debug)]
pub(crate) struct Journal {
    dir: PathBuf,
    file: File,
    length: u64,
    file_max: u64,
}

impl Journal {
    /// Opens the journal in `dir` and reads what the last run remembered, if there was one.
    ///
    /// # Errors
    /// Besides trouble with the disk: the journal remembers something, and none of it can be read. Starting afresh
    /// would send every service home and use numbers again.
    pub(crate) fn open(dir: &Path) -> anyhow::Result<(Journal, Option<Memory>)> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make the state directory {}", dir.display()))?;
        let path = dir.join("journal.jsonl");
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(&path)
            .with_context(|| format!("cannot open the journal {}", path.display()))?;
        let current = understood(&path, &mut file)?;
        file.set_len(current.whole).with_context(|| format!("cannot cut the torn last line off {}", path.display()))?;
        let memory = match current.memory {
            Some(memory) => Some(memory),
            None => set_aside_before(&dir.join("journal.1.jsonl"))?,
        };
        Ok((Journal { dir: dir.to_owned(), file, length: current.whole, file_max: FILE_MAX }, memory))
    }

    /// Appends one entry.
    pub(crate) fn write(&mut self, at: Time, entry: JournalEntry) -> anyhow::Result<()> {
        let bytes = line(&JournalLine { at, entry })?;
        self.append(&bytes)
    }

    /// Appends all the core knows; with `sync`, returns once it is on disk.
    pub(crate) fn remember(&mut self, at: Time, memory: &Memory, sync: bool) -> anyhow::Result<()> {
        let bytes = line(&MemoryLine { at, entry: Tag::Memory, format: FORMAT, memory: memory.clone() })?;
        if self.length > self.file_max {
            return self.set_aside(&bytes);
        }
        self.append(&bytes)?;
        if sync {
            self.file.sync_data().with_context(|| self.trouble())?;
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.file.write_all(bytes).with_context(|| self.trouble())?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    fn trouble(&self) -> String {
        format!(
            "cannot write the journal in {}\n\nhint: see whether the disk is full; the CPA goes on from the journal when started again",
            self.dir.display()
        )
    }

    /// Begins a new file with a memory line. A crash between the two renames leaves no journal.jsonl, and
    /// journal.1.jsonl with all that was said.
    fn set_aside(&mut self, memory_line: &[u8]) -> anyhow::Result<()> {
        let [next, current, old] = ["journal.next.jsonl", "journal.jsonl", "journal.1.jsonl"].map(|n| self.dir.join(n));
        let begin = || -> std::io::Result<File> {
            self.file.sync_data()?;
            // What is left of one that a crash kept from its place is not appended to.
            File::create(&next)?;
            let mut file = OpenOptions::new().append(true).open(&next)?;
            file.write_all(memory_line)?;
            file.sync_all()?;
            std::fs::rename(&current, &old)?;
            std::fs::rename(&next, &current)?;
            File::open(&self.dir)?.sync_all()?;
            Ok(file)
        };
        self.file = begin().with_context(|| self.trouble())?;
        self.length = memory_line.len() as u64;
        Ok(())
    }
}

fn line(line: &impl Serialize) -> anyhow::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(line).context("cannot put a journal line into JSON")?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Reads the end of a journal; refuses one that remembers something and cannot be understood.
fn understood(path: &Path, file: &mut File) -> anyhow::Result<Recalled> {
    let found = recall(file).with_context(|| format!("cannot read the journal {}", path.display()))?;
    match (&found.memory, &found.trouble) {
        (None, Some(trouble)) => bail!(
            "{} remembers what is in force, and this version cannot read it: {trouble}\n\nhint: start the version that wrote it; to begin afresh instead, with every service at home, move the state directory's journal files away",
            path.display()
        ),
        (Some(_), Some(trouble)) => tracing::warn!(
            journal = %path.display(),
            "the newest memory cannot be read, an older one is taken; networks correct its numbers: {trouble}"
        ),
        _ => {}
    }
    Ok(found)
}

/// What the journal set aside remembers, if there is one.
fn set_aside_before(path: &Path) -> anyhow::Result<Option<Memory>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("cannot open the journal {}", path.display())),
    };
    let memory = understood(path, &mut file)?.memory;
    if memory.is_some() {
        tracing::warn!(journal = %path.display(), "the journal in use remembers nothing; going on from the one set aside");
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmatrix_model::Generation;

    fn memory(generation: u64) -> Memory {
        let mut m = Memory::default();
        m.placement.generation = Generation(generation);
        m
    }

    fn generation(found: Option<Memory>) -> Option<u64> {
        found.map(|m| m.placement.generation.0)
    }

    fn announced(n: u64) -> JournalEntry {
        JournalEntry::Announced { generation: Generation(n) }
    }

    #[test]
    fn a_torn_last_line_is_cut_off_and_the_memory_before_it_counts() {
        let dir = tempfile::tempdir().unwrap();
        let (mut j, none) = Journal::open(dir.path()).unwrap();
        assert_eq!(none, None);
        j.remember(Time(1), &memory(6), false).unwrap();
        j.remember(Time(2), &memory(7), true).unwrap();
        j.write(Time(3), announced(9)).unwrap();
        drop(j);
        let path = dir.path().join("journal.jsonl");
        let whole = std::fs::read(&path).unwrap();
        let mut torn = whole.clone();
        torn.extend_from_slice(b"{\"at\":4,\"entry\":\"memory\",\"mem");
        std::fs::write(&path, torn).unwrap();
        let (mut j, found) = Journal::open(dir.path()).unwrap();
        assert_eq!(generation(found), Some(7));
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        j.remember(Time(5), &memory(8), true).unwrap();
        let (_, found) = Journal::open(dir.path()).unwrap();
        assert_eq!(generation(found), Some(8));
    }

    #[test]
    fn a_journal_of_nothing_but_a_torn_line_is_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("journal.jsonl"), "{\"at\"").unwrap();
        let (_, found) = Journal::open(dir.path()).unwrap();
        assert_eq!(found, None);
    }

    #[test]
    fn a_memory_that_cannot_be_read_is_not_forgotten_silently() {
        let unreadable = [
            // A field of another kind.
            r#"{"at":1,"entry":"memory","format":1,"memory":{"began":"yesterday"}}"#.to_owned(),
            // Of a later version.
            String::from_utf8(
                line(&MemoryLine { at: Time(1), entry: Tag::Memory, format: FORMAT + 1, memory: memory(9) }).unwrap(),
            )
            .unwrap(),
        ];
        for text in unreadable {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("journal.jsonl");
            let text = format!("{}\n", text.trim_end());
            std::fs::write(&path, &text).unwrap();
            let refused = format!("{:#}", Journal::open(dir.path()).unwrap_err());
            assert!(refused.contains("cannot read it") && refused.contains("hint: start the version"), "{refused}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "nothing is lost by the attempt");
            std::fs::rename(&path, dir.path().join("journal.1.jsonl")).unwrap();
            assert!(Journal::open(dir.path()).is_err(), "nor is the one set aside passed over");
        }
    }

    #[test]
    fn an_older_memory_counts_when_the_newest_cannot_be_read_and_a_line_without_a_format_can() {
        let dir = tempfile::tempdir().unwrap();
        let mut old =
            serde_json::to_value(MemoryLine { at: Time(1), entry: Tag::Memory, format: 0, memory: memory(5) }).unwrap();
        old.as_object_mut().unwrap().remove("format");
        // Field order as written: the entry stands near the line's begin.
        let text = format!("{old}\n{{\"at\":2,\"entry\":\"memory\",\"memory\":7}}\n");
        std::fs::write(dir.path().join("journal.jsonl"), text).unwrap();
        let (_, found) = Journal::open(dir.path()).unwrap();
        assert_eq!(generation(found), Some(5));
    }

    #[test]
    fn a_full_journal_is_set_aside_and_the_new_one_begins_with_the_memory() {
        let dir = tempfile::tempdir().unwrap();
        let (mut j, _) = Journal::open(dir.path()).unwrap();
        j.file_max = 2000;
        std::fs::write(dir.path().join("journal.next.jsonl"), "left by a crash").unwrap();
        let mut n = 0;
        while !dir.path().join("journal.1.jsonl").exists() {
            n += 1;
            j.write(Time(n), announced(n)).unwrap();
            j.remember(Time(n), &memory(n), true).unwrap();
            assert!(n < 100, "never set aside");
        }
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let (new, old) = (read("journal.jsonl"), read("journal.1.jsonl"));
        assert_eq!(new.lines().count(), 1);
        assert!(new.starts_with(&format!("{{\"written_at\":{n},\"entry\":\"memory\"")), "{new}");
        assert!(old.len() > 2000 && old.lines().last().unwrap().contains("announced"), "all that came before: {old}");
        assert!(!dir.path().join("journal.next.jsonl").exists());
        j.write(Time(n + 1), announced(n + 1)).unwrap();
        drop(j);
        let (_, found) = Journal::open(dir.path()).unwrap();
        assert_eq!(generation(found), Some(n));
    }

    #[test]
    fn a_crash_while_a_journal_is_set_aside_forgets_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (mut j, _) = Journal::open(dir.path()).unwrap();
        j.remember(Time(1), &memory(7), true).unwrap();
        drop(j);
        let [current, old] = ["journal.jsonl", "journal.1.jsonl"].map(|n| dir.path().join(n));
        std::fs::rename(&current, &old).unwrap();
        std::fs::write(dir.path().join("journal.next.jsonl"), "{\"at\":2,\"ent").unwrap();
        let (mut j, found) = Journal::open(dir.path()).unwrap();
        assert_eq!(generation(found), Some(7));
        // And again, before the new file has a memory of its own.
        j.write(Time(3), announced(9)).unwrap();
        drop(j);
        let (_, found) = Journal::open(dir.path()).unwrap();
        assert_eq!(generation(found), Some(7));
    }
}
