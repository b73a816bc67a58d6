//! What a network was last seen to have.

use crate::{Bytes, Digest, Generation, InstanceId, MachineId, NetworkId, ServiceId, Span, Time};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// What one VM agent sees of its network, whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inventory {
    pub network: NetworkId,
    pub at: Time,
    /// The assignment it works towards; zero if it has none yet.
    pub generation: Generation,
    pub machines: Vec<MachineSeen>,
    pub images: BTreeMap<ServiceId, ImageSeen>,
    pub instances: Vec<InstanceSeen>,
    /// Singletons that a machine here holds.
    #[serde(default)]
    pub holds: BTreeMap<ServiceId, Holder>,
    /// Wishes that were not granted, with the reason.
    pub refused: BTreeMap<ServiceId, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSeen {
    pub id: MachineId,
    pub cpus: u32,
    pub memory_mib: u64,
    pub free_mib: u64,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    pub qemu_version: String,
    /// Where it gives other machines chunks, and singletons.
    #[serde(default)]
    pub transfer: Option<SocketAddr>,
}

/// Who holds a singleton.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Holder {
    pub machine: MachineId,
    /// Where it is asked for the singleton.
    pub transfer: SocketAddr,
    /// Rises each time it is handed on.
    pub epoch: u64,
}

/// How much of an image a network holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageSeen {
    /// Of the manifest.
    pub digest: Digest,
    /// Stored bytes that are here.
    pub present: Bytes,
    /// Stored bytes of the whole image.
    pub total: Bytes,
    /// Bytes fetched from elsewhere since the agent began.
    pub fetched: Bytes,
    /// Whether what a guest needs before it runs is here: the rest comes while it does.
    #[serde(default)]
    pub resumable: bool,
}

impl ImageSeen {
    /// Whether all of it is here: an instance then needs nobody else.
    pub fn complete(&self) -> bool {
        self.present >= self.total
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceSeen {
    pub id: InstanceId,
    pub machine: MachineId,
    pub state: InstanceState,
    /// Since when it is in that state.
    pub since: Time,
    /// From the order to healthy, once it is.
    #[serde(default)]
    pub resumed_in: Option<Span>,
    /// What went wrong last, if anything.
    #[serde(default)]
    pub trouble: Option<String>,
}

/// ```text
/// Preparing ─▶ Resuming ─▶ Healthy ─▶ Serving ─▶ Draining ─▶ Suspending ─▶ (dormant: not listed)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InstanceState {
    /// Its cell is being built.
    Preparing,
    /// Its VM is being resumed, reseeded and checked.
    Resuming,
    /// It answers its health check and is not yet in rotation.
    Healthy,
    /// It answers and is in rotation.
    Serving,
    /// Out of rotation, connections still open.
    Draining,
    /// Its VM is being put back to sleep and its cell taken down.
    Suspending,
}
