//! The database of a build: what the guest finds where its origin's will be.

use super::tools;
use crate::postgres::Server;
use crate::recipe::BackendRecipe;
use crate::workshop::{Cell, Scratch};
use std::net::Ipv4Addr;
use std::path::Path;
use vmatrix_vma_image::error::Result;
use vmatrix_vma_image::netns;

/// The back end a guest is warmed against.
#[derive(Debug)]
pub(crate) struct Backend {
    // In this order: the server stops before its folder goes.
    pub(crate) server: Server,
    _dir: Scratch,
}

impl Backend {
    /// A server in the cell; `seed` is what it holds.
    pub(crate) fn of(address: Ipv4Addr, port: u16, seed: Option<&str>, cell: &Cell) -> Result<Backend> {
        let dir = Scratch::new(cell.folder())?;
        Ok(Backend { server: Server::start(Some(&cell.path()), dir.path(), address, port, seed)?, _dir: dir })
    }

    /// As the recipe has it: the schema's lines run inside `root`.
    pub(crate) fn start(b: &BackendRecipe, root: &Path, cell: &Cell) -> Result<Backend> {
        let backend = Backend::of(b.address, b.port, None, cell)?;
        let server = &backend.server;
        server.trust_own_address(b.address)?;
        for line in &b.schema {
            let mut command = tools::inside(root, line);
            command.env("PGHOST", b.address.to_string()).env("PGPORT", b.port.to_string()).env("PGUSER", "postgres");
            netns::enter(&cell.path(), || tools::run(&format!("schema line {line:?}"), &mut command))??;
        }
        if !b.sql.is_empty() {
            server.sql(&b.database, &b.sql)?;
        }
        let password = b.password.replace('\'', "''");
        server.sql("postgres", &format!("ALTER ROLE {} LOGIN PASSWORD '{password}'", b.user))?;
        Ok(backend)
    }
}
