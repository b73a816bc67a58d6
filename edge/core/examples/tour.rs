//! One edge in thirty lines: what the filter changes, and who is sent where.
//!
//! `cargo run -p vmatrix-edge-core --example tour`

use std::net::Ipv4Addr;
use vmatrix_edge_core::nat::{Rules, Table as Filter, plan, wanted};
use vmatrix_edge_core::steering::Table;
use vmatrix_model::Generation;
use vmatrix_model::edge_config::{EdgeConfig, EdgeService, Slot};
use vmatrix_model::steering::{Answers, Steering};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let service = EdgeService {
        vip: Ipv4Addr::new(198, 19, 1, 100),
        ports: vec![80],
        slots: vec![Slot { cell: Ipv4Addr::new(100, 64, 0, 2), weight: 1 }],
        draining: vec![],
        forward_to: None,
    };
    let services = [("maps".parse()?, service)].into();
    let config = EdgeConfig { generation: Generation(1), network: "lyon".parse()?, services };
    let table = wanted(&config, Rules { uplink: "wan0".into(), ..Rules::default() }).map_err(|p| p.problem)?;
    println!("{}", plan(&Filter::default(), &table));

    let by_clients = [("10.0.0.0/8".parse()?, vec![Ipv4Addr::new(198, 19, 1, 100)])].into();
    let answers = Answers { by_clients, otherwise: vec![Ipv4Addr::new(198, 19, 2, 100)] };
    let services = [("maps".parse()?, answers)].into();
    let steering = Steering { generation: Generation(1), zone: "vmatrix.test".into(), ttl_s: 5, services };
    for client in ["10.1.2.3", "192.0.2.1"] {
        println!("{client} gets {:?}", Table::new(&steering).choose("maps", client.parse()?));
    }
    Ok(())
}
