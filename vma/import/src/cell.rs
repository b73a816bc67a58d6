//! The throw-away network of an import.
//!
//! cell, guest ─▶ a namespace with the guest's gateway, and DHCP for a guest that asks

use crate::error::Result;
use crate::lease::Lease;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use vmatrix_model::manifest::GuestSpec;
use vmatrix_vma_build::workshop;

/// A namespace that goes when this does.
#[derive(Debug)]
pub(crate) struct Cell {
    // In this order: its socket would keep the namespace alive.
    _lease: Lease,
    cell: workshop::Cell,
}

impl Cell {
    /// Makes it, and removes what an import that was killed left.
    pub(crate) fn new(guest: &GuestSpec) -> Result<Cell> {
        let cell = workshop::Cell::new(guest.gateway, None)?;
        Ok(Cell { _lease: Lease::serve(&cell.path(), workshop::Cell::BRIDGE, guest)?, cell })
    }

    /// Where the namespace is.
    pub(crate) fn path(&self) -> PathBuf {
        self.cell.path()
    }

    /// A tap on the bridge.
    pub(crate) fn tap(&self) -> Result<OwnedFd> {
        Ok(self.cell.tap()?)
    }
}
