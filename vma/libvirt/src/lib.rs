//! What runs virtual machines: QEMU started directly, or by libvirt, behind one small interface.
//!
//! ```text
//!            ┌ Qemu ─────▶ qemu-system (child)     ─ QMP ─┐
//! Spawn ─▶ Hypervisor                                     ├─▶ waiting ─load_state─▶ loaded ─cont─▶ runs ─save_state─▶ device
//!            └ Libvirt ─▶ libvirtd ─▶ qemu-system  ─ monitor ┘
//! ```
//! Both give QEMU the same devices in the same words, so an image saved by either is resumed by the other;
//! the tests show it. What libvirt adds to the command line, and what it is not let add, is in [`domain`].
//!
//! # What libvirt needs on a machine
//! * Packages `libvirt-daemon` and `libvirt-daemon-driver-qemu` 8.2 or newer; to build, `libvirt-dev` and `pkg-config`.
//! * One addition to `/etc/libvirt/qemu.conf`, for QEMU opens its tap itself: [`daemon::QEMU_CONF`]. All else may be as
//!   Debian has it; `dynamic_ownership = 0` would keep the pager's library from opening `/dev/userfaultfd`.
//! * The daemon in the network namespace of the caller, who is root. Cells are other namespaces; their taps are moved
//!   there ([`Tap`]).
//! * Files of VMs in folders that others may search (`chmod o+x`): each VM runs as a user of its own, in the group of
//!   libvirt's QEMU. What VMs read together is given to that group, what one writes to its user.
//!
//! A started domain is "tainted" in libvirt's words: it has arguments that libvirt did not write.

pub mod daemon;
pub mod domain;
pub mod error;
mod grant;
pub mod hypervisor;
mod libvirt;
mod monitor;
pub mod plain;
mod process;
mod qemu;
mod tap;

pub use error::{Error, Result};
pub use hypervisor::{Hypervisor, Parts, Spawn, Tap, Vm};
pub use libvirt::Libvirt;
pub use qemu::Qemu;
