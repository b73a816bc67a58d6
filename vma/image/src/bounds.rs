//! What a manifest may say: its words reach a command line and a rule set, its sizes an allocation.
//!
//! Manifest ─▶ nothing, or the first thing in it that cannot be.

use crate::chunks::{BLOB_MAX, CHUNK_MAX, DATA_CHUNK, STORED_MORE};
use crate::store::is_image_name;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use vmatrix_model::Bytes;
use vmatrix_model::manifest::{Blob, FORMAT, GuestSpec, MachineSpec, Manifest, Memory, Part, PartKind};

/// Largest part: the memory of the largest guest.
const PART_MAX: u64 = 64 << 30;
/// Most plain bytes of device state: a guest without a display has 0.5 MiB.
const DEVICE_STATE_MAX: u64 = 16 << 20;
/// Most processors of a guest.
const SMP_MAX: u32 = 64;
/// Least and most guest memory, MiB.
const MEMORY_MIB: std::ops::RangeInclusive<u64> = 16..=PART_MAX >> 20;
/// Most ports, and most back ends: each is a rule in every cell.
const PORTS_MAX: usize = 64;
/// Most devices: the slots of a machine's first bus.
const DEVICES_MAX: usize = 32;
/// What the size of a disk that is written is a multiple of: a page of the guest that writes it.
const DATA_UNIT: u64 = 4096;
/// Longest argument of a device.
const DEVICE_MAX: usize = 256;
/// Longest kernel command line on x86.
const APPEND_MAX: usize = 2047;
/// Longest health path.
const PATH_MAX: usize = 512;

type Checked = Result<(), String>;

/// Whether everything a manifest says is possible.
pub(crate) fn check(m: &Manifest) -> Checked {
    ensure(m.format == FORMAT, || format!("format {} is not {FORMAT}, the one this version reads", m.format))?;
    ensure(is_image_name(&m.name), || format!("{:?} is not the name of an image", m.name))?;
    check_machine(&m.machine)?;
    check_guest(&m.guest)?;
    let mut kinds = BTreeSet::new();
    for part in &m.parts {
        ensure(kinds.insert(part.kind), || format!("part {:?} is there twice", part.kind))?;
        check_part(part)?;
    }
    ensure(kinds.contains(&PartKind::Disk), || "part Disk is missing".to_owned())?;
    check_memory(&m.memory)?;
    let size = m.memory.size.0;
    ensure(size == m.machine.memory_mib << 20, || {
        format!("its memory has {size} bytes, its machine {} MiB", m.machine.memory_mib)
    })?;
    check_blob("device state", &m.device)?;
    let device = m.device.plain.0;
    ensure(device <= DEVICE_STATE_MAX, || format!("device state of {device} bytes is larger than {DEVICE_STATE_MAX}"))
}

fn check_memory(m: &Memory) -> Checked {
    check_blob("first table", &m.first)?;
    check_blob("rest table", &m.rest)?;
    let pages = m.size.0 / 4096;
    let set = m.working_set;
    let counted = [m.zero_pages, m.parent_pages, set.pages].into_iter().all(|n| n <= pages);
    let possible = |stored: Bytes| stored.0 <= m.size.0 + pages * STORED_MORE as u64 && stored <= m.stored;
    ensure(counted && set.stored <= m.stored && possible(set.stored), || {
        format!("memory of {pages} pages cannot have what it counts")
    })
}

fn check_blob(what: &str, blob: &Blob) -> Checked {
    let (stored, plain) = (blob.stored.0, blob.plain.0);
    ensure((1..=(BLOB_MAX + STORED_MORE) as u64).contains(&stored) && plain <= BLOB_MAX as u64, || {
        format!("{what} of {plain} bytes, {stored} stored, is larger than {BLOB_MAX} or empty")
    })
}

fn check_machine(m: &MachineSpec) -> Checked {
    for (what, word) in [
        ("machine_type", &m.machine_type),
        ("cpu_model", &m.cpu_model),
        ("accelerator", &m.accelerator),
        ("qemu_version", &m.qemu_version),
        ("netdev", &m.netdev),
    ] {
        let good =
            (1..=64).contains(&word.len()) && word.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        ensure(good, || format!("{what} {word:?} is not a plain word"))?;
    }
    ensure((1..=SMP_MAX).contains(&m.smp) && MEMORY_MIB.contains(&m.memory_mib), || {
        format!("{} processors or {} MiB are out of range", m.smp, m.memory_mib)
    })?;
    ensure(m.devices.len() <= DEVICES_MAX, || format!("{} devices are more than {DEVICES_MAX}", m.devices.len()))?;
    for device in &m.devices {
        // A space would make two lists of devices look the same when they are compared with the host's.
        let good = (1..=DEVICE_MAX).contains(&device.len())
            && device.starts_with(|c: char| c.is_ascii_alphanumeric())
            && device.bytes().all(|b| b.is_ascii_graphic());
        ensure(good, || format!("device {device:?} is not one plain argument"))?;
    }
    let printable = m.append.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
    ensure(m.append.len() <= APPEND_MAX && printable, || {
        format!("append is not one line of at most {APPEND_MAX} printable characters")
    })
}

fn check_guest(g: &GuestSpec) -> Checked {
    ensure(is_mac(&g.mac), || format!("mac {:?} is not the address of one interface, like 52:54:00:12:34:56", g.mac))?;
    let (address, gateway) = (g.address, g.gateway);
    let network = |a: Ipv4Addr| a.to_bits() >> 8;
    // A /24 in every cell: its first and last address are nobody's.
    let host = |a: Ipv4Addr| a.is_private() && !matches!(a.octets()[3], 0 | 255);
    ensure(host(address) && host(gateway) && address != gateway && network(address) == network(gateway), || {
        format!("address {address} and gateway {gateway} are not two private addresses of one /24")
    })?;
    ensure(distinct(g.ports.iter().copied()) && !g.ports.is_empty(), || {
        format!("ports {:?} are not 1 to {PORTS_MAX} different ones, 1 to 65535", g.ports)
    })?;
    ensure(g.health.port != 0, || "health port is 0".to_owned())?;
    ensure((100..600).contains(&g.health.status), || format!("health status {} is none of HTTP", g.health.status))?;
    let path = &g.health.path;
    let plain = path.starts_with('/') && path.len() <= PATH_MAX && path.bytes().all(|b| b.is_ascii_graphic());
    ensure(plain, || format!("health path {path:?} is not a plain path"))?;
    ensure(distinct(g.backends.iter().map(|b| (b.address, b.port))), || {
        format!("back ends are not at most {PORTS_MAX} different ones")
    })?;
    for b in &g.backends {
        let a = b.address;
        let one = !(a.is_unspecified() || a.is_loopback() || a.is_multicast() || a.is_broadcast());
        ensure(is_image_name(&b.name) && one && b.port != 0, || {
            format!("back end {:?} at {a}:{} has no plain name, address of one machine and port", b.name, b.port)
        })?;
    }
    ensure(!g.ports.contains(&0), || "port 0 is nobody's".to_owned())
}

/// At most [`PORTS_MAX`], none twice.
fn distinct<T: Ord>(all: impl ExactSizeIterator<Item = T>) -> bool {
    let count = all.len();
    count <= PORTS_MAX && all.collect::<BTreeSet<T>>().len() == count
}

/// Six bytes in lower-case hex, of one interface rather than a group, and not all zeros.
fn is_mac(text: &str) -> bool {
    let bytes: Vec<Option<u8>> = text
        .split(':')
        .map(|pair| {
            let hex = pair.len() == 2 && pair.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            hex.then(|| u8::from_str_radix(pair, 16).ok()).flatten()
        })
        .collect();
    bytes.len() == 6
        && bytes.iter().all(Option::is_some)
        && bytes.iter().any(|b| *b != Some(0))
        && bytes.first().copied().flatten().is_some_and(|first| first & 1 == 0)
}

fn check_part(part: &Part) -> Checked {
    let (kind, size, chunk) = (part.kind, part.size.0, part.chunk.0);
    ensure((4096..=CHUNK_MAX as u64).contains(&chunk), || {
        format!("part {kind:?} has chunks of {chunk} bytes, not 4096 to {CHUNK_MAX}")
    })?;
    ensure(size <= PART_MAX, || format!("part {kind:?} of {size} bytes is larger than {PART_MAX}"))?;
    // What of it was written is marked by chunk, and written by whole sectors.
    ensure(kind != PartKind::Data || (chunk == DATA_CHUNK.0 && size > 0 && size % DATA_UNIT == 0), || {
        format!("part Data of {size} bytes in chunks of {chunk} is not whole pages in chunks of {}", DATA_CHUNK.0)
    })?;
    check_blob(&format!("table of {kind:?}"), &part.table)?;
    let longest = size.div_ceil(chunk).saturating_mul(36);
    ensure(part.table.plain.0 <= longest, || {
        format!("part {kind:?} of {size} bytes cannot have a table of {} bytes", part.table.plain.0)
    })
}

fn ensure(good: bool, otherwise: impl FnOnce() -> String) -> Checked {
    if good { Ok(()) } else { Err(otherwise()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunks::plain_length;
    use crate::machine::tests::manifest;
    use proptest::prelude::*;
    use vmatrix_model::manifest::BackendSpec;

    fn refuses(word: &str, change: impl FnOnce(&mut Manifest)) {
        let mut m = manifest();
        assert_eq!(check(&m), Ok(()));
        change(&mut m);
        let problem = check(&m).expect_err(word);
        assert!(problem.contains(word), "{problem} does not say {word}");
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        refuses("format 1", |m| m.format = 1);
        refuses("not the name of an image", |m| m.name = "../tiny".into());
        refuses("missing", |m| m.parts.clear());
        refuses("twice", |m| m.parts.push(m.parts[1].clone()));
        refuses("has chunks of", |m| m.parts[0].chunk = Bytes(1 << 40));
        refuses("cannot have a table", |m| m.parts[0].table.plain = Bytes(1 << 20));
        let data = |size, chunk| {
            let table = manifest().parts[0].table;
            Part { kind: PartKind::Data, size: Bytes(size), chunk: Bytes(chunk), table, stored: Bytes(0) }
        };
        for (size, chunk) in [(0, 64 << 10), (1 << 20, 4096), (4097, 64 << 10)] {
            refuses("part Data", |m| m.parts.push(data(size, chunk)));
        }
        let mut written = manifest();
        written.parts.push(data(1 << 20, 64 << 10));
        assert_eq!(check(&written), Ok(()));
        refuses("device state", |m| m.device.plain = Bytes(17 << 20));
        refuses("first table", |m| m.memory.first.stored = Bytes(1 << 40));
        refuses("rest table", |m| m.memory.rest.stored = Bytes(0));
        refuses("counts", |m| m.memory.zero_pages = u64::MAX);
        refuses("counts", |m| m.memory.working_set.stored = Bytes(u64::MAX));
        refuses("health path", |m| m.guest.health.path = "/ HTTP/1.0\r\n".into());
        refuses("health status", |m| m.guest.health.status = 42);
    }

    #[test]
    fn a_word_that_would_be_two_options_is_refused() {
        refuses("cpu_model", |m| m.machine.cpu_model = "Nehalem,-sse".into());
        refuses("netdev", |m| m.machine.netdev = "tap,script=/tmp/x".into());
        refuses("one plain argument", |m| m.machine.devices.push("virtio-rng-pci,rng=a\nvirtio-9p".into()));
        refuses("one plain argument", |m| m.machine.devices[0] += " -device ivshmem");
        refuses("one plain argument", |m| m.machine.devices.push("-monitor".into()));
        refuses("more than 32", |m| m.machine.devices = vec!["a".into(); 33]);
        refuses("append", |m| m.machine.append = "quiet\ninit=/bin/sh".into());
        refuses("append", |m| m.machine.append = "x".repeat(2048));
    }

    #[test]
    fn a_machine_larger_than_any_is_refused() {
        refuses("out of range", |m| m.machine.smp = 0);
        refuses("out of range", |m| m.machine.smp = 65);
        refuses("out of range", |m| m.machine.memory_mib = u64::MAX);
        refuses("its memory has", |m| m.machine.memory_mib = 256);
    }

    #[test]
    fn a_mac_is_six_lower_case_bytes_of_one_interface() {
        for mac in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:5",
            "52:54:00:12:34:5G",
            "52:54:00:12:34:AB",
            "+2:54:00:12:34:56",
            "52-54-00-12-34-56",
            "53:54:00:12:34:56",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
            "52:54:00:12:34:56,romfile=/etc/shadow",
            "52:54:00:12:34:56 accept\n}",
        ] {
            refuses("mac", |m| m.guest.mac = mac.into());
        }
    }

    #[test]
    fn guest_and_gateway_are_two_private_addresses_of_one_network() {
        for (address, gateway) in [
            ("192.168.1.1", "192.168.1.1"),
            ("192.168.1.10", "192.168.2.1"),
            ("8.8.8.8", "8.8.8.1"),
            ("127.0.0.2", "127.0.0.1"),
            ("192.168.1.255", "192.168.1.1"),
            ("192.168.1.10", "192.168.1.0"),
        ] {
            refuses("one /24", |m| {
                (m.guest.address, m.guest.gateway) = (address.parse().unwrap(), gateway.parse().unwrap());
            });
        }
    }

    #[test]
    fn ports_are_there_different_and_bounded() {
        refuses("ports", |m| m.guest.ports.clear());
        refuses("ports", |m| m.guest.ports = vec![80, 80]);
        refuses("port 0", |m| m.guest.ports = vec![80, 0]);
        refuses("ports", |m| m.guest.ports = (1..100).collect());
        refuses("health port", |m| m.guest.health.port = 0);
        let backend = BackendSpec { name: "db".into(), address: [10, 0, 0, 1].into(), port: 5432 };
        refuses("different", |m| m.guest.backends = vec![backend.clone(), backend.clone()]);
        for bad in [
            BackendSpec { name: "d b".into(), ..backend.clone() },
            BackendSpec { port: 0, ..backend.clone() },
            BackendSpec { address: [255; 4].into(), ..backend.clone() },
        ] {
            refuses("back end", |m| m.guest.backends = vec![bad]);
        }
    }

    /// Numbers where arithmetic breaks, and their neighbours.
    fn size() -> impl Strategy<Value = u64> {
        prop_oneof![any::<u64>(), Just(0), Just(1), Just(u64::MAX), (0u32..64).prop_map(|b| 1 << b)]
    }

    proptest! {
        #[test]
        fn no_size_from_outside_overflows(
            part in 0usize..3, size in size(), chunk in size(), memory in size(), stored in size(), index: usize,
        ) {
            let mut m = manifest();
            m.machine.memory_mib = memory;
            m.memory.size = Bytes(size);
            m.memory.stored = Bytes(stored);
            m.parts[part].size = Bytes(size);
            m.parts[part].chunk = Bytes(chunk);
            m.parts[part].table.stored = Bytes(stored);
            m.parts[part].stored = Bytes(stored);
            let _ = check(&m);
            let _ = (m.stored(), m.critical());
            prop_assert!(plain_length(&m.parts[part], index).0 <= chunk);
        }
    }
}
