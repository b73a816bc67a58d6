//! The fleet's authority and its agents' identities.

use crate::args::Identity;
use anyhow::{Context, Result};
use std::process::ExitCode;
use vmatrix_vma_transfer::identity::Authority;

pub fn run(identity: &Identity) -> Result<ExitCode> {
    match identity {
        Identity::Authority { dir } => {
            Authority::create(dir)?;
            println!("{}: authority made; keep it off machines that are reached from outside", dir.display());
        }
        Identity::Issue { authority, role, id, to } => {
            let role = role.parse().with_context(|| format!("role {role:?}"))?;
            Authority::open(authority)?.issue(role, id)?.write(to)?;
            println!("{}: identity of {id} written", to.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}
