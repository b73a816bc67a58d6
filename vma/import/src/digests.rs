//! The digests beside an OVA's files (its `.mf`): read, checked, written.
//!
//! `SHA256(disk.vmdk)= 64 hex` a line ─▶ file, algorithm, digest

use ring::digest::{Algorithm, Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256, SHA512};

/// Longest list: a line of some 200 bytes for each entry of the archive.
pub const TEXT_MAX: usize = 16 << 10;
const LINES_MAX: usize = 64;

/// Why a list is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("line {line} of its digests is no `SHA256(file)= …`; fetch it again")]
    Line { line: usize },
    #[error("its digests do not name {name:?}; fetch it again")]
    Unnamed { name: String },
    #[error("{name:?} is not what its digest says; it was changed or damaged on its way, fetch it again")]
    Differs { name: String },
    #[error("its list of digests is longer than {TEXT_MAX} bytes")]
    Long,
}

/// The digest that a file should have.
#[derive(Debug, Clone)]
pub struct Expected {
    algorithm: &'static Algorithm,
    digest: Vec<u8>,
    name: String,
}

/// Finds what the list says of the file `name`.
///
/// # Errors
/// A line that is none, or no line for the file.
pub fn of(text: &str, name: &str) -> Result<Expected, Problem> {
    if text.len() > TEXT_MAX {
        return Err(Problem::Long);
    }
    let mut found = None;
    for (number, line) in text.lines().enumerate().take(LINES_MAX).filter(|(_, l)| !l.trim().is_empty()) {
        let expected = parse(line).ok_or(Problem::Line { line: number + 1 })?;
        if expected.name == name {
            found = Some(expected);
        }
    }
    found.ok_or_else(|| Problem::Unnamed { name: name.to_owned() })
}

fn parse(line: &str) -> Option<Expected> {
    let (kind, rest) = line.trim().split_once('(')?;
    let (name, digest) = rest.rsplit_once(')')?;
    let algorithm = match kind.trim() {
        "SHA1" => &SHA1_FOR_LEGACY_USE_ONLY,
        "SHA256" => &SHA256,
        "SHA512" => &SHA512,
        _ => return None,
    };
    let digest = digest.trim().strip_prefix('=')?.trim();
    if !digest.is_ascii() || digest.len() != algorithm.output_len() * 2 {
        return None;
    }
    let digest = (0..digest.len()).step_by(2).map(|i| u8::from_str_radix(digest.get(i..i + 2)?, 16).ok());
    Some(Expected { algorithm, digest: digest.collect::<Option<_>>()?, name: name.to_owned() })
}

/// A file being compared with its digest.
pub struct Check {
    expected: Expected,
    context: Context,
}

impl Check {
    /// Begins to compare.
    pub fn new(expected: Expected) -> Check {
        Check { context: Context::new(expected.algorithm), expected }
    }
    /// Takes the file's next bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        self.context.update(bytes);
    }
    /// Compares.
    ///
    /// # Errors
    /// [`Problem::Differs`].
    pub fn end(self) -> Result<(), Problem> {
        let same = self.context.finish().as_ref() == self.expected.digest;
        if same { Ok(()) } else { Err(Problem::Differs { name: self.expected.name }) }
    }
}

/// A line for a file whose SHA-256 is known.
pub fn line(name: &str, sha256: &[u8]) -> String {
    let hex: String = sha256.iter().map(|b| format!("{b:02x}")).collect();
    format!("SHA256({name})= {hex}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use ring::digest::digest;

    fn check(text: &str, name: &str, bytes: &[u8]) -> Result<(), Problem> {
        let mut check = Check::new(of(text, name)?);
        bytes.chunks(3).for_each(|part| check.add(part));
        check.end()
    }

    #[test]
    fn a_file_that_differs_or_is_not_named_is_refused() {
        let text =
            line("vm.ovf", digest(&SHA256, b"text").as_ref()) + &line("disk", digest(&SHA256, b"bytes").as_ref());
        assert_eq!(check(&text, "vm.ovf", b"text"), Ok(()));
        assert_eq!(check(&text, "disk", b"bytez"), Err(Problem::Differs { name: "disk".into() }));
        assert_eq!(check(&text, "other", b""), Err(Problem::Unnamed { name: "other".into() }));
    }

    #[test]
    fn every_algorithm_of_the_standard_is_read() {
        // FIPS 180: "abc".
        assert_eq!(check("SHA1(f)= a9993e364706816aba3e25717850c26c9cd0d89d", "f", b"abc"), Ok(()));
        let sha512 = "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f";
        assert_eq!(check(&format!("SHA512 (f) = {sha512}\r\n"), "f", b"abc"), Ok(()));
    }

    #[test]
    fn a_line_that_is_no_digest_is_refused_by_its_number() {
        let good = line("f", digest(&SHA256, b"").as_ref());
        for bad in [
            "MD5(f)= 00",
            "SHA256(f)= 00",
            "SHA256 f = 00",
            "SHA256(f)= é00000000000000000000000000000000000000000000000000000000000000",
            "f",
        ] {
            assert_eq!(of(&format!("{good}{bad}"), "f").err(), Some(Problem::Line { line: 2 }), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_is_read_or_refused(text: String, name: String) {
            let _ = of(&text, &name);
            let _ = of(&format!("SHA256({name})= {text}"), &name);
        }
    }
}
