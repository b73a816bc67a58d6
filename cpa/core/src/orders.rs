//! What an operator orders: read, checked, and turned into the shares it asks for.
//!
//! `at = { tokyo = 1 }` adds Tokyo; `at = { tokyo = 1, ashburn = 0 }` moves from Ashburn to Tokyo; a
//! network that is not named keeps what it has. An ordered service belongs to the operator for
//! [`HELD`]: no automatic round touches it, its clients are sent to the nearest network rather than to the
//! one the prices prefer, and then the rounds may move it again. The next order for it starts the time anew.

use crate::Refusal;
use crate::memory::Shares;
use vmatrix_model::Span;
use vmatrix_model::config::nearest;
use vmatrix_model::fleet::{Fleet, Kind, Service};
use vmatrix_model::placement::Share;
use vmatrix_model::wire::Order;

/// How long an order keeps the automatic rounds away: long enough for a person to see what it did and think again.
pub const HELD: Span = Span::secs(600);

/// Reads an order against the shares its service has or is on its way to.
///
/// # Errors
/// [`Refusal::Order`] if it names what does not exist, asks for more than the service may have, or leaves nothing running.
pub fn wanted<'a>(fleet: &'a Fleet, order: &Order, present: &Shares) -> Result<(&'a Service, Shares), Refusal> {
    let refuse = |problem: String, hint: String| Err(Refusal::Order { problem, hint });
    let Some(service) = fleet.service(&order.service) else {
        let names: Vec<&str> = fleet.services.iter().map(|s| s.name.as_str()).collect();
        return refuse(format!("there is no service {}", order.service), guess(order.service.as_str(), &names));
    };
    if order.at.is_empty() {
        return refuse(
            format!("the order for {} names no network", order.service),
            "say where and how many, as in --at tokyo=1".into(),
        );
    }
    let mut wanted = present.clone();
    for (network, instances) in &order.at {
        if fleet.network(network).is_none() {
            let names: Vec<&str> = fleet.networks.iter().map(|n| n.name.as_str()).collect();
            return refuse(format!("there is no network {network}"), guess(network.as_str(), &names));
        }
        if *instances > service.instances_max {
            return refuse(
                format!(
                    "{instances} instances of {} at {network} are more than its instances_max, {}",
                    service.name, service.instances_max
                ),
                "order fewer, or raise instances_max in the fleet file".into(),
            );
        }
        if service.kind == Kind::Singleton && *instances > 0 {
            // It is in one network: where it is to go, it leaves the one it is in.
            wanted.values_mut().for_each(|share| *share = Share::Dormant);
        }
        wanted.insert(network.clone(), if *instances == 0 { Share::Dormant } else { Share::Active(*instances) });
    }
    if wanted.values().all(|s| s.instances() == 0) {
        return refuse(
            format!("the order leaves no instance of {} running", service.name),
            "name the network that is to serve instead, as in --at tokyo=1 --at ashburn=0".into(),
        );
    }
    Ok((service, wanted))
}

/// The name that was probably meant, or all there are.
pub(crate) fn guess(word: &str, names: &[&str]) -> String {
    nearest(word, names.iter().copied())
        .map_or_else(|| format!("there are {}", names.join(", ")), |n| format!("did you mean {n}?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(service: &str, at: &[(&str, u32)]) -> Order {
        Order {
            service: service.to_owned().try_into().unwrap(),
            at: at.iter().map(|(n, i)| ((*n).to_owned().try_into().unwrap(), *i)).collect(),
            fair: None,
        }
    }

    #[test]
    fn an_order_says_what_is_wrong_and_what_was_meant() {
        let fleet = crate::cpa::testing::fleet();
        let present: Shares = [("ashburn".to_owned().try_into().unwrap(), Share::Active(1))].into();
        let says = |o| wanted(&fleet, &o, &present).unwrap_err().to_string();
        assert!(says(order("map", &[("tokyo", 1)])).contains("did you mean maps?"));
        assert!(says(order("maps", &[("tokio", 1)])).contains("did you mean tokyo?"));
        assert!(says(order("maps", &[("tokyo", 5)])).contains("instances_max, 1"));
        assert!(says(order("maps", &[("ashburn", 0)])).contains("no instance of maps running"));
        assert!(says(order("maps", &[])).contains("names no network"));
        let (_, moved) = wanted(&fleet, &order("maps", &[("tokyo", 1), ("ashburn", 0)]), &present).unwrap();
        assert_eq!(moved.values().filter(|s| s.instances() > 0).count(), 1);
    }
}
