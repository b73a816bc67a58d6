//! Knocks where nobody may open: undeclared ports from the WAN, a neighbour's cell from inside a cell.
//!
//! ```text
//! region ─▶ VIPs and gateways, undeclared ports ─▶ must not answer
//! cell A ─▶ cell B's addresses, and B's ports at the private address both have ─▶ must not answer
//! ```

use crate::layout::{EDGE_PORT, MACHINE_PORT, ORIGIN_PORT, Place, VMA_PORT};
use crate::namespace::Namespace;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::process::Command;
use std::time::Duration;
use vmatrix_model::ServiceId;
use vmatrix_model::fleet::{Fleet, host};
use vmatrix_model::wire::Snapshot;

/// Three times the longest round trip: who has not answered then has dropped it.
const KNOCK: Duration = Duration::from_millis(1500);
/// Ports people leave open: remote shells, web servers, databases, and our own daemons'.
const USUAL: [u16; 9] = [22, 80, 443, 5432, 8080, VMA_PORT, EDGE_PORT, ORIGIN_PORT, MACHINE_PORT];
/// What every guest believes its own address to be (paper §4.1).
const PRIVATE: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 10);

/// What was tried, and what answered although it must not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Knocked {
    /// Doors knocked at.
    pub tried: usize,
    /// One sentence for each that opened.
    pub answered: Vec<String>,
}

/// Knocks from a client region at every VIP and gateway of the networks.
///
/// # Errors
/// The region's namespace cannot be entered.
pub fn from_region(fleet: &Fleet, region: &Namespace) -> anyhow::Result<Knocked> {
    let mut doors = BTreeSet::new();
    for network in &fleet.networks {
        // The agents' own ports are among them: they answer the CPA's address and their own network only.
        doors.extend(USUAL.map(|port| SocketAddrV4::new(host(network.prefix, 1), port)));
        for service in &fleet.services {
            let Some(vip) = fleet.vip(&service.name, &network.name) else { continue };
            doors.extend(USUAL.iter().filter(|p| !service.ports.contains(p)).map(|port| SocketAddrV4::new(vip, *port)));
        }
    }
    knock("a client region", region, doors)
}

/// Knocks from every running cell at every other cell of the same machine; `listening` says on which ports
/// each service's guest does listen.
///
/// # Errors
/// A cell's namespace cannot be entered.
pub fn from_cells(
    place: &Place,
    snapshot: &Snapshot,
    listening: &BTreeMap<ServiceId, BTreeSet<u16>>,
) -> anyhow::Result<Knocked> {
    let mut all = Knocked::default();
    for (network, inventory) in &snapshot.inventory {
        let cells: Vec<_> = inventory
            .instances
            .iter()
            .map(|i| (i, Namespace::named(&place.namespace(&format!("{network}-{}-{}", i.machine, i.id)))))
            .filter(|(_, n)| n.path().exists())
            .collect();
        let ports = |s| listening.get(s).cloned().unwrap_or_default();
        for (from, cell) in &cells {
            for (to, neighbour) in cells.iter().filter(|(to, _)| to.id != from.id && to.machine == from.machine) {
                let (own, theirs) = (ports(&from.id.service), ports(&to.id.service));
                let known: BTreeSet<u16> = theirs.iter().copied().chain(USUAL).collect();
                let underlay =
                    addresses(neighbour).into_iter().flat_map(|a| known.iter().map(move |p| SocketAddrV4::new(a, *p)));
                // Both have this address: whoever answers on a port that only the neighbour listens on is the neighbour.
                let private = theirs.difference(&own).map(|p| SocketAddrV4::new(PRIVATE, *p));
                let heard = knock(&format!("cell {} at {network}", from.id), cell, underlay.chain(private).collect())?;
                all.tried += heard.tried;
                all.answered.extend(heard.answered);
            }
        }
    }
    Ok(all)
}

/// The addresses of a cell that are not the same in every cell.
fn addresses(cell: &Namespace) -> Vec<Ipv4Addr> {
    let listed = Command::new("ip")
        .args(["-n", cell.name(), "-json", "-4", "addr"])
        .output()
        .map(|o| o.stdout)
        .unwrap_or_default();
    let links: serde_json::Value = serde_json::from_slice(&listed).unwrap_or_default();
    let all = links.as_array().into_iter().flatten().filter_map(|l| l["addr_info"].as_array()).flatten();
    let texts = all.filter_map(|a| a["local"].as_str()?.parse().ok());
    texts.filter(|a: &Ipv4Addr| !a.is_loopback() && a.octets()[..3] != PRIVATE.octets()[..3]).collect()
}

fn knock(whence: &str, inside: &Namespace, doors: BTreeSet<SocketAddrV4>) -> anyhow::Result<Knocked> {
    let tried = doors.len();
    let opened = inside.run(|| -> anyhow::Result<Vec<SocketAddrV4>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(async {
            let mut knocks = tokio::task::JoinSet::new();
            for door in doors {
                knocks.spawn(async move {
                    let answer = tokio::time::timeout(
                        KNOCK,
                        tokio::net::TcpStream::connect((IpAddr::from(*door.ip()), door.port())),
                    )
                    .await;
                    matches!(answer, Ok(Ok(_))).then_some(door)
                });
            }
            knocks.join_all().await.into_iter().flatten().collect()
        }))
    })??;
    Ok(Knocked { tried, answered: opened.iter().map(|door| format!("{door} answered {whence}")).collect() })
}
