//! Open connections per cell, as the kernel tracks them.

use anyhow::Context;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;

/// The kernel's list for the namespace of the reading thread.
const LIST: &str = "/proc/thread-self/net/nf_conntrack";

/// Counts the open connections of each of `cells`.
///
/// # Errors
/// The kernel shows no list: connection tracking is not loaded, or this is not root.
pub fn count(cells: &BTreeSet<Ipv4Addr>) -> anyhow::Result<BTreeMap<Ipv4Addr, u32>> {
    let mut counts: BTreeMap<Ipv4Addr, u32> = cells.iter().map(|c| (*c, 0)).collect();
    if cells.is_empty() {
        return Ok(counts);
    }
    let list = std::fs::File::open(LIST)
        .with_context(|| format!("cannot open {LIST}: run as root on a kernel with connection tracking"))?;
    for line in BufReader::new(list).lines() {
        let line = line.with_context(|| format!("cannot read {LIST}"))?;
        if let Some(n) = answerer(&line).and_then(|cell| counts.get_mut(&cell)) {
            *n += 1;
        }
    }
    Ok(counts)
}

/// Who answers the TCP connection that `line` describes, if it is open: the source of its replies.
fn answerer(line: &str) -> Option<Ipv4Addr> {
    let mut words = line.split_ascii_whitespace();
    let open = words.by_ref().nth(2)? == "tcp" && !matches!(words.nth(2)?, "TIME_WAIT" | "CLOSE" | "NONE");
    let reply = words.filter_map(|w| w.strip_prefix("src=")).nth(1)?;
    if open { reply.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_connection_belongs_to_whoever_answers_it() {
        let line = |state: &str| {
            format!(
                "ipv4     2 tcp      6 431999 {state} src=10.0.0.9 dst=198.19.1.100 sport=4000 dport=80 src=100.64.0.2 dst=10.0.0.9 sport=80 dport=4000 [ASSURED] mark=0 use=2"
            )
        };
        assert_eq!(answerer(&line("ESTABLISHED")), Some(Ipv4Addr::new(100, 64, 0, 2)));
        assert_eq!(answerer(&line("FIN_WAIT")), Some(Ipv4Addr::new(100, 64, 0, 2)));
        assert_eq!(answerer(&line("TIME_WAIT")), None);
        assert_eq!(
            answerer(
                "ipv4 2 udp 17 29 src=10.0.0.9 dst=198.19.1.1 sport=1 dport=53 src=198.19.1.1 dst=10.0.0.9 sport=53 dport=1 mark=0 use=2"
            ),
            None
        );
        assert_eq!(answerer(""), None);
    }
}
