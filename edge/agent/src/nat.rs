//! Makes the kernel's packet filter and the public addresses what they are to be, and reads counters.
//!
//! ```text
//! look: `nft -j list table`, `ip -j addr` ─▶ core::nat::plan ─▶ apply: `nft -f -`, `ip -batch -`
//! ```
//!
//! One `nft` costs 6 to 16 ms; the transaction is atomic, so no packet sees half of it.

use crate::command;
use anyhow::{Context, bail};
use ipnet::Ipv4Net;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use vmatrix_edge_core::demand::{Counters, Key};
use vmatrix_edge_core::nat::{Change, Element, Rules, TABLE, Table};
use vmatrix_model::Bytes;

/// Marks the public addresses that are this edge's among those of `lo`.
const LABEL: &str = "lo:vip";

/// What the kernel holds of the edge's table. The chains cannot be read back as what they were made
/// from, so they are `known` to the caller or they are written anew.
///
/// # Errors
/// nft is missing or not allowed, or says something that this edge did not write.
pub async fn look(known: Option<&Rules>) -> anyhow::Result<Table> {
    if !tables().await?.contains(TABLE) {
        return Ok(Table::default());
    }
    // Only what is configured: listing the whole table would bring every counted client with it.
    let list = |kind, set| async move { command::run("nft", &["-j", "list", kind, "ip", TABLE, set], "").await };
    let (slots, declared, vips, elsewhere) =
        tokio::try_join!(list("map", "slots"), list("set", "declared"), list("set", "vips"), list("set", "elsewhere"))?;
    let mut elements = BTreeSet::new();
    for text in [slots, declared, vips, elsewhere] {
        for (set, element) in entries(&text)? {
            elements.insert(read_element(&set, &element).with_context(|| {
                format!("table {TABLE} holds {element} in {set}, which this edge did not write: remove the table")
            })?);
        }
    }
    Ok(Table { rules: known.cloned(), elements })
}

async fn tables() -> anyhow::Result<BTreeSet<String>> {
    let text = command::run("nft", &["list", "tables", "ip"], "").await?;
    Ok(text.lines().filter_map(|l| l.strip_prefix("table ip ")).map(|n| n.trim().to_owned()).collect())
}

/// Does `change` in one transaction.
///
/// # Errors
/// nft refuses it; then nothing of it was done.
pub async fn apply(change: &Change) -> anyhow::Result<()> {
    if !change.is_empty() {
        command::run("nft", &["-f", "-"], &change.to_string()).await?;
    }
    Ok(())
}

/// Gives `lo` exactly the public addresses in `wanted`, so that the namespace answers for them.
///
/// # Errors
/// `ip` is missing or not allowed.
pub async fn hold_addresses(wanted: &BTreeSet<Ipv4Addr>) -> anyhow::Result<()> {
    let text = command::run("ip", &["-j", "-4", "addr", "show", "dev", "lo", "label", LABEL], "").await?;
    let text = if text.trim().is_empty() { "[]" } else { &text };
    let shown: Value = serde_json::from_str(text).context("`ip -j addr` printed something that is not JSON")?;
    let held: BTreeSet<Ipv4Addr> = shown
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|link| link.get("addr_info")?.as_array())
        .flatten()
        .filter_map(|a| a.get("local")?.as_str()?.parse().ok())
        .collect();
    let gone = held.difference(wanted).map(|a| format!("addr del {a}/32 dev lo\n"));
    let new = wanted.difference(&held).map(|a| format!("addr replace {a}/32 dev lo label {LABEL}\n"));
    let batch: String = gone.chain(new).collect();
    if !batch.is_empty() {
        command::run("ip", &["-batch", "-"], &batch).await?;
    }
    Ok(())
}

/// Reads the demand counters.
///
/// # Errors
/// nft fails, or the table is not there.
pub async fn counters() -> anyhow::Result<Counters> {
    // One call for both: every call is a process.
    let text = command::run("nft", &["-j", "list", "sets", "table", "ip", TABLE], "").await?;
    let mut counters = Counters::default();
    for (set, element) in entries(&text)? {
        if set != "requests" && set != "replies" {
            continue;
        }
        let Some((key, packets, bytes)) = read_counter(&element) else {
            bail!("set {set} holds {element}, which is no counter of this edge: remove the table {TABLE}")
        };
        if set == "requests" {
            counters.requests.insert(key, packets);
        } else {
            counters.bytes.insert(key, Bytes(bytes));
        }
    }
    Ok(counters)
}

/// Every element of every set and map in what `nft -j` printed, with the set's name.
fn entries(text: &str) -> anyhow::Result<Vec<(String, Value)>> {
    let listed: Value = serde_json::from_str(text).context("`nft -j` printed something that is not JSON")?;
    let mut entries = Vec::new();
    for item in listed.get("nftables").and_then(Value::as_array).into_iter().flatten() {
        let Some(set) = ["set", "map"].iter().find_map(|kind| item.get(*kind)) else { continue };
        let name = set.get("name").and_then(Value::as_str).unwrap_or_default();
        for element in set.get("elem").and_then(Value::as_array).into_iter().flatten() {
            entries.push((name.to_owned(), element.clone()));
        }
    }
    Ok(entries)
}

/// Reads one element; none if it is not one that this edge writes.
fn read_element(set: &str, element: &Value) -> Option<Element> {
    let address = |v: &Value| v.as_str()?.parse::<Ipv4Addr>().ok();
    let port = |v: &Value| u16::try_from(v.as_u64()?).ok();
    let concat = |v: &Value| v.get("concat")?.as_array().cloned();
    Some(match set {
        "vips" => Element::Vip(address(element)?),
        "elsewhere" => Element::Elsewhere(address(element)?),
        "declared" => match concat(element)?.as_slice() {
            [vip, p] => Element::Declared { vip: address(vip)?, port: port(p)? },
            _ => return None,
        },
        "slots" => {
            let [key, value] = element.as_array()?.as_slice() else { return None };
            match (concat(key)?.as_slice(), concat(value)?.as_slice()) {
                ([vip, _, p, slot], [to, _]) => Element::Slot {
                    vip: address(vip)?,
                    port: port(p)?,
                    slot: u32::try_from(slot.as_u64()?).ok()?,
                    to: address(to)?,
                },
                _ => return None,
            }
        }
        _ => return None,
    })
}

fn read_counter(element: &Value) -> Option<(Key, u64, u64)> {
    let inner = element.get("elem")?;
    let pair = inner.get("val")?.get("concat")?.as_array()?;
    let address = |n: usize| pair.get(n)?.as_str()?.parse::<Ipv4Addr>().ok();
    let clients = Ipv4Net::new(address(0)?, 24).ok()?.trunc();
    let counter = inner.get("counter")?;
    Some(((clients, address(1)?), counter.get("packets")?.as_u64()?, counter.get("bytes")?.as_u64()?))
}

/// Lets the namespace pass packets between its interfaces.
///
/// # Errors
/// Not root, or no such setting.
pub fn let_through() -> anyhow::Result<()> {
    let path = "/proc/sys/net/ipv4/ip_forward";
    let on = std::fs::read_to_string(path).is_ok_and(|v| v.trim() == "1");
    if on {
        return Ok(());
    }
    std::fs::write(path, "1")
        .with_context(|| format!("cannot set {path} to 1: an edge needs root and a network namespace of its own"))
}

/// The public addresses of a table.
pub fn addresses(table: &Table) -> BTreeSet<Ipv4Addr> {
    table.elements.iter().filter_map(|e| if let Element::Vip(vip) = e { Some(*vip) } else { None }).collect()
}

/// Owners of public addresses, as the demand counters need them.
pub fn owners(config: &vmatrix_model::edge_config::EdgeConfig) -> BTreeMap<Ipv4Addr, vmatrix_model::ServiceId> {
    config.services.iter().map(|(name, s)| (s.vip, name.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nft_prints_is_read_as_it_was_written() {
        let text = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}}, {"map": {"family": "ip", "name": "slots", "elem": [[{"concat": ["10.0.0.1", "tcp", 80, 3]}, {"concat": ["192.168.1.13", 80]}]]}},
            {"set": {"name": "declared", "elem": [{"concat": ["10.0.0.1", 80]}]}}, {"set": {"name": "vips", "elem": ["10.0.0.1"]}},
            {"set": {"name": "requests", "elem": [{"elem": {"val": {"concat": ["10.9.8.0", "10.0.0.1"]}, "timeout": 600, "expires": 599, "counter": {"packets": 4, "bytes": 240}}}]}}]}"#;
        let read: Vec<_> = entries(text).unwrap().iter().map(|(set, e)| read_element(set, e)).collect();
        let vip = Ipv4Addr::new(10, 0, 0, 1);
        let slot = Element::Slot { vip, port: 80, slot: 3, to: Ipv4Addr::new(192, 168, 1, 13) };
        assert_eq!(read, [Some(slot), Some(Element::Declared { vip, port: 80 }), Some(Element::Vip(vip)), None]);
        let counted = entries(text)
            .unwrap()
            .iter()
            .filter(|(s, _)| s == "requests")
            .map(|(_, e)| read_counter(e))
            .collect::<Vec<_>>();
        assert_eq!(counted, [Some((("10.9.8.0/24".parse().unwrap(), vip), 4, 240))]);
    }

    #[test]
    fn an_element_of_someone_else_is_noticed() {
        assert_eq!(read_element("slots", &serde_json::json!(["accept", 1])), None);
        assert_eq!(read_element("other", &serde_json::json!("10.0.0.1")), None);
    }
}
