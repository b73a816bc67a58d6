//! What the VM agent asks of machines and edge, and what it hears from them.

use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;
use vmatrix_model::assignment::{Assignment, Singleton};
use vmatrix_model::edge_config::{EdgeConfig, EdgeSeen};
use vmatrix_model::inventory::{ImageSeen, Inventory, MachineSeen};
use vmatrix_model::{Generation, InstanceId, MachineId, ServiceId, Span};

/// What the core hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The network's share of a placement.
    Assignment(Assignment),
    /// A machine subscribed, or renewed its lease.
    Subscribed(MachineSeen),
    /// What a machine has, whole.
    Seen(Seen),
    /// What the edge has installed.
    EdgeSeen(EdgeSeen),
    /// Someone tried to open a connection to a cell of a silent machine.
    Knocked { machine: MachineId, instance: InstanceId, answered: bool },
    /// A step ended; what it changed is in the next [`Event::Seen`].
    StepDone { machine: MachineId, step: Step, result: Result<(), Fault> },
    /// Time passed.
    Tick,
}

/// What the core asks of the world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// To a machine.
    Step { machine: MachineId, step: Step },
    /// To the edge: its whole wanted state.
    Edge(EdgeConfig),
    /// To the CPA: what is seen, whole.
    Report(Inventory),
    /// The answer to an assignment older than the one in force.
    Refused { asked: Generation, in_force: Generation },
}

/// One thing a machine is asked to do. Each may be asked again: what is done already is left as it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case", deny_unknown_fields)]
pub enum Step {
    /// Fetch the image, what a guest needs first first; done when begun, for it may take minutes: progress is seen.
    /// `urgent`: a guest waits for it. Otherwise machines that fetch it at the same time give it to each other.
    Stage {
        service: ServiceId,
        image: String,
        #[serde(default)]
        urgent: bool,
    },
    /// Remove a staged image.
    DropImage { image: String },
    /// Build the cell: namespace, bridge, rules and, where there are back ends, tunnel.
    Prepare(CellSpec),
    /// Resume the VM in its cell as soon as what it needs first is here, reseed it, step its clock, wait until it
    /// is healthy, let traffic in. The rest of its image comes while it runs.
    Resume { instance: InstanceId },
    /// Let no traffic in and put the VM back to sleep; a replica's writes are thrown away.
    Suspend { instance: InstanceId },
    /// Take the cell down.
    Release { instance: InstanceId },
}

impl Step {
    /// The instance a step is about, if it is about one.
    pub fn instance(&self) -> Option<&InstanceId> {
        match self {
            Step::Prepare(cell) => Some(&cell.instance),
            Step::Resume { instance } | Step::Suspend { instance } | Step::Release { instance } => Some(instance),
            Step::Stage { .. } | Step::DropImage { .. } => None,
        }
    }

    /// The verb, for logs.
    pub fn verb(&self) -> &'static str {
        match self {
            Step::Stage { .. } => "stage",
            Step::DropImage { .. } => "drop",
            Step::Prepare(_) => "prepare",
            Step::Resume { .. } => "resume",
            Step::Suspend { .. } => "suspend",
            Step::Release { .. } => "release",
        }
    }
}

/// What a cell is built for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CellSpec {
    pub instance: InstanceId,
    /// Name of the image.
    pub image: String,
    /// TCP ports let in.
    pub ports: Vec<u16>,
    /// All that the guest may reach, through the tunnel.
    pub backends: Vec<BackendAddress>,
    pub memory_mib: u64,
    /// Where a singleton's state comes from, unless this machine holds it; see [`crate::tenure`]. None: a replica,
    /// whose writes are thrown away.
    #[serde(default)]
    pub singleton: Option<Singleton>,
}

/// A back end's address in the origin's intranet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackendAddress {
    pub address: Ipv4Addr,
    pub port: u16,
}

/// Why a step was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{problem}")]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// What went wrong, and where.
    pub problem: String,
    /// What to do next.
    #[serde(default)]
    pub hint: String,
    /// Whether the same machine will refuse again until someone changes something: an image of
    /// another QEMU, a signature nobody trusts.
    #[serde(default)]
    pub lasting: bool,
}

/// What a machine has, whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seen {
    pub machine: MachineId,
    /// Names the run of the machine's daemon.
    pub run: u64,
    /// Rises with each look of one run; a look that was overtaken by a later one is not believed.
    pub sequence: u64,
    /// In order of instance.
    pub cells: Vec<CellSeen>,
    /// In order of name.
    pub images: Vec<StagedSeen>,
}

/// A cell on a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CellSeen {
    pub instance: InstanceId,
    /// Where the edge reaches it.
    pub address: Ipv4Addr,
    pub life: Life,
    pub memory_mib: u64,
    /// From the resume step to healthy, once it is.
    #[serde(default)]
    pub resumed_in: Option<Span>,
    #[serde(default)]
    pub trouble: Option<String>,
    /// Epoch of the singleton, where this machine holds it.
    #[serde(default)]
    pub holds: Option<u64>,
}

/// ```text
///            ┌────────── suspend ───────────┐
///            ▼                              │
/// Building ─▶ Ready ─▶ Resuming ─▶ Healthy ─┤
///                                     │     │
///                                     ├▶ Sick   runs and does not answer
///                                     └▶ Lost   QEMU is gone
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Life {
    /// Its cell is not whole.
    Building,
    /// The cell is whole; no VM runs in it.
    Ready,
    /// A VM runs and has not been healthy yet.
    Resuming,
    /// The VM answers its health check.
    Healthy,
    /// The VM runs and has stopped answering.
    Sick,
    /// The VM was resumed, and its process is gone or going.
    Lost,
    /// The singleton went on to another machine; what still comes here for it is relayed there.
    Handed,
}

/// An image on a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StagedSeen {
    /// Name of the image.
    pub image: String,
    /// None until its manifest is here and trusted.
    pub seen: Option<ImageSeen>,
    /// Whether it is being fetched now.
    pub fetching: bool,
    /// Why nothing of it comes; None as soon as something does.
    #[serde(default)]
    pub trouble: Option<Fault>,
}

/// A machine's answer to a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outcome {
    /// None if it was done.
    pub fault: Option<Fault>,
    /// What the machine has now: the look after the step, without another question.
    pub seen: Seen,
}
