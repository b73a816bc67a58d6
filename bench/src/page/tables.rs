//! The tables of each bench: rows of a report ─▶ columns that matter there.

use super::table;
use crate::limit::Limit;
use crate::report::{Report, Row, median};
use serde_json::Value;

/// Adds a bench's tables to the page.
pub fn of(page: &mut String, report: &Report) {
    match report.bench.as_str() {
        "relocate" => relocate(page, &report.rows),
        "resume" => resume(page, &report.rows),
        "density" => density(page, &report.rows),
        "wire" => wire(page, &report.rows),
        "fanout" => fanout(page, &report.rows),
        _ => generic(page, &report.rows),
    }
}

fn relocate(page: &mut String, rows: &[Row]) {
    page.push_str("\nWhat each guest needs before it answers, as recorded in its image:\n\n");
    let mut guests: Vec<&Row> = Vec::new();
    for row in rows {
        if row.number("working_set_pages").is_some() && !guests.iter().any(|g| is_guest(g, row)) {
            guests.push(row);
        }
    }
    let heads = ["guest", "RAM MiB", "working set, pages", "KiB as sent (W)", "device state and first table, KiB (D)"];
    let sets = guests.into_iter().map(|row| {
        vec![
            row.guest.clone(),
            row.ram_mib.to_string(),
            count(row.number("working_set_pages")),
            kib(row.number("working_set_bytes")),
            kib(limit(row).map(|l| l.d_bytes as f64)),
        ]
    });
    table(page, &heads, sets);

    page.push_str("\nFrom the order to the first byte of the first correct answer:\n\n");
    let heads = [
        "link Mbit/s, ms",
        "guest",
        "RAM MiB",
        "mechanism",
        "runs",
        "first byte",
        "limit",
        "over limit",
        "over bare limit",
        "second",
        "warm",
        "load",
        "KiB on the wire",
    ];
    let measured = rows.iter().map(|row| {
        let over = |limit: Option<f64>| {
            let over = row.first_byte_ms_median.zip(limit).map(|(first, limit)| first / limit);
            over.map_or(String::new(), |o| format!("{o:.2}"))
        };
        vec![
            link(row),
            row.guest.clone(),
            row.ram_mib.to_string(),
            row.mechanism.clone(),
            row.runs.to_string(),
            noisy(row.first_byte_ms_median, &row.runs_ms()),
            ms(row.limit_ms),
            over(row.limit_ms),
            over(row.number("bare_limit_ms")),
            ms(row.second_ms_median),
            ms(row.number("warm_ms_median")),
            ms(row.load_ms_median),
            kib(row.bytes_on_wire.map(|b| b as f64)),
        ]
    });
    table(page, &heads, measured);

    page.push_str("\nThe limits, `r + 8(D+W)/B + T_load + T_guest`, from terms measured in the same run:\n\n");
    let mut seen: Vec<&Row> = Vec::new();
    for row in rows.iter().filter(|r| limit(r).is_some()) {
        if !seen.iter().any(|s| is_guest(s, row) && s.link_mbit == row.link_mbit) {
            seen.push(row);
        }
    }
    let heads = ["link Mbit/s, ms", "guest", "RAM MiB", "r", "8(D+W)/B", "T_load", "T_guest", "limit", "bare limit"];
    let limits = seen.into_iter().filter_map(|row| {
        let terms = limit(row)?;
        Some(vec![
            link(row),
            row.guest.clone(),
            row.ram_mib.to_string(),
            ms(Some(terms.r_ms)),
            ms(Some(terms.transfer_ms())),
            ms(Some(terms.t_load_ms)),
            ms(Some(terms.t_guest_ms)),
            ms(row.limit_ms),
            ms(row.number("bare_limit_ms")),
        ])
    });
    table(page, &heads, limits);
}

fn resume(page: &mut String, rows: &[Row]) {
    page.push('\n');
    let heads = ["guest", "RAM MiB", "mechanism", "runs", "load step", "first byte", "second"];
    let measured = rows.iter().map(|row| {
        vec![
            row.guest.clone(),
            row.ram_mib.to_string(),
            row.mechanism.clone(),
            row.runs.to_string(),
            noisy(row.load_ms_median, &numbers(row, "load_runs_ms")),
            noisy(row.first_byte_ms_median, &row.runs_ms()),
            ms(row.second_ms_median),
        ]
    });
    table(page, &heads, measured);
}

fn density(page: &mut String, rows: &[Row]) {
    for row in rows {
        page.push_str(&format!(
            "\n{} clones of {} with {} MiB:\n\n",
            count(row.number("clones")),
            row.guest,
            row.ram_mib
        ));
        table(page, &["figure", "value"], further(row, &["clones"]).into_iter());
    }
}

fn wire(page: &mut String, rows: &[Row]) {
    page.push('\n');
    let heads = ["guest", "RAM MiB", "case", "mechanism", "bytes"];
    let bytes = rows.iter().map(|row| {
        vec![
            row.guest.clone(),
            row.ram_mib.to_string(),
            text(row, "case"),
            row.mechanism.clone(),
            count(row.bytes_on_wire.map(|b| b as f64)),
        ]
    });
    table(page, &heads, bytes);
    page.push_str("\nStored bytes that the network had not before, by part of the image:\n\n");
    const PARTS: [&str; 7] = ["memory", "device", "disk", "base", "data", "kernel", "initrd"];
    let heads: Vec<&str> = ["guest", "case"].into_iter().chain(PARTS).collect();
    let news = rows.iter().filter(|r| r.mechanism == "vmatrix").map(|row| {
        let parts = PARTS.map(|part| count(row.number(&format!("new_{part}_bytes"))));
        [row.guest.clone(), text(row, "case")].into_iter().chain(parts).collect()
    });
    table(page, &heads, news);
}

fn fanout(page: &mut String, rows: &[Row]) {
    page.push('\n');
    let heads =
        ["networks", "link Mbit/s, ms", "runs", "makespan s", "over a single one's", "origin's bytes over the image's"];
    let measured = rows.iter().map(|row| {
        let single = rows.iter().find(|r| r.number("networks") == Some(1.0) && r.link_mbit == row.link_mbit);
        let single = single.and_then(|r| r.number("whole_ms_median"));
        let makespan = row.number("whole_ms_median");
        let runs: Vec<f64> = row.runs_ms().into_iter().map(|ms| ms / 1e3).collect();
        vec![
            count(row.number("networks")),
            link(row),
            row.runs.to_string(),
            noisy(makespan.map(|m| m / 1e3), &runs),
            makespan.zip(single).map_or(String::new(), |(all, one)| format!("{:.2}", all / one)),
            row.number("origin_copies_median").map_or(String::new(), |c| format!("{c:.2}")),
        ]
    });
    table(page, &heads, measured);
}

/// Of a bench that has no tables of its own: everything.
fn generic(page: &mut String, rows: &[Row]) {
    for row in rows {
        page.push_str(&format!("\n{}, {}:\n\n", row.key().about(), row.mechanism));
        table(page, &["figure", "value"], further(row, &[]).into_iter());
    }
}

/// Figures and words of a row by name; lists and terms are in the JSON only.
fn further(row: &Row, but: &[&str]) -> Vec<Vec<String>> {
    let words = |value: &Value| match value {
        Value::Number(n) => Some(n.to_string()),
        Value::String(text) => Some(text.clone()),
        Value::Bool(is) => Some(is.to_string()),
        _ => None,
    };
    let first = row.first_byte_ms_median.map(|first| vec!["first byte ms median".to_owned(), ms(Some(first))]);
    let more = row.more.iter().filter(|(name, _)| !but.contains(&name.as_str()));
    let more = more.filter_map(|(name, value)| Some(vec![name.replace('_', " "), words(value)?]));
    first.into_iter().chain(more).collect()
}

fn is_guest(a: &Row, b: &Row) -> bool {
    (&a.guest, a.ram_mib) == (&b.guest, b.ram_mib)
}

fn limit(row: &Row) -> Option<Limit> {
    serde_json::from_value(row.more.get("limit_terms")?.clone()).ok()
}

fn link(row: &Row) -> String {
    row.link_mbit.map_or(String::new(), |mbit| format!("{mbit}, {}", row.rtt_ms.unwrap_or(0.0)))
}

fn text(row: &Row, name: &str) -> String {
    row.more.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn numbers(row: &Row, name: &str) -> Vec<f64> {
    let list = row.more.get(name).and_then(Value::as_array);
    list.map(|l| l.iter().filter_map(Value::as_f64).collect()).unwrap_or_default()
}

fn ms(value: Option<f64>) -> String {
    value.map_or(String::new(), |v| if v < 100.0 { format!("{v:.1}") } else { format!("{v:.0}") })
}

/// A median with the least and the most of its runs.
fn noisy(value: Option<f64>, runs: &[f64]) -> String {
    let least = runs.iter().copied().fold(f64::INFINITY, f64::min);
    let most = runs.iter().copied().fold(0.0, f64::max);
    let span = if runs.len() > 1 { format!(" [{}..{}]", ms(Some(least)), ms(Some(most))) } else { String::new() };
    value.or_else(|| median(runs)).map_or(String::new(), |v| format!("{}{span}", ms(Some(v))))
}

fn kib(bytes: Option<f64>) -> String {
    bytes.map_or(String::new(), |b| count(Some((b / 1024.0).round())))
}

/// A whole number in groups of three.
fn count(value: Option<f64>) -> String {
    let Some(value) = value else { return String::new() };
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_numbers_are_read_in_groups_and_a_lone_run_has_no_span() {
        assert_eq!(count(Some(1_234_567.0)), "1 234 567");
        assert_eq!(count(Some(12.0)), "12");
        assert_eq!(
            (noisy(Some(5.0), &[5.0]), noisy(Some(5.0), &[4.0, 5.0, 600.0])),
            ("5.0".into(), "5.0 [4.0..600]".into())
        );
        assert_eq!(noisy(None, &[]), "");
    }
}
