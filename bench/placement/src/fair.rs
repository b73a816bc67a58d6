//! Equi-latency placement: how far apart teams are, and how bad the worst latency is.
