//! The description in an OVA: XML, read for memory, processors and the one disk.
//!
//! text ─▶ memory, processors, disk file, capacity, and what was left aside, by name
//!
//! The parser knows no document type, so no entity of the text's own, inner or outer, can exist.

use crate::source::{DISK_MAX, DISK_MIN};
use roxmltree::{Document, Node, ParsingOptions};

/// Longest description; VirtualBox and VMware write some 10 KiB.
pub const TEXT_MAX: usize = 256 << 10;
/// Elements, attributes and texts in one.
const NODES_MAX: u32 = 20_000;
/// Elements within elements; OVF has seven.
const DEPTH_MAX: usize = 32;
/// Most things that are listed as left aside.
const ASIDE_MAX: usize = 64;
/// Kinds of hardware (`rasd:ResourceType`).
const PROCESSOR: &str = "3";
const MEMORY: &str = "4";
const DISK_DRIVE: &str = "17";

/// Why a description is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("is longer than {TEXT_MAX} bytes; a description has some ten thousand")]
    Long,
    #[error("is no XML that is read here: {0}; export it anew")]
    Xml(String),
    #[error("has elements within elements, more than {DEPTH_MAX} deep; do not use this file")]
    Deep,
    #[error("describes no virtual machine; export one machine as an OVA")]
    NoMachine,
    #[error("describes {0} virtual machines; export one at a time")]
    Machines(usize),
    #[error("describes {0} disks; only a machine with one is imported, detach the others and export it anew")]
    Disks(usize),
    #[error("{what} is {said:?}, which is not {allowed}")]
    Value { what: &'static str, said: String, allowed: &'static str },
}

/// What is taken from a description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    /// The machine's name, as its owner wrote it.
    pub name: Option<String>,
    /// 64 to 65536.
    pub memory_mib: Option<u64>,
    /// 1 to 64.
    pub cpus: Option<u32>,
    /// File of the disk in the archive.
    pub disk: String,
    /// Bytes of the disk.
    pub capacity: u64,
    /// What the description asks for and an import leaves aside, by name.
    pub aside: Vec<String>,
}

/// Reads a description.
///
/// # Errors
/// What is wrong with it, or that it is of several machines or disks.
pub fn read(text: &str) -> Result<Described, Problem> {
    if text.len() > TEXT_MAX {
        return Err(Problem::Long);
    }
    shallow(text)?;
    let options = ParsingOptions { allow_dtd: false, nodes_limit: NODES_MAX, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text, options).map_err(|e| Problem::Xml(shown(&e.to_string())))?;
    let all = |name: &'static str| document.descendants().filter(move |n| n.tag_name().name() == name);
    let machines: Vec<Node<'_, '_>> = all("VirtualSystem").collect();
    let machine = match machines.as_slice() {
        [] => return Err(Problem::NoMachine),
        [one] => *one,
        several => return Err(Problem::Machines(several.len())),
    };
    let disks: Vec<Node<'_, '_>> = all("Disk").collect();
    let [disk] = disks.as_slice() else { return Err(Problem::Disks(disks.len())) };
    let hardware = Hardware::of(machine)?;
    let reference = attribute(*disk, "fileRef").unwrap_or_default();
    let file = all("File").find(|f| attribute(*f, "id") == Some(reference));
    let file = file.ok_or_else(|| value("the disk's fileRef", reference, "the id of a file"))?;
    for (name, what) in [("compression", "the disk file's compression"), ("chunkSize", "the disk file's chunkSize")] {
        if let Some(said) = attribute(file, name).filter(|s| *s != "identity") {
            return Err(value(what, said, "known here; export it anew without"));
        }
    }
    let href = attribute(file, "href").unwrap_or_default();
    // It must name a file of the archive; that names lead nowhere else the archive's reader saw to.
    if href.is_empty() || href.contains(['/', '\\', ':']) {
        return Err(value("the disk file's href", href, "a file in the archive"));
    }
    let capacity = attribute(*disk, "capacity").unwrap_or_default();
    let unit = attribute(*disk, "capacityAllocationUnits").unwrap_or("byte");
    let capacity = capacity.parse::<u64>().ok().zip(unit_of(unit)).and_then(|(n, unit)| n.checked_mul(unit));
    let capacity = capacity.filter(|c| (DISK_MIN..=DISK_MAX).contains(c));
    let capacity = capacity.ok_or_else(|| {
        value(
            "the disk's capacity",
            attribute(*disk, "capacity").unwrap_or_default(),
            "1 MiB to 64 GiB, in a known unit",
        )
    })?;
    let mut aside = hardware.aside;
    let known =
        ["References", "DiskSection", "VirtualSystem", "VirtualHardwareSection", "NetworkSection", "Info", "Name"];
    let sections = document.root_element().children().chain(machine.children()).filter(Node::is_element);
    aside.extend(sections.map(|n| n.tag_name().name()).filter(|n| !known.contains(n)).map(shown));
    aside.truncate(ASIDE_MAX);
    let name = machine.children().find(|n| n.tag_name().name() == "Name").and_then(|n| n.text());
    let name = name.or_else(|| attribute(machine, "id")).map(shown);
    Ok(Described { name, memory_mib: hardware.memory_mib, cpus: hardware.cpus, disk: href.to_owned(), capacity, aside })
}

struct Hardware {
    memory_mib: Option<u64>,
    cpus: Option<u32>,
    aside: Vec<String>,
}

impl Hardware {
    fn of(machine: Node<'_, '_>) -> Result<Hardware, Problem> {
        let (mut memory_mib, mut cpus, mut drives, mut aside) = (None, None, 0, Vec::new());
        for item in
            machine.descendants().filter(|n| matches!(n.tag_name().name(), "Item" | "StorageItem" | "EthernetPortItem"))
        {
            let child = |name: &str| {
                item.children().find(|n| n.tag_name().name() == name).and_then(|n| n.text()).map(str::trim)
            };
            let quantity = child("VirtualQuantity").unwrap_or_default();
            match child("ResourceType").unwrap_or_default() {
                PROCESSOR => {
                    let n = quantity.parse().ok().filter(|n| (1..=64).contains(n));
                    cpus = Some(n.ok_or_else(|| value("the number of processors", quantity, "1 to 64"))?);
                }
                MEMORY => {
                    let unit = child("AllocationUnits").unwrap_or("byte * 2^20");
                    let bytes =
                        quantity.parse::<u64>().ok().zip(unit_of(unit)).and_then(|(n, unit)| n.checked_mul(unit));
                    let mib = bytes.map(|b| b >> 20).filter(|mib| (64..=65_536).contains(mib));
                    memory_mib =
                        Some(mib.ok_or_else(|| value("memory", quantity, "64 MiB to 64 GiB, in a known unit"))?);
                }
                DISK_DRIVE => drives += 1,
                other => {
                    let name = child("ElementName").or(child("Caption")).unwrap_or("nameless");
                    aside.push(format!("{} (kind {})", shown(name), shown(other)));
                }
            }
        }
        if drives > 1 { Err(Problem::Disks(drives)) } else { Ok(Hardware { memory_mib, cpus, aside }) }
    }
}

/// Counts depth before the parser sees the text, for a parser may call itself for each level.
fn shallow(text: &str) -> Result<(), Problem> {
    let (mut depth, mut rest) = (0usize, text);
    while let Some(at) = rest.find('<') {
        rest = rest.get(at + 1..).unwrap_or_default();
        let end = rest.find('>').unwrap_or(rest.len());
        if rest.starts_with('/') {
            depth = depth.saturating_sub(1);
        } else if !rest.starts_with(['!', '?']) && !rest.get(..end).unwrap_or_default().ends_with('/') {
            depth += 1;
        }
        if depth > DEPTH_MAX {
            return Err(Problem::Deep);
        }
    }
    Ok(())
}

/// `byte * 2^30`, `GigaBytes`, `MB` ─▶ bytes.
fn unit_of(unit: &str) -> Option<u64> {
    let plain: String = unit.chars().filter(|c| !c.is_whitespace()).collect::<String>().to_ascii_lowercase();
    match plain.as_str() {
        "byte" | "bytes" => Some(1),
        "kilobytes" | "kb" => Some(1 << 10),
        "megabytes" | "mb" => Some(1 << 20),
        "gigabytes" | "gb" => Some(1 << 30),
        other => {
            let power: u32 = other.strip_prefix("byte*2^")?.parse().ok()?;
            (power <= 40).then(|| 1 << power)
        }
    }
}

fn attribute<'a>(node: Node<'a, '_>, name: &str) -> Option<&'a str> {
    node.attributes().find(|a| a.name() == name).map(|a| a.value())
}

fn value(what: &'static str, said: &str, allowed: &'static str) -> Problem {
    Problem::Value { what, said: shown(said), allowed }
}

/// Words of a stranger, short and without control characters.
fn shown(text: &str) -> String {
    text.trim().chars().filter(|c| !c.is_control()).take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = r#"<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="r">
  <References><File ovf:id="file1" ovf:href="disk-1.vmdk" ovf:size="10"/></References>
  <DiskSection><Info>x</Info><Disk ovf:diskId="d1" ovf:capacity="2" ovf:capacityAllocationUnits="byte * 2^30" ovf:fileRef="file1"/></DiskSection>
  <VirtualSystem ovf:id="shop"><Info>x</Info>
    <ProductSection><Product>p</Product></ProductSection>
    <VirtualHardwareSection>
      <Item><rasd:ElementName>2 CPUs</rasd:ElementName><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>2</rasd:VirtualQuantity></Item>
      <Item><rasd:AllocationUnits>MegaBytes</rasd:AllocationUnits><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>512</rasd:VirtualQuantity></Item>
      <Item><rasd:ElementName>sound</rasd:ElementName><rasd:ResourceType>35</rasd:ResourceType></Item>
      <Item><rasd:ElementName>disk0</rasd:ElementName><rasd:HostResource>/disk/d1</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></Item>
    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>"#;

    fn with(from: &str, to: &str) -> Result<Described, Problem> {
        assert!(GOOD.contains(from), "{from}");
        read(&GOOD.replace(from, to))
    }

    #[test]
    fn memory_processors_and_disk_are_taken_and_the_rest_is_named() {
        let described = read(GOOD).unwrap();
        assert_eq!((described.memory_mib, described.cpus, described.capacity), (Some(512), Some(2), 2 << 30));
        assert_eq!((described.disk.as_str(), described.name.as_deref()), ("disk-1.vmdk", Some("shop")));
        assert_eq!(described.aside, ["sound (kind 35)", "ProductSection"]);
    }

    #[test]
    fn entities_cannot_exist() {
        let outer = with("<Envelope", "<!DOCTYPE x [<!ENTITY f SYSTEM \"file:///etc/shadow\">]><Envelope");
        assert!(matches!(outer, Err(Problem::Xml(_))), "{outer:?}");
        let laughs = with("<Envelope", "<!DOCTYPE x [<!ENTITY a \"aaaaaaaaaa\"><!ENTITY b \"&a;&a;&a;\">]><Envelope");
        assert!(matches!(laughs, Err(Problem::Xml(_))), "{laughs:?}");
        assert!(matches!(with("shop", "&f;"), Err(Problem::Xml(_))));
    }

    #[test]
    fn a_disk_outside_the_archive_compressed_or_beside_another_is_refused() {
        for href in ["../../etc/shadow", "/etc/shadow", "http://x/y", ""] {
            let refused = with("disk-1.vmdk", href);
            assert!(matches!(refused, Err(Problem::Value { what: "the disk file's href", .. })), "{refused:?}");
        }
        assert!(matches!(with("ovf:size", "ovf:compression=\"gzip\" ovf:size"), Err(Problem::Value { .. })));
        assert_eq!(with("<DiskSection>", "<DiskSection><Disk/>"), Err(Problem::Disks(2)));
        assert!(matches!(with("capacity=\"2\"", "capacity=\"18446744073709551615\""), Err(Problem::Value { .. })));
        assert!(matches!(with(">512<", ">1<"), Err(Problem::Value { what: "memory", .. })));
        assert_eq!(with("VirtualSystem", "VirtualThing"), Err(Problem::NoMachine));
    }

    #[test]
    fn a_text_that_is_deep_or_long_is_refused_before_it_is_parsed() {
        assert_eq!(read(&"<a>".repeat(40_000)), Err(Problem::Deep));
        assert_eq!(read(&" ".repeat(TEXT_MAX + 1)), Err(Problem::Long));
    }

    proptest! {
        #[test]
        fn arbitrary_text_is_read_or_refused(text: String, from in 0usize..1500, to in 0usize..1500) {
            let _ = read(&text);
            let cut = GOOD.get(..from).unwrap_or_default().to_owned() + &text + GOOD.get(to..).unwrap_or_default();
            if let Ok(described) = read(&cut) {
                prop_assert!((DISK_MIN..=DISK_MAX).contains(&described.capacity));
            }
        }
    }
}
