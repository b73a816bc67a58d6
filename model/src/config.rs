//! Reading a file people wrote: one error that says what, where, and what was probably meant.

use serde::de::DeserializeOwned;

/// A file that could not be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}: {problem}{hint}")]
pub struct BadFile {
    file: String,
    problem: String,
    hint: String,
}

/// Largest file people write by hand; a longer one is a mistake or an attack.
pub const FILE_MAX: usize = 1 << 20;

/// Reads `text` (the content of `file`) as TOML of type `T`.
///
/// # Errors
/// Unknown or missing keys, wrong types and values out of range, with line and column; an unknown
/// key comes with the nearest known one.
pub fn parse_toml<T: DeserializeOwned>(file: &str, text: &str) -> Result<T, BadFile> {
    if text.len() > FILE_MAX {
        return Err(BadFile {
            file: file.to_owned(),
            problem: format!("{} bytes are more than the {FILE_MAX} a file may have", text.len()),
            hint: String::new(),
        });
    }
    toml::from_str(text).map_err(|e| {
        let at = e.span().map(|s| line_and_column(text, s.start));
        let message = e.message().to_owned();
        BadFile {
            file: at.map_or(file.to_owned(), |(l, c)| format!("{file}:{l}:{c}")),
            hint: nearest_key(&message).map_or(String::new(), |k| format!("\n\nhint: did you mean `{k}`?")),
            problem: message,
        }
    })
}

fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, str::len) + 1;
    (line, column)
}

/// Reads "unknown field `x`, expected one of `a`, `b`" and returns the expected name nearest to `x`.
fn nearest_key(message: &str) -> Option<String> {
    if !message.starts_with("unknown ") {
        return None;
    }
    let mut quoted = message.split('`').skip(1).step_by(2);
    let wrong = quoted.next()?;
    nearest(wrong, quoted).map(str::to_owned)
}

/// The candidate with the least edit distance from `word`, if that is under half the word;
/// ties go to the first.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|c| (edit_distance(word, c), c))
        .min_by_key(|(d, _)| *d)
        .filter(|(d, c)| *d * 2 <= word.len().max(c.len()))
        .map(|(_, c)| c)
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = i;
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
        for (j, cb) in b.iter().enumerate() {
            let cost = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize, Debug)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Recipe {
        packages: Vec<String>,
        memory_mib: u64,
    }

    #[test]
    fn an_unknown_key_comes_with_the_nearest_right_one() {
        let e = parse_toml::<Recipe>("r.toml", "packages = []\nmemory_mb = 1").unwrap_err().to_string();
        assert!(e.starts_with("r.toml:2:1: unknown field `memory_mb`"), "{e}");
        assert!(e.ends_with("did you mean `memory_mib`?"), "{e}");
    }

    #[test]
    fn a_missing_key_is_named() {
        let e = parse_toml::<Recipe>("r.toml", "packages = []").unwrap_err().to_string();
        assert!(e.contains("missing field `memory_mib`"), "{e}");
    }

    #[test]
    fn edit_distance_counts_single_changes() {
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("", "abc"), 3);
    }
}
