//! Lazy greedy placement of one service over many networks and prefixes.
