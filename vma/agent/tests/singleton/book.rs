//! A user who writes into the guest's book, a line at a time, over a connection each; and what must stand in it.

use crate::users::page;
use crate::world::{World, wait};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Lines of a book.
#[derive(Debug, Clone, Copy)]
pub struct Lines {
    /// Those it had when the image was built: `warm-0`, `warm-1`, …
    built: u64,
    /// Those behind: `line-1`, `line-2`, …
    pub written: u64,
}

/// Tells the writer to stop.
#[derive(Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    pub fn now(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Writes lines through the network of machine 0 until it is told to stop; each is answered by its number, once and in
/// order.
pub fn write(world: &World, stop: &Stop) -> Lines {
    let mut lines: Option<Lines> = None;
    for n in 1u64.. {
        if let Some(lines) = lines.filter(|_| stop.0.load(Ordering::Relaxed)) {
            return lines;
        }
        let said = page(world, world.door(0, 80), &format!("/cgi-bin/append?line-{n}"));
        let number = said.as_deref().map(str::trim).and_then(|s| s.parse::<u64>().ok());
        let built = lines.map_or_else(|| number.unwrap_or_default().saturating_sub(1), |l| l.built);
        assert_eq!(number, Some(built + n), "line {n} of the book was answered {said:?}");
        lines = Some(Lines { built, written: n });
        wait(Duration::from_millis(20));
    }
    unreachable!("there are more numbers than lines")
}

/// The book, read through the network of a machine, is what an undisturbed guest would have written.
pub fn check(world: &World, machine: usize, lines: Lines) {
    let mut text: String = (0..lines.built).map(|n| format!("warm-{n}\n")).collect();
    (1..=lines.written).for_each(|n| text.push_str(&format!("line-{n}\n")));
    let expected = format!("{}\n{}\n", sha256(&text), text.len());
    let said = page(world, world.door(machine, 80), "/cgi-bin/book").unwrap();
    assert_eq!(said, expected, "the book has other lines than were written");
}

/// By the program that the guest has too.
fn sha256(text: &str) -> String {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let mut child =
        Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("needs coreutils");
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let said = child.wait_with_output().unwrap().stdout;
    String::from_utf8(said).unwrap()[..64].to_owned()
}
