//! Says which package is missing, for the linker would only name symbols.

/// `virDomainQemuMonitorCommandWithFiles` came with it.
const VERSION: &str = "8.2.0";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for library in ["libvirt", "libvirt-qemu"] {
        let found = pkg_config::Config::new().atleast_version(VERSION).cargo_metadata(false).probe(library);
        if let Err(why) = found {
            let short: String = why.to_string().lines().take(3).collect::<Vec<_>>().join(" ");
            println!(
                "cargo::error={library} {VERSION} or newer and pkg-config are needed to build the libvirt hypervisor; \
                 install them with `apt-get install -t bookworm-backports libvirt-dev pkg-config`, or build without \
                 the feature `libvirt` ({short})"
            );
        }
    }
}
