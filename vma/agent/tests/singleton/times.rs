//! What the machines say a relocation took, step by step.

use crate::world::World;

/// A step of a relocation, as the logs tell it.
struct Step {
    name: &'static str,
    /// A word of the line that tells.
    line: &'static str,
    /// From this field on, if not from the beginning, …
    from: Option<&'static str>,
    /// … to this one.
    to: &'static str,
    unit: Unit,
}

#[derive(Clone, Copy)]
enum Unit {
    Milliseconds,
    Microseconds,
    Pages,
}

const fn step(
    name: &'static str,
    line: &'static str,
    from: Option<&'static str>,
    to: &'static str,
    unit: Unit,
) -> Step {
    Step { name, line, from, to, unit }
}

const STEPS: [Step; 11] = [
    step("meet", " taken ", None, "met_ms", Unit::Milliseconds),
    step("stop", " taken ", None, "stop_us", Unit::Microseconds),
    step("save device", " taken ", None, "save_us", Unit::Microseconds),
    step("cut", " taken ", None, "cut_us", Unit::Microseconds),
    step("hand over, in all", " taken ", None, "handed_ms", Unit::Milliseconds),
    step("open", " loaded ", None, "opened_ms", Unit::Milliseconds),
    step("pager and QEMU", " loaded ", Some("opened_ms"), "spawned_ms", Unit::Milliseconds),
    step("ship, meanwhile", " loaded ", Some("opened_ms"), "shipped_ms", Unit::Milliseconds),
    step("open to served", " loaded ", Some("opened_ms"), "served_ms", Unit::Milliseconds),
    step("load", " loaded ", Some("served_ms"), "loaded_ms", Unit::Milliseconds),
    step("written", " taken ", None, "pages", Unit::Pages),
];

/// Prints the median of each step.
pub fn print(world: &World) {
    let logs: String = (0..3).map(|machine| world.log(machine)).collect();
    for Step { name, line, from, to, unit } in &STEPS {
        // The first resume took it from nobody.
        let lines = logs.lines().filter(|l| l.contains(line) && (l.contains("relay=") || l.contains(" taken ")));
        let one = |line: &str| field(line, to)?.checked_sub(from.map_or(Some(0), |f| field(line, f))?);
        let mut all: Vec<u64> = lines.filter_map(one).collect();
        all.sort_unstable();
        let Some(median) = all.get(all.len() / 2).copied() else { continue };
        let text = match unit {
            Unit::Milliseconds => format!("{median} ms"),
            Unit::Microseconds => format!("{:.1} ms", median as f64 / 1000.0),
            Unit::Pages => format!("{median} pages"),
        };
        eprintln!("{name:>20}: {text:>12} (median of {})", all.len());
    }
}

/// A number in a line of a log: `name=12`.
fn field(line: &str, name: &str) -> Option<u64> {
    let words = line.split_whitespace().filter_map(|w| w.split_once('='));
    words.filter(|(key, _)| *key == name).find_map(|(_, value)| value.parse().ok())
}
