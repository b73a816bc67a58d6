//! Plays a scenario for real on one machine.
//!
//! ```text
//! scenario ─▶ namespaces + WAN + database + daemons + clients ─▶ recording
//! ```
//! The lab imports no agent: it starts the daemons as processes of the same binary, as a fleet would,
//! and may kill them.

pub mod clients;
pub mod cpa;
pub mod daemons;
pub mod dns;
pub mod exchange;
pub mod forward;
pub mod lab;
pub mod layout;
pub mod ledger;
pub mod leftovers;
mod logs;
pub mod namespace;
pub mod needs;
mod outcome;
pub mod place;
mod play;
pub mod probe;
pub mod scan;
mod stop;
pub mod wan;
pub mod watch;

pub use lab::{PlayOptions, Told};
pub use outcome::{ChecksFailed, LeftBehind, NotInTime};
pub use place::{LabState, down, status};
pub use play::{play, up};
