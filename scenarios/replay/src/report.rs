//! Sums a recording up.
