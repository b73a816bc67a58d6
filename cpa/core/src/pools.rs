//! Pools: how many instances, and machines, a loss target needs (paper §6.1.1).
