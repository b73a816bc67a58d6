//! The limit: what physics leaves, computed from terms measured in the same run.
//!
//! `r + 8(D+W)/B + T_load + T_guest`: a round trip for the order, the bytes that the guest cannot
//! run without, QEMU's load step, and the guest's own time until it answers.

use crate::world::Link;
use serde::{Deserialize, Serialize};
use vmatrix_model::Bytes;
use vmatrix_model::manifest::Manifest;

/// The measured terms of a limit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// The emulator's round trip as measured, milliseconds.
    pub r_ms: f64,
    /// Device state and the first table, bytes as sent.
    pub d_bytes: u64,
    /// The working set, bytes as sent.
    pub w_bytes: u64,
    /// Rate of the link, 10^6 bits a second.
    pub b_mbit: u32,
    /// QEMU's load step, milliseconds.
    pub t_load_ms: f64,
    /// From running to the first byte with everything local, milliseconds.
    pub t_guest_ms: f64,
}

impl Limit {
    /// Of an image over a link. `local_ms` is the first byte of a resume with everything local, which has the
    /// load step in it.
    pub fn of(manifest: &Manifest, link: Link, r_ms: f64, t_load_ms: f64, local_ms: f64) -> Limit {
        Limit {
            r_ms,
            d_bytes: (manifest.device.stored + manifest.memory.first.stored).0,
            w_bytes: manifest.memory.working_set.stored.0,
            b_mbit: link.mbit,
            t_load_ms,
            t_guest_ms: (local_ms - t_load_ms).max(0.0),
        }
    }

    /// The limit, milliseconds.
    pub fn ms(&self) -> f64 {
        self.r_ms + self.transfer_ms() + self.t_load_ms + self.t_guest_ms
    }

    /// `8(D+W)/B`, milliseconds.
    pub fn transfer_ms(&self) -> f64 {
        let bytes = Bytes(self.d_bytes + self.w_bytes);
        vmatrix_model::Mbit(self.b_mbit).time_for(bytes).as_secs_f64() * 1e3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_the_sum_of_its_terms() {
        let limit =
            Limit { r_ms: 20.0, d_bytes: 250_000, w_bytes: 1_000_000, b_mbit: 100, t_load_ms: 5.0, t_guest_ms: 130.0 };
        assert!((limit.transfer_ms() - 100.0).abs() < 0.01, "{limit:?}");
        assert!((limit.ms() - 255.0).abs() < 0.01, "{limit:?}");
    }
}
