//! Says what is wrong with a placement, whoever made it: the rounds, an operator, or a file.
//!
//! Apart from the code that makes placements, so that a mistake there is found here.

use std::collections::BTreeMap;
use vmatrix_model::fleet::Fleet;
use vmatrix_model::placement::Placement;
use vmatrix_model::{NetworkId, ServiceId};

/// A rule that a placement breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("service {0} would run nowhere: keep at least one instance")]
    Nowhere(ServiceId),
    #[error("service {service} is placed at {network}, which is not a network of the fleet")]
    NoNetwork { service: ServiceId, network: NetworkId },
    #[error("{0} is placed and is not a service of the fleet")]
    NoService(ServiceId),
    #[error("service {service} would have {instances} instances at {network}; its instances_max is {max}")]
    TooMany { service: ServiceId, network: NetworkId, instances: u32, max: u32 },
    #[error("{network} would need {needed_mib} MiB of memory and its machines lend {have_mib} MiB")]
    Memory { network: NetworkId, needed_mib: u64, have_mib: u64 },
}

/// Every rule the placement breaks, in order of name; empty means it may be put in force.
pub fn lint(fleet: &Fleet, placement: &Placement) -> Vec<Fault> {
    let mut faults = vec![];
    let mut memory: BTreeMap<&NetworkId, u64> = BTreeMap::new();
    for (name, shares) in &placement.services {
        let Some(service) = fleet.service(name) else {
            faults.push(Fault::NoService(name.clone()));
            continue;
        };
        if shares.values().all(|s| s.instances() == 0) {
            faults.push(Fault::Nowhere(name.clone()));
        }
        for (network, share) in shares {
            if fleet.network(network).is_none() {
                faults.push(Fault::NoNetwork { service: name.clone(), network: network.clone() });
                continue;
            }
            let instances = share.instances();
            if instances > service.instances_max {
                faults.push(Fault::TooMany {
                    service: name.clone(),
                    network: network.clone(),
                    instances,
                    max: service.instances_max,
                });
            }
            *memory.entry(network).or_default() += u64::from(instances).saturating_mul(service.memory_mib);
        }
    }
    for (network, needed_mib) in memory {
        let have_mib = fleet.network(network).map_or(0, |n| u64::from(n.machines) * n.machine_memory_mib);
        if needed_mib > have_mib {
            faults.push(Fault::Memory { network: network.clone(), needed_mib, have_mib });
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmatrix_model::placement::Share;

    fn placement(at: &[(&str, &str, Share)]) -> Placement {
        let mut p = Placement::default();
        for (service, network, share) in at {
            let shares = p.services.entry((*service).to_owned().try_into().unwrap()).or_default();
            shares.insert((*network).to_owned().try_into().unwrap(), *share);
        }
        p
    }

    #[test]
    fn a_placement_that_cannot_be_is_named_rule_by_rule() {
        let fleet = crate::cpa::testing::fleet();
        assert_eq!(lint(&fleet, &placement(&[("maps", "tokyo", Share::Active(1))])), []);
        let words = |p: &Placement| lint(&fleet, p).iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        assert!(words(&placement(&[("maps", "tokyo", Share::Dormant)])).contains("run nowhere"));
        assert!(words(&placement(&[("maps", "mars", Share::Active(1))])).contains("not a network"));
        assert!(words(&placement(&[("maps", "tokyo", Share::Active(2))])).contains("instances_max is 1"));
        assert!(words(&placement(&[("mops", "tokyo", Share::Active(1))])).contains("not a service"));
        assert!(words(&placement(&[("maps", "tokyo", Share::Active(9))])).contains("4608 MiB"));
    }
}
