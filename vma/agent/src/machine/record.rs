//! What a machine writes down of each cell, so that it is found again: `state_dir/cells/<instance>/cell.json`.

use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use vmatrix_model::{InstanceId, Span};
use vmatrix_vma_core::cell::Link;
use vmatrix_vma_core::steps::CellSpec;

/// How far a cell has come, as last written; whether its processes live is looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    Building,
    Ready,
    Resuming,
    Healthy,
    Suspending,
    /// Its singleton went on to another machine.
    Handed,
}

/// A cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub spec: CellSpec,
    pub phase: Phase,
    /// Number of its /30.
    pub index: u32,
    pub link: Link,
    pub resumed_in: Option<Span>,
    /// The name of its QEMU, where that waited for it in another namespace.
    pub vm: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    spec: CellSpec,
    phase: Phase,
    index: u32,
    outer: std::net::Ipv4Addr,
    cell: std::net::Ipv4Addr,
    resumed_in: Option<Span>,
    #[serde(default)]
    vm: Option<String>,
}

/// The instance that a folder is named after.
fn named(folder: &str) -> Option<InstanceId> {
    let (service, number) = folder.rsplit_once('-')?;
    Some(InstanceId { service: service.parse().ok()?, number: number.parse().ok()? })
}

/// All cells of a machine.
#[derive(Debug)]
pub struct Records {
    dir: PathBuf,
    cells: Mutex<BTreeMap<InstanceId, Record>>,
    /// Cells whose record could not be read: something may run in them.
    strays: Vec<InstanceId>,
}

impl Records {
    /// Reads what an earlier run wrote. A cell whose record cannot be read is a stray, known by its folder's
    /// name: another version may have written it, and its VM may run.
    ///
    /// # Errors
    /// The folder cannot be made or read.
    pub fn open(dir: &Path) -> io::Result<Records> {
        std::fs::create_dir_all(dir)?;
        let (mut cells, mut strays) = (BTreeMap::new(), Vec::new());
        for entry in std::fs::read_dir(dir)? {
            let folder = entry?.path();
            match read(&folder) {
                Ok(record) => {
                    cells.insert(record.spec.instance.clone(), record);
                }
                Err(e) => {
                    tracing::warn!(folder = %folder.display(), error = format!("{e:#}"), "a cell's record cannot be read; taking it down");
                    match folder.file_name().and_then(|n| n.to_str()).and_then(named) {
                        Some(instance) => strays.push(instance),
                        None => std::fs::remove_dir_all(&folder)?,
                    }
                }
            }
        }
        Ok(Records { dir: dir.to_owned(), cells: Mutex::new(cells), strays })
    }

    /// Cells whose record could not be read.
    pub fn strays(&self) -> &[InstanceId] {
        &self.strays
    }

    /// A cell's folder.
    pub fn folder(&self, instance: &InstanceId) -> PathBuf {
        self.dir.join(instance.to_string())
    }

    pub fn get(&self, instance: &InstanceId) -> Option<Record> {
        self.lock().get(instance).cloned()
    }

    pub fn all(&self) -> Vec<Record> {
        self.lock().values().cloned().collect()
    }

    /// Begins a cell: gives it the lowest free /30, so that two never get the same. `vm`: the name of a QEMU that
    /// waited for it.
    ///
    /// # Errors
    /// There is none free, or the record cannot be written.
    pub fn begin(&self, spec: &CellSpec, cells: ipnet::Ipv4Net, vm: Option<String>) -> anyhow::Result<Record> {
        let mut known = self.lock();
        let free = (0..)
            .find(|i| !known.values().any(|r| r.index == *i && r.spec.instance != spec.instance))
            .unwrap_or(u32::MAX);
        let index = known.get(&spec.instance).map_or(free, |r| r.index);
        let link = vmatrix_vma_core::cell::link(cells, index)
            .with_context(|| format!("every address of cells = {cells} is taken; give the machine a larger prefix"))?;
        let record = Record { spec: spec.clone(), phase: Phase::Building, index, link, resumed_in: None, vm };
        self.write(&record)?;
        known.insert(spec.instance.clone(), record.clone());
        Ok(record)
    }

    /// Notes how far a cell has come.
    ///
    /// # Errors
    /// The record cannot be written.
    pub fn note(&self, instance: &InstanceId, phase: Phase, resumed_in: Option<Span>) -> anyhow::Result<()> {
        let mut known = self.lock();
        let record = known.get_mut(instance).with_context(|| format!("there is no cell {instance}"))?;
        let noted = Record { phase, resumed_in, ..record.clone() };
        self.write(&noted)?;
        *record = noted;
        Ok(())
    }

    /// Notes that a cell is for another spec, which it need not be built anew for.
    ///
    /// # Errors
    /// The record cannot be written.
    pub fn respec(&self, spec: &CellSpec) -> anyhow::Result<()> {
        let mut known = self.lock();
        let record = known.get_mut(&spec.instance).with_context(|| format!("there is no cell {}", spec.instance))?;
        let noted = Record { spec: spec.clone(), ..record.clone() };
        self.write(&noted)?;
        *record = noted;
        Ok(())
    }

    /// Forgets a cell and removes its folder.
    ///
    /// # Errors
    /// The folder cannot be removed.
    pub fn forget(&self, instance: &InstanceId) -> anyhow::Result<()> {
        let folder = self.folder(instance);
        match std::fs::remove_dir_all(&folder) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("cannot remove {}", folder.display()));
            }
            _ => {}
        }
        self.lock().remove(instance);
        Ok(())
    }

    fn write(&self, r: &Record) -> anyhow::Result<()> {
        let folder = self.folder(&r.spec.instance);
        let written = Written {
            spec: r.spec.clone(),
            phase: r.phase,
            index: r.index,
            outer: r.link.outer,
            cell: r.link.cell,
            resumed_in: r.resumed_in,
            vm: r.vm.clone(),
        };
        let text = serde_json::to_vec_pretty(&written)?;
        std::fs::create_dir_all(&folder)
            .and_then(|()| crate::replace(&folder.join("cell.json"), &text))
            .with_context(|| format!("cannot write the record of cell {}", r.spec.instance))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<InstanceId, Record>> {
        self.cells.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(folder: &Path) -> anyhow::Result<Record> {
    let w: Written = serde_json::from_slice(&std::fs::read(folder.join("cell.json"))?)?;
    Ok(Record {
        spec: w.spec,
        phase: w.phase,
        index: w.index,
        link: Link { outer: w.outer, cell: w.cell },
        resumed_in: w.resumed_in,
        vm: w.vm,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(number: u32) -> CellSpec {
        CellSpec {
            instance: InstanceId { service: "maps".parse().unwrap(), number },
            image: "maps".into(),
            ports: vec![80],
            backends: vec![],
            memory_mib: 512,
            singleton: None,
        }
    }

    #[test]
    fn cells_are_found_again_with_their_addresses() {
        let dir = tempfile::tempdir().unwrap();
        let cells = "100.64.0.0/29".parse().unwrap();
        let before = Records::open(dir.path()).unwrap();
        let a = before.begin(&spec(0), cells, None).unwrap();
        let b = before.begin(&spec(1), cells, None).unwrap();
        assert_ne!(a.link, b.link);
        assert!(before.begin(&spec(2), cells, None).unwrap_err().to_string().contains("every address"));
        before.note(&spec(1).instance, Phase::Healthy, Some(Span::ms(900))).unwrap();
        let after = Records::open(dir.path()).unwrap();
        assert_eq!(after.all(), before.all());
        after.forget(&spec(0).instance).unwrap();
        assert_eq!(after.begin(&spec(2), cells, None).unwrap().link, a.link);
    }
}
