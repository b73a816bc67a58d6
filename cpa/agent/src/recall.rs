//! Reads the end of a journal: what was remembered last, and where the last whole line ends.
//!
//! ```text
//!  ……………………………│ line │ memory line │ line │ to
//!              └─────── read back ────────┘ └┘ torn by a crash, cut off
//!  no memory line, or no line's end, in it: read back twice as far
//! ```

use crate::journal::{FORMAT, MemoryLine};
use std::fs::File;
use std::io::{Error, ErrorKind, Read, Seek, SeekFrom};
use vmatrix_cpa_core::Memory;

/// Bytes read back at first: several memory lines of any fleet that was seen.
const TAIL: u64 = 64 << 20;

/// What the end of a journal says.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Recalled {
    /// Bytes up to the end of the last whole line.
    pub whole: u64,
    /// The newest memory that can be read.
    pub memory: Option<Memory>,
    /// Why the newest memory cannot be read, where that is so.
    pub trouble: Option<String>,
}

/// Reads the end of `file`, in the worst case all of it: a journal is set aside at a bounded size.
pub(crate) fn recall(file: &mut File) -> std::io::Result<Recalled> {
    recall_from(file, TAIL)
}

fn recall_from(file: &mut File, tail: u64) -> std::io::Result<Recalled> {
    let length = file.metadata()?.len();
    let mut window = tail;
    loop {
        let from = length.saturating_sub(window);
        let found = look(file, from, length)?;
        match found {
            Some(found) if found.memory.is_some() || from == 0 => return Ok(found),
            None if from == 0 && length <= tail => return Ok(Recalled::default()),
            None if from == 0 => {
                let words = format!("no line ends in its {length} bytes: this is not a journal");
                return Err(Error::new(ErrorKind::InvalidData, words));
            }
            _ => window = window.saturating_mul(2),
        }
    }
}

/// Reads the bytes from `from` to `to`; none if no line ends there.
fn look(file: &mut File, from: u64, to: u64) -> std::io::Result<Option<Recalled>> {
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(to - from).read_to_end(&mut bytes)?;
    let Some(end) = bytes.iter().rposition(|b| *b == b'\n') else { return Ok(None) };
    // The first piece may be the rest of a longer line.
    let lines = bytes[..end].split(|b| *b == b'\n').skip(usize::from(from > 0));
    let lines: Vec<&[u8]> = lines.filter(|l| is_memory(l)).collect();
    let mut found = Recalled { whole: from + end as u64 + 1, ..Recalled::default() };
    for line in lines.into_iter().rev() {
        match understand(line) {
            Ok(memory) => {
                found.memory = Some(memory);
                break;
            }
            Err(trouble) => {
                found.trouble.get_or_insert(trouble);
            }
        }
    }
    Ok(Some(found))
}

/// How a memory line is told from the others without reading it whole.
const MARK: &[u8] = b"\"entry\":\"memory\"";

fn is_memory(line: &[u8]) -> bool {
    line.windows(MARK.len()).take(64).any(|w| w == MARK)
}

fn understand(line: &[u8]) -> Result<Memory, String> {
    let line: MemoryLine = serde_json::from_slice(line).map_err(|e| e.to_string())?;
    if line.format > FORMAT {
        return Err(format!("its format is {}, this version reads up to {FORMAT}", line.format));
    }
    Ok(line.memory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn journal(text: &str) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn memory_line(plans_made: u64) -> String {
        let memory = serde_json::to_string(&Memory { plans_made, ..Memory::default() }).unwrap();
        format!("{{\"at\":1,\"entry\":\"memory\",\"format\":1,\"memory\":{memory}}}\n")
    }

    #[test]
    fn a_long_torn_line_costs_no_whole_one() {
        let whole = memory_line(3);
        let torn = format!("{whole}{{\"at\":2,\"entry\":\"inventory\",{}", "x".repeat(4096));
        let found = recall_from(&mut journal(&torn), 64).unwrap();
        assert_eq!(found.whole, whole.len() as u64, "only the torn line is cut");
        assert_eq!(found.memory.unwrap().plans_made, 3);
    }

    #[test]
    fn a_memory_far_before_the_end_is_found() {
        let text = memory_line(1) + &memory_line(2) + &"{\"at\":1,\"entry\":\"order\"}\n".repeat(500);
        let found = recall_from(&mut journal(&text), 64).unwrap();
        assert_eq!((found.memory.unwrap().plans_made, found.whole), (2, text.len() as u64));
    }

    #[test]
    fn a_large_file_without_lines_is_left_alone() {
        let refused = recall_from(&mut journal(&"x".repeat(1000)), 64).unwrap_err();
        assert!(refused.to_string().contains("not a journal"), "{refused}");
        assert_eq!(recall_from(&mut journal("torn"), 64).unwrap(), Recalled::default());
    }
}
