//! What the host may ask: one line, checked, to an order; its outcome, to one line.

use crate::kernel;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

/// Longest line the host may send.
pub const LINE_MAX: usize = 4096;
/// Random bytes in a reseed.
const SEED_BYTES: usize = 64;

/// The fields of every order; each line carries one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    reseed: Option<String>,
    clock_unix_us: Option<u64>,
    trim: Option<bool>,
}

#[derive(Debug, PartialEq, Eq)]
enum Order {
    Awaken { seed: [u8; SEED_BYTES], clock_unix_us: u64 },
    Trim,
}

/// Does what a line says and returns the line to answer.
pub fn obey(line: &[u8]) -> String {
    let outcome = parse(line).and_then(|order| match order {
        Order::Awaken { seed, clock_unix_us } => {
            kernel::reseed(&seed)?;
            kernel::set_clock(clock_unix_us)?;
            Ok(json!({ "ok": true, "clock_unix_us": kernel::clock()? }))
        }
        Order::Trim => kernel::trim().map(|()| json!({ "ok": true })),
    });
    let answer: Value = outcome.unwrap_or_else(|error| json!({ "ok": false, "error": error }));
    format!("{answer}\n")
}

fn parse(line: &[u8]) -> Result<Order, String> {
    let line: Line = serde_json::from_slice(line).map_err(|e| format!("not an order: {e}"))?;
    match (line.reseed, line.clock_unix_us, line.trim) {
        (Some(seed), Some(clock_unix_us), None) => {
            let seed = STANDARD.decode(seed).map_err(|e| format!("reseed: {e}"))?;
            let length = seed.len();
            let seed = seed.try_into().map_err(|_| format!("reseed has {length} bytes, not {SEED_BYTES}"))?;
            Ok(Order::Awaken { seed, clock_unix_us })
        }
        (None, None, Some(true)) => Ok(Order::Trim),
        _ => Err("send reseed with clock_unix_us, or trim".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reseed_comes_with_the_time_and_64_bytes() {
        let seed = STANDARD.encode([7; SEED_BYTES]);
        let line = json!({ "reseed": seed, "clock_unix_us": 5 }).to_string();
        assert_eq!(parse(line.as_bytes()), Ok(Order::Awaken { seed: [7; SEED_BYTES], clock_unix_us: 5 }));
        let short = json!({ "reseed": STANDARD.encode([7; 8]), "clock_unix_us": 5 }).to_string();
        assert!(parse(short.as_bytes()).unwrap_err().contains("8 bytes, not 64"));
        assert!(parse(json!({ "reseed": seed }).to_string().as_bytes()).is_err(), "taken without the time");
    }

    #[test]
    fn what_is_not_an_order_is_answered_with_an_error_and_nothing_is_done() {
        for line in ["", "{}", "[]", "{\"trim\":false}", "{\"shutdown\":true}", "\u{0}\u{0}"] {
            let answer: Value = serde_json::from_str(&obey(line.as_bytes())).unwrap();
            assert_eq!(answer["ok"], false, "{line:?} was obeyed");
        }
    }
}
