//! What the host may ask: one line, checked, to an order; its outcome, to one line.

use crate::{identity, kernel, memory};
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
    machine_id: Option<String>,
    memory: Option<Ask>,
}

/// What is asked about memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Ask {
    /// Give the page cache back.
    Trim,
    /// Lend free blocks, and tell where they are.
    Lend,
    /// Take them back.
    TakeBack,
    /// Tell what each page is in use for.
    Kinds,
}

#[derive(Debug, PartialEq, Eq)]
enum Order {
    /// With a machine id where the guest becomes somebody of its own; without, it stays who it was.
    Awaken {
        seed: [u8; SEED_BYTES],
        clock_unix_us: u64,
        machine_id: Option<[u8; 16]>,
    },
    Memory(Ask),
}

/// Does what a line says and returns the line to answer.
pub fn obey(line: &[u8]) -> String {
    let outcome = parse(line).and_then(|order| match order {
        Order::Awaken { seed, clock_unix_us, machine_id } => {
            kernel::reseed(&seed)?;
            kernel::set_clock(clock_unix_us)?;
            machine_id.map_or(Ok(()), |id| identity::renew(&id))?;
            Ok(json!({ "ok": true, "clock_unix_us": kernel::clock()? }))
        }
        Order::Memory(Ask::Trim) => {
            identity::look();
            kernel::trim().map(|()| json!({ "ok": true }))
        }
        Order::Memory(Ask::Lend) => memory::lend().map(|runs| json!({ "ok": true, "runs": runs })),
        Order::Memory(Ask::TakeBack) => memory::take_back().map(|()| json!({ "ok": true })),
        Order::Memory(Ask::Kinds) => memory::kinds().map(|runs| json!({ "ok": true, "runs": runs })),
    });
    let answer: Value = outcome.unwrap_or_else(|error| json!({ "ok": false, "error": error }));
    format!("{answer}\n")
}

fn parse(line: &[u8]) -> Result<Order, String> {
    let line: Line = serde_json::from_slice(line).map_err(|e| format!("not an order: {e}"))?;
    match (line.reseed, line.clock_unix_us, line.machine_id, line.memory) {
        (Some(seed), Some(clock_unix_us), id, None) => Ok(Order::Awaken {
            seed: bytes("reseed", &seed)?,
            clock_unix_us,
            machine_id: id.map(|id| bytes("machine_id", &id)).transpose()?,
        }),
        (None, None, None, Some(ask)) => Ok(Order::Memory(ask)),
        _ => Err("send reseed with clock_unix_us (and machine_id), or memory".to_owned()),
    }
}

fn bytes<const N: usize>(what: &str, text: &str) -> Result<[u8; N], String> {
    let bytes = STANDARD.decode(text).map_err(|e| format!("{what}: {e}"))?;
    let length = bytes.len();
    bytes.try_into().map_err(|_| format!("{what} has {length} bytes, not {N}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reseed_comes_with_the_time_and_64_bytes() {
        let seed = STANDARD.encode([7; SEED_BYTES]);
        let line = json!({ "reseed": seed, "clock_unix_us": 5 }).to_string();
        let awaken = |machine_id| Ok(Order::Awaken { seed: [7; SEED_BYTES], clock_unix_us: 5, machine_id });
        assert_eq!(parse(line.as_bytes()), awaken(None));
        let line = json!({ "reseed": seed, "clock_unix_us": 5, "machine_id": STANDARD.encode([9; 16]) }).to_string();
        assert_eq!(parse(line.as_bytes()), awaken(Some([9; 16])));
        let short = json!({ "reseed": STANDARD.encode([7; 8]), "clock_unix_us": 5 }).to_string();
        assert!(parse(short.as_bytes()).unwrap_err().contains("8 bytes, not 64"));
        assert!(parse(json!({ "reseed": seed }).to_string().as_bytes()).is_err(), "taken without the time");
    }

    #[test]
    fn what_is_not_an_order_is_answered_with_an_error_and_nothing_is_done() {
        for line in [
            "",
            "{}",
            "[]",
            "{\"memory\":\"sell\"}",
            "{\"memory\":\"trim\",\"clock_unix_us\":1}",
            "{\"shutdown\":true}",
            "\u{0}\u{0}",
        ] {
            let answer: Value = serde_json::from_str(&obey(line.as_bytes())).unwrap();
            assert_eq!(answer["ok"], false, "{line:?} was obeyed");
        }
    }
}
