//! The VM as libvirt is told of it: QEMU's arguments ─▶ a domain's XML.
//!
//! The devices are not described to libvirt but passed through (`<qemu:commandline>`), in the words of the direct
//! start. Described, they would get PCI addresses and ids of libvirt's choosing, and no state saved by a direct QEMU
//! would load.
//!
//! What differs on the command line, none of it part of the saved state:
//! * libvirt's own: `-S`, a monitor, `-uuid`, `-rtc base=utc`, `-no-shutdown`, `-boot strict=on`, an audio back end
//!   without a device, `-global ICH9-LPC.noreboot=off -watchdog-action reset`, a master key, a stricter `-sandbox`;
//! * a second memory back end `pc.ram` of the guest's size, which no machine uses and nothing touches;
//! * `-machine` and `-cpu` come twice, and QEMU goes by the later word, which is ours;
//! * `-name guest=NAME`; no `-qmp`, for the monitor is libvirt's; no `-run-with user=`, for libvirt starts QEMU as the
//!   VM's own user, without a capability, from the first instruction on.
//!
//! What libvirt is kept from adding, because it would be in the state: a USB controller and a balloon.

use crate::error::{Error, Result};
use std::fmt::Write;
use vmatrix_model::manifest::MachineSpec;

/// One domain.
#[derive(Debug, Clone, Copy)]
pub struct Domain<'a> {
    pub name: &'a str,
    pub machine: &'a MachineSpec,
    /// The arguments of a direct start.
    pub arguments: &'a [String],
    pub environment: &'a [(String, String)],
    /// The tap that QEMU opens, in the namespace of libvirt's daemon.
    pub tap: &'a str,
    /// The program, with its folder.
    pub emulator: &'a str,
    /// The user and group that QEMU runs as.
    pub user: (u32, u32),
    /// Security models that would confine QEMU to files libvirt knows of; switched off for this domain.
    pub unconfined: &'a [String],
}

/// What QEMU may still do, whatever the daemon's configuration says: it changes no user, so it may not.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny";

/// The domain's XML.
///
/// # Errors
/// A word holds a control character.
pub fn xml(domain: &Domain<'_>) -> Result<String> {
    let through = translate(domain.arguments, domain.tap);
    write(domain, &through)
}

/// The XML of a VM as libvirt alone would keep one: memory of its own, no image under it. It is what `virsh save` and
/// `virsh restore` are measured with.
///
/// # Errors
/// A word holds a control character.
pub fn plain_xml(domain: &Domain<'_>) -> Result<String> {
    let mut through = Vec::new();
    let mut words = translate(domain.arguments, domain.tap).into_iter();
    while let Some(word) = words.next() {
        match (word.as_str(), words.as_slice().first().map(String::as_str)) {
            ("-object", Some(value)) if value.starts_with("memory-backend-file,") => drop(words.next()),
            ("-machine" | "-incoming", _) => drop(words.next()),
            _ => through.push(word),
        }
    }
    write(domain, &through)
}

/// The arguments that are passed through, in their order.
fn translate(arguments: &[String], tap: &str) -> Vec<String> {
    let mut through = Vec::new();
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            // Libvirt's to say.
            "-nodefaults" | "-no-user-config" => {}
            "-name" | "-accel" | "-smp" | "-m" | "-display" | "-qmp" | "-run-with" => drop(words.next()),
            "-machine" => {
                let properties = words.next().and_then(|value| value.split_once(',')).map(|(_, rest)| rest.to_owned());
                through.extend(properties.into_iter().flat_map(|rest| ["-machine".to_owned(), rest]));
            }
            "-netdev" => {
                through.push(word.clone());
                through.extend(words.next().map(|value| by_name(value, tap)));
            }
            "-sandbox" => {
                words.next();
                through.extend([word.clone(), SANDBOX.to_owned()]);
            }
            _ => through.push(word.clone()),
        }
    }
    through
}

/// A tap that was inherited, as one that QEMU opens.
fn by_name(netdev: &str, tap: &str) -> String {
    let kept = netdev.split(',').filter(|option| !option.starts_with("fd="));
    kept.chain([&*format!("ifname={tap}"), "script=no", "downscript=no"]).collect::<Vec<_>>().join(",")
}

fn write(domain: &Domain<'_>, through: &[String]) -> Result<String> {
    let m = domain.machine;
    let kind = if m.accelerator == "kvm" { "kvm" } else { "qemu" };
    let (uid, gid) = domain.user;
    let mut rest = String::new();
    // Relabelled, libvirt gives this user what it makes for it, the device for userfaultfds among it.
    let _ =
        writeln!(rest, "  <seclabel type='static' model='dac' relabel='yes'><label>+{uid}:+{gid}</label></seclabel>");
    for model in domain.unconfined {
        let _ = writeln!(rest, "  <seclabel type='none' model='{}'/>", escape(model)?);
    }
    rest.push_str("  <qemu:commandline>\n");
    for word in through {
        let _ = writeln!(rest, "    <qemu:arg value='{}'/>", escape(word)?);
    }
    for (name, value) in domain.environment {
        let _ = writeln!(rest, "    <qemu:env name='{}' value='{}'/>", escape(name)?, escape(value)?);
    }
    rest.push_str("  </qemu:commandline>\n");
    Ok(format!(
        "<domain type='{kind}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\n  \
           <name>{}</name>\n  \
           <memory unit='MiB'>{}</memory>\n  \
           <vcpu>{}</vcpu>\n  \
           <os><type arch='x86_64' machine='{}'>hvm</type></os>\n  \
           <features><acpi/><apic/></features>\n  \
           <clock offset='utc'/>\n  \
           <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>\n  \
           <devices>\n    \
             <emulator>{}</emulator>\n    \
             <controller type='usb' model='none'/>\n    \
             <memballoon model='none'/>\n  \
           </devices>\n{rest}</domain>\n",
        escape(domain.name)?,
        m.memory_mib,
        m.smp,
        escape(&m.machine_type)?,
        escape(domain.emulator)?,
    ))
}

/// A word as a value of XML 1.0, which has no way to write most control characters.
pub(crate) fn escape(word: &str) -> Result<String> {
    if word.chars().any(char::is_control) {
        return Err(Error::Unwritable(word.to_owned()));
    }
    let mut out = String::with_capacity(word.len());
    for c in word.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&apos;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    Ok(out)
}

/// What libvirt says of the machine it runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Daemon {
    /// The user and group its QEMU runs as.
    pub user: Option<(u32, u32)>,
    /// Security models that confine QEMU by files.
    pub confines: Vec<String>,
}

/// Reads `virConnectGetCapabilities`: `<secmodel><model>dac</model>…<baselabel type='kvm'>+64055:+64055</baselabel>`.
pub fn daemon(capabilities: &str) -> Daemon {
    let mut read = Daemon { user: None, confines: Vec::new() };
    for model in capabilities.split("<secmodel>").skip(1) {
        match between(model, "<model>", "</model>") {
            Some("dac") => read.user = between(model, "<baselabel type='kvm'>", "</baselabel>").and_then(ids),
            Some(name @ ("apparmor" | "selinux")) => read.confines.push(name.to_owned()),
            _ => {}
        }
    }
    read
}

fn between<'a>(text: &'a str, from: &str, to: &str) -> Option<&'a str> {
    text.split_once(from)?.1.split_once(to).map(|(found, _)| found)
}

/// `+64055:+109` ─▶ user and group.
fn ids(label: &str) -> Option<(u32, u32)> {
    let (user, group) = label.split_once(':')?;
    let id = |word: &str| word.strip_prefix('+')?.parse().ok();
    Some((id(user)?, id(group)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use vmatrix_vma_image::machine::{Files, NETDEV, Run, Start, devices, machine_arguments};

    fn machine() -> MachineSpec {
        MachineSpec {
            qemu_version: "10.0.2".to_owned(),
            machine_type: "pc-q35-10.0".to_owned(),
            cpu_model: "Nehalem".to_owned(),
            accelerator: "tcg".to_owned(),
            smp: 1,
            memory_mib: 128,
            devices: devices("52:54:00:12:34:56", &[vmatrix_model::manifest::PartKind::Disk]),
            netdev: NETDEV.to_owned(),
            append: "quiet x='<&>'".to_owned(),
        }
    }

    fn arguments(start: Start) -> Vec<String> {
        let run = Run {
            name: "one".to_owned(),
            qmp: "/run/q".into(),
            guest_agent: "/run/a,b".into(),
            tap_fd: 0,
            console: None,
            start,
        };
        machine_arguments(&machine(), &Files::within(Path::new("/i")), &run)
    }

    fn of(arguments: &[String], make: fn(&Domain<'_>) -> Result<String>) -> String {
        let environment = [("LD_PRELOAD".to_owned(), "/l.so".to_owned())];
        make(&Domain {
            name: "one",
            machine: &machine(),
            arguments,
            environment: &environment,
            tap: "vt1",
            emulator: "/usr/bin/qemu-system-x86_64",
            user: (7, 8),
            unconfined: &["apparmor".to_owned()],
        })
        .unwrap()
    }

    fn words(xml: &str) -> Vec<&str> {
        xml.lines().filter_map(|l| l.trim().strip_prefix("<qemu:arg value='")?.strip_suffix("'/>")).collect()
    }

    #[test]
    fn devices_go_through_as_the_direct_start_has_them() {
        let direct = arguments(Start::Clone);
        let pairs = |words: &[&str], flag: &str| -> Vec<String> {
            words.windows(2).filter(|w| w[0] == flag).map(|w| w[1].to_owned()).collect()
        };
        let xml = of(&direct, xml);
        let (through, direct) = (words(&xml), direct.iter().map(String::as_str).collect::<Vec<_>>());
        for flag in ["-device", "-object", "-drive", "-chardev", "-cpu", "-incoming", "-serial"] {
            assert_eq!(pairs(&through, flag), pairs(&direct, flag), "{flag}");
            assert!(!pairs(&through, flag).is_empty(), "{flag}");
        }
    }

    #[test]
    fn what_is_libvirts_to_say_is_not_said_twice() {
        let xml = of(&arguments(Start::Clone), xml);
        let through = words(&xml);
        for flag in ["-name", "-accel", "-smp", "-m", "-display", "-qmp", "-run-with", "-nodefaults"] {
            assert!(!through.contains(&flag), "{flag}");
        }
        for word in ["user=nobody", "none", "1", "128M"] {
            assert!(!through.contains(&word), "{word} lost its flag");
        }
        assert!(through.contains(&"memory-backend=ram0") && through.contains(&SANDBOX), "{through:?}");
        assert!(through.contains(&"tap,id=net0,ifname=vt1,script=no,downscript=no"), "{through:?}");
        assert!(xml.contains("<qemu:env name='LD_PRELOAD' value='/l.so'/>"));
        assert!(xml.contains("<seclabel type='none' model='apparmor'/>"));
        assert!(xml.contains("<label>+7:+8</label>"));
    }

    #[test]
    fn a_plain_domain_has_the_devices_and_its_own_memory() {
        let xml = of(&arguments(Start::Boot), plain_xml);
        let through = words(&xml);
        assert!(!xml.contains("memory-backend") && !through.contains(&"-incoming"), "{xml}");
        assert!(through.contains(&"/i/kernel") && through.iter().any(|w| w.starts_with("virtio-rng-pci")), "{xml}");
        assert!(through.iter().any(|w| w.starts_with("rng-random")), "{xml}");
    }

    #[test]
    fn no_word_ends_its_attribute() {
        let xml = of(&arguments(Start::Boot), xml);
        assert!(xml.contains("quiet x=&apos;&lt;&amp;&gt;&apos;"), "{xml}");
        assert!(matches!(escape("a\nb"), Err(Error::Unwritable(_))));
    }

    #[test]
    fn the_user_of_qemu_is_read_from_the_capabilities() {
        let said = "<host><secmodel><model>apparmor</model><doi>0</doi></secmodel>\
                    <secmodel><model>dac</model><doi>0</doi><baselabel type='kvm'>+64055:+109</baselabel>\
                    <baselabel type='qemu'>+1:+2</baselabel></secmodel></host>";
        let read = daemon(said);
        assert_eq!(read, Daemon { user: Some((64055, 109)), confines: vec!["apparmor".to_owned()] });
        let bare = daemon("<host><secmodel><model>none</model></secmodel></host>");
        assert_eq!(bare, Daemon { user: None, confines: vec![] });
        assert_eq!(ids("root:root"), None);
    }
}
