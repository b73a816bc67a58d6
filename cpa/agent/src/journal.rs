//! The journal: every event heard and every decision made, one JSON line each, only ever appended.
//!
//! ```text
//!  {"at":…,"entry":"demand",…}      events as they came (a journal is a scenario)
//!  {"at":…,"entry":"decided",…}     decisions, placements, announcements
//!  {"at":…,"entry":"memory",…}      all the core knows: a restart needs the last of these and nothing before it
//! ```
//!
//! A memory line follows everything that was said to anyone, before it is sent, and is synced to disk; so no
//! generation and no plan number is ever used twice. Between them at most [`MEMORY_EVERY`] pass. A line that
//! a crash tore is cut off at the next start. A file of [`FILE_MAX`] is set aside as journal.1.jsonl.

use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmatrix_cpa_core::Memory;
use vmatrix_model::Time;
use vmatrix_model::wire::{JournalEntry, JournalLine};

/// Longest time without a memory line while anything happens. What is learned of demand in between is learned again.
pub(crate) const MEMORY_EVERY: Duration = Duration::from_secs(30);
/// Bytes read back at a start: several memory lines, whatever the fleet's size.
const TAIL: u64 = 64 << 20;
/// A journal of this size is set aside; the one set aside before it is dropped. Days of a small fleet.
const FILE_MAX: u64 = 512 << 20;

#[derive(Debug, Serialize, Deserialize)]
struct MemoryLine {
    at: Time,
    entry: Tag,
    memory: Memory,
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
}

impl Journal {
    /// Opens the journal in `dir` and reads what the last run remembered, if there was one.
    pub(crate) fn open(dir: &Path) -> anyhow::Result<(Journal, Option<Memory>)> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make the state directory {}", dir.display()))?;
        let path = dir.join("journal.jsonl");
        let open = || OpenOptions::new().read(true).append(true).create(true).open(&path);
        let mut file = open().with_context(|| format!("cannot open the journal {}", path.display()))?;
        let (whole, memory) =
            recall(&mut file).with_context(|| format!("cannot read the journal {}", path.display()))?;
        file.set_len(whole).with_context(|| format!("cannot cut the torn last line off {}", path.display()))?;
        Ok((Journal { dir: dir.to_owned(), file, length: whole }, memory))
    }

    /// Appends one entry.
    pub(crate) fn write(&mut self, at: Time, entry: JournalEntry) -> anyhow::Result<()> {
        self.append(&JournalLine { at, entry })
    }

    /// Appends all the core knows; with `sync`, returns once it is on disk.
    pub(crate) fn remember(&mut self, at: Time, memory: &Memory, sync: bool) -> anyhow::Result<()> {
        if self.length > FILE_MAX {
            self.set_aside()?;
        }
        self.append(&MemoryLine { at, entry: Tag::Memory, memory: memory.clone() })?;
        if sync {
            self.file.sync_data().with_context(|| self.trouble())?;
        }
        Ok(())
    }

    fn append(&mut self, line: &impl Serialize) -> anyhow::Result<()> {
        let mut bytes = serde_json::to_vec(line).context("cannot put a journal line into JSON")?;
        bytes.push(b'\n');
        self.file.write_all(&bytes).with_context(|| self.trouble())?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    fn trouble(&self) -> String {
        format!(
            "cannot write the journal in {}\n\nhint: see whether the disk is full; the CPA goes on from the journal when started again",
            self.dir.display()
        )
    }

    fn set_aside(&mut self) -> anyhow::Result<()> {
        let path = self.dir.join("journal.jsonl");
        std::fs::rename(&path, self.dir.join("journal.1.jsonl")).with_context(|| self.trouble())?;
        self.file = OpenOptions::new().append(true).create(true).open(&path).with_context(|| self.trouble())?;
        self.length = 0;
        Ok(())
    }
}

/// The end of the last whole line, and the last memory in the file's tail.
fn recall(file: &mut File) -> std::io::Result<(u64, Option<Memory>)> {
    let length = file.metadata()?.len();
    let from = length.saturating_sub(TAIL);
    file.seek(SeekFrom::Start(from))?;
    let mut tail = Vec::new();
    file.take(TAIL).read_to_end(&mut tail)?;
    let Some(end) = tail.iter().rposition(|b| *b == b'\n') else { return Ok((from, None)) };
    let lines = tail[..end].split(|b| *b == b'\n');
    // The first line of the tail may be the rest of a longer one; then it does not parse and is passed over.
    let is_memory = |l: &&[u8]| l.windows(MARK.len()).take(64).any(|w| w == MARK);
    let memory = lines.rev().filter(is_memory).find_map(|l| serde_json::from_slice::<MemoryLine>(l).ok());
    Ok((from + end as u64 + 1, memory.map(|m| m.memory)))
}

/// How a memory line is told from the others without reading it whole.
const MARK: &[u8] = b"\"entry\":\"memory\"";

#[cfg(test)]
mod tests {
    use super::*;
    use vmatrix_model::Generation;

    fn memory(generation: u64) -> Memory {
        let mut m = Memory::default();
        m.placement.generation = Generation(generation);
        m
    }

    #[test]
    fn a_torn_last_line_is_cut_off_and_the_memory_before_it_counts() {
        let dir = tempfile::tempdir().unwrap();
        let (mut j, none) = Journal::open(dir.path()).unwrap();
        assert_eq!(none, None);
        j.remember(Time(1), &memory(6), false).unwrap();
        j.remember(Time(2), &memory(7), true).unwrap();
        j.write(Time(3), JournalEntry::Announced { generation: Generation(9) }).unwrap();
        drop(j);
        let path = dir.path().join("journal.jsonl");
        let whole = std::fs::read(&path).unwrap();
        let mut torn = whole.clone();
        torn.extend_from_slice(b"{\"at\":4,\"entry\":\"memory\",\"mem");
        std::fs::write(&path, torn).unwrap();
        let (mut j, found) = Journal::open(dir.path()).unwrap();
        assert_eq!(found.unwrap().placement.generation, Generation(7));
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        j.remember(Time(5), &memory(8), true).unwrap();
        let (_, found) = Journal::open(dir.path()).unwrap();
        assert_eq!(found.unwrap().placement.generation, Generation(8));
    }

    #[test]
    fn a_journal_of_nothing_but_a_torn_line_is_a_new_one() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("journal.jsonl"), "{\"at\"").unwrap();
        let (_, found) = Journal::open(dir.path()).unwrap();
        assert_eq!(found, None);
    }
}
