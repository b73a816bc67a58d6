//! Who could be served from where: kept once for all services.
//!
//! ```text
//!  prefix ─▶ (row, latency of its nearest) ─▶ row: candidates, nearest first, latency beyond the nearest
//!  network ─▶ rows that have it as a candidate
//! ```
//!
//! Prefixes whose candidates are the same but for a constant (the same city behind other last miles) share a row: the
//! constant is paid whatever is placed. Rows are kept in the order of their content, nearest network first, so that
//! neighbours lie side by side in memory and the order of the prefixes is forgotten.

use super::Wrong;

/// Farthest a candidate may be, microseconds: ten seconds, after which people have given up.
pub const LATENCY_MAX: u32 = 10_000_000;

/// A candidate of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Edge {
    pub(crate) network: u32,
    /// Microseconds beyond the row's nearest.
    pub(crate) latency: u32,
}

/// The candidate networks of every prefix.
#[derive(Debug, Clone, Default)]
pub struct Graph {
    networks: u32,
    /// For each prefix its row (none: [`super::NOWHERE`]) and the latency of its nearest candidate.
    of_prefix: Vec<(u32, u32)>,
    starts: Vec<u32>,
    edges: Vec<Edge>,
    back_starts: Vec<u32>,
    /// (row, latency), rows ascending.
    back: Vec<(u32, u32)>,
}

impl Graph {
    /// A graph of so many networks and, for each prefix, its candidates as (network, microseconds) in any order.
    ///
    /// # Errors
    /// A candidate that does not exist, comes twice or is too far; more candidates than can be numbered.
    pub fn new<R: AsRef<[(u32, u32)]>>(networks: u32, candidates: &[R]) -> Result<Graph, Wrong> {
        let total: usize = candidates.iter().map(|c| c.as_ref().len()).sum();
        if u32::try_from(total).is_err() || u32::try_from(candidates.len()).is_err() {
            return Err(Wrong::Candidates);
        }
        let (mut edges, mut starts) = (Vec::with_capacity(total), vec![0]);
        let mut nearest = Vec::with_capacity(candidates.len());
        let mut seen = vec![usize::MAX; networks as usize];
        for (prefix, row) in candidates.iter().enumerate() {
            let begin = edges.len();
            for &(network, latency) in row.as_ref() {
                let seen = seen.get_mut(network as usize).ok_or(Wrong::Network { prefix, network, networks })?;
                if std::mem::replace(seen, prefix) == prefix {
                    return Err(Wrong::Twice { prefix, network });
                }
                if latency > LATENCY_MAX {
                    return Err(Wrong::Latency { prefix, network, latency });
                }
                edges.push(Edge { network, latency });
            }
            let row = &mut edges[begin..];
            row.sort_unstable_by_key(|e| (e.latency, e.network));
            let base = row.first().map_or(0, |e| e.latency);
            row.iter_mut().for_each(|e| e.latency -= base);
            nearest.push(base);
            starts.push(edges.len());
        }
        let row = |prefix: usize| &edges[starts[prefix]..starts[prefix + 1]];
        let mut order: Vec<usize> = (0..candidates.len()).filter(|&p| !row(p).is_empty()).collect();
        order.sort_unstable_by(|&a, &b| row(a).cmp(row(b)).then(a.cmp(&b)));

        let mut of_prefix: Vec<(u32, u32)> = nearest.iter().map(|_| (super::NOWHERE, 0)).collect();
        let mut graph = Graph { networks, starts: vec![0], ..Graph::default() };
        let mut last: &[Edge] = &[];
        for &prefix in &order {
            if row(prefix) != last {
                last = row(prefix);
                graph.edges.extend_from_slice(last);
                graph.starts.push(graph.edges.len() as u32);
            }
            of_prefix[prefix] = (graph.starts.len() as u32 - 2, nearest[prefix]);
        }
        graph.edges.shrink_to_fit();
        graph.of_prefix = of_prefix;
        graph.turn();
        Ok(graph)
    }

    /// Fills in the way back, from networks to rows.
    fn turn(&mut self) {
        let mut starts = vec![0_u32; self.networks as usize + 1];
        for edge in &self.edges {
            starts[edge.network as usize + 1] += 1;
        }
        for network in 1..starts.len() {
            starts[network] += starts[network - 1];
        }
        let mut free = starts.clone();
        self.back = vec![(0, 0); self.edges.len()];
        for row in 0..self.rows() {
            for edge in &self.edges[self.starts[row] as usize..self.starts[row + 1] as usize] {
                let at = &mut free[edge.network as usize];
                self.back[*at as usize] = (row as u32, edge.latency);
                *at += 1;
            }
        }
        self.back_starts = starts;
    }

    /// Networks there are.
    pub fn networks(&self) -> u32 {
        self.networks
    }

    /// Prefixes there are.
    pub fn prefixes(&self) -> usize {
        self.of_prefix.len()
    }

    /// Rows that differ: never more than prefixes.
    pub fn rows(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }

    /// Candidates of all rows.
    pub fn edges(&self) -> usize {
        self.edges.len()
    }

    /// For each prefix its row and the latency of its nearest candidate.
    pub(crate) fn of_prefix(&self) -> &[(u32, u32)] {
        &self.of_prefix
    }

    /// The candidates of a row, nearest first; of equals the lower network.
    #[inline]
    pub(crate) fn row(&self, row: usize) -> &[Edge] {
        &self.edges[self.starts[row] as usize..self.starts[row + 1] as usize]
    }

    /// The latency of a row's farthest candidate.
    #[inline]
    pub(crate) fn farthest(&self, row: usize) -> u32 {
        self.row(row).last().map_or(0, |e| e.latency)
    }

    /// Rows that have a network as a candidate, ascending, with its latency.
    #[inline]
    pub(crate) fn back(&self, network: usize) -> &[(u32, u32)] {
        &self.back[self.back_starts[network] as usize..self.back_starts[network + 1] as usize]
    }
}
