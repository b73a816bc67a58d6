//! Recorded data, line by line and within bounds: what comes from outside may be endless, or one line.
//!
//! ```text
//! bytes, plain or gzip ─▶ [Lines] ─▶ file, number, text
//! ```

use std::io::{BufRead, BufReader, Read};

/// Recorded data that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("cannot read {file}")]
    Read { file: String, source: std::io::Error },
    #[error("cannot write {file}")]
    Write { file: String, source: std::io::Error },
    #[error("{file}:{line}: {problem}")]
    Line { file: String, line: u64, problem: String },
    #[error("{file}: {problem}")]
    Whole { file: String, problem: String },
}

/// What a reader takes at most.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Bytes of a line, without its end.
    pub line: usize,
    /// Bytes in all, after unpacking: a few kilobytes of gzip can hold gigabytes.
    pub bytes: u64,
}

/// The lines of a file, numbered from 1.
pub(crate) struct Lines<'a> {
    file: String,
    from: Box<dyn BufRead + 'a>,
    bounds: Bounds,
    number: u64,
    bytes: u64,
    buffer: Vec<u8>,
}

/// One line, without its end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Line<'a> {
    file: &'a str,
    pub number: u64,
    pub text: &'a str,
}

impl<'a> Lines<'a> {
    /// The lines of `from`, unpacked if it is gzip.
    pub fn of(file: &str, mut from: impl BufRead + 'a, bounds: Bounds) -> Result<Lines<'a>, TraceError> {
        let read = |source| TraceError::Read { file: file.to_owned(), source };
        let packed = from.fill_buf().map_err(read)?.starts_with(&[0x1f, 0x8b]);
        let from: Box<dyn BufRead + 'a> =
            if packed { Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(from))) } else { Box::new(from) };
        Ok(Lines { file: file.to_owned(), from, bounds, number: 0, bytes: 0, buffer: Vec::new() })
    }

    /// The next line; `None` at the end of the file.
    pub fn next(&mut self) -> Result<Option<Line<'_>>, TraceError> {
        self.buffer.clear();
        self.number += 1;
        // The line's end may have two bytes, and whatever is longer than that is too long already.
        let most = self.bounds.line as u64 + 2;
        let read = self.from.by_ref().take(most).read_until(b'\n', &mut self.buffer);
        let read = read.map_err(|source| TraceError::Read { file: self.file.clone(), source })?;
        if read == 0 {
            return Ok(None);
        }
        self.bytes += read as u64;
        if self.bytes > self.bounds.bytes {
            return Err(self.whole(format!("holds more than the {} bytes that are taken", self.bounds.bytes)));
        }
        let end = [&b"\r\n"[..], b"\n"].into_iter().find_map(|end| self.buffer.strip_suffix(end));
        let bytes = end.unwrap_or(&self.buffer);
        let line = Line { file: &self.file, number: self.number, text: "" };
        if bytes.len() > self.bounds.line {
            return Err(line.bad(format!("is longer than {} bytes", self.bounds.line)));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| line.bad("is not text"))?;
        Ok(Some(Line { text, ..line }))
    }

    /// A problem of the file as a whole.
    pub fn whole(&self, problem: impl Into<String>) -> TraceError {
        TraceError::Whole { file: self.file.clone(), problem: problem.into() }
    }

    /// A problem of the line with this number.
    pub fn bad_at(&self, line: u64, problem: impl Into<String>) -> TraceError {
        TraceError::Line { file: self.file.clone(), line, problem: problem.into() }
    }
}

impl Line<'_> {
    /// A problem of this line.
    pub fn bad(&self, problem: impl Into<String>) -> TraceError {
        TraceError::Line { file: self.file.to_owned(), line: self.number, problem: problem.into() }
    }
}

/// As much of a text from outside as an error needs to show, with what a terminal would obey made harmless.
pub(crate) fn shown(text: &str) -> String {
    const MOST: usize = 40;
    let mut start: String = text.chars().take(MOST).collect();
    if start.len() < text.len() {
        start.push('…');
    }
    format!("{start:?}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const SMALL: Bounds = Bounds { line: 8, bytes: 64 };

    fn read(bytes: &[u8], bounds: Bounds) -> Result<Vec<String>, TraceError> {
        let mut lines = Lines::of("f", bytes, bounds)?;
        let mut all = vec![];
        while let Some(line) = lines.next()? {
            all.push(line.text.to_owned());
        }
        Ok(all)
    }

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut gzip = flate2::write::GzEncoder::new(vec![], flate2::Compression::best());
        gzip.write_all(bytes).unwrap();
        gzip.finish().unwrap()
    }

    #[test]
    fn lines_end_as_on_any_system() {
        assert_eq!(read(b"one\ntwo\r\n\nthree", SMALL).unwrap(), ["one", "two", "", "three"]);
        assert_eq!(read(b"12345678\n", SMALL).unwrap(), ["12345678"]);
        assert_eq!(read(b"12345678\r\n12345678", SMALL).unwrap(), ["12345678", "12345678"]);
        assert_eq!(read(b"", SMALL).unwrap(), [""; 0]);
    }

    #[test]
    fn a_line_that_is_too_long_is_named() {
        for long in [&b"ok\n123456789\n"[..], b"ok\n123456789", b"ok\n1234567890123456789"] {
            assert_eq!(read(long, SMALL).unwrap_err().to_string(), "f:2: is longer than 8 bytes");
        }
        assert_eq!(read(b"ok\n\xff\xfe\n", SMALL).unwrap_err().to_string(), "f:2: is not text");
    }

    #[test]
    fn gzip_is_unpacked_and_a_bomb_is_not() {
        assert_eq!(read(&packed(b"one\ntwo\n"), SMALL).unwrap(), ["one", "two"]);
        let both = [packed(b"one\n"), packed(b"two\n")].concat();
        assert_eq!(read(&both, SMALL).unwrap(), ["one", "two"], "what was packed in two parts");
        let bomb = packed(&vec![b'\n'; 1 << 20]);
        assert!(bomb.len() < 2000);
        assert_eq!(read(&bomb, SMALL).unwrap_err().to_string(), "f: holds more than the 64 bytes that are taken");
        assert!(matches!(read(&packed(b"one\ntwo\n")[..20], SMALL), Err(TraceError::Read { .. })), "cut short");
    }

    #[test]
    fn what_is_shown_of_a_text_is_short_and_harmless() {
        assert_eq!(shown("a\u{1b}[2J"), r#""a\u{1b}[2J""#);
        assert_eq!(shown(&"é".repeat(99)).chars().count(), 43);
    }
}
