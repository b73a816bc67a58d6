//! What a guest with cloud-init is told at its first boot: its name, its address, and to take our guest agent.
//!
//! ```text
//! name, address, gateway, agent's program ─▶ a disk labelled cidata (NoCloud):
//!     meta-data, network-config, vendor-data (installs the agent), user-data (the owner's), the agent
//! ```
//! The agent comes by vendor-data, so that the owner's user-data is the owner's alone.

use crate::error::{Error, Result, io};
use crate::iso;
use std::fs::{self, File};
use std::path::Path;
use vmatrix_model::manifest::GuestSpec;
use vmatrix_vma_image::machine::SEED_SIZE;

/// The label that cloud-init looks for.
const LABEL: &str = "cidata";
/// The agent's name there and in the guest.
const AGENT: &str = "vmatrix-vma-guest";
/// Longest user-data: clouds allow 16 KiB.
const USER_DATA_MAX: usize = 64 << 10;
/// Largest agent: with everything for debugging in it, it has 5 MiB.
const AGENT_MAX: u64 = 60 << 20;

/// Installs the agent in cloud-init's first stage, and has it started when the last one, with all the owner's
/// user-data asks for, is over: a guest whose agent answers is not in the middle of its first boot. Without the default
/// dependencies, for cloud-init's last stage comes after the target that wants the agent. It needs no network, for
/// what it needs is on the disk.
const VENDOR_DATA: &str = r#"#cloud-boothook
#!/bin/sh
# Takes fresh random bytes and the time when this machine wakes from its sleep.
set -e
[ -e /dev/disk/by-label/cidata ] || exit 0
[ ! -e /usr/local/sbin/vmatrix-vma-guest ] || exit 0
seed=/run/vmatrix-seed
agent=/usr/local/sbin/vmatrix-vma-guest
mkdir -p $seed /usr/local/sbin
mount -o ro -t iso9660 /dev/disk/by-label/cidata $seed
cp $seed/vmatrix-vma-guest $agent
umount $seed
rmdir $seed
chmod 755 $agent
$agent --version
if [ -d /run/systemd/system ]; then
    cat > /etc/systemd/system/vmatrix-guest.service <<'END'
[Unit]
Description=vMatrix guest agent
DefaultDependencies=no
After=cloud-final.service
[Service]
ExecStart=/usr/local/sbin/vmatrix-vma-guest
Restart=always
RestartSec=1
[Install]
WantedBy=multi-user.target
END
    systemctl daemon-reload
    systemctl enable vmatrix-guest.service
    systemctl start --no-block vmatrix-guest.service
else
    (setsid $agent < /dev/null > /dev/null 2>&1 &)
fi
"#;

/// Writes the disk.
///
/// # Errors
/// `user_data` is too long, or the agent's program cannot be read.
pub(crate) fn write(to: &Path, name: &str, guest: &GuestSpec, user_data: Option<&str>, agent: &Path) -> Result<()> {
    let user_data = user_data.unwrap_or("#cloud-config\n{}\n");
    if user_data.len() > USER_DATA_MAX {
        return Err(Error::BadOptions(format!("user-data has {} bytes, {USER_DATA_MAX} may be", user_data.len())));
    }
    let length = fs::metadata(agent).map_err(io("read the guest agent", agent))?.len();
    if length > AGENT_MAX {
        return Err(Error::BadOptions(format!(
            "the guest agent {} is no program of ours: {length} bytes",
            agent.display()
        )));
    }
    let agent = fs::read(agent).map_err(io("read the guest agent", agent))?;
    let (meta, network) = (meta_data(name), network_config(guest));
    let volume = iso::volume(
        LABEL,
        &[
            ("meta-data", meta.as_bytes()),
            ("user-data", user_data.as_bytes()),
            ("vendor-data", VENDOR_DATA.as_bytes()),
            ("network-config", network.as_bytes()),
            (AGENT, &agent),
        ],
    );
    fs::write(to, volume).map_err(io("write", to))?;
    File::options().write(true).open(to).and_then(|file| file.set_len(SEED_SIZE)).map_err(io("size", to))
}

fn meta_data(name: &str) -> String {
    format!("instance-id: vmatrix-{name}\nlocal-hostname: {name}\n")
}

/// By the interface's address, for its name differs from one release to the next.
fn network_config(guest: &GuestSpec) -> String {
    format!(
        "version: 2\nethernets:\n  nic0:\n    match: {{macaddress: \"{}\"}}\n    addresses: [{}/24]\n    \
         routes: [{{to: 0.0.0.0/0, via: {}}}]\n",
        guest.mac, guest.address, guest.gateway
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmatrix_model::manifest::Health;

    fn seed(user_data: Option<&str>, agent: &[u8]) -> Result<Vec<u8>> {
        let dir = tempfile::tempdir().unwrap();
        let (to, program) = (dir.path().join("seed"), dir.path().join("agent"));
        fs::write(&program, agent).unwrap();
        let guest = GuestSpec {
            address: [192, 168, 1, 10].into(),
            gateway: [192, 168, 1, 1].into(),
            mac: "52:54:00:12:34:56".to_owned(),
            ports: vec![80],
            health: Health { port: 80, path: "/".to_owned(), status: 200 },
            backends: vec![],
            reseeds: true,
        };
        write(&to, "shop", &guest, user_data, &program)?;
        Ok(fs::read(to).unwrap())
    }
    fn has(bytes: &[u8], text: &str) -> bool {
        bytes.windows(text.len()).any(|w| w == text.as_bytes())
    }

    #[test]
    fn a_guest_is_told_its_name_and_address_and_given_the_agent() {
        let bytes = seed(None, b"the agent's program").unwrap();
        for text in [
            "local-hostname: shop",
            "192.168.1.10/24",
            "via: 192.168.1.1",
            "52:54:00:12:34:56",
            "the agent's program",
            "cidata",
        ] {
            assert!(has(&bytes, text), "{text} is not there");
        }
        assert_eq!(bytes.len() as u64, SEED_SIZE, "what stands in its place later has another size");
    }

    #[test]
    fn the_owners_user_data_is_there_as_it_is_and_has_a_bound() {
        assert!(has(&seed(Some("#cloud-config\nmine: 1\n"), b"").unwrap(), "#cloud-config\nmine: 1\n"));
        let error = seed(Some(&"x".repeat(USER_DATA_MAX + 1)), b"").unwrap_err();
        assert!(error.to_string().contains("user-data has 65537 bytes"), "{error}");
    }
}
